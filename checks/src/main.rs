//! Prints what is not as it should be in the checkout that the first argument names, the current folder without one.

use std::{env, path::PathBuf, process::ExitCode};

use checks::{house, rules};

#[expect(clippy::print_stdout, reason = "it is a command, and this is its answer")]
fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let folder = arguments.iter().find(|argument| !argument.starts_with("--"));
    let folder = folder.map_or_else(|| PathBuf::from("."), PathBuf::from);
    let report = match arguments.iter().find(|argument| argument.starts_with("--")).map(String::as_str) {
        None => house::faults(&folder),
        Some("--old-names") => house::old_names(&folder),
        Some("--rules") => rules::faults(&folder),
        Some(other) => Err(format!("{other}: not known; there are --old-names and --rules")),
    };
    match report {
        Ok(lines) => {
            lines.iter().for_each(|line| println!("{line}"));
            println!("{} faults", lines.len());
            if lines.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}
