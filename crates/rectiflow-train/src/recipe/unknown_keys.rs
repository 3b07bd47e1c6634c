//! Unknown keys of a recipe, each with the nearest valid name, and missing keys.
//!
//! The valid keys come from the JSON schema that schemars derives from the same structs that serde
//! reads, so that no second list has to be kept. Serde alone would stop at the first problem.

use schemars::{JsonSchema, schema_for};
use serde_json::Value;
use strsim::levenshtein;

/// Removes the keys that `T` does not know from `table`; returns one line for each.
pub(crate) fn take_unknown_keys<T: JsonSchema>(table: &mut toml::Table) -> Vec<String> {
    let schema = schema_for!(T).to_value();
    let mut found = Vec::new();
    visit(&schema, &schema, table, "", &mut |schema, table, path| {
        let properties = &schema["properties"];
        let mut unknown: Vec<String> = table.keys().cloned().collect();
        unknown.retain(|key| properties.get(key).is_none());
        for key in unknown {
            table.remove(&key);
            found.push(complaint(&joined(path, &key), &key, properties));
        }
    });
    found
}

/// Returns one line for each key that `T` requires and `table` lacks.
pub(crate) fn missing_keys<T: JsonSchema>(table: &mut toml::Table) -> Vec<String> {
    let schema = schema_for!(T).to_value();
    let mut found = Vec::new();
    visit(&schema, &schema, table, "", &mut |schema, table, path| {
        let required = schema.get("required").and_then(Value::as_array);
        for key in required.into_iter().flatten().filter_map(Value::as_str) {
            if !table.contains_key(key) {
                let key = joined(path, key);
                found.push(format!("{key}: missing, and it has no default"));
            }
        }
    });
    found
}

/// Returns the path of a key in the section at `path`, which is empty at the top.
pub(crate) fn joined(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// Calls `act` for `table` and each section below it whose schema has properties, with that schema.
fn visit(
    root: &Value,
    schema: &Value,
    table: &mut toml::Table,
    path: &str,
    act: &mut dyn FnMut(&Value, &mut toml::Table, &str),
) {
    let schema = resolve(root, schema);
    let Some(properties) = schema.get("properties") else {
        return;
    };
    act(schema, table, path);
    for (key, value) in table.iter_mut() {
        let Some(schema) = properties.get(key) else {
            continue;
        };
        let path = joined(path, key);
        match value {
            toml::Value::Table(section) => visit(root, schema, section, &path, act),
            toml::Value::Array(items) => {
                let schema = resolve(root, schema).get("items").unwrap_or(&Value::Null);
                visit_items(root, schema, items, &path, act);
            }
            _ => {}
        }
    }
}

/// As [`visit`], for each section of an array.
fn visit_items(
    root: &Value,
    schema: &Value,
    items: &mut [toml::Value],
    path: &str,
    act: &mut dyn FnMut(&Value, &mut toml::Table, &str),
) {
    for (index, item) in items.iter_mut().enumerate() {
        if let Some(section) = item.as_table_mut() {
            visit(root, schema, section, &format!("{path}[{index}]"), act);
        }
    }
}

/// Follows `$ref` and the `anyOf [T, null]` of an optional field.
pub(crate) fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    if let Some(pointer) = schema.get("$ref").and_then(Value::as_str) {
        return match root.pointer(pointer.trim_start_matches('#')) {
            Some(target) => resolve(root, target),
            None => schema,
        };
    }
    let options = schema.get("anyOf").and_then(Value::as_array);
    match options.and_then(|options| options.first()) {
        Some(option) => resolve(root, option),
        None => schema,
    }
}

fn complaint(path: &str, key: &str, properties: &Value) -> String {
    let valid: Vec<&str> = match properties.as_object() {
        Some(properties) => properties.keys().map(String::as_str).collect(),
        None => Vec::new(),
    };
    let nearest = valid.iter().min_by_key(|name| levenshtein(key, name));
    if let Some(name) = nearest
        && levenshtein(key, name) <= 3
    {
        return format!("{path}: unknown key; did you mean `{name}`?");
    }
    let names = valid.join(", ");
    format!("{path}: unknown key; expected one of {names}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_unknown_keys_are_named_with_their_nearest() {
        let mut table: toml::Table =
            "[run]\ndirr = 1\n[[data]]\npath = 'x'\nrepeat = 2\n[data.prompt]\n[tranin]\n\
             [objective]\nshfit = 3\n"
                .parse()
                .expect("TOML");
        let found = take_unknown_keys::<crate::recipe::Recipe>(&mut table);
        assert_eq!(
            found,
            [
                "tranin: unknown key; did you mean `train`?",
                "data[0].repeat: unknown key; did you mean `repeats`?",
                "objective.shfit: unknown key; did you mean `shift`?",
                "run.dirr: unknown key; did you mean `dir`?",
            ]
        );
    }

    #[test]
    fn all_missing_keys_are_named() {
        let mut table: toml::Table = "[run]\n[[data]]\n[train]\nsamples = 1\n"
            .parse()
            .expect("TOML");
        let mut found = missing_keys::<crate::recipe::Recipe>(&mut table);
        found.sort();
        let keys: Vec<&str> = found
            .iter()
            .filter_map(|line| line.split(':').next())
            .collect();
        assert_eq!(
            keys,
            ["data[0].path", "model", "run.dir", "train.micro_batch"]
        );
    }
}
