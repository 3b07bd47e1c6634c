//! What both writers do to a tensor: which dtype it gets, and that its values survive that.

use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    files::{bundle::Bundle, export::options::ExportOptions},
    weights::{component::Component, tensor_file::stored_kind},
};

/// The largest fp16 number.
const LARGEST_HALF: f64 = 65504.0;

/// The dtype a tensor is written in.
pub(crate) fn written_kind(bundle: &Bundle<'_>, component: Component, name: &str, options: &ExportOptions) -> Kind {
    stored_kind(bundle.kind(component, name).unwrap_or(Kind::Float), options.kind)
}

/// A tensor that is finite, and stays so in the dtype it is written in.
pub(crate) fn loaded(bundle: &Bundle<'_>, component: Component, name: &str, options: &ExportOptions) -> Result<Tensor> {
    let tensor = bundle.load(component, name)?;
    if stored_kind(tensor.kind(), options.kind) == Kind::Half && tensor.numel() > 0 {
        let largest = tensor.abs().max().double_value(&[]);
        if largest > LARGEST_HALF {
            let reason = format!("holds {largest}, and fp16 ends at {LARGEST_HALF}: export as bf16 or fp32");
            return Err(Error::Invalid { what: format!("tensor {name} of {}", component.folder()), reason });
        }
    }
    Ok(tensor)
}

/// The entries of a header as the writer takes them.
pub(crate) fn borrowed(metadata: &[(String, String)]) -> Vec<(&str, &str)> {
    metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}
