//! Event files as TensorBoard reads them: TFRecords of `Event` messages, as few fields as viewers
//! need.
//!
//! A record is its length (u64, little-endian), the masked CRC-32C of these eight bytes, the data
//! and the masked CRC-32C of the data. Numbers of fields are those of TensorFlow's `event.proto`,
//! `summary.proto` and `tensor.proto`, read back by the `tensorboard` package in `make
//! peers-watch`.

/// A value of a summary.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value<'a> {
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
pub(crate) fn version(unix_secs: f64) -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, unix_secs);
    event.bytes(3, b"brain.Event:2");
    record(&event.0)
}

/// Returns the record of a start: viewers then drop what they have of `step` and later ones.
pub(crate) fn session_start(unix_secs: f64, step: u64) -> Vec<u8> {
    const START: u64 = 1;
    let mut log = Message::default();
    log.varint(1, START);
    let mut event = event(unix_secs, step);
    event.bytes(7, &log.0);
    record(&event.0)
}

/// Returns the record of some values of a step, by tag.
pub(crate) fn values<'a>(
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

/// Width and height of a PNG file in pixels, from its first chunk.
pub(crate) fn png_size(png: &[u8]) -> Option<(u32, u32)> {
    if !png.starts_with(b"\x89PNG\r\n\x1a\n") {
        return None;
    }
    let number = |at: usize| Some(u32::from_be_bytes(png.get(at..at + 4)?.try_into().ok()?));
    Some((number(16)?, number(20)?))
}

/// A message of protocol buffers.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, field: u64, value: u64) {
        self.number(field << 3);
        self.number(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.number(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
    }

    fn float(&mut self, field: u64, value: f32) {
        self.number(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.number(field << 3 | 2);
        self.number(value.len() as u64);
        self.0.extend(value);
    }

    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
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

    #[test]
    fn long_numbers_take_several_bytes() {
        let mut message = Message::default();
        message.varint(2, 300);
        message.varint(2, u64::MAX);
        assert_eq!(message.0[..3], [16, 0xac, 2]);
        assert_eq!(message.0.len(), 3 + 1 + 10);
    }

    #[test]
    fn the_size_of_a_picture_is_in_its_first_chunk() {
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
        png.extend(640_u32.to_be_bytes());
        png.extend(64_u32.to_be_bytes());
        assert_eq!(png_size(&png), Some((640, 64)));
        assert_eq!(png_size(&png[..20]), None);
        assert_eq!(png_size(b"GIF89a, and more of it"), None);
    }
}
