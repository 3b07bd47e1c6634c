//! The hashes that identify a component's weights, wherever and in whatever files they are.

use std::{
    fs::{self, File},
    path::Path,
};

use rectiflow_sdxl::{model::Component, visit::visit_weights};

use crate::error::{Error, Result};

/// Returns the BLAKE3 of a component's tensors, hexadecimal: names, dtypes, shapes and elements,
/// sorted by name. Equal weights have equal hashes, regardless of how they are split into files and
/// of the files' metadata, so a model that is exported again still matches the data sets and
/// checkpoints that name it. A component of a single-file checkpoint has the hash of the folder
/// that `rectiflow import` writes.
///
/// # Errors
/// [`Error::Model`] for missing or unusable weight files.
pub fn hash_weights(component: Component, folder: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    visit_weights(component, folder, &mut |name, kind, shape, bytes| {
        hasher.update(format!("{name}\0{kind:?}\0{shape:?}\0").as_bytes());
        hasher.update(bytes);
    })?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Returns the hash by which checkpoints of format 1, and of format 2 at first, name weights: the
/// BLAKE3 of a folder's weight files in the order of their names.
pub(crate) fn hash_files(folder: &Path) -> Result<String> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path.extension().is_some_and(|end| end == "safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    let mut hasher = blake3::Hasher::new();
    for path in paths {
        let mut file = File::open(&path).map_err(Error::io(&path))?;
        hasher.update_reader(&mut file).map_err(Error::io(&path))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use rectiflow_sdxl::tensor_file::write_tensors;
    use tch::Tensor;

    use super::*;

    #[test]
    fn a_hash_of_weights_depends_on_the_numbers_alone() {
        let (a, b) = (
            Tensor::from_slice(&[1f32, 2.0]),
            Tensor::from_slice(&[3f32]),
        );
        let folder = |files: &[(&str, &[(&str, &Tensor)])], metadata: &[(&str, &str)]| {
            let dir = tempfile::tempdir().expect("a temporary folder");
            for (name, tensors) in files {
                write_tensors(
                    &dir.path().join(name),
                    tensors.iter().copied(),
                    None,
                    metadata,
                )
                .expect("writes");
            }
            dir
        };
        let hash = |dir: &tempfile::TempDir| {
            hash_weights(Component::Vae, dir.path()).expect("it can be hashed")
        };
        let whole = "diffusion_pytorch_model.safetensors";
        let one = folder(&[(whole, &[("a", &a), ("b", &b)])], &[]);
        let told = folder(&[(whole, &[("b", &b), ("a", &a)])], &[("format", "pt")]);
        let cut = folder(
            &[
                ("1.safetensors", &[("b", &b)]),
                ("2.safetensors", &[("a", &a)]),
            ],
            &[],
        );
        let index = r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}"#;
        fs::write(cut.path().join(format!("{whole}.index.json")), index).expect("writes");
        assert_eq!(hash(&one), hash(&told));
        assert_eq!(hash(&one), hash(&cut));
        let other = folder(&[(whole, &[("a", &b), ("b", &a)])], &[]);
        assert_ne!(hash(&one), hash(&other));
    }
}
