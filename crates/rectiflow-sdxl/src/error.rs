//! The errors of this crate, by meaning.

use std::{fmt, io, path::PathBuf};

use tch::TchError;

/// A failure of this crate. Each message says what failed and where, what was expected and found,
/// and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system reported an error.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A file violates the specification of its format.
    #[error("{}: not a valid {kind}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The expected format, e.g. "safetensors file".
        kind: &'static str,
        /// The first rule it violates, with expected and found values.
        reason: String,
    },
    /// A model's `config.json` asks for something unsupported or contradicts itself.
    #[error("{what}: {}", problems.join("; "))]
    Config {
        /// The file, or a description of the configuration.
        what: String,
        /// One sentence per key: name, expected value and value found.
        problems: Vec<String>,
    },
    /// The tensors of a weight file are not those of the model.
    #[error(transparent)]
    Weights(Box<WeightProblems>),
    /// A model folder lacks a part.
    #[error("{}: {what} not found; {hint}", path.display())]
    Missing {
        /// The file or folder that was searched.
        path: PathBuf,
        /// The missing part.
        what: String,
        /// What to do about it.
        hint: String,
    },
    /// A tensor or a value passed to a model does not fit the model.
    #[error("{what}: expected {expected}, found {found}")]
    Input {
        /// The tensor or value, in the caller's terms.
        what: String,
        /// The shape, dtype or range that fits.
        expected: String,
        /// The shape, dtype or value found.
        found: String,
    },
    /// A setting or a combination of settings is invalid.
    #[error("{what}: {reason}")]
    Invalid {
        /// The setting, as the user writes it.
        what: String,
        /// The reason, with the values that are valid.
        reason: String,
    },
    /// libtorch failed in a calculation whose inputs were checked, usually for lack of memory.
    #[error("{doing}: libtorch says: {}", first_line(source))]
    Torch {
        /// The calculation.
        doing: String,
        /// libtorch's message, with its stack trace.
        source: TchError,
    },
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Returns a constructor of [`Error::Io`] for `path`, for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// Returns a constructor of [`Error::Torch`] for the calculation `doing`, for `map_err`.
    pub fn torch(doing: impl Into<String>) -> impl FnOnce(TchError) -> Self {
        let doing = doing.into();
        move |source| Self::Torch { doing, source }
    }

    /// Returns an [`Error::Input`] for a tensor or value.
    pub fn input(
        what: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Input {
            what: what.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// Returns an [`Error::Invalid`] for a setting, with all its problems.
    pub fn invalid(what: impl Into<String>, problems: &[String]) -> Self {
        Self::Invalid {
            what: what.into(),
            reason: problems.join("; "),
        }
    }

    /// Returns an [`Error::Invalid`] for a name that is not one of `known`. It suggests the most
    /// similar known name.
    pub fn unknown_name(kind: &str, name: &str, known: &[&str]) -> Self {
        let nearest = known
            .iter()
            .min_by_key(|known| strsim::levenshtein(name, known));
        // A name that shares less than half of its letters with every known one is no typing error.
        let nearest =
            nearest.filter(|nearest| strsim::normalized_levenshtein(name, nearest) >= 0.5);
        let all = known.join(", ");
        let reason = match nearest {
            Some(nearest) => format!("unknown; did you mean {nearest}? All: {all}"),
            None => format!("unknown; one of {all}"),
        };
        Self::Invalid {
            what: format!("{kind} {name:?}"),
            reason,
        }
    }
}

/// Returns a number with its noun: "1 byte", "2 bytes".
pub(crate) fn counted(number: usize, noun: &str) -> String {
    if number == 1 {
        format!("1 {noun}")
    } else {
        format!("{number} {noun}s")
    }
}

/// libtorch's message without its C++ stack trace.
fn first_line(error: &TchError) -> String {
    error
        .to_string()
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// Largest number of names of each kind in a message.
const MAX_LISTED: usize = 20;

/// The differences between a weight file and the model described by its configuration.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct WeightProblems {
    /// The files or the source of the tensors.
    pub source: String,
    /// Tensors of the model that the files lack: name, expected shape.
    pub missing: Vec<(String, Vec<i64>)>,
    /// Tensors of the files that the model lacks: name, shape.
    pub unexpected: Vec<(String, Vec<i64>)>,
    /// Tensors of the wrong shape: name, expected, found.
    pub misshapen: Vec<(String, Vec<i64>, Vec<i64>)>,
    /// Tensors that are unusable for another reason: name, reason.
    pub unusable: Vec<(String, String)>,
}

impl WeightProblems {
    /// Returns true if there are no problems.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty()
            && self.unexpected.is_empty()
            && self.misshapen.is_empty()
            && self.unusable.is_empty()
    }
}

