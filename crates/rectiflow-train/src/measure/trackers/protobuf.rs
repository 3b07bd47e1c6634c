//! Messages of protocol buffers, written field by field, and read back field by field.

/// A message that is being written.
#[derive(Default)]
pub(super) struct Message(pub(super) Vec<u8>);

impl Message {
    pub(super) fn varint(&mut self, field: u64, value: u64) {
        self.number(field << 3);
        self.number(value);
    }

    pub(super) fn double(&mut self, field: u64, value: f64) {
        self.number(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn float(&mut self, field: u64, value: f32) {
        self.number(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn bytes(&mut self, field: u64, value: &[u8]) {
        self.number(field << 3 | 2);
        self.number(value.len() as u64);
        self.0.extend(value);
    }

    pub(super) fn text(&mut self, field: u64, value: &str) {
        self.bytes(field, value.as_bytes());
    }

    pub(super) fn message(&mut self, field: u64, value: &Self) {
        self.bytes(field, &value.0);
    }

    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// The value of a field that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field<'a> {
    Number(u64),
    /// A text, bytes or a message.
    Bytes(&'a [u8]),
    /// Four or eight bytes.
    Fixed(&'a [u8]),
}

/// The fields of a message with their numbers, in the order of writing. Ends where the bytes are no
/// message.
#[derive(Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    /// The last value of a field whose value is bytes; empty if it is not there.
    pub(super) fn bytes_of(message: &'a [u8], field: u64) -> &'a [u8] {
        let mut found: &[u8] = &[];
        for (number, value) in Fields(message) {
            if let Field::Bytes(bytes) = value
                && number == field
            {
                found = bytes;
            }
        }
        found
    }

    /// The last value of a field whose value is a number; 0 if it is not there.
    pub(super) fn number_of(message: &'a [u8], field: u64) -> u64 {
        let mut found = 0;
        for (number, value) in Fields(message) {
            if let Field::Number(value) = value
                && number == field
            {
                found = value;
            }
        }
        found
    }

    fn number(&mut self) -> Option<u64> {
        let mut value = 0;
        for place in 0..10 {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << (7 * place);
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, num_bytes: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(num_bytes).ok()?)?;
        self.0 = rest;
        Some(taken)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = (u64, Field<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let key = self.number()?;
        let value = match key & 7 {
            0 => Field::Number(self.number()?),
            1 => Field::Fixed(self.take(8)?),
            2 => {
                let num_bytes = self.number()?;
                Field::Bytes(self.take(num_bytes)?)
            }
            5 => Field::Fixed(self.take(4)?),
            _ => return None,
        };
        Some((key >> 3, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_numbers_take_several_bytes() {
        let mut message = Message::default();
        message.varint(2, 300);
        message.varint(2, u64::MAX);
        assert_eq!(message.0[..3], [16, 0xac, 2]);
        assert_eq!(message.0.len(), 3 + 1 + 10);
    }

    #[test]
    fn fields_come_back_as_written() {
        let mut message = Message::default();
        message.varint(1, 300);
        message.double(2, 0.5);
        message.float(3, 0.25);
        message.text(200, "text");
        let found: Vec<_> = Fields(&message.0).collect();
        let expected = [
            (1, Field::Number(300)),
            (2, Field::Fixed(&[0, 0, 0, 0, 0, 0, 0xe0, 0x3f])),
            (3, Field::Fixed(&[0, 0, 0x80, 0x3e])),
            (200, Field::Bytes(b"text")),
        ];
        assert_eq!(found, expected);
        assert_eq!(Fields::number_of(&message.0, 1), 300);
        assert_eq!(Fields::bytes_of(&message.0, 200), b"text");
        assert_eq!(Fields::bytes_of(&message.0, 1), b"");
    }

    #[test]
    fn bytes_that_are_no_message_end() {
        let mut message = Message::default();
        message.text(2, "text");
        for end in 0..message.0.len() {
            assert_eq!(Fields(&message.0[..end]).count(), 0);
        }
        assert_eq!(Fields(&[0xff; 40]).count(), 0);
        assert_eq!(Fields(&[0x12, 0xff, 0xff, 0xff, 0xff, 0x7f, 1]).count(), 0);
    }
}
