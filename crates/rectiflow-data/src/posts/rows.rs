//! What takes the rows of a table, whatever its format.

use crate::posts::fields::Row;

/// Columns that a message names.
const MOST_NAMED: usize = 30;

/// Takes the rows of a table.
pub(crate) trait Rows {
    /// Whether the row is to be taken; by default each is. Rows are numbered from 0.
    fn wants(&self, _number: u32) -> bool {
        true
    }

    /// Takes a row, or why it cannot be read.
    ///
    /// # Errors
    /// Why no more rows can be taken.
    fn take(&mut self, number: u32, row: Result<Row, String>) -> Result<(), String>;
}

/// What is wrong with a row, which messages number from 1.
pub(crate) fn in_row(number: u32, reason: &str) -> String {
    format!("row {}: {reason}", u64::from(number) + 1)
}

/// The names of columns in a message.
pub(crate) fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    let num_left = names.len().saturating_sub(MOST_NAMED);
    let shown = names[..names.len() - num_left].join(", ");
    match num_left {
        0 => shown,
        num_left => format!("{shown} and {num_left} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_columns_are_counted() {
        let names: Vec<String> = (0..40).map(|number| number.to_string()).collect();
        let text = listed(names.iter().map(String::as_str));
        assert!(text.ends_with("29 and 10 more"), "{text}");
        assert_eq!(listed(["a", "b"].into_iter()), "a, b");
    }
}
