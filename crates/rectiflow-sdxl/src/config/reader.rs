//! Reads typed values from a `config.json` and collects every problem, so that one report names
//! them all.
//!
//! Each method returns a usable value even if the file is wrong; `finish` then returns the error.

use std::{fs, ops::RangeInclusive, path::Path};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Largest accepted size, of a width, a vocabulary or a picture; SDXL's largest is 49408. Anything
/// larger is a mistake or an attack, and memory estimated from it would overflow.
const MAX_SIZE: i64 = 1 << 17;
/// Largest number of layers of a text encoder or a transformer; SDXL's have 32 and 10.
const MAX_LAYERS: usize = 64;
/// Largest number of residual blocks per level; SDXL has up to 3. A header of a few bytes must not
/// describe millions of tensors.
const MAX_BLOCKS: i64 = 16;

/// Largest accepted file: the index of a sharded SDXL has 300 kB.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Reads the JSON object in a file, as Python writes it: `-Infinity`, `Infinity` and `NaN`, which
/// JSON lacks, become strings of those names.
///
/// # Errors
/// [`Error::Io`], or [`Error::Malformed`] if the file is not a regular file of at most 16 MiB with
/// a JSON object.
pub fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let malformed = |reason: String| Error::Malformed {
        path: path.to_owned(),
        kind: "JSON object",
        reason,
    };
    let metadata = fs::metadata(path).map_err(Error::io(path))?;
    if !metadata.is_file() {
        return Err(malformed("it is not a regular file".into()));
    }
    let num_bytes = metadata.len();
    if num_bytes > MAX_FILE_BYTES {
        let reason = format!("it has {num_bytes} bytes, more than {MAX_FILE_BYTES}");
        return Err(malformed(reason));
    }
    let bytes = fs::read(path).map_err(Error::io(path))?;
    parsed_object(&bytes).map_err(|error| malformed(error.to_string()))
}

/// Parses a JSON object, as [`read_object`].
pub(crate) fn parsed_object(bytes: &[u8]) -> serde_json::Result<Map<String, Value>> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    serde_json::from_slice(bytes)
        .or_else(|error| serde_json::from_slice(&with_quoted_numbers(bytes)).map_err(|_| error))
}

