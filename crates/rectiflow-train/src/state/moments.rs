//! The optimiser's memory: the mean of gradients and that of their squares, in fp32 or in 8 bits.

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::state::{
    eight_bit::{
        blocks::{BLOCK, Blocks},
        pass::{Decoded, EightBit},
    },
    layout::narrow,
};

/// How the optimiser's moments are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum MomentsKind {
    /// fp32: 8 bytes a parameter.
    #[default]
    #[serde(rename = "fp32")]
    Fp32,
    /// 8 bits: 2.125 bytes a parameter.
    #[serde(rename = "8bit")]
    EightBit,
}

impl MomentsKind {
    /// Returns the bytes of both moments of as many parameters, at least: blocks at the ends of
    /// tensors may be shorter.
    pub fn bytes(self, parameters: u64) -> u64 {
        match self {
            Self::Fp32 => 8 * parameters,
            Self::EightBit => 2 * parameters + 8 * parameters.div_ceil(BLOCK as u64),
        }
    }

    /// Returns the number of elements of which a rank's piece of a bucket is a multiple, so that it
    /// cuts no block.
    pub fn multiple(self) -> i64 {
        match self {
            Self::Fp32 => 1,
            Self::EightBit => BLOCK,
        }
    }

    /// Returns the name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::EightBit => "8bit",
        }
    }
}

/// The moments of the elements that a rank owns, `[k]`.
#[derive(Debug)]
pub(crate) enum Moments {
    /// fp32.
    Fp32 {
        /// Mean of gradients, `[k]`.
        mean: Tensor,
        /// Mean of squared gradients, `[k]`.
        mean_square: Tensor,
    },
    /// 8 bits and scales.
    EightBit(EightBit),
}

/// Names of the tensors of moments in fp32.
pub(crate) const FP32_NAMES: [&str; 2] = ["mean", "mean_square"];
/// Names of the tensors of moments in 8 bits: the codes of each, and the scales of its blocks.
pub(crate) const EIGHT_BIT_NAMES: [[&str; 2]; 2] = [
    ["mean", "mean_scales"],
    ["root_mean_square", "root_mean_square_scales"],
];

impl Moments {
    /// Returns moments of zero for the elements of `blocks`.
    pub(crate) fn zeros(kind: MomentsKind, len: i64, blocks: Blocks, device: Device) -> Self {
        let zeros = || Tensor::zeros([len], (Kind::Float, device));
        match kind {
            MomentsKind::Fp32 => Self::Fp32 {
                mean: zeros(),
                mean_square: zeros(),
            },
            MomentsKind::EightBit => Self::EightBit(EightBit::zeros(len, blocks, device)),
        }
    }

    /// Returns another handle of the same memory.
    pub(crate) fn shallow_clone(&self) -> Self {
        match self {
            Self::Fp32 { mean, mean_square } => Self::Fp32 {
                mean: mean.shallow_clone(),
                mean_square: mean_square.shallow_clone(),
            },
            Self::EightBit(moments) => Self::EightBit(moments.shallow_clone()),
        }
    }

    /// Returns the memory with a name for each tensor.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Fp32 { mean, mean_square } => {
                let [first, second] = FP32_NAMES;
                vec![(first, mean), (second, mean_square)]
            }
            Self::EightBit(moments) => {
                let mut found = Vec::new();
                for ([codes, scales], of) in
                    EIGHT_BIT_NAMES.iter().zip([&moments.mean, &moments.root])
                {
                    found.push((*codes, &of.codes));
                    found.push((*scales, &of.scales));
                }
                found
            }
        }
    }

    /// Returns the moments of some elements as fp32: views, or copies of 8 bits.
    pub(crate) fn read(&self, range: &Range<i64>) -> Decoded {
        match self {
            Self::Fp32 { mean, mean_square } => Decoded {
                mean: narrow(mean, range),
                mean_square: narrow(mean_square, range),
            },
            Self::EightBit(moments) => moments.read(range),
        }
    }
}
