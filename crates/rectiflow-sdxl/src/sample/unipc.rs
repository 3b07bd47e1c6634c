//! UniPC (Zhao et al. 2023): a multistep predictor and a corrector that reuses the next step's
//! evaluation.
//!
//! The variant B1(h) of order 3 on denoised predictions, with the lower orders that its authors use
//! at both ends. The paper uses latents of unit variance; its update is linear in them, so it is
//! written here for the latents of [`crate::denoise`], where `lambda = -ln sigma` and every signal
//! factor is 1. For this reason it also holds for flow. As in ComfyUI, a final 0 is replaced by
//! 0.001, because lambda must be finite.

use tch::Tensor;

use crate::{
    error::Result,
    sample::{
        denoise::Denoise,
        solvers::{Progress, Watch},
    },
};

/// Order of the inner steps.
const ORDER: usize = 3;
/// The value that replaces a final sigma of 0.
pub const LAST_SIGMA: f64 = 0.001;

/// UniPC from `sigmas[0]` to the last sigma, or to [`LAST_SIGMA`] if that is 0. Order 3 except at
/// both ends, one evaluation per step.
///
/// A single step is Euler's method (ComfyUI returns the input there).
///
/// # Errors
/// Errors of `denoise`.
pub fn uni_pc(
    denoise: &mut Denoise<'_>,
    x: Tensor,
    sigmas: &[f64],
    watch: &mut Watch<'_>,
) -> Result<Tensor> {
    let sigmas = above_zero(sigmas);
    let num_steps = sigmas.len() - 1;
    let highest = ORDER.min(num_steps.saturating_sub(1)).max(1);
    let mut x = x;
    // Newest first.
    let mut answers = Vec::new();
    for (step, pair) in sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        if step == 0 {
            answers.push(Answer::of(denoise, &x, sigma)?);
        }
        watch(Progress {
            step,
            num_steps,
            sigma,
            x: &x,
            denoised: &answers[0].denoised,
        });
        // The predictor, and unless this is the last step, the corrector.
        let order = highest.min(step + 1).min(num_steps - step);
        let update = Update::new(&x, [sigma, next], &answers[..order]);
        let predicted = update.predict();
        if step + 1 == num_steps {
            return Ok(predicted);
        }
        let answer = Answer::of(denoise, &predicted, next)?;
        x = update.correct(&answer.denoised);
        answers.insert(0, answer);
        answers.truncate(ORDER);
    }
    Ok(x)
}

/// Returns the levels with [`LAST_SIGMA`] in place of 0.
fn above_zero(sigmas: &[f64]) -> Vec<f64> {
    let mut sigmas = sigmas.to_vec();
    for sigma in &mut sigmas {
        if *sigma == 0.0 {
            *sigma = LAST_SIGMA;
        }
    }
    sigmas
}

/// An evaluation of the model.
struct Answer {
    denoised: Tensor,
    /// Its place: `-ln sigma`.
    lambda: f64,
}

impl Answer {
    fn of(denoise: &mut Denoise<'_>, x: &Tensor, sigma: f64) -> Result<Self> {
        Ok(Self {
            denoised: denoise(x, sigma)?,
            lambda: -sigma.ln(),
        })
    }
}

/// The terms of one step.
struct Update {
    /// The result of a step of order 1.
    base: Tensor,
    /// Differences of earlier predictions to the newest, each divided by its ratio.
    differences: Vec<Tensor>,
    /// Distances of earlier predictions from the newest, in step lengths; then 1 for the next one.
    ratios: Vec<f64>,
    newest: Tensor,
    /// The negative length of the step in lambda.
    hh: f64,
}

