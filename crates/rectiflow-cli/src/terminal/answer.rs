//! The answer of a command, and its exit code.
//!
//! Codes: 0 done, 1 failed, 2 wrong arguments or settings, 3 stopped by the guard, 128 + signal
//! where a signal stopped it after saving.

use std::io::{self, ErrorKind, Write};

use serde_json::{Value, json};

/// The command failed.
const FAILED: u8 = 1;
/// The arguments or settings cannot work. Clap exits with the same code.
const USAGE: u8 = 2;

/// The guard has stopped the run, in this process or an earlier one.
const STOPPED: u8 = 3;

/// The answer of a command that ran to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    /// For people, without a trailing newline.
    text: String,
    /// For machines: one object.
    json: Value,
    exit: u8,
}

impl Answer {
    /// The answer of a command that succeeded.
    pub(crate) fn done(text: impl Into<String>, json: Value) -> Self {
        Self {
            text: text.into(),
            json,
            exit: 0,
        }
    }

    /// An empty answer with exit code `code`: rank 0, a process of its own, has printed the answer.
    pub(crate) fn of_rank_0(code: i32) -> Self {
        Self {
            text: String::new(),
            json: Value::Null,
            exit: u8::try_from(code).unwrap_or(FAILED),
        }
    }

    /// The same answer with the exit code of a command that `signal` stopped.
    pub(crate) fn stopped_by(self, signal: i32) -> Self {
        Self {
            exit: 128 + u8::try_from(signal).unwrap_or(0),
            ..self
        }
    }

    /// The same answer with the exit code of a failure.
    pub(crate) fn failed(self) -> Self {
        Self {
            exit: FAILED,
            ..self
        }
    }

    /// Prints the answer and returns the exit code. A closed pipe (`| head`) is no failure.
    pub(crate) fn print(&self, as_json: bool) -> u8 {
        let line = if as_json && !self.json.is_null() {
            self.json.to_string()
        } else {
            self.text.clone()
        };
        match write_line(&line) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                report(&format!("standard output: {error}"));
                FAILED
            }
            _ => self.exit,
        }
    }
}

/// Reports a failure: one message on standard error and, for machines, an object with `error` on
/// standard output. Returns the exit code.
pub(crate) fn fail(error: &anyhow::Error, as_json: bool) -> u8 {
    let message = message(error);
    let code = exit_code(error);
    report(&message);
    if as_json {
        // An error cannot be reported to a closed pipe.
        let _ = write_line(&json!({ "error": message, "exit": code }).to_string());
    }
    code
}

fn report(message: &str) {
    // Nothing can be done where standard error is closed.
    let _ = writeln!(
        io::stderr().lock(),
        "{}error: {message}",
        crate::terminal::log::rank_prefix()
    );
}

fn write_line(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if !line.is_empty() {
        writeln!(out, "{line}")?;
    }
    out.flush()
}

/// The chain of causes as one message. A cause that an earlier message quotes is left out.
fn message(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !message.contains(&cause) {
            let separator = if message.is_empty() { "" } else { ": " };
            message = format!("{message}{separator}{cause}");
        }
    }
    message
}

fn exit_code(error: &anyhow::Error) -> u8 {
    if matches!(
        error.downcast_ref(),
        Some(rectiflow_train::Error::Stopped { .. })
    ) {
        return STOPPED;
    }
    let misuse = error.chain().any(|cause| {
        cause.is::<Misuse>()
            || cause.downcast_ref().is_some_and(is_setting)
            || cause.downcast_ref().is_some_and(is_asked_wrong)
            || matches!(
                cause.downcast_ref(),
                Some(rectiflow_data::Error::Invalid { .. })
            )
            || matches!(
                cause.downcast_ref(),
                Some(rectiflow_sdxl::error::Error::Invalid { .. })
            )
    });
    if misuse { USAGE } else { FAILED }
}

/// Whether the error is a refused setting, of the trainer or of a library below it.
fn is_setting(error: &rectiflow_train::Error) -> bool {
    use rectiflow_train::Error;
    matches!(
        error,
        Error::Recipe { .. }
            | Error::Changed { .. }
            | Error::RateJump { .. }
            | Error::Branch { .. }
            | Error::Launch { .. }
            | Error::Data(rectiflow_data::Error::Invalid { .. })
            | Error::Model(rectiflow_sdxl::error::Error::Invalid { .. })
    )
}

/// Whether the error is a refused setting of captions, tags or scores.
fn is_asked_wrong(error: &rectiflow_annotate::error::Error) -> bool {
    use rectiflow_annotate::error::Error;
    matches!(
        error,
        Error::Invalid { .. } | Error::Data(rectiflow_data::Error::Invalid { .. })
    )
}

/// Arguments that contradict each other; clap finds the other mistakes.
#[derive(Debug)]
pub(crate) struct Misuse(pub(crate) String);

impl std::fmt::Display for Misuse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Misuse {}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_cause_that_is_quoted_already_is_not_said_twice() {
        let source = io::Error::from(ErrorKind::NotFound);
        let error = rectiflow_data::Error::Io {
            path: PathBuf::from("a.json"),
            source,
        };
        let error = anyhow::Error::from(error).context("opening the data set");
        assert_eq!(
            message(&error),
            "opening the data set: a.json: entity not found"
        );
    }

    #[test]
    fn wrong_settings_are_wrong_use_and_everything_else_is_a_failure() {
        let setting = rectiflow_data::Error::Invalid {
            what: "prep.step_px".into(),
            reason: "is 0".into(),
        };
        assert_eq!(
            exit_code(&anyhow::Error::from(setting).context("preparing")),
            USAGE
        );
        let recipe = rectiflow_train::Error::Recipe {
            path: PathBuf::from("r.toml"),
            problems: vec!["x".into()],
        };
        assert_eq!(exit_code(&recipe.into()), USAGE);
        assert_eq!(exit_code(&Misuse("both".into()).into()), USAGE);
        let stopped = rectiflow_train::Error::Stopped {
            run_dir: PathBuf::from("r"),
            reason: "x".into(),
        };
        assert_eq!(exit_code(&stopped.into()), STOPPED);
        assert_eq!(exit_code(&anyhow::anyhow!("disk full")), FAILED);
    }
}
