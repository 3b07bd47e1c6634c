//! Values with separators between them (CSV): which separator a file has, and a limit for its rows.

use std::{
    cell::Cell,
    io::{self, Read},
};

use crate::text::caption::MAX_SOURCE_BYTES;

/// A source of which each row may take a certain number of bytes: one whose quotes do not close
/// would fill the memory.
#[derive(Debug)]
pub(crate) struct Rationed<'a, R> {
    pub(crate) source: R,
    pub(crate) left: &'a Cell<u64>,
}

impl<R: Read> Read for Rationed<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let num_read = self.source.read(out)?;
        let Some(left) = self.left.get().checked_sub(num_read as u64) else {
            let reason = format!(
                "a row is longer than {MAX_SOURCE_BYTES} bytes: is a quotation mark missing?"
            );
            return Err(io::Error::other(reason));
        };
        self.left.set(left);
        Ok(num_read)
    }
}

/// The most frequent separator in the first line of a file.
pub(crate) fn delimiter(start: &[u8]) -> u8 {
    let line = start.split(|&byte| byte == b'\n').next().unwrap_or(start);
    let count = |separator: u8| line.iter().filter(|&&byte| byte == separator).count();
    let mut best = b',';
    for separator in [b';', b'\t'] {
        if count(separator) > count(best) {
            best = separator;
        }
    }
    best
}
