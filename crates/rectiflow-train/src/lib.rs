//! The trainer: from a recipe, a packed data set and a base model to checkpoints, metrics and pictures.
//!
//! ```text
//! recipe -> checked | data set -> loader -> step -> guard -> optimiser -> checkpoint
//!                   | base model --^    \-> metrics, test loss, previews
//! ```
//!
//! [`run::train`] tells the story from top to bottom.

pub mod checkpoint;
pub mod config;
pub mod error;
pub mod guard;
pub mod hardware;
pub mod lr;
mod measure;
mod pictures;
pub mod plan;
mod ranks;
pub mod run;
pub mod state;
mod step;

pub use checkpoint::{components, model};
pub use measure::{findings, metrics, testloss};
pub use pictures::{draw, gallery, preview, staged};
pub use plan::{memory, plan_facts, plan_memory, simulate};
pub use ranks::{comm, lag, launch};
pub use run::{blackbox, eval, replay};
pub use state::{ema, flat, layout, optim, partition, precision};
pub use step::{rehearsal, work};

pub use error::{Error, Result};
