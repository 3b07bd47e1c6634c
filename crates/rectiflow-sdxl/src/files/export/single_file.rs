//! Writes a single-file SDXL checkpoint: each tensor in the single file's form, some stacked from
//! several diffusers tensors.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::{
    durable::create_parent,
    error::{Error, Result},
    files::{
        bundle::Bundle,
        export::{
            configs::component_config,
            model_spec,
            options::ExportOptions,
            tensors::{borrowed, loaded, written_kind},
        },
        prediction::{V_TENSOR, ZTSNR_TENSOR},
        single_file::HASH_KEY,
    },
    flow::Parameterization,
    weights::{
        component::Component,
        keys::{Form, SingleKey},
        tensor_file::{Metadata, Planned, write_streamed},
    },
};

/// Writes a single-file SDXL checkpoint. An earlier file of that name is replaced.
///
/// # Errors
/// [`Error::Invalid`] if it is unknown what the model predicts, or a tensor holds NaN or does not
/// fit fp16; [`Error::Io`].
pub fn export_single_file(bundle: &Bundle<'_>, out: &Path, options: &ExportOptions) -> Result<()> {
    let parameterization = bundle.known_parameterization()?;
    let contents = contents(bundle);
    let mut all_planned = Vec::new();
    for (name, parts) in &contents {
        all_planned.push(planned(bundle, name, parts, options));
    }
    all_planned.extend(markers(parameterization));
    let configs = configs(bundle, options.kind);
    let metadata = model_spec::metadata(bundle, parameterization, options, configs)?;
    let metadata = Metadata {
        entries: &borrowed(&metadata),
        hash: Some(HASH_KEY),
    };
    create_parent(out)?;
    write_streamed(out, all_planned, metadata, &mut |name| {
        let Some(parts) = contents.get(name) else {
            return Ok(marker());
        };
        let mut tensors = Vec::new();
        for part in parts {
            let tensor = loaded(bundle, part.component, &part.name, options)?;
            tensors.push((tensor, part.form));
        }
        to_single(tensors).map_err(Error::torch(format!("converting {name}")))
    })
}

/// Returns the configurations of all components, by folder.
fn configs(bundle: &Bundle<'_>, kind: Option<Kind>) -> Map<String, Value> {
    let mut configs = Map::new();
    for component in Component::ALL {
        let config = component_config(component, bundle.config(component), kind);
        configs.insert(component.folder().to_owned(), config.into());
    }
    configs
}

/// A diffusers tensor as a part of a single-file tensor, alone or in a stack.
struct StackPart {
    component: Component,
    name: String,
    form: Form,
}

impl StackPart {
    /// Returns its position in the stack.
    fn index(&self) -> usize {
        match self.form {
            Form::Stacked { index, .. } => index,
            Form::Same | Form::Transposed | Form::Pointwise => 0,
        }
    }
}

/// Returns the diffusers tensors in each tensor of the single file, in stacking order.
fn contents(bundle: &Bundle<'_>) -> BTreeMap<String, Vec<StackPart>> {
    let mut contents: BTreeMap<String, Vec<StackPart>> = BTreeMap::new();
    for component in Component::ALL {
        for diffusers in bundle.names(component) {
            let SingleKey { name, form } = bundle
                .table()
                .to_single(component, diffusers)
                .expect("the table has a place for every tensor of the configured model");
            contents.entry(name).or_default().push(StackPart {
                component,
                name: diffusers.to_owned(),
                form,
            });
        }
    }
    for parts in contents.values_mut() {
        parts.sort_by_key(StackPart::index);
    }
    contents
}

/// Returns the empty tensors by which other tools know what a v model predicts.
fn markers(parameterization: Parameterization) -> Vec<Planned> {
    let names: &[&str] = match parameterization {
        Parameterization::Flow | Parameterization::Eps => &[],
        Parameterization::V => &[V_TENSOR],
        Parameterization::VZtsnr => &[V_TENSOR, ZTSNR_TENSOR],
    };
    let mut planned = Vec::new();
    for name in names {
        planned.push(Planned {
            name: (*name).to_owned(),
            kind: Kind::Float,
            shape: vec![0],
        });
    }
    planned
}

fn marker() -> Tensor {
    Tensor::zeros([0], (Kind::Float, Device::Cpu))
}

/// Plans a tensor of the single file: the combined shape of its parts, and a dtype that can hold
/// them all.
fn planned(
    bundle: &Bundle<'_>,
    name: &str,
    parts: &[StackPart],
    options: &ExportOptions,
) -> Planned {
    let first = &parts[0];
    let shape = bundle
        .shape(first.component, &first.name)
        .expect("listed tensors have shapes");
    let kinds = parts
        .iter()
        .map(|part| written_kind(bundle, part.component, &part.name, options));
    let kind = kinds
        .reduce(wider)
        .expect("every tensor of the file holds one of the model");
    Planned {
        name: name.to_owned(),
        kind,
        shape: first.form.single_shape(&shape),
    }
}

/// Converts diffusers tensors to one tensor in the form of the single file.
fn to_single(mut parts: Vec<(Tensor, Form)>) -> std::result::Result<Tensor, tch::TchError> {
    if parts.len() > 1 {
        return Tensor::f_cat(
            &parts.iter().map(|(tensor, _)| tensor).collect::<Vec<_>>(),
            0,
        );
    }
    let (tensor, form) = parts
        .pop()
        .expect("every tensor of the file holds one of the model");
    match form {
        Form::Same | Form::Stacked { .. } => Ok(tensor),
        Form::Transposed => tensor.f_tr(),
        Form::Pointwise => tensor.f_unsqueeze(-1)?.f_unsqueeze(-1),
    }
}

/// Returns a dtype that represents all values of both: the parts of a stack can differ in dtype.
fn wider(a: Kind, b: Kind) -> Kind {
    match (a, b) {
        (a, b) if a == b => a,
        (Kind::Half, Kind::BFloat16) | (Kind::BFloat16, Kind::Half) => Kind::Float,
        (a, b) if a.elt_size_in_bytes() < b.elt_size_in_bytes() => b,
        (a, _) => a,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_is_as_wide_as_its_widest_part() {
        for (a, b, expected) in [
            (Kind::Half, Kind::Half, Kind::Half),
            (Kind::Half, Kind::BFloat16, Kind::Float),
            (Kind::BFloat16, Kind::Float, Kind::Float),
            (Kind::Double, Kind::Half, Kind::Double),
        ] {
            assert_eq!(
                (wider(a, b), wider(b, a)),
                (expected, expected),
                "{a:?} and {b:?}"
            );
        }
    }
}