impl Update {
    /// `answers` are the last predictions, one per order of the step, newest first.
    fn new(x: &Tensor, [sigma, next]: [f64; 2], answers: &[Answer]) -> Self {
        let newest = &answers[0].denoised;
        let lambda = answers[0].lambda;
        let length = -next.ln() - lambda;
        let mut ratios = Vec::new();
        let mut differences = Vec::new();
        for earlier in &answers[1..] {
            let ratio = (earlier.lambda - lambda) / length;
            differences.push((&earlier.denoised - newest) / ratio);
            ratios.push(ratio);
        }
        ratios.push(1.0);
        let base = x * (next / sigma) - newest * (-length).exp_m1();
        Self {
            base,
            differences,
            ratios,
            newest: newest.shallow_clone(),
            hh: -length,
        }
    }

    fn predict(&self) -> Tensor {
        let weights = match self.differences.len() {
            0 => Vec::new(),
            // The authors' simplification: any weight leads to order 2.
            1 => vec![0.5],
            n => weights(&self.ratios[..n], self.hh),
        };
        self.with(&weights, None)
    }

    fn correct(&self, answer: &Tensor) -> Tensor {
        let weights = if self.ratios.len() == 1 {
            vec![0.5]
        } else {
            weights(&self.ratios, self.hh)
        };
        self.with(&weights, Some(answer - &self.newest))
    }

    /// Returns the step of order 1 plus weighted differences.
    fn with(&self, weights: &[f64], last: Option<Tensor>) -> Tensor {
        let terms = weights
            .iter()
            .zip(self.differences.iter().chain(last.as_ref()));
        terms.fold(self.base.shallow_clone(), |x, (weight, difference)| {
            x - difference * (self.hh * weight)
        })
    }
}

/// Returns the weights that match the first `n` derivatives (theorem 3.1 of the paper): the
/// solution of `sum_j ratio_j^i w_j = b_i` for `i` from 0, with `b_i = (i + 1)! phi_(i+2)(hh)` and
/// B(h) = h.
fn weights(ratios: &[f64], hh: f64) -> Vec<f64> {
    let n = ratios.len();
    let mut rows: Vec<Vec<f64>> = Vec::new();
    let mut phi = hh.exp_m1() / hh - 1.0;
    let mut factorial = 1.0;
    for i in 0..n {
        let mut row: Vec<f64> = ratios.iter().map(|ratio| ratio.powi(i as i32)).collect();
        row.push(phi * factorial / hh);
        rows.push(row);
        factorial *= (i + 2) as f64;
        phi = phi / hh - 1.0 / factorial;
    }
    solve(rows)
}

/// Solves a small linear system by Gauss-Jordan elimination; the last element of each row is its
/// right-hand side.
fn solve(mut rows: Vec<Vec<f64>>) -> Vec<f64> {
    let n = rows.len();
    for column in 0..n {
        let largest =
            (column..n).max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()));
        rows.swap(column, largest.expect("the range is not empty"));
        let pivot = rows[column].clone();
        for (i, row) in rows.iter_mut().enumerate() {
            if i != column {
                let factor = row[column] / pivot[column];
                for (value, pivot) in row.iter_mut().zip(&pivot) {
                    *value -= factor * pivot;
                }
            }
        }
    }
    (0..n).map(|i| rows[i][n] / rows[i][i]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_systems_are_solved() {
        let solution = solve(vec![
            vec![0.0, 2.0, 1.0, 7.0],
            vec![1.0, 1.0, 1.0, 6.0],
            vec![2.0, 0.0, -1.0, -1.0],
        ]);
        assert!(
            solution
                .iter()
                .zip([1.0, 2.0, 3.0])
                .all(|(a, b)| (a - b).abs() < 1e-12),
            "{solution:?}"
        );
    }

    #[test]
    fn short_steps_have_the_weights_of_polynomials() {
        // As h approaches 0, the weights integrate the polynomial through the predictions:
        // sum w = 1/2, sum r w = 1/3.
        let found = weights(&[-1.0, 1.0], -1e-3);
        assert!(
            (found[0] + found[1] - 0.5).abs() < 1e-3
                && (found[1] - found[0] - 1.0 / 3.0).abs() < 1e-3,
            "{found:?}"
        );
    }
}
