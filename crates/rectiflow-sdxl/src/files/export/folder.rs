//! Writes a diffusers folder: the four components, the scheduler, the attachments and the index.
//! Everything goes to a temporary folder, which is renamed when it is complete (`staging`).

use std::{fs, path::Path};

use serde_json::Value;

use crate::{
    durable::{create_parent, write_bytes},
    error::{Error, Result},
    files::{
        bundle::Bundle,
        export::{
            configs::{component_config, model_index, scheduler_config},
            options::ExportOptions,
            staging::Staging,
            tensors::{borrowed, loaded, written_kind},
        },
    },
    flow::Parameterization,
    weights::{
        component::{Component, PARAMETERIZATION_KEY},
        tensor_file::{Metadata, Planned, write_streamed},
    },
};

/// Writes a diffusers folder. An earlier export of that name is replaced.
///
/// # Errors
/// [`Error::Invalid`] if it is unknown what the model predicts, a tensor holds NaN or does not fit
/// fp16, or `out` exists and is not an export; [`Error::Io`].
pub fn export_diffusers(bundle: &Bundle<'_>, out: &Path, options: &ExportOptions) -> Result<()> {
    let parameterization = bundle.known_parameterization()?;
    refuse_foreign(out)?;
    create_parent(out)?;
    let staging = Staging::beside(out)?;
    write_folder(bundle, staging.folder(), parameterization, options)?;
    staging.publish(out)
}

fn write_folder(
    bundle: &Bundle<'_>,
    folder: &Path,
    parameterization: Parameterization,
    options: &ExportOptions,
) -> Result<()> {
    create(folder)?;
    for component in Component::ALL {
        let folder = folder.join(component.folder());
        create(&folder)?;
        write_component(bundle, component, &folder, parameterization, options)?;
    }
    let read = bundle.scheduler.as_ref();
    let config = scheduler_config(parameterization, options.sampling_shift, read);
    let scheduler = folder.join("scheduler");
    create(&scheduler)?;
    write_json(&scheduler.join("scheduler_config.json"), &config)?;
    for file in &options.attachments {
        let path = folder.join(&file.path);
        create(path.parent().unwrap_or(folder))?;
        write_bytes(&path, &file.bytes)?;
    }
    write_json(&folder.join("model_index.json"), &model_index(&config))
}

fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))
}

fn write_component(
    bundle: &Bundle<'_>,
    component: Component,
    folder: &Path,
    parameterization: Parameterization,
    options: &ExportOptions,
) -> Result<()> {
    let planned = planned(bundle, component, options);
    let kind = planned.first().map(|planned| planned.kind);
    let config = component_config(component, bundle.config(component), kind);
    write_json(&folder.join("config.json"), &Value::Object(config))?;
    let mut metadata = vec![("format".to_owned(), "pt".to_owned())];
    metadata.extend(options.metadata.iter().cloned());
    if component == Component::UNet {
        metadata.push((PARAMETERIZATION_KEY.into(), parameterization.to_string()));
    }
    let path = folder.join(component.weights_name());
    let metadata = Metadata {
        entries: &borrowed(&metadata),
        hash: None,
    };
    write_streamed(&path, planned, metadata, &mut |name| {
        loaded(bundle, component, name, options)
    })
}

/// Plans the tensors of a component's weight file.
fn planned(bundle: &Bundle<'_>, component: Component, options: &ExportOptions) -> Vec<Planned> {
    let mut planned = Vec::new();
    for name in bundle.names(component) {
        planned.push(Planned {
            name: name.to_owned(),
            kind: written_kind(bundle, component, name, options),
            shape: bundle
                .shape(component, name)
                .expect("listed tensors have shapes"),
        });
    }
    planned
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).expect("a JSON value serialises");
    text.push('\n');
    write_bytes(path, text.as_bytes())
}

/// Refuses to replace `out` unless it is absent, empty or an earlier export.
fn refuse_foreign(out: &Path) -> Result<()> {
    let entries = match fs::read_dir(out) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            return Err(Error::Invalid {
                what: out.display().to_string(),
                reason: "this is a file; name a folder for the model".into(),
            });
        }
        Err(source) => {
            return Err(Error::Io {
                path: out.to_owned(),
                source,
            });
        }
        Ok(mut entries) => entries.next(),
    };
    if entries.is_none() || out.join("model_index.json").is_file() {
        return Ok(());
    }
    let reason = "this folder holds something other than an exported model; choose another name";
    Err(Error::Invalid {
        what: out.display().to_string(),
        reason: reason.into(),
    })
}
