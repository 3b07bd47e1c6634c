//! What both writers do to a tensor: choose its dtype, and check that its values fit that dtype.

use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    files::{bundle::Bundle, export::options::ExportOptions},
    weights::{component::Component, tensor_file::stored_kind},
};

/// The largest finite fp16 number.
const LARGEST_HALF: f64 = 65504.0;

/// Returns the dtype that a tensor is written in.
pub(crate) fn written_kind(
    bundle: &Bundle<'_>,
    component: Component,
    name: &str,
    options: &ExportOptions,
) -> Kind {
    stored_kind(
        bundle.kind(component, name).unwrap_or(Kind::Float),
        options.kind,
    )
}

/// Loads a tensor and checks that it is finite, also in the dtype that it is written in.
pub(crate) fn loaded(
    bundle: &Bundle<'_>,
    component: Component,
    name: &str,
    options: &ExportOptions,
) -> Result<Tensor> {
    let tensor = bundle.load(component, name)?;
    if stored_kind(tensor.kind(), options.kind) == Kind::Half && tensor.numel() > 0 {
        let largest = tensor.abs().max().double_value(&[]);
        if largest > LARGEST_HALF {
            let reason = format!(
                "it holds {largest}, but fp16 ends at {LARGEST_HALF}; export as bf16 or fp32"
            );
            return Err(Error::Invalid {
                what: format!("tensor {name} of {}", component.folder()),
                reason,
            });
        }
    }
    Ok(tensor)
}

/// Borrows the entries of a header, as the writer takes them.
pub(crate) fn borrowed(metadata: &[(String, String)]) -> Vec<(&str, &str)> {
    metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect()
}
