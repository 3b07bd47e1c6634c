//! The networks: layers, attention, UNet, text encoders, autoencoder.

pub mod attention;
pub mod clip;
pub mod cond;
pub(crate) mod layers;
pub(crate) mod recompute;
pub mod unet;
pub(crate) mod unet_blocks;
pub mod vae;
