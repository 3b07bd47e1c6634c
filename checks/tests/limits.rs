//! Limits of files, functions, comments and words, for the code of this repository. `make fmt` runs
//! them.

use std::path::Path;

use checks::limits::{self, Text};

fn check(limit: fn(&[Text]) -> Vec<String>) {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("this crate lies in the workspace");
    let faults = limit(&limits::read(workspace).expect("the sources can be read"));
    assert!(
        faults.is_empty(),
        "{} faults:\n{}",
        faults.len(),
        faults.join("\n")
    );
}

#[test]
fn files_have_at_most_600_lines() {
    check(limits::files);
}

#[test]
fn functions_have_at_most_80_lines() {
    check(limits::functions);
}

#[test]
fn comments_end_at_column_100() {
    check(limits::widths);
}

#[test]
fn comments_avoid_what_only_a_translator_says() {
    check(limits::words);
}
