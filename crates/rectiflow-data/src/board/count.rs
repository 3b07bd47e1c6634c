//! What a preparation says about tables of image boards: counts, each with its first examples.

use serde::Serialize;

/// Examples that are named of each count.
const NUM_EXAMPLES: usize = 3;

/// A number of things, and the first of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Counted {
    /// How many there are.
    pub count: u64,
    /// The first ones.
    pub examples: Vec<String>,
}

impl Counted {
    /// Whether another example is wanted.
    pub(crate) fn has_room(&self) -> bool {
        self.examples.len() < NUM_EXAMPLES
    }

    /// Counts one. `example` is asked only for the first ones.
    pub(crate) fn add(&mut self, example: impl FnOnce() -> String) {
        self.count += 1;
        self.add_example(example);
    }

    /// Names an example of what is counted elsewhere.
    pub(crate) fn add_example(&mut self, example: impl FnOnce() -> String) {
        if self.has_room() {
            self.examples.push(example());
        }
    }
}

/// The rows of a table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TableCount {
    /// The table, relative to the source folder.
    pub path: String,
    /// All rows.
    pub rows: u64,
    /// Rows with a picture.
    pub with_picture: u64,
    /// Rows whose picture is not there.
    pub without_picture: Counted,
    /// Rows with the id or the hash of a row before them, which is the one that counts.
    pub repeated: Counted,
    /// Rows that cannot be read, or have no id, hash or file name.
    pub unusable: Counted,
    /// Whether rating s is read as safe: no row is rated g.
    pub s_is_safe: bool,
}

/// The pictures of a source with tables.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct BoardCount {
    /// The tables in the order in which they are read.
    pub tables: Vec<TableCount>,
    /// Pictures without a row; their text comes from elsewhere, if they have any.
    pub without_row: Counted,
    /// Pictures whose name has the id of one row and the hash of another, or of none. They are read
    /// as if they had no row.
    pub contradictory: Counted,
}

/// The samples that a clause of `prep.filter` removes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ClauseCount {
    /// The clause as it is written.
    pub clause: String,
    /// The pictures that it removes; the clauses before it keep them.
    pub removed: Counted,
}
