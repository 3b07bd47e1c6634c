//! The noise of sampling: where a picture starts, and what the stochastic samplers add on the way.
//!
//! Everything comes from torch's CPU generator in fp32, on every device, so that a seed means the same picture on each.
//! The initial noise is ComfyUI's. The noise of steps has two sources, as there:
//!
//! - [`independent`], for ancestral samplers: one draw a step from a generator of its own, seeded with
//!   `seed + 1`. ComfyUI does this where it samples on a CPU; on a GPU it draws from that GPU's generator.
//! - [`crate::brownian`], for SDE samplers: increments of one path of Brownian motion, which depend on the noise levels
//!   and not on the number of steps between them. ComfyUI's `dpmpp_2m_sde` has the same on every device.

use std::{collections::VecDeque, sync::Mutex};

use tch::{Device, Kind, Tensor};

use crate::torch::ffi::Torch;

/// Torch's generator belongs to the process: between seeding and drawing nobody else may seed it.
static GENERATOR: Mutex<()> = Mutex::new(());

/// Initial noise as ComfyUI draws it: torch's CPU generator seeded with `seed`, fp32, the whole batch at once.
///
/// # Panics
/// If there is no memory for it; where a user chose the shape, `f_initial_noise` reports that.
pub fn initial_noise(seed: u64, shape: &[i64]) -> Tensor {
    f_initial_noise(seed, shape).expect("there is memory for the noise of a batch that is in memory")
}

/// As [`initial_noise`], for a shape that may be too large.
pub(crate) fn f_initial_noise(seed: u64, shape: &[i64]) -> Torch {
    Ok(draws(seed, shape, 1)?.remove(0))
}

/// `count` draws in a row from one generator.
fn draws(seed: u64, shape: &[i64], count: usize) -> Torch<Vec<Tensor>> {
    let _guard = GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    tch::manual_seed(seed as i64);
    (0..count).map(|_| Tensor::f_randn(shape, (Kind::Float, Device::Cpu))).collect()
}

/// Noise of unit variance for the step from one level to the next: (from, to) to a tensor of the latents' shape.
pub type StepNoise<'a> = dyn FnMut(f64, f64) -> Tensor + 'a;

/// The source for ancestral samplers: independent draws. All `num_steps` of them are made and held at once, since the
/// generator is shared with the rest of the process; that is 256 KiB a step for a picture of 1024x1024.
pub fn independent(
    seed: u64,
    shape: &[i64],
    num_steps: usize,
    device: Device,
) -> Torch<impl FnMut(f64, f64) -> Tensor + use<>> {
    let mut drawn: VecDeque<Tensor> = draws(seed.wrapping_add(1), shape, num_steps)?.into();
    Ok(move |_, _| drawn.pop_front().expect("a sampler asks for noise at most once a step").to_device(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_noise_is_torchs() {
        // torch 2.13.0: torch.randn(2, 4, 2, 3, generator=torch.manual_seed(42)).flatten()[[0, 1, 24, 47]], and
        // torch.randn(1, 1, 1, 5, generator=torch.manual_seed(2**64 - 1)), so few that torch draws them one by one.
        let noise = initial_noise(42, &[2, 4, 2, 3]).flatten(0, -1);
        let picked = [0, 1, 24, 47].map(|i| noise.double_value(&[i]) as f32);
        assert_eq!(picked, [1.9269153, 1.4872841, 1.2791244, -0.48791388]);
        let few: Vec<f32> = initial_noise(u64::MAX, &[1, 1, 1, 5]).flatten(0, -1).try_into().unwrap();
        assert_eq!(few, [1.219763, -0.39297947, 1.0230751, -0.37342113, -0.0755102]);
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
        assert!(first.equal(&initial_noise(8, &shape)), "the first draw of the generator seeded with seed + 1");
        assert!(!first.equal(&second) && !first.equal(&initial_noise(7, &shape)));
    }
}