impl fmt::Display for WeightProblems {
    /// Writes one line for a single problem or for unusable tensors alone, otherwise a list of each
    /// kind.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = &self.source;
        let of_other_shape = self.missing.len() + self.unexpected.len() + self.misshapen.len();
        // Unusable tensors alone.
        match (of_other_shape, &self.unusable[..]) {
            (0, [(name, reason)]) => return write!(f, "{source}: tensor {name} {reason}"),
            (0, [(name, reason), ..]) => {
                let num = self.unusable.len();
                return write!(
                    f,
                    "{source}: {num} tensors cannot be used; the first, {name}, {reason}"
                );
            }
            _ => {}
        }
        // Other tensors than the model's.
        write!(
            f,
            "{source}: the tensors do not fit the model's configuration"
        )?;
        if of_other_shape + self.unusable.len() == 1 {
            self.only_problem(f)
        } else {
            self.all_problems(f)
        }
    }
}

impl WeightProblems {
    /// Writes the only tensor that is missing, unexpected or misshapen.
    fn only_problem(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, shape)) = self.missing.first() {
            return write!(f, ": {name} {shape:?} is missing");
        }
        if let Some((name, shape)) = self.unexpected.first() {
            return write!(f, ": {name} {shape:?} is not part of the model");
        }
        match self.misshapen.first() {
            Some(tensor) => write!(f, ": {}", misshapen(tensor)),
            None => Ok(()),
        }
    }

    fn all_problems(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        list(f, "missing", &self.missing, with_shape)?;
        list(f, "unexpected", &self.unexpected, with_shape)?;
        list(f, "misshapen", &self.misshapen, misshapen)?;
        list(f, "unusable", &self.unusable, with_reason)
    }
}

fn with_shape((name, shape): &(String, Vec<i64>)) -> String {
    format!("{name} {shape:?}")
}

fn with_reason((name, reason): &(String, String)) -> String {
    format!("{name} {reason}")
}

fn misshapen((name, expected, found): &(String, Vec<i64>, Vec<i64>)) -> String {
    format!("{name}: expected {expected:?}, found {found:?}")
}

impl std::error::Error for WeightProblems {}

fn list<T>(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    items: &[T],
    line: impl Fn(&T) -> String,
) -> fmt::Result {
    if items.is_empty() {
        return Ok(());
    }
    write!(f, "\n  {} {title}:", items.len())?;
    for item in items.iter().take(MAX_LISTED) {
        write!(f, "\n    {}", line(item))?;
    }
    if items.len() > MAX_LISTED {
        write!(f, "\n    ... and {} more", items.len() - MAX_LISTED)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_the_first_twenty_and_the_count() {
        let problems = WeightProblems {
            source: "x.safetensors".into(),
            missing: (0..25).map(|i| (format!("t{i}"), vec![i, 2])).collect(),
            misshapen: vec![("w".into(), vec![1, 2], vec![2, 1])],
            ..WeightProblems::default()
        };
        let text = problems.to_string();
        assert!(
            text.contains("25 missing")
                && text.contains("t19 [19, 2]")
                && text.contains("and 5 more"),
            "{text}"
        );
        assert!(!text.contains("t20 "), "{text}");
        assert!(text.contains("w: expected [1, 2], found [2, 1]"), "{text}");
        assert!(!text.contains("unexpected"), "{text}");
    }

    #[test]
    fn one_problem_is_one_line() {
        let source = || "x.safetensors".to_owned();
        let nan = || {
            (
                "w".to_owned(),
                "holds values that are not finite (NaN or infinity)".to_owned(),
            )
        };
        let one = WeightProblems {
            source: source(),
            unusable: vec![nan()],
            ..WeightProblems::default()
        };
        assert_eq!(
            one.to_string(),
            "x.safetensors: tensor w holds values that are not finite (NaN or infinity)"
        );
        let two = WeightProblems {
            source: source(),
            unusable: vec![nan(), nan()],
            ..WeightProblems::default()
        };
        assert!(
            two.to_string()
                .starts_with("x.safetensors: 2 tensors cannot be used; the first, w, holds"),
            "{two}"
        );
        let shape = WeightProblems {
            source: source(),
            misshapen: vec![("w".into(), vec![4], vec![9])],
            ..WeightProblems::default()
        };
        let expected = "x.safetensors: the tensors do not fit the model's configuration: w: \
                        expected [4], found [9]";
        assert_eq!(shape.to_string(), expected);
    }
}
