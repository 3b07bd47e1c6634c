//! The scores of pictures, from tables of annotations.

use std::{collections::HashMap, path::PathBuf};

use crate::{
    error::Result,
    format::{
        annotation::{Kind, Status},
        annotation_table,
        record::SampleId,
    },
};

/// The score of each picture that has one.
#[derive(Debug, Default)]
pub(crate) struct Scores(HashMap<SampleId, f64>);

impl Scores {
    /// Reads the scores of tables; of several of one picture the first counts, as in texts. A rank
    /// counts before the score that it comes from: scores of two models have two scales.
    ///
    /// # Errors
    /// Those of [`annotation_table::read`].
    pub(crate) fn read(tables: &[PathBuf]) -> Result<Self> {
        let mut all = HashMap::new();
        for table in tables {
            annotation_table::read(table, &mut |row| {
                let value = row.rank.or(row.score).filter(|value| value.is_finite());
                if let (Kind::Score, Status::Ok, Some(value)) = (row.kind, row.status, value) {
                    all.entry(row.id).or_insert(value);
                }
                Ok(())
            })?;
        }
        Ok(Self(all))
    }

    /// The score of a picture.
    pub(crate) fn of(&self, id: SampleId) -> Option<f64> {
        self.0.get(&id).copied()
    }
}
