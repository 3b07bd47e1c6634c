//! The noise of sampling: the initial noise, and the noise that stochastic samplers add.
//!
//! All noise comes from torch's CPU generator in fp32, so that a seed produces the same picture on
//! every device. The initial noise is ComfyUI's. The noise of steps has two sources, as in ComfyUI:
//!
//! - [`independent`], for ancestral samplers: one draw per step from a separate generator, seeded
//!   with `seed + 1`. ComfyUI does this on a CPU; on a GPU it draws from the GPU's generator.
//! - [`crate::brownian`], for SDE samplers: increments of one path of Brownian motion, which depend
//!   on the noise levels, not on the number of steps between them. ComfyUI's `dpmpp_2m_sde` does
//!   this on every device.

use std::{collections::VecDeque, sync::Mutex};

use tch::{Device, Kind, Tensor};

use crate::torch::ffi::Torch;

/// Guards torch's generator, which is global: no other thread may seed it between seeding and
/// drawing.
static GENERATOR: Mutex<()> = Mutex::new(());

/// Returns initial noise as ComfyUI draws it: from torch's CPU generator seeded with `seed`, in
/// fp32, for the whole batch at once.
///
/// # Panics
/// If memory runs out; `f_initial_noise` returns that as an error, for shapes that a user chooses.
pub fn initial_noise(seed: u64, shape: &[i64]) -> Tensor {
    f_initial_noise(seed, shape).expect("the noise of a batch fits in memory if the batch does")
}

/// As [`initial_noise`], with an error if memory runs out.
pub(crate) fn f_initial_noise(seed: u64, shape: &[i64]) -> Torch {
    Ok(draws(seed, shape, 1)?.remove(0))
}

/// Returns `count` consecutive draws from one generator.
fn draws(seed: u64, shape: &[i64], count: usize) -> Torch<Vec<Tensor>> {
    let _guard = GENERATOR
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    tch::manual_seed(seed as i64);
    (0..count)
        .map(|_| Tensor::f_randn(shape, (Kind::Float, Device::Cpu)))
        .collect()
}

/// A source of step noise: a function from (this level, next level) to unit-variance noise of the
/// latents' shape.
pub type StepNoise<'a> = dyn FnMut(f64, f64) -> Tensor + 'a;

/// Returns the source for ancestral samplers: independent draws. All `num_steps` draws are made in
/// advance and held, since the generator is shared with the rest of the process; they take 256 KiB
/// per step for a 1024x1024 picture.
pub fn independent(
    seed: u64,
    shape: &[i64],
    num_steps: usize,
    device: Device,
) -> Torch<impl FnMut(f64, f64) -> Tensor + use<>> {
    let mut drawn: VecDeque<Tensor> = draws(seed.wrapping_add(1), shape, num_steps)?.into();
    Ok(move |_, _| {
        drawn
            .pop_front()
            .expect("a sampler requests noise at most once per step")
            .to_device(device)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_noise_is_torchs() {
        // torch 2.13.0:
        // torch.randn(2, 4, 2, 3, generator=torch.manual_seed(42)).flatten()[[0, 1, 24, 47]]
        // torch.randn(1, 1, 1, 5, generator=torch.manual_seed(2**64 - 1))
        // torch draws the second, smaller one value by value.
        let noise = initial_noise(42, &[2, 4, 2, 3]).flatten(0, -1);
        let picked = [0, 1, 24, 47].map(|i| noise.double_value(&[i]) as f32);
        assert_eq!(picked, [1.9269153, 1.4872841, 1.2791244, -0.48791388]);
        let few: Vec<f32> = initial_noise(u64::MAX, &[1, 1, 1, 5])
            .flatten(0, -1)
            .try_into()
            .unwrap();
        assert_eq!(
            few,
            [1.219763, -0.39297947, 1.0230751, -0.37342113, -0.0755102]
        );
    }

    #[test]
    fn too_much_is_an_error() {
        // More bytes than a 64-bit processor can address.
        assert!(f_initial_noise(0, &[1 << 24, 4, 1 << 10, 1 << 10]).is_err());
        assert!(independent(0, &[1 << 24, 4, 1 << 10, 1 << 10], 2, Device::Cpu).is_err());
    }

    #[test]
    fn steps_have_noise_of_their_own() {
        let shape = [1, 4, 3, 5];
        let mut steps = independent(7, &shape, 2, Device::Cpu).unwrap();
        let (first, second) = (steps(1.0, 0.5), steps(0.5, 0.2));
        assert!(
            first.equal(&initial_noise(8, &shape)),
            "the first draw of the generator seeded with seed + 1"
        );
        assert!(!first.equal(&second) && !first.equal(&initial_noise(7, &shape)));
    }
}
