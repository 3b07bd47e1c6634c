//! The differences between the recipe of a checkpoint and the one that a run continues with, and
//! which of them are allowed.
//!
//! Both are compared with every default written out, so that writing out a default is no change.

use std::collections::{BTreeMap, BTreeSet};

use crate::recipe::{
    Recipe,
    unknown_keys::{joined, take_unknown_keys},
};

/// A key whose value differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    /// Its path in the recipe, e.g. `lr.peak` or `data[0].path`.
    pub(crate) key: String,
    /// "key: old -> new".
    pub(crate) line: String,
}

impl Change {
    /// Whether a run may resume with it: it changes what is measured, kept or paid, or when the run
    /// ends, but not what is learnt. The location of a data set does not matter, since the order's
    /// hash shows whether it is the same data set; nor does that of the base, since a checkpoint
    /// names the hash of each part that it takes from there.
    pub(crate) fn is_harmless(&self) -> bool {
        let key = self.key.as_str();
        let sections = [
            "test.",
            "checkpoint.",
            "preview.",
            "report.",
            "prep.",
            "caption.",
            "guard.",
            "memory.",
            "ranks.",
        ];
        let keys = [
            "model.base",
            "run.dir",
            "run.device",
            "run.hardware",
            "run.price_per_hour",
            "train.samples",
        ];
        sections.iter().any(|section| key.starts_with(section))
            || keys.contains(&key)
            || (key.starts_with("data[") && key.ends_with("].path"))
    }
}

impl Change {
    /// Whether it may differ between the ranks of a run: paths and memory of each rank's machine.
    pub(crate) fn is_of_machine(&self) -> bool {
        let key = self.key.as_str();
        let keys = [
            "run.dir",
            "run.device",
            "run.read_ahead_mib",
            "run.cache_dir",
            "run.cache_gib",
        ];
        keys.contains(&key) || (key.starts_with("data[") && key.ends_with("].path"))
    }
}

/// Returns the keys whose values differ. Keys of an older version's recipe that no longer exist are
/// ignored.
///
/// # Errors
/// If the old recipe cannot be read, the reason.
pub(crate) fn changes(old: &str, new: &Recipe) -> Result<Vec<Change>, String> {
    let old = values(&read_older(old)?);
    let new = values(new);
    let mut found = Vec::new();
    for key in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
        let before = old.get(key);
        let after = new.get(key);
        if before != after {
            found.push(Change {
                key: key.clone(),
                line: format!("{key}: {} -> {}", or_none(before), or_none(after)),
            });
        }
    }
    Ok(found)
}

/// Reads the recipe of a checkpoint, without the keys that no longer exist.
///
/// # Errors
/// Why it cannot be read.
pub(crate) fn read_older(text: &str) -> Result<Recipe, String> {
    let parsed: Result<toml::Table, _> = text.parse();
    let mut table = parsed.map_err(|error| error.to_string())?;
    take_unknown_keys::<Recipe>(&mut table);
    let recipe = toml::Value::Table(table).try_into();
    recipe.map_err(|error: toml::de::Error| error.to_string())
}

fn or_none(value: Option<&String>) -> &str {
    value.map_or("none", String::as_str)
}

/// Returns all values of a recipe by their keys.
fn values(recipe: &Recipe) -> BTreeMap<String, String> {
    let table = toml::Value::try_from(recipe).expect("a recipe is plain data that TOML can hold");
    let mut found = BTreeMap::new();
    flatten(&table, "", &mut found);
    found
}

fn flatten(value: &toml::Value, path: &str, found: &mut BTreeMap<String, String>) {
    match value {
        toml::Value::Table(section) => {
            for (key, value) in section {
                flatten(value, &joined(path, key), found);
            }
        }
        toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
            for (index, item) in items.iter().enumerate() {
                flatten(item, &format!("{path}[{index}]"), found);
            }
        }
        value => drop(found.insert(path.to_owned(), value.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::sections::DataConfig;

    fn recipe(more: &str) -> Recipe {
        let text = format!(
            "[run]\ndir = 'runs/x'\n[model]\nbase = 'm'\n[[data]]\npath = 'd'\n\
             [train]\nsamples = 100\nmicro_batch = 4\n{more}"
        );
        toml::from_str(&text).expect("a recipe")
    }

    fn lines(old: &str, new: &str) -> Vec<(String, bool)> {
        let changes = changes(&recipe(old).to_toml(), &recipe(new)).expect("both can be read");
        changes
            .into_iter()
            .map(|change| (change.line.clone(), change.is_harmless()))
            .collect()
    }

    #[test]
    fn a_default_written_out_is_no_change() {
        assert_eq!(
            lines("", "[lr]\npeak = 1e-4\n[optimizer]\nname = 'adamw'\n"),
            []
        );
    }

    #[test]
    fn what_is_learnt_must_stay_and_what_is_measured_need_not() {
        assert_eq!(
            lines(
                "[test]\nbins = 5\n",
                "[lr]\npeak = 2e-4\n[test]\nbins = 7\n[ema]\nhalf_life_samples = 9\n"
            ),
            [
                ("ema.half_life_samples: none -> 9".to_owned(), false),
                ("lr.peak: 0.0001 -> 0.0002".to_owned(), false),
                ("test.bins: 5 -> 7".to_owned(), true),
            ]
        );
    }

    #[test]
    fn data_sets_may_move_but_not_come_or_go() {
        let moved = Recipe {
            data: vec![DataConfig {
                path: "e".into(),
                ..recipe("").data[0].clone()
            }],
            ..recipe("")
        };
        let found = changes(&recipe("").to_toml(), &moved).expect("both can be read");
        assert_eq!(found.len(), 1);
        assert!(found[0].is_harmless(), "{found:?}");
        let more = lines("", "[[data]]\npath = 'f'\n[data.prompt]\ndropped = 0.5\n");
        assert!(
            more.contains(&("data[1].prompt.dropped: none -> 0.5".to_owned(), false)),
            "{more:?}"
        );
    }

    #[test]
    fn a_base_may_move() {
        let mut moved = recipe("");
        moved.model.base = "elsewhere".into();
        let found = changes(&recipe("").to_toml(), &moved).expect("both can be read");
        assert_eq!(found.len(), 1);
        assert!(found[0].is_harmless(), "{found:?}");
    }

    #[test]
    fn keys_of_an_older_version_are_passed_over() {
        let old = recipe("")
            .to_toml()
            .replace("[train]", "[train]\ntext_encoder_lr_ratio = 1.0");
        assert_eq!(changes(&old, &recipe("")).expect("it can be read"), []);
    }
}
