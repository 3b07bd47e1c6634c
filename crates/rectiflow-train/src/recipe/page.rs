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
        let item = if array {
            section.get("items").unwrap_or(&Value::Null)
        } else {
            section
        };
        let title = if array {
            format!("[[{name}]]")
        } else {
            format!("[{name}]")
        };
        write_section(&mut page, &root, &title, section, resolve(&root, item));
        for (key, value) in &properties(resolve(&root, item)) {
            let target = resolve(&root, value);
            if !properties(target).is_empty() {
                let title = title
                    .replace(name.as_str(), &format!("{name}.{key}"))
                    .replace("[[", "[")
                    .replace("]]", "]");
                write_section(&mut page, &root, &title, value, target);
            }
        }
    }
    page
}

fn write_section(page: &mut String, root: &Value, title: &str, field: &Value, section: &Value) {
    let about = description(field)
        .or_else(|| description(section))
        .unwrap_or_default();
    write!(
        page,
        "\n## `{title}`\n\n{about}\n\n| key | default | meaning |\n|---|---|---|\n"
    )
    .expect("a String grows");
    for (key, value) in &properties(section) {
        if !properties(resolve(root, value)).is_empty() {
            continue;
        }
        let meaning = description(value)
            .or_else(|| description(resolve(root, value)))
            .unwrap_or_default();
        let meaning = meaning.replace('\n', " ").replace('|', "\\|");
        let required = section
            .get("required")
            .and_then(Value::as_array)
            .is_some_and(|r| r.contains(&key.clone().into()));
        let default = match value.get("default") {
            _ if required => "**required**".to_owned(),
            None | Some(Value::Null) => "none".to_owned(),
            Some(default) => format!("`{default}`"),
        };
        writeln!(
            page,
            "| `{key}` | {default} | {meaning}{} |",
            choices(root, value)
        )
        .expect("a String grows");
    }
}

/// Returns the valid names, if the value is an enumeration.
fn choices(root: &Value, value: &Value) -> String {
    let target = resolve(root, value);
    let plain = target
        .get("enum")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str);
    let documented = target
        .get("oneOf")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let documented = documented.filter_map(|option| option.get("const").and_then(Value::as_str));
    let names: Vec<String> = plain
        .chain(documented)
        .map(|name| format!("`{name}`"))
        .collect();
    if names.is_empty() {
        String::new()
    } else {
        format!(" One of {}.", names.join(", "))
    }
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
