//! Bytes of a text file to text: UTF-8, or UTF-16 with a byte order mark, as Windows' tools write.

use std::borrow::Cow;

const UTF_8_MARK: &[u8] = b"\xef\xbb\xbf";
const UTF_16_LITTLE_MARK: &[u8] = b"\xff\xfe";
const UTF_16_BIG_MARK: &[u8] = b"\xfe\xff";

/// The text of a file, without its byte order mark.
///
/// # Errors
/// A message if it is neither UTF-8 nor marked UTF-16.
pub(crate) fn decoded(bytes: &[u8]) -> Result<Cow<'_, str>, String> {
    if let Some(units) = bytes.strip_prefix(UTF_16_LITTLE_MARK) {
        return from_utf16(units, u16::from_le_bytes).map(Cow::Owned);
    }
    if let Some(units) = bytes.strip_prefix(UTF_16_BIG_MARK) {
        return from_utf16(units, u16::from_be_bytes).map(Cow::Owned);
    }
    let text = std::str::from_utf8(without_mark(bytes));
    text.map(Cow::Borrowed)
        .map_err(|error| format!("not UTF-8: {error}; save it as UTF-8"))
}

/// Whether a file that begins with `bytes` is UTF-16.
pub(crate) fn is_utf16(bytes: &[u8]) -> bool {
    bytes.starts_with(UTF_16_LITTLE_MARK) || bytes.starts_with(UTF_16_BIG_MARK)
}

/// The bytes behind UTF-8's byte order mark, if there is one.
pub(crate) fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(UTF_8_MARK).unwrap_or(bytes)
}

fn from_utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Result<String, String> {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let units: Vec<u16> = pairs.iter().map(|&pair| unit(pair)).collect();
    match String::from_utf16(&units) {
        Ok(text) if rest.is_empty() => Ok(text),
        _ => Err("not UTF-16, which its first two bytes announce; save it as UTF-8".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_no_text() {
        for bytes in [
            &b"caf\xc3\xa9"[..],
            b"\xef\xbb\xbfcaf\xc3\xa9",
            b"\xff\xfec\0a\0f\0\xe9\0",
            b"\xfe\xff\0c\0a\0f\0\xe9",
        ] {
            assert_eq!(decoded(bytes).unwrap(), "café");
        }
        for bytes in [&b"caf\xe9"[..], b"\xff\xfec\0a", b"\xff\xfe\0\xd8", b"\xff"] {
            assert!(decoded(bytes).unwrap_err().contains("save it as UTF-8"));
        }
    }
}
