//! Everything that changes during training, as one value: what a resume needs is what is in here.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{flat::FlatParameters, optim::AdamW};

/// How far a run is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Steps of the order that have been passed: the next step to read.
    pub cursor: u64,
    /// Updates made. It falls behind the cursor where batches are passed over.
    pub update: u64,
    /// Samples in the steps passed.
    pub samples: u64,
}

/// The state of a run between two steps.
#[derive(Debug)]
pub struct TrainState {
    /// How far the run is.
    pub position: Position,
    /// The trained parameters, fp32.
    pub parameters: FlatParameters,
    /// The optimiser's memory.
    pub optimizer: AdamW,
}

impl TrainState {
    /// The learning rate of each part of the flat vector, given the UNet's and the text encoders' multiple of it.
    pub fn rates(&self, lr: f64, text_encoder_ratio: f64) -> Vec<(Range<i64>, f64)> {
        let rate = |component: &str| if component == "unet" { lr } else { lr * text_encoder_ratio };
        self.parameters.groups.iter().map(|group| (group.range.clone(), rate(&group.component))).collect()
    }
}
