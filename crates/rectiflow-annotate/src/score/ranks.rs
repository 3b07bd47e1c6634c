//! Scores to ranks over a whole set: the share of it that scores lower. Pure.
//!
//! What a high score is differs between models; a rank means the same of each. Equal scores have
//! equal ranks, so the lowest rank is 0 and the highest is below 1.

/// The ranks of a set of scores.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ranks {
    /// The scores, the lowest first.
    sorted: Vec<f64>,
}

impl Ranks {
    /// Of these scores.
    pub fn new(mut scores: Vec<f64>) -> Self {
        scores.sort_by(f64::total_cmp);
        Self { sorted: scores }
    }

    /// Number of scores.
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    /// Whether there are no scores.
    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// The share of the set that scores lower, 0 to 1.
    pub fn of(&self, score: f64) -> f64 {
        let num_lower = self.sorted.partition_point(|&other| other < score);
        num_lower as f64 / self.sorted.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_rank_is_the_share_below() {
        let ranks = Ranks::new(vec![3.0, 1.0, 2.0, 2.0]);
        let found = [1.0, 2.0, 3.0, 0.0, 9.0].map(|score| ranks.of(score));
        assert_eq!(found, [0.0, 0.25, 0.75, 0.0, 1.0]);
        assert_eq!(Ranks::new(vec![-0.0, 0.0]).of(0.0), 0.0, "zeros are equal");
        assert_eq!(Ranks::default().of(1.0), 0.0);
    }

    proptest! {
        #[test]
        fn ranks_keep_the_order_and_ties(scores in prop::collection::vec(-5i8..5, 1..60)) {
            let scores: Vec<f64> = scores.into_iter().map(f64::from).collect();
            let ranks = Ranks::new(scores.clone());
            for &a in &scores {
                prop_assert!((0.0..1.0).contains(&ranks.of(a)));
                for &b in &scores {
                    prop_assert_eq!(a < b, ranks.of(a) < ranks.of(b));
                }
            }
            // A scale that keeps the order keeps the ranks.
            let scaled = Ranks::new(scores.iter().map(|score| 1000.0 * score + 7.0).collect());
            for &score in &scores {
                prop_assert_eq!(scaled.of(1000.0 * score + 7.0), ranks.of(score));
            }
        }
    }
}
