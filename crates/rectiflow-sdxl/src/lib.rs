//! SDXL on libtorch: its models, what they are conditioned on, and the file layouts they come in.
//!
//! Shapes in line comments: `b` batch, `c` channels, `h`, `w` latent height and width, `n` tokens of context (77 a
//! chunk), `d` channels of a token. Latents are `[b, 4, h, w]`, a context is `[b, 77 k, 2048]`, pooled text `[b, 1280]`;
//! the numbers are SDXL's, a tiny model has others.
//!
//! Its folders, from the top floor down; each uses only what stands below it:
//!
//! | folder | what it holds |
//! |---|---|
//! | `compare` | our numbers against other programs', pictures against real ones |
//! | `files` | whole models in files: a diffusers folder, a single file, and the way from one to the other |
//! | `sample` | noise to pictures: schedules, samplers, guidance, ComfyUI's workflow |
//! | `nets` | the networks: layers, attention, UNet, text encoders, autoencoder |
//! | `weights` | named tensors: in files, mapped, random, under each layout's names |
//! | `cost` | sizes without weights: what a pass keeps in memory, and its operations |
//! | `torch` | what `tch` lacks of libtorch: all kernels, all C++ |
//! | `config` | model sizes, read from their JSON |
//! | `flow` | noise levels, for training and sampling |
//!
//! Below them lie `durable` (files that appear whole) and `error`. Nothing here opens a socket or knows a data set. Only
//! `attention` knows kernels.

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
