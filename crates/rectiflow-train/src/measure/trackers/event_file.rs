//! Event files as TensorBoard reads them: TFRecords of `Event` messages, as few fields as viewers
//! need.
//!
//! A record is its length (u64, little-endian), the masked CRC-32C of these eight bytes, the data
//! and the masked CRC-32C of the data. Numbers of fields are those of TensorFlow's `event.proto`,
//! `summary.proto` and `tensor.proto`, read back by the `tensorboard` package in `make
//! peers-watch`.

use crate::measure::trackers::protobuf::Message;

/// A value of a summary.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value<'a> {
    /// A number; viewers keep 32 bits of it.
    Scalar(f64),
    /// A PNG file with its size in pixels.
    Picture {
        /// The file's bytes.
        png: &'a [u8],
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// A text, in Markdown.
    Text(&'a str),
}

/// Returns the first record of a file.
pub(super) fn version(unix_secs: f64) -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, unix_secs);
    event.bytes(3, b"brain.Event:2");
    record(&event.0)
}

/// Returns the record of a start: viewers then drop what they have of `step` and later ones.
pub(super) fn session_start(unix_secs: f64, step: u64) -> Vec<u8> {
    const START: u64 = 1;
    let mut log = Message::default();
    log.varint(1, START);
    let mut event = event(unix_secs, step);
    event.bytes(7, &log.0);
    record(&event.0)
}

/// Returns the record of some values of a step, by tag.
pub(super) fn values<'a>(
    unix_secs: f64,
    step: u64,
    values: impl IntoIterator<Item = (&'a str, Value<'a>)>,
) -> Vec<u8> {
    let mut summary = Message::default();
    for (tag, value) in values {
        summary.bytes(1, &tagged(tag, &value).0);
    }
    let mut event = event(unix_secs, step);
    event.bytes(5, &summary.0);
    record(&event.0)
}

fn event(unix_secs: f64, step: u64) -> Message {
    let mut event = Message::default();
    event.double(1, unix_secs);
    event.varint(2, step);
    event
}

fn tagged(tag: &str, value: &Value<'_>) -> Message {
    let mut message = Message::default();
    message.bytes(1, tag.as_bytes());
    match *value {
        Value::Scalar(number) => message.float(2, number as f32),
        Value::Picture { png, width, height } => {
            const RGB: u64 = 3;
            let mut picture = Message::default();
            picture.varint(1, height.into());
            picture.varint(2, width.into());
            picture.varint(3, RGB);
            picture.bytes(4, png);
            message.bytes(4, &picture.0);
        }
        Value::Text(text) => {
            const DT_STRING: u64 = 7;
            let mut tensor = Message::default();
            tensor.varint(1, DT_STRING);
            tensor.bytes(2, b"");
            tensor.bytes(8, text.as_bytes());
            message.bytes(8, &tensor.0);
            let mut plugin = Message::default();
            plugin.bytes(1, b"text");
            let mut metadata = Message::default();
            metadata.bytes(1, &plugin.0);
            message.bytes(9, &metadata.0);
        }
    }
    message
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc(data).to_le_bytes());
    record
}

/// A checksum that may stand in the data that is checked.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C, Castagnoli's polynomial, bits reflected.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = table();
    let mut crc = u32::MAX;
    for &byte in data {
        crc = TABLE[(crc as u8 ^ byte) as usize] ^ crc >> 8;
    }
    !crc
}

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The data of a file's records, whose checksums must be right.
    pub(crate) fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
            assert_eq!(number(&bytes[8..12]), masked_crc(&bytes[..8]));
            let data = &bytes[12..12 + length];
            assert_eq!(number(&bytes[12 + length..16 + length]), masked_crc(data));
            found.push(data.to_vec());
            bytes = &bytes[16 + length..];
        }
        found
    }

    #[test]
    fn checksums_are_those_of_rfc_3720() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn the_first_record_has_the_version() {
        let found = version(1.0);
        assert_eq!(found.len(), 8 + 4 + 24 + 4);
        assert_eq!(found[..8], 24_u64.to_le_bytes());
        assert_eq!(found[12..21], [9, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f]);
        assert_eq!(&found[21..36], b"\x1a\x0dbrain.Event:2");
    }
}
