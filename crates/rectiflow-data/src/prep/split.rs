//! Selects the samples that are held out for the test loss. Pure, and by content, so that a picture
//! stays in its split.
//!
//! Samples are ranked by a hash of (seed, id), which never changes for a picture. A fraction
//! selects the samples whose hash is below it; a count selects the lowest hashes. Samples that have
//! a split keep it when a folder grows: a test loss on pictures that were trained on would be
//! wrong. At most half of a data set is held out.

use crate::{
    format::{manifest::Split, record::SampleId},
    rng::{Purpose, key_u64},
};

/// The share of the samples that is held out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Share {
    /// A fraction of all samples, 0 to 0.5.
    Fraction(f64),
    /// A number of samples.
    Count(u64),
}

/// The splits of `new` samples. `present` counts those that have one already: (train, test).
pub(crate) fn sides(new: &[SampleId], present: (u64, u64), share: Share, seed: u64) -> Vec<Split> {
    let (train, test) = present;
    let total = train + test + new.len() as u64;
    let ranked = ranked(new, seed);
    let wanted = match share {
        Share::Fraction(fraction) => {
            let limit = fraction * 2f64.powi(64);
            ranked.partition_point(|&(key, _)| (key as f64) < limit) as u64
        }
        Share::Count(count) => count.saturating_sub(test),
    };
    let wanted = wanted.min((total / 2).saturating_sub(test)) as usize;
    let mut sides = vec![Split::Train; new.len()];
    for &(_, index) in ranked.iter().take(wanted) {
        sides[index] = Split::Test;
    }
    sides
}

/// Hash and index of each sample, in the order of the hashes.
fn ranked(samples: &[SampleId], seed: u64) -> Vec<(u64, usize)> {
    let mut ranked = Vec::with_capacity(samples.len());
    for (index, id) in samples.iter().enumerate() {
        ranked.push((key_u64(seed, Purpose::Split, &[id.0]), index));
    }
    ranked.sort_unstable();
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(range: std::ops::Range<u64>) -> Vec<SampleId> {
        range
            .map(|i| SampleId(i.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
            .collect()
    }

    fn num_test(sides: &[Split]) -> usize {
        sides.iter().filter(|&&side| side == Split::Test).count()
    }

    #[test]
    fn fraction_is_met_and_does_not_depend_on_the_others() {
        let all = ids(0..20_000);
        let whole = sides(&all, (0, 0), Share::Fraction(0.1), 1);
        // Five standard deviations.
        assert!(
            num_test(&whole).abs_diff(2000) < 213,
            "{}",
            num_test(&whole)
        );
        let half = sides(&all[..10_000], (0, 0), Share::Fraction(0.1), 1);
        assert_eq!(half, whole[..10_000]);
        let rest = sides(&all[10_000..], (9_000, 1_000), Share::Fraction(0.1), 1);
        assert_eq!(rest, whole[10_000..]);
        assert_ne!(sides(&all, (0, 0), Share::Fraction(0.1), 2), whole);
    }

    #[test]
    fn count_is_exact_and_filled_up_when_a_folder_grows() {
        let all = ids(0..1000);
        assert_eq!(num_test(&sides(&all, (0, 0), Share::Count(100), 1)), 100);
        assert_eq!(num_test(&sides(&all, (500, 60), Share::Count(100), 1)), 40);
        assert_eq!(num_test(&sides(&all, (500, 200), Share::Count(100), 1)), 0);
    }

    #[test]
    fn never_more_than_half() {
        for (num, most) in [(0, 0), (1, 0), (2, 1), (3, 1), (100, 50)] {
            assert_eq!(
                num_test(&sides(&ids(0..num), (0, 0), Share::Count(2048), 1)),
                most
            );
            assert!(num_test(&sides(&ids(0..num), (0, 0), Share::Fraction(0.5), 1)) <= most);
        }
        assert_eq!(
            num_test(&sides(&ids(0..10), (0, 10), Share::Count(2048), 1)),
            0
        );
        assert_eq!(
            num_test(&sides(&ids(0..10), (4, 4), Share::Count(2048), 1)),
            5
        );
    }
}
