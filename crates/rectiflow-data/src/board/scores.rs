//! Scores to quality words, by rank among all rows: what is a high score differs between boards.

use std::collections::BTreeMap;

/// Scores are counted in steps of a thousandth: boards have whole ones, models have fractions.
const STEPS: f64 = 1000.0;

/// The number of rows of each score.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scores {
    counts: BTreeMap<i64, u64>,
}

/// The words of scores: each from a score on.
#[derive(Debug, Clone, Default)]
pub(crate) struct ScoreWords {
    from: BTreeMap<i64, String>,
}

/// The step of a score, within the range of the numbers.
fn step(score: f64) -> i64 {
    (score * STEPS).round() as i64
}

impl Scores {
    /// Counts a row.
    pub(crate) fn add(&mut self, score: f64) {
        *self.counts.entry(step(score)).or_default() += 1;
    }

    /// The words of all scores: of the words whose share of rows is below a score, the one with the
    /// largest share.
    pub(crate) fn words(&self, words: &BTreeMap<String, f64>) -> ScoreWords {
        let total: u64 = self.counts.values().sum();
        let mut from = BTreeMap::new();
        let mut below = 0;
        for (&score, &count) in &self.counts {
            let percent = 100.0 * below as f64 / total as f64;
            let reached = words.iter().filter(|&(_, &from)| from <= percent);
            let best = reached.max_by(|(_, a), (_, b)| a.total_cmp(b));
            // Words change at few scores; a score without a word has none below it either.
            if let Some((best, _)) = best
                && from.values().next_back() != Some(best)
            {
                from.insert(score, best.clone());
            }
            below += count;
        }
        ScoreWords { from }
    }
}

impl ScoreWords {
    /// The word of a score.
    pub(crate) fn of(&self, score: f64) -> Option<&str> {
        let (_, word) = self.from.range(..=step(score)).next_back()?;
        Some(word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::classes::TagSettings;

    #[test]
    fn words_go_by_rank() {
        let mut scores = Scores::default();
        for score in 1..=100 {
            scores.add(f64::from(score));
        }
        let words = scores.words(&TagSettings::default().score_words);
        for (score, word) in [
            (100.0, "masterpiece"),
            (96.0, "masterpiece"),
            (95.0, "best quality"),
            (86.0, "best quality"),
            (85.0, "good quality"),
            (61.0, "good quality"),
            (60.0, "normal quality"),
            (31.0, "normal quality"),
            (30.0, "worst quality"),
            (1.0, "worst quality"),
            (500.0, "masterpiece"),
        ] {
            assert_eq!(words.of(score), Some(word), "{score}");
        }
        assert_eq!(words.of(0.0), None);
    }

    #[test]
    fn rows_of_one_score_have_one_word() {
        let mut scores = Scores::default();
        for _ in 0..50 {
            scores.add(0.0);
        }
        scores.add(-0.25);
        scores.add(f64::MAX);
        let top = BTreeMap::from([("top".to_owned(), 90.0)]);
        let words = scores.words(&top);
        assert_eq!((words.of(0.0), words.of(-0.25)), (None, None));
        assert_eq!(words.of(1e300), Some("top"));
        assert_eq!(Scores::default().words(&top).of(5.0), None);
    }
}
