//! SDXL on libtorch: its models, what they are conditioned on, and the file layouts they come in.
//!
//! Shapes in line comments: `b` batch, `c` channels, `h`, `w` latent height and width, `n` tokens of context (77 a
//! chunk), `d` channels of a token. Latents are `[b, 4, h, w]`, a context is `[b, 77 k, 2048]`, pooled text `[b, 1280]`;
//! the numbers are SDXL's, a tiny model has others.
//!
//! Nothing here opens a socket or knows a data set. Only `attention` knows kernels.

mod compare;
pub mod config;
pub mod cost;
pub mod durable;
pub mod error;
mod files;
pub mod flow;
mod nets;
pub mod sample;
mod torch;
pub mod weights;

pub use compare::{forward, kid};
pub use cost::{flops, walk};
pub use files::{bundle, export, export::model_spec, folder, model};
pub use flow::discrete;
pub use nets::{attention, clip, cond, unet, vae};
pub use sample::{
    brownian, denoise, guidance, infotext, noise, sampler, schedule, solvers, stochastic, unipc, workflow,
};
pub use torch::{allocator, autograd, ffi, write};
pub use weights::{component, init, keys, tensor_file};

pub use error::{Error, Result};
