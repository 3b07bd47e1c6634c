//! The scores of a finished table by quality word, with some pictures of each to look at.

use std::path::Path;

use rectiflow_data::{
    SampleId,
    annotation::{Annotation, Kind, Status},
    annotation_table,
    quality_ranks::{QualityRank, word_of},
};

use crate::error::Result;

/// A picture to look at.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Its id.
    pub id: SampleId,
    /// Its address.
    pub source: String,
    /// Its score.
    pub score: f64,
    /// Its rank.
    pub rank: f64,
}

/// The pictures of one word.
#[derive(Debug, Clone, PartialEq)]
pub struct WordGroup {
    /// The word; None of those that reach no word's share.
    pub word: Option<String>,
    /// Number of pictures.
    pub count: u64,
    /// The lowest score.
    pub lowest: f64,
    /// The highest score.
    pub highest: f64,
    /// Some of the pictures, the highest rank first.
    pub examples: Vec<Example>,
}

/// A group while a table is read.
#[derive(Debug)]
struct Growing {
    word: Option<String>,
    count: u64,
    lowest: f64,
    highest: f64,
    /// Pictures that are kept, with their keys: those with the smallest, a fair draw that is the
    /// same in each run.
    drawn: Vec<(u64, Example)>,
}

impl Growing {
    /// A group of one picture.
    fn new(word: Option<&str>, first: Example) -> Self {
        Self {
            word: word.map(str::to_owned),
            count: 1,
            lowest: first.score,
            highest: first.score,
            drawn: vec![(mixed(first.id.0), first)],
        }
    }

    fn add(&mut self, example: Example, limit: usize) {
        self.count += 1;
        self.lowest = self.lowest.min(example.score);
        self.highest = self.highest.max(example.score);
        let key = mixed(example.id.0);
        let at = self.drawn.partition_point(|(other, _)| *other < key);
        self.drawn.insert(at, (key, example));
        self.drawn.truncate(limit);
    }

    fn finish(self) -> WordGroup {
        let mut examples: Vec<Example> = Vec::new();
        examples.extend(self.drawn.into_iter().map(|(_, example)| example));
        examples.sort_by(|a, b| b.rank.total_cmp(&a.rank));
        WordGroup {
            word: self.word,
            count: self.count,
            lowest: self.lowest,
            highest: self.highest,
            examples,
        }
    }
}

/// Ids are hashes; the first are not to be those of a split, which hashes decide too.
fn mixed(id: u64) -> u64 {
    (id ^ (id >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// The groups of a scorer's pictures in the table `path`, the best word first, with at most
/// `num_examples` of each.
///
/// # Errors
/// Those of the table.
pub fn groups(
    path: &Path,
    mode: &str,
    ranks: &[QualityRank],
    num_examples: usize,
) -> Result<Vec<WordGroup>> {
    let mut found: Vec<Growing> = Vec::new();
    annotation_table::read(path, &mut |row| {
        if let Some(example) = example_of(row, mode) {
            let word = word_of(ranks, example.rank);
            let known = found.iter_mut().find(|other| other.word.as_deref() == word);
            match known {
                Some(group) => group.add(example, num_examples),
                None => found.push(Growing::new(word, example)),
            }
        }
        Ok(())
    })?;
    found.sort_by(|a, b| b.lowest.total_cmp(&a.lowest));
    Ok(found.into_iter().map(Growing::finish).collect())
}

/// The scored picture of a row. None if the row is something else.
fn example_of(row: Annotation, mode: &str) -> Option<Example> {
    let is_score = row.kind == Kind::Score && row.status == Status::Ok && row.mode == mode;
    let (score, rank) = row.score.filter(|_| is_score).zip(row.rank)?;
    Some(Example {
        id: row.id,
        source: row.source,
        score,
        rank,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::ranked::write_ranks;

    #[test]
    fn groups_have_their_counts_and_a_draw_of_their_pictures() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        let mut lines = String::new();
        for number in 0..100u32 {
            let mut row = Annotation::new(
                SampleId(u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
                &format!("{number}.png"),
                Kind::Score,
                "q",
            );
            // Two pictures for each score.
            row.score = Some(f64::from(number / 2));
            if number == 99 {
                row.status = Status::Failed;
            }
            lines += &(row.to_line() + "\n");
        }
        std::fs::write(&path, lines).unwrap();
        let all = folder.path().join("all.jsonl");
        let ranks = write_ranks(&path, Some(&all), &[("a", "b")]).unwrap();
        assert_eq!(ranks["q"].len(), 99);
        assert_eq!(std::fs::read_to_string(all).unwrap().lines().count(), 100);

        let rank = |word: &str, from| QualityRank {
            word: word.to_owned(),
            from,
        };
        let words = [rank("low", 0.25), rank("high", 0.9)];
        let groups = groups(&path, "q", &words, 3).unwrap();
        let found: Vec<_> = groups
            .iter()
            .map(|group| (group.word.as_deref(), group.count))
            .collect();
        // 90% of 99 are 89.1: the scores from 45 on, 9 of whose 10 pictures are well.
        assert_eq!(found, [(Some("high"), 9), (Some("low"), 64), (None, 26)]);
        assert_eq!((groups[0].lowest, groups[0].highest), (45.0, 49.0));
        for group in &groups {
            assert_eq!(group.examples.len(), 3);
            for example in &group.examples {
                assert_eq!(word_of(&words, example.rank), group.word.as_deref());
                assert_eq!(example.rank, ranks["q"].of(example.score));
            }
        }
    }
}
