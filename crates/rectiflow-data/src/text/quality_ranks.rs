//! Ranks of scores to quality words. Pure.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The word of pictures from a rank on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QualityRank {
    /// The word.
    pub word: String,
    /// The share of the set that must score lower, 0 to 1.
    pub from: f64,
}

/// The usual words, with the shares of NoobAI-XL.
pub(crate) fn usual() -> Vec<QualityRank> {
    let mut ranks = Vec::new();
    for (word, from) in [
        ("masterpiece", 0.95),
        ("best quality", 0.85),
        ("good quality", 0.6),
        ("normal quality", 0.3),
        ("worst quality", 0.0),
    ] {
        ranks.push(QualityRank {
            word: word.to_owned(),
            from,
        });
    }
    ranks
}

/// The word of a rank: of those that it reaches, the one with the largest share. None if it reaches
/// none.
pub fn word_of(ranks: &[QualityRank], rank: f64) -> Option<&str> {
    let mut best: Option<&QualityRank> = None;
    for candidate in ranks {
        let is_higher = best.is_none_or(|best| candidate.from > best.from);
        if candidate.from <= rank && is_higher {
            best = Some(candidate);
        }
    }
    best.map(|best| best.word.as_str())
}

/// What cannot work, a message each.
pub(crate) fn problems(ranks: &[QualityRank]) -> Vec<String> {
    let mut problems = Vec::new();
    for (number, rank) in ranks.iter().enumerate() {
        let QualityRank { word, from } = rank;
        if !(0.0..=1.0).contains(from) {
            problems.push(format!(
                "prep.quality_ranks: {word:?} from {from}: must be 0 to 1"
            ));
        }
        if word.trim().is_empty() {
            problems.push(format!(
                "prep.quality_ranks: the word from {from} on is empty"
            ));
        }
        if ranks[..number].iter().any(|other| other.from == *from) {
            problems.push(format!("prep.quality_ranks: two words from {from} on"));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_share_that_is_reached_counts() {
        let ranks = usual();
        for (rank, word) in [
            (0.999, "masterpiece"),
            (0.95, "masterpiece"),
            (0.9499, "best quality"),
            (0.6, "good quality"),
            (0.3, "normal quality"),
            (0.0, "worst quality"),
        ] {
            assert_eq!(word_of(&ranks, rank), Some(word), "{rank}");
        }
        assert_eq!(word_of(&ranks[..1], 0.5), None);
        assert_eq!(problems(&ranks), Vec::<String>::new());
    }

    #[test]
    fn impossible_words_are_named() {
        let rank = |word: &str, from| QualityRank {
            word: word.to_owned(),
            from,
        };
        let bad = [
            rank("a", 1.5),
            rank(" ", 0.5),
            rank("b", 0.5),
            rank("c", f64::NAN),
        ];
        let problems = problems(&bad).join("\n");
        for expected in [
            "\"a\" from 1.5: must be 0 to 1",
            "from 0.5 on is empty",
            "two words from 0.5 on",
            "\"c\" from NaN",
        ] {
            assert!(problems.contains(expected), "{problems}");
        }
    }
}
