//! The pictures that `prep.filter` removes: counted by clause, since they can be millions, and only
//! the first ones of each clause listed.

use crate::{
    board::count::ClauseCount,
    reject::{Reason, Remark},
};

/// Pictures of a clause that are listed in `rejected.jsonl`.
const MOST_LISTED: u64 = 20;

/// The pictures that the filter removes.
#[derive(Debug, Default)]
pub(crate) struct Filtered {
    pub(crate) clauses: Vec<ClauseCount>,
    /// The first pictures of each clause.
    pub(crate) listed: Vec<Remark>,
}

impl Filtered {
    /// No picture yet.
    pub(crate) fn new(clauses: Vec<ClauseCount>) -> Self {
        Self {
            clauses,
            listed: Vec::new(),
        }
    }

    /// Counts the picture at `path`, which a clause removes.
    pub(crate) fn add(&mut self, clause: usize, path: &str) {
        let ClauseCount { clause, removed } = &mut self.clauses[clause];
        removed.add(|| path.to_owned());
        if removed.count <= MOST_LISTED {
            let detail = format!("prep.filter: it is not {clause}");
            self.listed
                .push(Remark::new(path, Reason::Filtered, detail));
        }
    }

    /// The number of pictures that all clauses remove.
    pub(crate) fn count(&self) -> u64 {
        self.clauses.iter().map(|clause| clause.removed.count).sum()
    }
}
