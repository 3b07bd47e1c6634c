//! The dtypes that arguments name: of numbers in a file, and of calculations.

use clap::ValueEnum;
use tch::Kind;

/// Numbers in a weight file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FileDtype {
    Fp32,
    Fp16,
    Bf16,
}

impl From<FileDtype> for Kind {
    fn from(dtype: FileDtype) -> Self {
        match dtype {
            FileDtype::Fp32 => Self::Float,
            FileDtype::Fp16 => Self::Half,
            FileDtype::Bf16 => Self::BFloat16,
        }
    }
}

/// The compute dtype of a model, whatever dtype its files hold. fp16 is not offered: SDXL's
/// autoencoder overflows in it, and CPUs have no fp16 arithmetic for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ComputeDtype {
    Fp32,
    Bf16,
}

impl From<ComputeDtype> for Kind {
    fn from(dtype: ComputeDtype) -> Self {
        match dtype {
            ComputeDtype::Fp32 => Self::Float,
            ComputeDtype::Bf16 => Self::BFloat16,
        }
    }
}

/// A dtype's name on the command line.
pub(crate) fn name(kind: Kind) -> String {
    match kind {
        Kind::Float => "fp32".into(),
        Kind::Half => "fp16".into(),
        Kind::BFloat16 => "bf16".into(),
        other => format!("{other:?}"),
    }
}
