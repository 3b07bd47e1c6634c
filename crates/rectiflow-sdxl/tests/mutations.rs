//! Seeded mutations of single files and model folders: bits flipped, files cut, ranges doubled,
//! numbers replaced, in headers, configurations and weights. Each is read or refused, never a
//! panic.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod tiny;

use std::{
    fs,
    path::{Path, PathBuf},
};

use checks::mutation::{Case, Random, cases};
use rectiflow_sdxl::{
    bundle::Bundle,
    export::{ExportOptions, export_diffusers, export_single_file},
    flow::Parameterization,
    forward::{Pass, forward},
    model::{self, Component, Model, OpenOptions},
    tensor_file::{TensorFile, write_tensors},
};
use tch::{Device, Kind, Tensor};

/// Inputs of the forward passes.
fn write_inputs(folder: &Path) -> Vec<(Pass, PathBuf)> {
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let ids = Tensor::zeros([1, 5], (Kind::Int64, Device::Cpu));
    let unet = [
        ("sample", zeros(&[1, 4, 8, 8])),
        ("timestep", zeros(&[1])),
        ("encoder_hidden_states", zeros(&[1, 5, 12])),
        ("text_embeds", zeros(&[1, 6])),
        ("time_ids", zeros(&[1, 6])),
    ];
    let write = |name: &str, tensors: &[(&str, Tensor)]| {
        let path = folder.join(name);
        let tensors = tensors.iter().map(|(name, tensor)| (*name, tensor));
        write_tensors(&path, tensors, None, &[]).unwrap();
        path
    };
    vec![
        (Pass::UNet, write("unet", &unet)),
        (
            Pass::ClipL,
            write("clip", &[("input_ids", ids.shallow_clone())]),
        ),
        (Pass::ClipG, write("clip", &[("input_ids", ids)])),
        (
            Pass::VaeDecode,
            write("latents", &[("latents", zeros(&[1, 4, 4, 4]))]),
        ),
        (
            Pass::VaeEncode,
            write("pixels", &[("pixels", zeros(&[1, 3, 8, 8]))]),
        ),
    ]
}

/// Reads a model in every way that commands read one; returns whether it was accepted.
fn read_everything(
    path: &Path,
    bundle: rectiflow_sdxl::Result<Bundle<'_>>,
    inputs: &[(Pass, PathBuf)],
) -> bool {
    // Errors are what is expected; only panics are not.
    let _ = model::prediction(path).map(|prediction| prediction.line());
    let _ = model::scheduler(path);
    let opened = Model::open(path, &OpenOptions::default()).is_ok();
    let Ok(mut bundle) = bundle else { return false };
    bundle.parameterization = Some(Parameterization::Flow);
    for component in Component::ALL {
        for name in bundle.names(component) {
            let _ = bundle.load(component, name);
        }
    }
    if opened {
        let out = path.with_extension("out");
        for (pass, input) in inputs {
            let input = TensorFile::open(input).expect("it was just written");
            let _ = forward(*pass, path, &input, &out, &OpenOptions::default());
        }
    }
    opened
}

/// Writes a single file with the hash of its tensors, or without it: with it, nearly every mutation
/// is refused first.
fn write_single_file(path: &Path, has_hash: bool) -> Vec<u8> {
    tiny::write_single_file(path, Parameterization::VZtsnr);
    if !has_hash {
        let mut contents = tiny::Contents::read(path);
        contents.set("modelspec.hash_sha256", None);
        contents.write(path);
    }
    fs::read(path).unwrap()
}

