//! The trainer: from a recipe, a packed data set and a base model to checkpoints, metrics and pictures.
//!
//! ```text
//! recipe -> checked | data set -> loader -> step -> guard -> optimiser -> checkpoint
//!                   | base model --^    \-> metrics, test loss, previews
//! ```
//!
//! [`run::train`] tells the story from top to bottom.

pub mod checkpoint;
pub mod error;
pub mod guard;
pub mod hardware;
pub mod lr;
mod measure;
mod pictures;
pub mod plan;
mod ranks;
pub mod recipe;
pub mod run;
pub mod state;
mod step;

pub use checkpoint::{components, model};
pub use measure::{findings, metrics, testloss};
pub use pictures::{generate, preview, staged_model};
pub use plan::{estimate, facts, gpu_memory, simulate};
pub use ranks::{comm, launch, straggler, traffic};
pub use run::{blackbox, eval, replay};
pub use state::{ema, flat, layout, optim, partition, precision};
pub use step::{step_flops, synthetic};

pub use error::{Error, Result};
