//! The folders' order and the circles of imports, of this repository.
//!
//! `checks::house::FLOORS` says what stands above what. Read a failure from its `up` lines: each is
//! an arrow that one moved definition cuts, and most circles fall with them.

use std::path::Path;

use checks::house;

#[test]
fn files_form_no_circle_and_folders_use_only_what_stands_below_them() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("this crate lies in the workspace");
    let faults = house::faults(workspace).expect("the sources can be read");
    assert!(
        faults.is_empty(),
        "{} faults:\n{}",
        faults.len(),
        faults.join("\n")
    );
}
