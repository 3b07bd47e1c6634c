//! The trainer: from a recipe, a packed data set and a base model to checkpoints, metrics and pictures.
//!
//! ```text
//! recipe -> checked | data set -> loader -> step -> optimiser -> checkpoint
//!                   | base model --^    \-> metrics, test loss, previews
//! ```
//!
//! [`run::train`] tells the story from top to bottom.

pub mod checkpoint;
pub mod config;
#[cfg(test)]
mod config_page;
pub mod draw;
pub mod error;
pub mod findings;
pub mod flat;
pub mod gallery;
mod keys;
pub mod lr;
pub mod metrics;
pub mod model;
pub mod optim;
pub mod preview;
pub mod run;
pub mod staged;
pub mod state;
mod step;
pub mod testloss;
mod workers;

pub use error::{Error, Result};