#[test]
fn mutated_single_files_are_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mutated.safetensors");
    let good = write_single_file(&path, false);
    let inputs = write_inputs(folder.path());
    assert!(read_everything(
        &path,
        Bundle::open_single_file(&path, None),
        &inputs
    ));
    let mut num_accepted = 0;
    for case in cases() {
        let bytes = case.mutation.of_tensors(&good, &mut case.random());
        fs::write(&path, bytes).unwrap();
        num_accepted += usize::from(case.run("a single file", || {
            let bundle = Bundle::open_single_file(&path, None);
            // What writes to the disk is tried with some.
            let inputs = if case.seed % 4 == 0 { &inputs[..] } else { &[] };
            if case.seed % 10 == 0
                && let Ok(bundle) = &bundle
            {
                let out = folder.path().join("exported");
                let _ = export_diffusers(bundle, &out, &ExportOptions::default());
            }
            read_everything(&path, bundle, inputs)
        }));
    }
    assert!(num_accepted > 0, "some mutations are harmless");
    assert!(num_accepted < cases().len(), "most are not: {num_accepted}");
}

/// The elements of all tensors of a bundle, by component and name.
fn tensors_of(bundle: &Bundle<'_>) -> Vec<(String, Vec<u32>)> {
    let mut found = Vec::new();
    for component in Component::ALL {
        for name in bundle.names(component) {
            let tensor = bundle.load(component, name).unwrap();
            let values: Vec<f32> = tensor.flatten(0, -1).try_into().unwrap();
            let bits = values.into_iter().map(f32::to_bits).collect();
            found.push((format!("{}.{name}", component.folder()), bits));
        }
    }
    found
}

#[test]
fn mutated_files_with_a_hash_hold_the_right_numbers_or_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mutated.safetensors");
    let good = write_single_file(&path, true);
    let expected = tensors_of(&Bundle::open_single_file(&path, None).unwrap());
    let length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    for case in cases() {
        let mut random = case.random();
        // The data alone: the hash covers nothing else.
        let (header, data) = good.split_at(8 + length);
        let data = case.mutation.of(data, &mut random);
        fs::write(&path, [header, &data].concat()).unwrap();
        case.run("a single file with a hash", || {
            if let Ok(bundle) = Bundle::open_single_file(&path, None) {
                assert!(bundle.notes.is_empty(), "{:?}", bundle.notes);
                assert!(tensors_of(&bundle) == expected, "{case:?}");
            }
        });
    }
}

/// Every file of a folder, relative to it.
fn files_in(folder: &Path, below: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder.join(below)).unwrap() {
        let entry = entry.unwrap();
        let path = below.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            found.extend(files_in(folder, &path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn mutated_model_folders_are_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model");
    tiny::write_folder(&out, Parameterization::Flow);
    let files = files_in(&out, Path::new(""));
    let configs: Vec<&PathBuf> = files
        .iter()
        .filter(|path| path.extension().is_some_and(|ending| ending == "json"))
        .collect();
    assert_eq!((files.len(), configs.len()), (10, 6));
    let inputs = write_inputs(folder.path());
    let open = || Bundle::open_folders(|c| out.join(c.folder()), Some(Parameterization::Flow));
    assert!(read_everything(&out, open(), &inputs));
    for case in cases() {
        let mut random = case.random();
        // Three in four mutations are of a configuration.
        let is_config = random.below(4) > 0;
        let place = if is_config {
            out.join(random.of(&configs))
        } else {
            out.join(random.of(&files))
        };
        let good = fs::read(&place).unwrap();
        let is_weights = place
            .extension()
            .is_some_and(|ending| ending == "safetensors");
        fs::write(&place, mutated(&good, is_weights, case, &mut random)).unwrap();
        case.run(&place.display().to_string(), || {
            let inputs = if case.seed % 4 == 0 { &inputs[..] } else { &[] };
            read_everything(&out, open(), inputs);
            if case.seed % 10 == 0
                && let Ok(mut bundle) = open()
            {
                bundle.scheduler = model::scheduler(&out).unwrap_or_default();
                let single = folder.path().join("exported.safetensors");
                let _ = export_single_file(&bundle, &single, &ExportOptions::default());
            }
        });
        fs::write(&place, good).unwrap();
    }
}

fn mutated(bytes: &[u8], is_weights: bool, case: Case, random: &mut Random) -> Vec<u8> {
    if is_weights {
        case.mutation.of_tensors(bytes, random)
    } else {
        case.mutation.of(bytes, random)
    }
}
