//! The refusal of a learning rate that jumps because a run was made longer.
//!
//! `train.samples` is the only key that a resumed run may change and that the rate depends on: a
//! rate that has decayed to nearly nothing comes back at half its height, and undoes in a few steps
//! what the decay has settled.

use crate::{
    checkpoint::{RECIPE, found::Found},
    error::{Error, Result},
    recipe::{Checked, Recipe, changes::read_older},
    run::origin::Origin,
};

/// The largest factor by which the rate may grow from the last update to the next.
const MOST_GROWTH: f64 = 1.5;

/// Checks that a run that is resumed continues at about the rate that it had.
///
/// # Errors
/// [`Error::RateJump`]; [`Error::Checkpoint`] if the checkpoint's recipe cannot be read.
pub(crate) fn check(checked: &Checked, origin: &Origin) -> Result<()> {
    let Origin::Resume(found, _) = origin else {
        return Ok(());
    };
    let old = recipe_of(found)?;
    let new = &checked.recipe;
    let seen = found.saved.position.samples;
    let Some((before, after)) = jump(&old, new, seen) else {
        return Ok(());
    };
    Err(Error::RateJump {
        run_dir: new.run.dir.clone(),
        checkpoint: found.path.clone(),
        samples: [old.train.samples, new.train.samples],
        before,
        after,
    })
}

fn recipe_of(found: &Found) -> Result<Recipe> {
    let text = found.recipe()?;
    read_older(&text).map_err(|reason| Error::checkpoint(&found.path.join(RECIPE), reason))
}

/// Returns the rates of the last update by the old recipe and of the next one by the new, after
/// `seen` samples, if the rate jumps.
fn jump(old: &Recipe, new: &Recipe, seen: u64) -> Option<(f64, f64)> {
    let total = old.train.samples;
    if total == new.train.samples || seen >= new.train.samples {
        return None;
    }
    let batch = old
        .train
        .micro_batch
        .saturating_mul(old.train.micro_batches) as u64;
    let mut before = old.lr.rate(seen.saturating_sub(batch), total);
    if seen < total {
        // A rate that is still rising is that of the update which would have come.
        before = before.max(old.lr.rate(seen, total));
    }
    let after = new.lr.rate(seen, new.train.samples);
    (after > MOST_GROWTH * before).then_some((before, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(samples: u64, lr: &str) -> Recipe {
        let text = format!(
            "[run]\ndir = 'r'\n[model]\nbase = 'm'\n[[data]]\npath = 'd'\n\
             [train]\nsamples = {samples}\nmicro_batch = 4\n[lr]\npeak = 1e-4\n{lr}\n"
        );
        toml::from_str(&text).expect("a recipe")
    }

    fn jumps(lr: &str, [old, new]: [u64; 2], seen: u64) -> Option<(f64, f64)> {
        jump(&recipe(old, lr), &recipe(new, lr), seen)
    }

    #[test]
    fn a_longer_run_jumps_where_the_rate_has_decayed() {
        let (before, after) = jumps("", [32, 64], 32).expect("a jump");
        assert!(
            (before - 3.806e-6).abs() < 1e-9 && (after - 5e-5).abs() < 1e-12,
            "{before} {after}"
        );
        // Finished, in the middle, linear, with a floor, after one update at rate 0.
        for (lr, totals, seen) in [
            ("decay = 'linear'", [100, 1000], 100),
            ("decay = 'linear'", [100, 200], 70),
            ("", [100, 400], 60),
            ("min_ratio = 0.01", [1000, 2000], 1000),
            ("", [4, 8], 8),
            ("warmup_samples = 20", [100, 300], 100),
        ] {
            let jump = jumps(lr, totals, seen);
            let expected = seen < totals[1];
            assert_eq!(jump.is_some(), expected, "{lr} {totals:?} {seen}: {jump:?}");
        }
    }

    #[test]
    fn the_same_length_a_shorter_run_and_a_rate_without_decay_do_not() {
        for (lr, totals, seen) in [
            ("", [1000, 1000], 500),
            ("", [1000, 900], 500),
            ("", [1000, 1100], 500),
            ("", [1000, 400], 500),
            ("decay = 'constant'", [32, 64], 32),
            ("min_ratio = 0.9", [32, 64], 32),
            // While the rate rises it rises by more than the factor, in either run.
            ("warmup_samples = 50", [100, 1000], 0),
            ("warmup_samples = 50", [100, 1000], 4),
            ("warmup_samples = 50", [100, 1000], 8),
        ] {
            assert_eq!(jumps(lr, totals, seen), None, "{lr} {totals:?} {seen}");
        }
    }
}
