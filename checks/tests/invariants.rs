//! ARCHITECTURE.md's invariants 1, 2, 6 and 11, as far as they can be seen in the syntax.

use std::path::Path;

use checks::rules::{self, Crate};

fn check(rule: fn(&[Crate]) -> Vec<String>) {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("this crate lies in the workspace");
    let faults = rule(&rules::read(workspace).expect("the sources can be read"));
    assert!(
        faults.is_empty(),
        "{} faults:\n{}",
        faults.len(),
        faults.join("\n")
    );
}

#[test]
fn crates_do_not_know_what_is_not_theirs() {
    check(rules::layers);
}

#[test]
fn libraries_never_print() {
    check(rules::printing);
}

#[test]
fn pure_files_read_no_file_no_clock_and_no_environment() {
    check(rules::purity);
}

#[test]
fn async_is_where_bytes_come_from_afar() {
    check(rules::asynchrony);
}

#[test]
fn foreign_code_is_called_from_its_own_files() {
    check(rules::foreign_code);
}

#[test]
fn only_c10d_makes_groups_and_only_comm_makes_collectives() {
    check(rules::groups);
}

#[test]
fn only_the_key_table_knows_other_layouts_names() {
    check(rules::key_tables);
}

#[test]
fn only_metrics_knows_metric_names() {
    check(rules::metric_names);
}
