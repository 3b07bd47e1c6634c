//! The keys of a post in the name of its picture, as boards and downloaders write them.
//!
//! | name | from |
//! |---|---|
//! | `1000123.jpg`, also in folders such as `0123/` | data sets |
//! | `0123456789abcdef0123456789abcdef.jpg` | the boards' own files |
//! | `danbooru_1000123.jpg`, `e621_1000123_HASH.png` | gallery-dl |
//! | `__title__HASH.jpg`, `sample-HASH.jpg` | Danbooru's downloads |

use crate::posts::fields::parse_md5;

/// Boards whose names precede the number of a post.
const BOARDS: [&str; 9] = [
    "danbooru",
    "safebooru",
    "gelbooru",
    "aibooru",
    "e621",
    "e926",
    "rule34",
    "konachan",
    "yandere",
];

/// The keys that a name has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct NamedKeys {
    pub(crate) id: Option<u64>,
    pub(crate) md5: Option<[u32; 4]>,
}

/// The keys in the name of the picture at `path`.
pub(crate) fn keys_of(path: &str) -> NamedKeys {
    let name = path.rsplit('/').next().unwrap_or(path);
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    if let Some(md5) = parse_md5(stem) {
        return NamedKeys {
            id: None,
            md5: Some(md5),
        };
    }
    if let Some(id) = parse_id(stem) {
        return NamedKeys {
            id: Some(id),
            md5: None,
        };
    }
    of_board(stem).unwrap_or_else(|| NamedKeys {
        id: None,
        md5: last_part(stem).and_then(parse_md5),
    })
}

/// The keys of a stem that begins with the name of a board.
fn of_board(stem: &str) -> Option<NamedKeys> {
    let mut parts = stem.split('_');
    let board = parts.next()?;
    if !BOARDS.iter().any(|name| board.eq_ignore_ascii_case(name)) {
        return None;
    }
    let id = parse_id(parts.next()?)?;
    Some(NamedKeys {
        id: Some(id),
        md5: parts.next().and_then(parse_md5),
    })
}

/// A number of digits alone.
fn parse_id(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

/// What is behind the last `_` or `-` of a stem.
fn last_part(stem: &str) -> Option<&str> {
    let at = stem.rfind(['_', '-'])?;
    Some(&stem[at + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_boards_and_downloaders_have_keys() {
        let hash = "00000001000000020000000300000004";
        let md5 = Some([1, 2, 3, 4]);
        for (path, id, md5) in [
            ("1000123.jpg".to_owned(), Some(1_000_123), None),
            ("0123/0001000123.webp".to_owned(), Some(1_000_123), None),
            (format!("a/{hash}.png"), None, md5),
            (hash.to_owned(), None, md5),
            ("danbooru_5.jpg".to_owned(), Some(5), None),
            (format!("e621_5_{hash}.jpg"), Some(5), md5),
            ("E621_5_x.jpg".to_owned(), Some(5), None),
            (format!("__a_b_drawn_by_c__{hash}.jpg"), None, md5),
            (format!("sample-{hash}.jpg"), None, md5),
            // Names without a key.
            ("photo_5.jpg".to_owned(), None, None),
            ("danbooru_x.jpg".to_owned(), None, None),
            ("5.5.jpg".to_owned(), None, None),
            ("-5.jpg".to_owned(), None, None),
            (".jpg".to_owned(), None, None),
            ("99999999999999999999.jpg".to_owned(), None, None),
            ("é_日本.jpg".to_owned(), None, None),
        ] {
            assert_eq!(keys_of(&path), NamedKeys { id, md5 }, "{path}");
        }
    }
}
