//! Seeded mutations of single files and model folders: bits flipped, files cut, ranges doubled,
//! numbers replaced, in headers, configurations and weights. Each is read or refused, never a
//! panic.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod tiny;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use rectiflow_sdxl::{
    bundle::Bundle,
    export::{ExportOptions, export_diffusers, export_single_file},
    flow::Parameterization,
    forward::{Pass, forward},
    model::{self, Component, Model, OpenOptions},
    tensor_file::{TensorFile, write_tensors},
};
use tch::{Device, Kind, Tensor};

/// Mutations of each kind, for each of the two layouts.
const NUM_EACH: u64 = 200;

/// SplitMix64, so that a failure can be repeated from its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

#[derive(Debug, Clone, Copy)]
enum Mutation {
    FlippedBit,
    Cut,
    DoubledRange,
    ReplacedNumber,
}

const ALL: [Mutation; 4] = [
    Mutation::FlippedBit,
    Mutation::Cut,
    Mutation::DoubledRange,
    Mutation::ReplacedNumber,
];

const NUMBERS: [&str; 20] = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "0.5",
    "255",
    "1e9",
    "65536",
    "2147483648",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "1e999",
    "NaN",
    "-Infinity",
    "\"4\"",
];

/// Applies a mutation to bytes.
fn mutated(bytes: &[u8], mutation: Mutation, random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    match mutation {
        Mutation::FlippedBit => {
            let place = random.below(bytes.len());
            bytes[place] ^= 1 << random.below(8);
        }
        Mutation::Cut => bytes.truncate(random.below(bytes.len())),
        Mutation::DoubledRange => {
            let start = random.below(bytes.len());
            let end = (start + 1 + random.below(64)).min(bytes.len());
            let range = bytes[start..end].to_vec();
            bytes.splice(end..end, range);
        }
        Mutation::ReplacedNumber => bytes = with_other_number(&bytes, random),
    }
    bytes
}

/// Replaces one of the decimal numbers in a text.
fn with_other_number(text: &[u8], random: &mut Random) -> Vec<u8> {
    let mut numbers = Vec::new();
    let mut start = None;
    for (place, byte) in text.iter().enumerate() {
        match (byte.is_ascii_digit(), start) {
            (true, None) => start = Some(place),
            (false, Some(from)) => {
                numbers.push(from..place);
                start = None;
            }
            _ => {}
        }
    }
    let mut bytes = text.to_vec();
    if !numbers.is_empty() {
        let range = random.of(&numbers).clone();
        bytes.splice(range, random.of(&NUMBERS).bytes());
    }
    bytes
}

/// Mutates a safetensors file: its header, whose length is then right again, or all of it.
fn mutated_file(bytes: &[u8], mutation: Mutation, random: &mut Random) -> Vec<u8> {
    let is_whole = matches!(mutation, Mutation::FlippedBit | Mutation::Cut) && random.below(3) == 0;
    if is_whole {
        return mutated(bytes, mutation, random);
    }
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (header, data) = bytes[8..].split_at(length);
    let header = mutated(header, mutation, random);
    [&(header.len() as u64).to_le_bytes()[..], &header, data].concat()
}

/// Runs `read`; a panic fails the test with the mutation's name and seed.
fn never_panics(what: &str, mutation: Mutation, seed: u64, read: impl FnOnce()) {
    let result = catch_unwind(AssertUnwindSafe(read));
    assert!(result.is_ok(), "{what}: {mutation:?} of seed {seed} panics");
}

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

#[test]
fn mutated_single_files_are_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("own.safetensors");
    tiny::write_single_file(&own, Parameterization::VZtsnr);
    // Without the hash, which would refuse nearly every mutation first.
    let mut contents = tiny::Contents::read(&own);
    contents.set("modelspec.hash_sha256", None);
    contents.write(&own);
    let good = fs::read(&own).unwrap();
    let inputs = write_inputs(folder.path());
    let path = folder.path().join("mutated.safetensors");
    fs::write(&path, &good).unwrap();
    assert!(read_everything(
        &path,
        Bundle::open_single_file(&path, None),
        &inputs
    ));
    let mut num_accepted = 0;
    for mutation in ALL {
        for seed in 0..NUM_EACH {
            let mut random = Random(seed);
            fs::write(&path, mutated_file(&good, mutation, &mut random)).unwrap();
            never_panics("a single file", mutation, seed, || {
                let bundle = Bundle::open_single_file(&path, None);
                // What writes to the disk is tried with some.
                let inputs = if seed % 4 == 0 { &inputs[..] } else { &[] };
                if seed % 10 == 0
                    && let Ok(bundle) = &bundle
                {
                    let out = folder.path().join("exported");
                    let _ = export_diffusers(bundle, &out, &ExportOptions::default());
                }
                num_accepted += usize::from(read_everything(&path, bundle, inputs));
            });
        }
    }
    assert!(
        num_accepted > 10,
        "some mutations are harmless: {num_accepted}"
    );
    assert!(num_accepted < 700, "most are not: {num_accepted}");
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
    for mutation in ALL {
        for seed in 0..NUM_EACH {
            let mut random = Random(seed);
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
            let bytes = if is_weights {
                mutated_file(&good, mutation, &mut random)
            } else {
                mutated(&good, mutation, &mut random)
            };
            fs::write(&place, bytes).unwrap();
            never_panics(&place.display().to_string(), mutation, seed, || {
                let inputs = if seed % 4 == 0 { &inputs[..] } else { &[] };
                read_everything(&out, open(), inputs);
                if seed % 10 == 0
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
}
