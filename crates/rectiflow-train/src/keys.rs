//! Unknown keys of a recipe, each with the nearest valid name.
//!
//! The valid keys are read off the JSON schema that schemars derives from the same structs that serde reads, so that
//! there is no second list to keep.

use schemars::{JsonSchema, schema_for};
use serde_json::Value;
use strsim::levenshtein;

/// One line for each key of `table` that `T` does not know.
pub(crate) fn unknown_keys<T: JsonSchema>(table: &toml::Table) -> Vec<String> {
    let schema = schema_for!(T).to_value();
    let mut found = Vec::new();
    walk(&schema, &schema, table, "", &mut found);
    found
}

fn walk(root: &Value, schema: &Value, table: &toml::Table, path: &str, found: &mut Vec<String>) {
    let Some(properties) = resolve(root, schema).get("properties").and_then(Value::as_object) else {
        return;
    };
    for (key, value) in table {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (properties.get(key), value) {
            (None, _) => found.push(complaint(&path, key, properties.keys())),
            (Some(schema), toml::Value::Table(table)) => walk(root, schema, table, &path, found),
            (Some(schema), toml::Value::Array(items)) => {
                let schema = resolve(root, schema).get("items").unwrap_or(&Value::Null);
                for (index, item) in items.iter().enumerate() {
                    if let toml::Value::Table(table) = item {
                        walk(root, schema, table, &format!("{path}[{index}]"), found);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Follows `$ref` and the `anyOf [T, null]` of an optional field.
pub(crate) fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    if let Some(pointer) = schema.get("$ref").and_then(Value::as_str) {
        return root.pointer(pointer.trim_start_matches('#')).map_or(schema, |target| resolve(root, target));
    }
    match schema.get("anyOf").and_then(Value::as_array) {
        Some(options) => options.first().map_or(schema, |option| resolve(root, option)),
        None => schema,
    }
}

fn complaint<'a>(path: &str, key: &str, valid: impl Iterator<Item = &'a String>) -> String {
    let valid: Vec<&String> = valid.collect();
    let nearest = valid.iter().min_by_key(|name| levenshtein(key, name)).filter(|name| levenshtein(key, name) <= 3);
    match nearest {
        Some(name) => format!("{path}: unknown key; did you mean `{name}`?"),
        None => {
            let names: Vec<&str> = valid.iter().map(|name| name.as_str()).collect();
            format!("{path}: unknown key; expected one of {}", names.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_unknown_keys_are_named_with_their_nearest() {
        let table: toml::Table =
            "[run]\ndirr = 1\n[[data]]\npath = 'x'\nrepeat = 2\n[data.prompt]\n[tranin]\n[objective]\nshfit = 3\n"
                .parse()
                .expect("TOML");
        let found = unknown_keys::<crate::config::Recipe>(&table);
        assert_eq!(
            found,
            [
                "data[0].repeat: unknown key; did you mean `repeats`?",
                "objective.shfit: unknown key; did you mean `shift`?",
                "run.dirr: unknown key; did you mean `dir`?",
                "tranin: unknown key; did you mean `train`?",
            ]
        );
    }
}
