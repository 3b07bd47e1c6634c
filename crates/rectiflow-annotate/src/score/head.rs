//! The numbers of a model to one score a picture. Pure.

/// What is done to the numbers before they count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// Each to 0 to 1.
    Sigmoid,
    /// All to probabilities.
    Softmax,
}

/// Which of several numbers counts.
#[derive(Debug, Clone, PartialEq)]
pub enum Counts {
    /// The only one.
    Only,
    /// One of them, from 0.
    One(usize),
    /// The sum, each multiplied by its weight: of probabilities the expected value.
    Weighted(Vec<f64>),
}

/// How a score is made of a model's numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// What is done to the numbers.
    pub activation: Activation,
    /// Which of them counts.
    pub counts: Counts,
}

impl Head {
    /// Whether it fits a model that returns `width` numbers a picture.
    ///
    /// # Errors
    /// What is expected, and what to do.
    pub fn check(&self, width: usize) -> Result<(), String> {
        match &self.counts {
            Counts::Only if width == 1 => Ok(()),
            Counts::Only => Err(format!(
                "it returns {width} numbers a picture: name the one that is the score with \
                 --class, 0 to {}, or their weights with --weights",
                width - 1
            )),
            Counts::One(class) if *class < width => Ok(()),
            Counts::One(class) => Err(format!(
                "it returns {width} numbers a picture, there is no class {class}: 0 to {}",
                width - 1
            )),
            Counts::Weighted(weights) if weights.len() == width => Ok(()),
            Counts::Weighted(weights) => Err(format!(
                "it returns {width} numbers a picture, and there are {} weights: name as many",
                weights.len()
            )),
        }
    }

    /// The score of a picture with these numbers. It is NaN if they are.
    ///
    /// # Panics
    /// If there are other numbers than [`Head::check`] has seen.
    pub fn score(&self, numbers: &[f32]) -> f64 {
        let numbers = self.activation.of(numbers);
        match &self.counts {
            Counts::Only => numbers[0],
            Counts::One(class) => numbers[*class],
            Counts::Weighted(weights) => {
                let products = numbers
                    .iter()
                    .zip(weights)
                    .map(|(number, weight)| number * weight);
                products.sum()
            }
        }
    }
}

impl Activation {
    /// All, with the names that users write.
    pub const ALL: [(&'static str, Self); 3] = [
        ("none", Self::None),
        ("sigmoid", Self::Sigmoid),
        ("softmax", Self::Softmax),
    ];

    /// The numbers after it, computed in 64 bits.
    pub fn of(self, numbers: &[f32]) -> Vec<f64> {
        let numbers: Vec<f64> = numbers.iter().copied().map(f64::from).collect();
        match self {
            Self::None => numbers,
            Self::Sigmoid => numbers
                .iter()
                .map(|number| 1.0 / (1.0 + (-number).exp()))
                .collect(),
            Self::Softmax => {
                let most = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let raised: Vec<f64> = numbers.iter().map(|number| (number - most).exp()).collect();
                let sum: f64 = raised.iter().sum();
                raised.iter().map(|number| number / sum).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(activation: Activation, counts: Counts) -> Head {
        Head { activation, counts }
    }

    #[test]
    fn numbers_become_scores() {
        let logits = [0.0, 1.0, -2.0];
        let sum = 1.0 + 1f64.exp() + (-2f64).exp();
        for (head, expected) in [
            (head(Activation::None, Counts::One(2)), -2.0),
            (head(Activation::Sigmoid, Counts::One(0)), 0.5),
            (head(Activation::Softmax, Counts::One(0)), 1.0 / sum),
            (
                head(Activation::Softmax, Counts::Weighted(vec![1.0, 2.0, 3.0])),
                (1.0 + 2.0 * 1f64.exp() + 3.0 * (-2f64).exp()) / sum,
            ),
        ] {
            assert!((head.score(&logits) - expected).abs() < 1e-12, "{head:?}");
        }
        let only = head(Activation::None, Counts::Only);
        assert_eq!(only.score(&[5.5]), 5.5);
        assert!(only.score(&[f32::NAN]).is_nan());
        // Large logits do not overflow.
        let softmax = head(Activation::Softmax, Counts::One(0));
        assert_eq!(softmax.score(&[1e30, 0.0]), 1.0);
        let sigmoid = head(Activation::Sigmoid, Counts::Only);
        assert_eq!(
            (sigmoid.score(&[-1e30]), sigmoid.score(&[1e30])),
            (0.0, 1.0)
        );
    }

    #[test]
    fn a_head_that_does_not_fit_says_what_would() {
        for (counts, expected) in [
            (Counts::Only, "3 numbers a picture: name the one"),
            (Counts::One(3), "no class 3: 0 to 2"),
            (Counts::Weighted(vec![1.0]), "there are 1 weights"),
        ] {
            let problem = head(Activation::None, counts).check(3).unwrap_err();
            assert!(problem.contains(expected), "{problem}");
        }
        for counts in [Counts::One(2), Counts::Weighted(vec![1.0; 3])] {
            head(Activation::None, counts).check(3).unwrap();
        }
        head(Activation::None, Counts::Only).check(1).unwrap();
    }
}
