//! The trainer: from a recipe, a packed data set and a base model to checkpoints, metrics and pictures.
//!
//! ```text
//! recipe -> checked | data set -> loader -> step -> guard -> optimiser -> checkpoint
//!                   | base model --^    \-> metrics, test loss, previews
//! ```
//!
//! [`run::train`] tells the story from top to bottom.

mod agree;
mod bins;
pub mod blackbox;
mod c10d;
mod changes;
pub mod checkpoint;
pub mod comm;
mod components;
pub mod config;
#[cfg(test)]
mod config_page;
pub mod draw;
pub mod ema;
pub mod error;
pub mod eval;
mod exchange;
pub mod findings;
pub mod flat;
pub mod gallery;
mod gradient_vector;
mod gradients;
pub mod guard;
pub mod hardware;
mod keys;
pub mod lag;
pub mod launch;
pub mod lr;
pub mod memory;
pub mod metrics;
pub mod model;
mod one_pass;
mod opening;
pub mod optim;
mod origin;
pub mod partition;
pub mod plan;
pub mod plan_facts;
pub mod plan_memory;
pub mod precision;
pub mod preview;
mod pulse;
mod reduce;
pub mod rehearsal;
mod repeated;
pub mod replay;
mod restore;
pub mod run;
mod saving;
pub mod simulate;
mod snapshots;
pub mod staged;
pub mod state;
mod step;
mod stopped;
pub mod testloss;
pub mod vitals;
mod watch;
pub mod work;
mod workers;

pub use error::{Error, Result};
