//! Reads typed values from a `config.json` and collects every problem, so that one report names
//! them all.
//!
//! Each method returns a usable value even if the file is wrong; `finish` then returns the error.

use std::{fs, path::Path};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Largest accepted size: anything larger is a mistake or an attack.
const MAX_SIZE: i64 = 1 << 24;
/// Largest number of layers of a text encoder or a transformer; SDXL's have 32 and 10.
const MAX_LAYERS: usize = 64;
/// Largest number of residual blocks per level; SDXL has up to 3. A header of a few bytes must not
/// describe millions of tensors.
const MAX_BLOCKS: i64 = 16;

/// Reads the JSON object in a file.
///
/// # Errors
/// [`Error::Io`], or [`Error::Malformed`] if the file is not a JSON object.
pub fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::Malformed {
        path: path.to_owned(),
        kind: "JSON object",
        reason: error.to_string(),
    })
}

pub(crate) struct Reader<'a> {
    json: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(json: &'a Map<String, Value>) -> Self {
        Self {
            json,
            problems: Vec::new(),
        }
    }

    pub(crate) fn finish(self, what: &str) -> Result<()> {
        if self.problems.is_empty() {
            Ok(())
        } else {
            Err(Error::Config {
                what: what.to_owned(),
                problems: self.problems,
            })
        }
    }

    pub(crate) fn problem(&mut self, key: &str, expected: &str, found: &str) {
        self.problems
            .push(format!("{key}: expected {expected}, found {found}"));
    }

    /// Returns the value of a key; null counts as absent, as upstream does for keys that have a
    /// default.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// Returns the value as read by `read`, or the default if it is absent. Records a problem if it
    /// is present and `read` returns `None`.
    pub(crate) fn typed<T>(
        &mut self,
        key: &str,
        default: T,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> T {
        match self.get(key).map(|value| (value, read(value))) {
            None => default,
            Some((_, Some(value))) => value,
            Some((value, None)) => {
                self.problem(key, expected, &value.to_string());
                default
            }
        }
    }

    pub(crate) fn positive(&mut self, key: &str, default: i64) -> i64 {
        self.typed(key, default, "a positive integer", size)
    }

    pub(crate) fn optional_positive(&mut self, key: &str) -> Option<i64> {
        self.typed(key, None, "a positive integer or null", |value| {
            size(value).map(Some)
        })
    }

    pub(crate) fn count(&mut self, key: &str, default: usize) -> usize {
        self.typed(key, default, "a whole number", |value| {
            value.as_u64().map(|n| n as usize)
        })
    }

    /// A number of consecutive layers, 1 to [`MAX_LAYERS`].
    pub(crate) fn num_layers(&mut self, key: &str, default: usize) -> usize {
        self.typed(key, default, &format!("1 to {MAX_LAYERS}"), |value| {
            layer_count(value).filter(|n| *n > 0)
        })
    }

    /// A number of residual blocks per level, 1 to [`MAX_BLOCKS`].
    pub(crate) fn num_blocks(&mut self, key: &str, default: usize) -> usize {
        let blocks = |value: &Value| size(value).filter(|n| *n <= MAX_BLOCKS).map(|n| n as usize);
        self.typed(key, default, &format!("1 to {MAX_BLOCKS}"), blocks)
    }

    /// The number of residual blocks of each level: one number for all, or a list.
    pub(crate) fn num_blocks_per_level(
        &mut self,
        key: &str,
        default: i64,
        num_levels: usize,
    ) -> Vec<usize> {
        let found = self.per_level(key, default, num_levels);
        if found.iter().any(|n| *n > MAX_BLOCKS) {
            self.problem(key, &format!("1 to {MAX_BLOCKS}"), &format!("{found:?}"));
        }
        found
            .into_iter()
            .map(|n| n.min(MAX_BLOCKS) as usize)
            .collect()
    }

    pub(crate) fn number(&mut self, key: &str, default: f64) -> f64 {
        self.typed(key, default, "a number", Value::as_f64)
    }

    pub(crate) fn boolean(&mut self, key: &str, default: bool) -> bool {
        self.typed(key, default, "true or false", Value::as_bool)
    }

    /// A list of 1 to 16 sizes.
    pub(crate) fn positive_list(&mut self, key: &str, default: &[i64]) -> Vec<i64> {
        self.typed(
            key,
            default.to_vec(),
            "a list of positive integers",
            |value| {
                let list = value
                    .as_array()
                    .filter(|list| !list.is_empty() && list.len() <= 16)?;
                list.iter().map(size).collect()
            },
        )
    }

    /// A size for each level: one number for all, or a list.
    pub(crate) fn per_level(&mut self, key: &str, default: i64, num_levels: usize) -> Vec<i64> {
        let expected = format!("a positive integer or {num_levels} of them");
        self.typed(
            key,
            vec![default; num_levels],
            &expected,
            |value| match value {
                Value::Array(list) if list.len() == num_levels => list.iter().map(size).collect(),
                value => size(value).map(|n| vec![n; num_levels]),
            },
        )
    }

    /// A string that must be one of `supported`.
    pub(crate) fn only(&mut self, key: &str, default: &str, supported: &[&str]) -> String {
        let expected = supported.join(" or ");
        self.typed(key, default.to_owned(), &expected, |value| {
            value
                .as_str()
                .filter(|text| supported.contains(text))
                .map(str::to_owned)
        })
    }

    /// As [`Reader::only`], but a missing key is a problem too.
    pub(crate) fn required(&mut self, key: &str, supported: &[&str]) {
        if self.get(key).is_none() {
            self.problem(key, &supported.join(" or "), "nothing");
        }
        self.only(key, supported[0], supported);
    }

    /// The first element of a list of strings, which must be one of `supported`.
    pub(crate) fn first_of(&mut self, key: &str, default: &str, supported: &[&str]) -> String {
        let expected = supported.join(" or ");
        self.typed(key, default.to_owned(), &expected, |value| {
            value
                .get(0)?
                .as_str()
                .filter(|text| supported.contains(text))
                .map(str::to_owned)
        })
    }

    /// Checks that a feature is off: absent, null or `off`.
    pub(crate) fn unset(&mut self, key: &str, off: &Value) {
        let Some(value) = self.get(key) else { return };
        let same_number = value.as_f64().is_some_and(|n| Some(n) == off.as_f64());
        if value != off && !same_number {
            self.problem(
                key,
                &format!("{off} (other values are not supported)"),
                &value.to_string(),
            );
        }
    }

    pub(crate) fn divides(&mut self, key: &str, divisor: i64, of: &str, number: i64) {
        if number % divisor != 0 {
            self.problem(
                key,
                &format!("a divisor of {of} ({number})"),
                &divisor.to_string(),
            );
        }
    }

    /// For each level, whether its block type is the second of `types`.
    pub(crate) fn block_types(
        &mut self,
        key: &str,
        types: [&str; 2],
        default: &[bool],
        num_levels: usize,
    ) -> Vec<bool> {
        let expected = format!("{num_levels} of {} or {}", types[0], types[1]);
        let found = self.typed(key, default.to_vec(), &expected, |value| {
            let list = value.as_array().filter(|list| list.len() == num_levels)?;
            list.iter()
                .map(|name| {
                    types
                        .iter()
                        .rposition(|t| Some(*t) == name.as_str())
                        .map(|i| i == 1)
                })
                .collect()
        });
        if found.len() != num_levels {
            self.problem(key, &expected, &format!("{} by default", found.len()));
            return vec![false; num_levels];
        }
        found
    }

    /// The number of transformer layers after each residual block of each level: one number for
    /// all, one per level, or a list per level.
    pub(crate) fn layers(&mut self, key: &str, num_resnets: &[usize]) -> Vec<Vec<usize>> {
        let expected = format!(
            "a number of layers, or one or a list for each of {} levels",
            num_resnets.len()
        );
        let default = num_resnets.iter().map(|&n| vec![1; n]).collect();
        self.typed(key, default, &expected, |value| {
            layers_of(value, num_resnets)
        })
    }

    /// As [`Reader::layers`], for the up path. It mirrors the down path unless the file says
    /// otherwise; nested lists cannot be mirrored, since a level has one more residual block on the
    /// up path.
    pub(crate) fn layers_up(&mut self, num_resnets: &[usize]) -> Vec<Vec<usize>> {
        const KEY: &str = "reverse_transformer_layers_per_block";
        if self.get(KEY).is_some() {
            return self.layers(KEY, num_resnets);
        }
        let mirrored: Option<Vec<Vec<usize>>> = match self.get("transformer_layers_per_block") {
            None => Some(num_resnets.iter().map(|&n| vec![1; n]).collect()),
            Some(Value::Array(list)) => layers_of(
                &Value::Array(list.iter().rev().cloned().collect()),
                num_resnets,
            )
            .filter(|_| list.iter().all(|value| !value.is_array())),
            Some(value) => layers_of(value, num_resnets),
        };
        mirrored.unwrap_or_else(|| {
            self.problem(
                KEY,
                "layers of the up path, since transformer_layers_per_block is nested",
                "nothing",
            );
            num_resnets.iter().map(|&n| vec![1; n]).collect()
        })
    }

    /// The number of layers in the middle: the first of the coarsest level.
    pub(crate) fn layers_mid(&mut self, key: &str) -> usize {
        let last = match self.get(key) {
            Some(Value::Array(list)) => list.last(),
            value => value,
        };
        let first = match last {
            Some(Value::Array(list)) => list.first(),
            value => value,
        };
        first.and_then(layer_count).unwrap_or(1)
    }
}

/// Returns an integer from 1 to [`MAX_SIZE`].
fn size(value: &Value) -> Option<i64> {
    value.as_i64().filter(|n| (1..=MAX_SIZE).contains(n))
}

fn layer_count(value: &Value) -> Option<usize> {
    value
        .as_u64()
        .map(|n| n as usize)
        .filter(|n| *n <= MAX_LAYERS)
}

fn layers_of(value: &Value, num_resnets: &[usize]) -> Option<Vec<Vec<usize>>> {
    let level = |value: &Value, n: usize| match value {
        Value::Array(list) if list.len() == n => list.iter().map(layer_count).collect(),
        value => layer_count(value).map(|layers| vec![layers; n]),
    };
    match value {
        Value::Array(list) if list.len() == num_resnets.len() => list
            .iter()
            .zip(num_resnets)
            .map(|(value, &n)| level(value, n))
            .collect(),
        Value::Array(_) => None,
        value => num_resnets.iter().map(|&n| level(value, n)).collect(),
    }
}
