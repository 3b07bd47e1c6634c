//! `docs/config.md`: every key of a recipe with its default and meaning, generated from the structs
//! that serde reads.
//!
//! Compiled for tests only: the page is checked in, and a test fails if it is stale. `make docs`
//! regenerates it.

use std::fmt::Write;

use schemars::schema_for;
use serde_json::{Map, Value};

use crate::recipe::{Recipe, unknown_keys::resolve};

const HEAD: &str = "# The recipe

One TOML file describes a run. Keys marked **required** have no default; `none` means that an
optional key is not set. `--set section.key=value` overrides a key on the command line. An unknown
key is an error that names the nearest valid one. This page is generated from the program's own
structures (`make docs`), and a test fails if it is stale.
";

fn page() -> String {
    let root = schema_for!(Recipe).to_value();
    let mut page = HEAD.to_owned();
    for (name, section) in &properties(&root) {
        let array = section.get("type").is_some_and(|kind| kind == "array");
        let mut title = format!("[{name}]");
        let mut item = section;
        if array {
            title = format!("[{title}]");
            item = section.get("items").unwrap_or(&Value::Null);
        }
        let item = resolve(&root, item);
        write_section(&mut page, &root, &title, section, item);
        for (key, value) in &properties(item) {
            let target = resolve(&root, value);
            let inner = resolve(&root, target.get("items").unwrap_or(&Value::Null));
            if !properties(target).is_empty() {
                write_section(&mut page, &root, &format!("[{name}.{key}]"), value, target);
            } else if !properties(inner).is_empty() {
                write_section(&mut page, &root, &format!("[[{name}.{key}]]"), value, inner);
            }
        }
    }
    page
}

fn write_section(page: &mut String, root: &Value, title: &str, field: &Value, section: &Value) {
    let about = description_of_either(field, section);
    write!(
        page,
        "\n## `{title}`\n\n{about}\n\n| key | default | meaning |\n|---|---|---|\n"
    )
    .expect("a String grows");
    for (key, value) in &properties(section) {
        let target = resolve(root, value);
        let inner = resolve(root, target.get("items").unwrap_or(&Value::Null));
        if !properties(target).is_empty() || !properties(inner).is_empty() {
            continue;
        }
        let meaning = description_of_either(value, target);
        let meaning = meaning.replace('\n', " ").replace('|', "\\|");
        let default = default_cell(section, key, value);
        let choices = choices(root, value);
        writeln!(page, "| `{key}` | {default} | {meaning}{choices} |").expect("a String grows");
    }
}

/// Returns the cell with the default of a key.
fn default_cell(section: &Value, key: &str, value: &Value) -> String {
    let required = section.get("required").and_then(Value::as_array);
    if required.is_some_and(|required| required.contains(&key.into())) {
        return "**required**".to_owned();
    }
    match value.get("default") {
        None | Some(Value::Null) => "none".to_owned(),
        Some(default) => format!("`{default}`"),
    }
}

/// Returns the description of a field, or of its type if the field has none.
fn description_of_either<'a>(field: &'a Value, target: &'a Value) -> &'a str {
    match description(field) {
        Some(description) => description,
        None => description(target).unwrap_or_default(),
    }
}

/// Returns the valid names, if the value is an enumeration.
fn choices(root: &Value, value: &Value) -> String {
    let target = resolve(root, value);
    let plain = target.get("enum").and_then(Value::as_array);
    let documented = target.get("oneOf").and_then(Value::as_array);
    let mut names = Vec::new();
    for option in plain.into_iter().flatten() {
        names.extend(option.as_str());
    }
    for option in documented.into_iter().flatten() {
        names.extend(option.get("const").and_then(Value::as_str));
    }
    if names.is_empty() {
        return String::new();
    }
    format!(" One of `{}`.", names.join("`, `"))
}

fn description(value: &Value) -> Option<&str> {
    value.get("description").and_then(Value::as_str)
}

fn properties(schema: &Value) -> Map<String, Value> {
    schema
        .get("properties")
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default()
}

#[test]
fn config_page_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/config.md");
    let page = page();
    if std::env::var_os("RECTIFLOW_WRITE_DOCS").is_some() {
        std::fs::write(path, &page).expect("docs/config.md can be written");
    }
    let found = std::fs::read_to_string(path).expect("docs/config.md exists");
    assert!(
        found == page,
        "docs/config.md is stale: run `make docs` and commit the result"
    );
}
