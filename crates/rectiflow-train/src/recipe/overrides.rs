//! `--set section.key=value`: single keys of a recipe, set on the command line.

use std::path::Path;

use rectiflow_data::text_file;

use crate::error::{Error, Result};

/// Stands for the recipe's path in messages if there is no file.
pub(crate) const NO_FILE: &str = "--set";

/// Returns the table of a recipe's file, or an empty one without a file, with the overrides
/// applied.
///
/// # Errors
/// [`Error::Data`] if it is no text file; [`Error::Recipe`] if the file is not TOML or an override
/// is invalid.
pub(crate) fn read_table(path: Option<&Path>, overrides: &[String]) -> Result<toml::Table> {
    let text = match path {
        Some(path) => text_file::read(path)?,
        None => String::new(),
    };
    let path = path.unwrap_or(Path::new(NO_FILE));
    let mut table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(error) => return Err(Error::recipe(path, vec![error.to_string()])),
    };
    for text in overrides {
        if let Err(problem) = set(&mut table, text) {
            return Err(Error::recipe(path, vec![problem]));
        }
    }
    Ok(table)
}

/// Applies one `section.key=value`.
fn set(table: &mut toml::Table, text: &str) -> std::result::Result<(), String> {
    let Some((path, value)) = text.split_once('=') else {
        return Err(format!(
            "--set {text}: expected section.key=value, found no `=`"
        ));
    };
    let mut keys: Vec<&str> = path.trim().split('.').collect();
    let last = keys.pop().expect("split returns at least one part");
    let mut place = table;
    for key in keys {
        place = match section(place, key) {
            Ok(section) => section,
            Err(kind) => {
                let problem = format!("`{key}` is of type {kind}, not a single section");
                return Err(format!("--set {text}: {problem}"));
            }
        };
    }
    place.insert(last.to_owned(), parse_value(value));
    Ok(())
}

/// Returns a value as TOML, or as a string if it is not TOML, so that paths need no quotes.
fn parse_value(value: &str) -> toml::Value {
    let parsed = format!("value = {value}").parse::<toml::Table>();
    match parsed.ok().and_then(take_value) {
        Some(parsed) => parsed,
        None => toml::Value::String(value.to_owned()),
    }
}

fn take_value(mut table: toml::Table) -> Option<toml::Value> {
    table.remove("value")
}

/// Returns a section of a table, new if there is none; `data` is the only [[data]] section.
///
/// # Errors
/// The type of the value, if it is not a single section.
fn section<'a>(
    table: &'a mut toml::Table,
    key: &str,
) -> std::result::Result<&'a mut toml::Table, &'static str> {
    let entry = table
        .entry(key)
        .or_insert_with(|| toml::Value::Table(toml::Table::new()));
    let kind = entry.type_str();
    let section = match entry {
        toml::Value::Table(table) => Some(table),
        toml::Value::Array(items) if items.len() == 1 => items[0].as_table_mut(),
        _ => None,
    };
    section.ok_or(kind)
}
