//! The kernel distance between the features of a set of drawn pictures and a set of real ones.
//!
//! The Kernel Inception Distance (Binkowski et al. 2018, arXiv 1801.01401) without Inception: the
//! unbiased estimate of the squared maximum mean discrepancy under the cubic kernel
//! `k(x, y) = (x . y / d + 1)^3`, on features from the caller. 0 means that the two sets are
//! indistinguishable; small negative values are noise around 0. It compares models on one kind of
//! features; it is not comparable with published KIDs, which use Inception's.
//!
//! The usual features are [`crate::vae::Vae::features`], which need no further model. Features are
//! standardised by the real set, so that all have equal weight.

use tch::{Kind, Tensor};

/// Returns the squared maximum mean discrepancy between `drawn` `[n, d]` and `real` `[m, d]`
/// features, standardised by `real`.
///
/// # Panics
/// If either set has fewer than two rows, or the sets differ in width.
pub fn kernel_distance(drawn: &Tensor, real: &Tensor) -> f64 {
    let (n, m) = (drawn.size(), real.size());
    assert!(
        n.len() == 2 && m.len() == 2 && n[1] == m[1],
        "two sets of features of one width, found {n:?} and {m:?}"
    );
    assert!(
        n[0] > 1 && m[0] > 1,
        "at least two pictures in each set, found {} and {}",
        n[0],
        m[0]
    );
    tch::no_grad(|| {
        let real = real.to_kind(Kind::Double);
        let mean = real.mean_dim(0, true, Kind::Double);
        let deviation = real.std_dim(0, true, true);
        // A feature that is constant over the real pictures has no scale.
        let deviation = deviation.where_self(&deviation.gt(0.0), &deviation.ones_like());
        let x = (drawn.to_kind(Kind::Double) - &mean) / &deviation;
        let y = (&real - &mean) / &deviation;
        within(&x) + within(&y) - 2.0 * across(&x, &y)
    })
}

/// Returns the mean kernel between rows of two sets.
fn across(x: &Tensor, y: &Tensor) -> f64 {
    kernel(x, y).mean(Kind::Double).double_value(&[])
}

/// Returns the mean kernel between different rows.
fn within(x: &Tensor) -> f64 {
    let n = x.size()[0] as f64;
    let all = kernel(x, x);
    (all.sum(Kind::Double) - all.diagonal(0, 0, 1).sum(Kind::Double)).double_value(&[])
        / (n * (n - 1.0))
}

/// Returns the kernel of all pairs of rows: `[n, d]`, `[m, d]` to `[n, m]`.
fn kernel(x: &Tensor, y: &Tensor) -> Tensor {
    (x.matmul(&y.transpose(0, 1)) / x.size()[1] as f64 + 1.0).pow_tensor_scalar(3)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::sample::noise::initial_noise;

    fn random(seed: u64, n: i64, d: i64) -> Tensor {
        initial_noise(seed, &[n, d]).to_kind(Kind::Double)
    }

    /// The definition, computed term by term.
    fn slow(x: &[Vec<f64>], y: &[Vec<f64>]) -> f64 {
        let (d, m) = (y[0].len(), y.len() as f64);
        let mean: Vec<f64> = (0..d)
            .map(|j| y.iter().map(|row| row[j]).sum::<f64>() / m)
            .collect();
        let std: Vec<f64> = (0..d)
            .map(|j| {
                (y.iter().map(|row| (row[j] - mean[j]).powi(2)).sum::<f64>() / (m - 1.0)).sqrt()
            })
            .collect();
        let standard = |set: &[Vec<f64>]| -> Vec<Vec<f64>> {
            set.iter()
                .map(|row| (0..d).map(|j| (row[j] - mean[j]) / std[j]).collect())
                .collect()
        };
        let (x, y) = (standard(x), standard(y));
        let k = |a: &[f64], b: &[f64]| {
            (a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / d as f64 + 1.0).powi(3)
        };
        let pairs = |set: &[Vec<f64>]| {
            let n = set.len();
            let sum: f64 = (0..n)
                .flat_map(|i| (0..n).map(move |j| (i, j)))
                .filter(|(i, j)| i != j)
                .map(|(i, j)| k(&set[i], &set[j]))
                .sum();
            sum / (n * (n - 1)) as f64
        };
        let across: f64 = x
            .iter()
            .flat_map(|a| y.iter().map(move |b| (a, b)))
            .map(|(a, b)| k(a, b))
            .sum();
        pairs(&x) + pairs(&y) - 2.0 * across / (x.len() * y.len()) as f64
    }

    fn rows(tensor: &Tensor) -> Vec<Vec<f64>> {
        (0..tensor.size()[0])
            .map(|i| Vec::try_from(tensor.get(i)).unwrap())
            .collect()
    }

    #[test]
    fn equals_the_definition() {
        let (x, y) = (random(1, 5, 3) + 0.3, random(2, 7, 3));
        let (fast, slow) = (kernel_distance(&x, &y), slow(&rows(&x), &rows(&y)));
        assert!(
            (fast - slow).abs() < 1e-12 * slow.abs().max(1.0),
            "{fast} and {slow}"
        );
    }

    #[test]
    fn grows_with_the_distance_and_is_about_0_for_one_distribution() {
        let real = random(3, 200, 16);
        let distances =
            [0.0, 0.1, 0.3].map(|shift| kernel_distance(&(random(4, 200, 16) + shift), &real));
        assert!(distances[0].abs() < 0.02, "{distances:?}");
        assert!(
            distances[0] < distances[1] && distances[1] < distances[2],
            "{distances:?}"
        );
    }

    #[test]
    fn a_feature_without_variance_does_not_divide_by_0() {
        let real = Tensor::cat(
            &[
                random(3, 20, 4),
                Tensor::ones([20, 1], (Kind::Double, Device::Cpu)),
            ],
            1,
        );
        assert!(kernel_distance(&real, &real).is_finite());
    }
}
