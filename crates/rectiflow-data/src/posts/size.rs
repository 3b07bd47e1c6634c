//! The size of a picture as a row of a table says it.

use serde_json::{Map, Value};

/// Keys of width and height, in the order of precedence: of Danbooru's, e621's and other tables. A
/// dot leads into an object.
pub(crate) const KEYS: [[&str; 2]; 4] = [
    ["image_width", "image_height"],
    ["file.width", "file.height"],
    ["original_width", "original_height"],
    ["width", "height"],
];

/// Width and height in pixels. None if the row says neither, or no sizes of pictures.
pub(crate) fn of(row: &Map<String, Value>) -> Option<(u32, u32)> {
    for [width, height] in KEYS {
        if let (Some(width), Some(height)) = (side(row, width), side(row, height)) {
            return Some((width, height));
        }
    }
    None
}

fn side(row: &Map<String, Value>, key: &str) -> Option<u32> {
    let value = match key.split_once('.') {
        Some((outer, inner)) => row.get(outer)?.get(inner)?,
        None => row.get(key)?,
    };
    let number = match value {
        Value::String(text) => text.parse().ok()?,
        value => value.as_u64()?,
    };
    u32::try_from(number).ok().filter(|&side| side > 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sizes_are_found_under_the_keys_of_public_tables() {
        for (row, expected) in [
            (json!({"image_width": 3, "image_height": 4}), Some((3, 4))),
            (json!({"file": {"width": 3, "height": 4}}), Some((3, 4))),
            (json!({"width": "3", "height": "4"}), Some((3, 4))),
            (
                json!({"width": 1, "height": 1, "original_width": 3, "original_height": 4}),
                Some((3, 4)),
            ),
            (json!({"width": 3}), None),
            (json!({"width": 0, "height": 4}), None),
            (json!({"width": -3, "height": 4}), None),
            (json!({"width": 5_000_000_000_u64, "height": 4}), None),
        ] {
            assert_eq!(of(row.as_object().unwrap()), expected, "{row}");
        }
    }
}
