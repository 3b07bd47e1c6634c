//! SDXL on libtorch: its models, what they are conditioned on, and the file layouts they come in.
//!
//! Shapes in line comments: `b` batch, `c` channels, `h`, `w` latent height and width, `n` tokens of context (77 a
//! chunk), `d` channels of a token. Latents are `[b, 4, h, w]`, a context is `[b, 77 k, 2048]`, pooled text `[b, 1280]`;
//! the numbers are SDXL's, a tiny model has others.
//!
//! Nothing here opens a socket or knows a data set. Only `attention` knows kernels.

pub mod allocator;
pub mod attention;
pub mod autograd;
pub mod brownian;
pub mod bundle;
pub mod clip;
pub mod cond;
pub mod config;
mod config_reader;
pub mod cost;
pub mod denoise;
pub mod discrete;
pub mod durable;
pub mod error;
pub mod export;
pub mod flops;
pub mod flow;
mod foreign;
pub mod forward;
pub mod guidance;
pub mod infotext;
pub mod init;
mod kernels;
pub mod keys;
pub mod kid;
mod layers;
mod mapped;
pub mod model;
pub mod model_spec;
pub mod noise;
mod remade;
pub mod sample;
pub mod sampler;
pub mod schedule;
mod single_file;
pub mod solvers;
pub mod stochastic;
mod stored;
pub mod tensor_file;
pub mod unet;
mod unet_blocks;
pub mod unipc;
pub mod vae;
pub mod walk;
pub mod weights;
pub mod workflow;

pub use error::{Error, Result};
