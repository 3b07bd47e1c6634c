//! SDXL on libtorch: its networks, their conditioning, sampling, and the files of models.
//!
//! A model is opened from a diffusers folder, a single file or a training checkpoint ([`model`]),
//! each with its own tensor names. Its UNet predicts a velocity ([`flow`]); training compares that
//! with a target, and sampling integrates it ([`sample`]). A trained model is exported as a single
//! file for ComfyUI or as a folder for diffusers ([`export`]).
//!
//! ```text
//! open      file -> names (keys) -> tensors (weights) -> networks
//! sample    token ids -> text encoders -> guidance -> sampler (schedule, noise) -> decoder
//! export    networks or files -> names -> single file, diffusers folder
//! ```
//!
//! The folders, from the top floor down; each uses only what stands below it:
//!
//! | folder | holds |
//! |---|---|
//! | `compare` | single forward passes, and the distance between sets of pictures |
//! | `files` | whole models in files: folders, single files, detection of other files, export |
//! | `provenance` | texts inside pictures, by which other programs draw them again |
//! | `sample` | noise to pictures: schedules, samplers, guidance |
//! | `nets` | layers, attention, recomputation, UNet, text encoders, autoencoder, conditioning |
//! | `weights` | named tensors: the table of names, safetensors files, random weights |
//! | `cost` | parameters, FLOPs and bytes of activations, from sizes alone |
//! | `torch` | the parts of libtorch that `tch` lacks: kernels, autograd nodes, allocator; C++ |
//! | `config` | sizes of models and schedulers, read from diffusers' `config.json` |
//! | `flow` | noise levels, noising and targets of training and sampling, eps and v included |
//! | `durable`, `error` | atomic writes of files and folders; errors |
//!
//! Shapes in line comments: `b` batch, `c` channels, `h`, `w` latent height and width, `n` tokens
//! of context (77 per chunk), `d` channels of a token. Latents are `[b, 4, h, w]`, a context is
//! `[b, 77 k, 2048]`, pooled text `[b, 1280]`; the numbers are SDXL's, a tiny model has others.
//!
//! Nothing here opens a socket or knows a data set. All kernels are in `torch`, and only `nets`
//! calls them.

mod compare;
pub mod config;
pub mod cost;
pub mod durable;
pub mod error;
mod files;
pub mod flow;
mod nets;
mod provenance;
pub mod sample;
mod torch;
pub mod weights;

pub use compare::{forward, kid};
pub use cost::{flops, walk};
pub use files::{bundle, export, export::model_spec, folder, model, prediction, visit};
pub use flow::discrete;
pub use nets::{attention, clip, cond, unet, vae};
pub use provenance::{differences, drawing, infotext, workflow};
pub use sample::{
    brownian, denoise, guidance, noise, sampler, schedule, solvers, stochastic, unipc,
};
pub use torch::{
    allocator, autograd, choices, counting, ffi, gpu, test_threads, vectors, waiting, write,
};
pub use weights::{component, init, keys, tensor_file};

pub use error::{Error, Result};
