//! The layout of a diffusers folder: the paths of each component's configuration and weights.
//!
//! Weights may be sharded (an index names the files) and in an fp16 variant, under the file names
//! that diffusers and transformers use.

use std::path::{Path, PathBuf};

use crate::{
    config::reader::read_object,
    error::{Error, Result},
    nets::{clip, vae},
    weights::{component::Component, stored::Stored},
};

/// Returns the folder with the component's `config.json`: its subfolder of a diffusers model, or
/// `model` itself.
///
/// # Errors
/// [`Error::Missing`] if neither has one.
pub fn find(component: Component, model: &Path) -> Result<PathBuf> {
    for folder in [model.join(component.folder()), model.to_owned()] {
        if folder.join("config.json").is_file() {
            return Ok(folder);
        }
    }
    let hint = if model.is_dir() {
        "pass a diffusers model folder, or the component's own folder with its config.json"
    } else if model.exists() {
        "this is a file, not a folder in diffusers' layout (`rectiflow import` makes one of a \
         single-file checkpoint)"
    } else {
        "nothing at this path"
    };
    let config = Path::new(component.folder()).join("config.json");
    Err(Error::Missing {
        path: model.to_owned(),
        what: format!("{} of the {}", config.display(), component.name()),
        hint: hint.into(),
    })
}

/// Returns a component's weight files in its `folder`: a single file, or the shards that an index
/// names. The fp16 variant is used only if no other exists.
///
/// # Errors
/// [`Error::Missing`] if `folder` has no weights, [`Error::Malformed`] if the index is unusable.
pub fn weight_files(component: Component, folder: &Path) -> Result<Vec<PathBuf>> {
    let stem = component.weights_name().trim_end_matches(".safetensors");
    for variant in ["", ".fp16"] {
        let single = folder.join(format!("{stem}{variant}.safetensors"));
        if single.is_file() {
            return Ok(vec![single]);
        }
        let index = folder.join(format!("{stem}.safetensors.index{variant}.json"));
        if index.is_file() {
            return shards(&index);
        }
    }
    let is_pickled =
        folder.join(format!("{stem}.bin")).is_file() || folder.join("pytorch_model.bin").is_file();
    Err(no_weights(component, folder, is_pickled))
}

fn no_weights(component: Component, folder: &Path, is_pickled: bool) -> Error {
    let hint = if is_pickled {
        "the weights are a pickle, which can run code when it is opened; convert them to \
         safetensors"
            .into()
    } else {
        format!(
            "pass a model with weights, or request random weights for {:?}",
            component.name()
        )
    };
    Error::Missing {
        path: folder.to_owned(),
        what: component.weights_name().to_owned(),
        hint,
    }
}

/// Returns the tensors of a component in its folder, old names replaced by current ones.
pub(crate) fn stored(component: Component, folder: &Path) -> Result<Stored> {
    let mut stored = Stored::open(&weight_files(component, folder)?)?;
    stored.drop_constants();
    stored.attach_scales()?;
    match component {
        Component::UNet => {}
        Component::Vae => stored.rename(vae::current_name),
        Component::ClipL | Component::ClipG => {
            if clip::lacks_prefix(stored.names()) {
                stored.rename(clip::with_prefix);
            }
        }
    }
    Ok(stored)
}

/// Returns the files that a sharded model's index names, sorted and without duplicates.
fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let malformed = |reason: String| Error::Malformed {
        path: index.to_owned(),
        kind: "index of weight files",
        reason,
    };
    let json = read_object(index)?;
    let map = json.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| malformed("it has no weight_map".into()))?;
    let mut files = Vec::new();
    for value in map.values() {
        let name = value.as_str().unwrap_or_default();
        if name.is_empty() || Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(malformed(format!(
                "{value} does not name a file in the same folder"
            )));
        }
        files.push(index.with_file_name(name));
    }
    files.sort();
    files.dedup();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn finds_single_sharded_and_variant_weights() {
        let folder = tempfile::tempdir().unwrap();
        let found = || weight_files(Component::ClipL, folder.path());
        let missing = found().unwrap_err().to_string();
        assert!(
            missing.contains("model.safetensors") && missing.contains("clip-l"),
            "{missing}"
        );
        fs::write(folder.path().join("pytorch_model.bin"), b"").unwrap();
        assert!(found().unwrap_err().to_string().contains("pickle"));
        fs::write(folder.path().join("model.fp16.safetensors"), b"").unwrap();
        assert_eq!(
            found().unwrap(),
            [folder.path().join("model.fp16.safetensors")]
        );
        fs::remove_file(folder.path().join("model.fp16.safetensors")).unwrap();
        let index = folder.path().join("model.safetensors.index.fp16.json");
        fs::write(&index, r#"{"weight_map": {"a": "half"}}"#).unwrap();
        assert_eq!(found().unwrap(), [folder.path().join("half")]);
        let index = folder.path().join("model.safetensors.index.json");
        fs::write(
            &index,
            r#"{"weight_map": {"a": "two", "b": "one", "c": "two"}}"#,
        )
        .unwrap();
        assert_eq!(
            found().unwrap(),
            [folder.path().join("one"), folder.path().join("two")]
        );
        for hostile in [
            r#"{"weight_map": {"a": "../x"}}"#,
            r#"{"weight_map": {"a": 3}}"#,
            r#"{"weight_map": []}"#,
            "[]",
            "{",
        ] {
            fs::write(&index, hostile).unwrap();
            assert!(matches!(found(), Err(Error::Malformed { .. })), "{hostile}");
        }
    }
}
