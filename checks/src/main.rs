//! Prints what is not as it should be in the checkout that the first argument names, the current
//! folder without one.

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
};

use checks::{house, limits, rules};

const USAGE: &str = "not known; there are --old-names, --rules and --limits";

#[expect(
    clippy::print_stdout,
    reason = "it is a command, and this is its answer"
)]
fn main() -> ExitCode {
    match report(env::args().skip(1)) {
        Ok(faults) if faults.is_empty() => ExitCode::SUCCESS,
        Ok(faults) => {
            println!("{}\n{} faults", faults.join("\n"), faults.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("{error}");
            ExitCode::from(2)
        }
    }
}

fn report(arguments: impl Iterator<Item = String>) -> Result<Vec<String>, String> {
    let mut report: fn(&Path) -> Result<Vec<String>, String> = house::faults;
    let mut folder = PathBuf::from(".");
    for argument in arguments {
        match argument.as_str() {
            "--old-names" => report = house::old_names,
            "--rules" => report = rules::faults,
            "--limits" => report = limits::faults,
            other if other.starts_with('-') => return Err(format!("{other}: {USAGE}")),
            other => folder = PathBuf::from(other),
        }
    }
    report(&folder)
}
