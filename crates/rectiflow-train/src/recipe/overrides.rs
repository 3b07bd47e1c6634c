//! `--set section.key=value`: single keys of a recipe, set on the command line.

use std::{fs, path::Path};

use crate::error::{Error, Result};

/// Stands for the recipe's path in messages if there is no file.
pub(crate) const NO_FILE: &str = "--set";

/// Returns the table of a recipe's file, or an empty one without a file, with the overrides
/// applied.
///
/// # Errors
/// [`Error::Io`]; [`Error::Recipe`] if the file is not TOML or an override is invalid.
pub(crate) fn read_table(path: Option<&Path>, overrides: &[String]) -> Result<toml::Table> {
    let text = path.map_or_else(
        || Ok(String::new()),
        |path| fs::read_to_string(path).map_err(Error::io(path)),
    )?;
    let path = path.unwrap_or(Path::new(NO_FILE));
    let problem = |problem: String| Error::Recipe {
        path: path.to_owned(),
        problems: vec![problem],
    };
    let mut table: toml::Table = text
        .parse()
        .map_err(|e: toml::de::Error| problem(e.to_string()))?;
    for text in overrides {
        set(&mut table, text).map_err(problem)?;
    }
    Ok(table)
}

/// Applies one `section.key=value`. A value that is not TOML is taken as a string, so that paths
/// need no quotes.
fn set(table: &mut toml::Table, text: &str) -> std::result::Result<(), String> {
    let (path, value) = text
        .split_once('=')
        .ok_or_else(|| format!("--set {text}: expected section.key=value, found no `=`"))?;
    let value = format!("value = {value}")
        .parse::<toml::Table>()
        .ok()
        .and_then(|mut parsed| parsed.remove("value"))
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let mut keys: Vec<&str> = path.trim().split('.').collect();
    let last = keys.pop().expect("split returns at least one part");
    let mut place = table;
    for key in keys {
        let entry = place
            .entry(key)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let kind = entry.type_str();
        let section = match entry {
            toml::Value::Table(table) => Some(table),
            // `data.path=...` refers to the only [[data]] section.
            toml::Value::Array(items) if items.len() == 1 => items[0].as_table_mut(),
            _ => None,
        };
        place = section.ok_or_else(|| {
            format!("--set {text}: `{key}` is of type {kind}, not a single section")
        })?;
    }
    place.insert(last.to_owned(), value);
    Ok(())
}