/// Puts quotes around the numbers that JSON lacks, outside of strings.
fn with_quoted_numbers(bytes: &[u8]) -> Vec<u8> {
    const NUMBERS: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];
    let mut quoted = Vec::with_capacity(bytes.len() + 16);
    let mut rest = bytes;
    let mut is_string = false;
    while let [byte, tail @ ..] = rest {
        let number = NUMBERS.iter().find(|number| rest.starts_with(number));
        match (is_string, byte, number) {
            (false, _, Some(number)) => {
                quoted.extend([b"\"", *number, b"\""].concat());
                rest = &rest[number.len()..];
                continue;
            }
            // An escaped character is part of the string, a quote too.
            (true, b'\\', _) => {
                let length = rest.len().min(2);
                quoted.extend(&rest[..length]);
                rest = &rest[length..];
                continue;
            }
            (_, b'"', _) => is_string = !is_string,
            _ => {}
        }
        quoted.push(*byte);
        rest = tail;
    }
    quoted
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
        let Some(value) = self.get(key) else {
            return default;
        };
        if let Some(read) = read(value) {
            return read;
        }
        self.problem(key, expected, &value.to_string());
        default
    }

    pub(crate) fn positive(&mut self, key: &str, default: i64) -> i64 {
        self.typed(key, default, "a positive integer", size)
    }

    pub(crate) fn optional_positive(&mut self, key: &str) -> Option<i64> {
        self.typed(key, None, "a positive integer or null", optional_size)
    }

    pub(crate) fn count(&mut self, key: &str, default: usize) -> usize {
        self.typed(key, default, "a whole number", whole_number)
    }

    /// A side of a square: a size, or a list of two, of which the longer counts.
    pub(crate) fn side(&mut self, key: &str, default: u64) -> u64 {
        let expected = "a positive integer or a list of two";
        self.typed(key, default, expected, |value| {
            let side = match value {
                Value::Array(sides) if sides.len() == 2 => size(&sides[0])?.max(size(&sides[1])?),
                value => size(value)?,
            };
            u64::try_from(side).ok()
        })
    }

    /// A number of consecutive layers, 1 to [`MAX_LAYERS`].
    pub(crate) fn num_layers(&mut self, key: &str, default: usize) -> usize {
        let expected = format!("1 to {MAX_LAYERS}");
        self.typed(key, default, &expected, positive_layer_count)
    }

    /// A number of residual blocks per level, 1 to [`MAX_BLOCKS`].
    pub(crate) fn num_blocks(&mut self, key: &str, default: usize) -> usize {
        self.typed(key, default, &format!("1 to {MAX_BLOCKS}"), block_count)
    }

    /// The number of residual blocks of each level: one number for all, or a list.
    pub(crate) fn num_blocks_per_level(
        &mut self,
        key: &str,
        default: i64,
        num_levels: usize,
    ) -> Vec<usize> {
        let found = self.per_level(key, default, num_levels);
        if found.iter().max() > Some(&MAX_BLOCKS) {
            self.problem(key, &format!("1 to {MAX_BLOCKS}"), &format!("{found:?}"));
        }
        let mut blocks = Vec::new();
        for n in found {
            blocks.push(n.min(MAX_BLOCKS) as usize);
        }
        blocks
    }

    pub(crate) fn number(&mut self, key: &str, default: f64) -> f64 {
        self.typed(key, default, "a number", Value::as_f64)
    }

    /// A number in a range, both ends included.
    pub(crate) fn number_in(&mut self, key: &str, default: f64, range: RangeInclusive<f64>) -> f64 {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        self.typed(key, default, &expected, |value| {
            value.as_f64().filter(|number| range.contains(number))
        })
    }

    /// The small number that a norm adds to a variance.
    pub(crate) fn epsilon(&mut self, key: &str) -> f64 {
        self.number_in(key, 1e-5, 1e-12..=1.0)
    }

    pub(crate) fn boolean(&mut self, key: &str, default: bool) -> bool {
        self.typed(key, default, "true or false", Value::as_bool)
    }

    /// A list of 1 to 16 sizes.
    pub(crate) fn positive_list(&mut self, key: &str, default: &[i64]) -> Vec<i64> {
        let expected = "a list of positive integers";
        self.typed(key, default.to_vec(), expected, sizes)
    }

    /// The number of groups of every group norm, which must divide all `widths`.
    pub(crate) fn norm_num_groups(&mut self, widths: &[i64]) -> i64 {
        let num_groups = self.positive("norm_num_groups", 32);
        for &width in widths {
            self.divides("norm_num_groups", num_groups, "block_out_channels", width);
        }
        num_groups
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
            one_of(value, supported)
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
            one_of(value.get(0)?, supported)
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
            are_second(value, types, num_levels)
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
        self.typed(key, one_each(num_resnets), &expected, |value| {
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
        let mirrored = match self.get("transformer_layers_per_block") {
            None => Some(one_each(num_resnets)),
            Some(Value::Array(list)) => mirrored(list, num_resnets),
            Some(value) => layers_of(value, num_resnets),
        };
        if let Some(layers) = mirrored {
            return layers;
        }
        let expected = "layers of the up path, since transformer_layers_per_block is nested";
        self.problem(KEY, expected, "nothing");
        one_each(num_resnets)
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
    let n = value.as_i64()?;
    (1..=MAX_SIZE).contains(&n).then_some(n)
}

/// As [`size`], for keys without a default.
fn optional_size(value: &Value) -> Option<Option<i64>> {
    size(value).map(Some)
}

/// Returns a list of 1 to 16 sizes.
fn sizes(value: &Value) -> Option<Vec<i64>> {
    let list = value.as_array()?;
    if (1..=16).contains(&list.len()) {
        list.iter().map(size).collect()
    } else {
        None
    }
}

/// Returns an integer from 0 to [`MAX_SIZE`].
fn whole_number(value: &Value) -> Option<usize> {
    let n = value.as_u64()?;
    (n <= MAX_SIZE as u64).then_some(n as usize)
}

fn block_count(value: &Value) -> Option<usize> {
    let n = size(value)?;
    (n <= MAX_BLOCKS).then_some(n as usize)
}

fn layer_count(value: &Value) -> Option<usize> {
    let n = whole_number(value)?;
    (n <= MAX_LAYERS).then_some(n)
}

fn positive_layer_count(value: &Value) -> Option<usize> {
    let n = layer_count(value)?;
    (n > 0).then_some(n)
}

/// Returns a string that is one of `supported`.
fn one_of(value: &Value, supported: &[&str]) -> Option<String> {
    let text = value.as_str()?;
    supported.contains(&text).then(|| text.to_owned())
}

/// Returns, for each of `num_levels` names, whether it is the second of `types`.
fn are_second(value: &Value, types: [&str; 2], num_levels: usize) -> Option<Vec<bool>> {
    let list = value.as_array()?;
    if list.len() != num_levels {
        return None;
    }
    let mut are_second = Vec::new();
    for name in list {
        let name = name.as_str()?;
        if !types.contains(&name) {
            return None;
        }
        are_second.push(name == types[1]);
    }
    Some(are_second)
}

/// Returns one layer for each residual block, the default.
fn one_each(num_resnets: &[usize]) -> Vec<Vec<usize>> {
    num_resnets.iter().map(|&n| vec![1; n]).collect()
}

/// Returns the layers of the up path for those of the down path; `None` if they are nested.
fn mirrored(list: &[Value], num_resnets: &[usize]) -> Option<Vec<Vec<usize>>> {
    if list.iter().any(Value::is_array) {
        return None;
    }
    let reversed = list.iter().rev().cloned().collect();
    layers_of(&Value::Array(reversed), num_resnets)
}

fn layers_of(value: &Value, num_resnets: &[usize]) -> Option<Vec<Vec<usize>>> {
    let list = match value {
        Value::Array(list) if list.len() == num_resnets.len() => Some(list),
        Value::Array(_) => return None,
        _ => None,
    };
    let mut layers = Vec::new();
    for (i, &n) in num_resnets.iter().enumerate() {
        layers.push(layers_of_level(list.map_or(value, |list| &list[i]), n)?);
    }
    Some(layers)
}

/// Returns the layers after each of the `n` residual blocks of a level: one number for all, or a
/// list.
fn layers_of_level(value: &Value, n: usize) -> Option<Vec<usize>> {
    match value {
        Value::Array(list) if list.len() == n => list.iter().map(layer_count).collect(),
        value => Some(vec![layer_count(value)?; n]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_as_python_writes_it_is_read() {
        for (text, expected) in [
            (r#"{"a": -Infinity}"#, json!({"a": "-Infinity"})),
            (
                r#"{"a":Infinity,"b":[NaN,-Infinity]}"#,
                json!({"a": "Infinity", "b": ["NaN", "-Infinity"]}),
            ),
            (
                r#"{"a": {"b": NaN}, "c": 1e-5}"#,
                json!({"a": {"b": "NaN"}, "c": 1e-5}),
            ),
            (
                r#"{"NaN": "-Infinity \" NaN", "b": NaN}"#,
                json!({"NaN": "-Infinity \" NaN", "b": "NaN"}),
            ),
            (r#"{"a\\": -Infinity}"#, json!({"a\\": "-Infinity"})),
            ("\u{feff}{\"a\": 1}", json!({"a": 1})),
        ] {
            let found = parsed_object(text.as_bytes()).expect(text);
            assert_eq!(Value::Object(found), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_json_object_is_refused_with_its_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("config.json");
        for text in [
            "",
            "[]",
            "{",
            "{\"a\": -Infinit}",
            "{\"a\": -Infinity",
            "-Infinity",
            "\"",
            "{\"\\",
        ] {
            fs::write(&path, text).expect("the file is written");
            let error = read_object(&path).expect_err(text).to_string();
            assert!(
                error.contains("config.json") && error.contains("JSON object"),
                "{error}"
            );
        }
        let error = read_object(folder.path())
            .expect_err("a folder")
            .to_string();
        assert!(error.contains("not a regular file"), "{error}");
        let error = read_object(Path::new("/dev/zero"))
            .expect_err("a device")
            .to_string();
        assert!(error.contains("not a regular file"), "{error}");
        let file = fs::File::create(&path).expect("the file is made");
        file.set_len(MAX_FILE_BYTES + 1).expect("a sparse file");
        let error = read_object(&path).expect_err("too long").to_string();
        assert!(error.contains("16777217 bytes"), "{error}");
    }

    #[test]
    fn a_number_that_is_not_finite_is_refused_by_name_where_a_number_is_needed() {
        for text in [r#"{"x": NaN}"#, r#"{"x": -Infinity}"#] {
            let json = parsed_object(text.as_bytes()).expect("it is read");
            let mut reader = Reader::new(&json);
            reader.number("x", 1.0);
            let error = reader.finish("f").expect_err(text).to_string();
            assert!(
                error.starts_with("f: x: expected a number, found"),
                "{error}"
            );
        }
    }
}
