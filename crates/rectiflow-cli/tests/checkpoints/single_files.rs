//! Single files: the hash in the header is compared by every command that reads weights, and an
//! autoencoder alone is read or refused by its name.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use rectiflow_sdxl::{
    bundle::CONFIGS_KEY,
    tensor_file::{TensorFile, write_tensors},
};
use serde_json::{Value, json};
use tch::Tensor;

use crate::fixture::{Fixture, READERS, Wrong, stderr, text};

const HASH: &str = "modelspec.hash_sha256";
const VAE: &str = "first_stage_model.";
const NO_SINGLE_FILE: [&str; 2] = ["--branch-from", "resume"];

#[test]
fn a_single_file_is_compared_with_its_hash_by_every_command_that_reads_weights() {
    let fixture = Fixture::new();
    let file = fixture.path("base.safetensors");
    let good = fs::read(&file).expect("the file is there");
    let mut wrong = Wrong::default();
    for from_end in [1, 1001, good.len() / 2] {
        let mut bytes = good.clone();
        bytes[good.len() - from_end] ^= 1 << 4;
        fs::write(&file, bytes).expect("written");
        for reader in READERS {
            // These take no single file; one reader is tried with every place.
            let is_few = from_end == 1 || reader.name == "export, diffusers";
            if !is_few || NO_SINGLE_FILE.contains(&reader.name) {
                continue;
            }
            let output = (reader.run)(&fixture, &file, &[]);
            let what = format!("{}, byte -{from_end}", reader.name);
            wrong.expect_refusal(&what, &output, &[HASH, "base.safetensors", "0x"]);
        }
        let import = ["import", text(&file), "--out", "imported"];
        let output = fixture.rectiflow(&import);
        wrong.expect_refusal("import", &output, &[HASH, "base.safetensors"]);
        // A plan reads no weights.
        let base = format!("model.base='{}'", file.display());
        let plan = ["plan", "run.toml", "--hardware", "h100-sxm", "--set", &base];
        wrong.expect_success("plan", &fixture.rectiflow(&plan));
    }
    fs::write(&file, good).expect("written");
    for reader in READERS {
        if !NO_SINGLE_FILE.contains(&reader.name) {
            wrong.expect_success(reader.name, &(reader.run)(&fixture, &file, &[]));
        }
    }
    autoencoders_alone(&fixture, &mut wrong);
    wrong.assert_none();
}

/// The hash of the VAE that a data set was made with.
fn vae_hash(fixture: &Fixture, data: &str) -> Value {
    let path = fixture.path(data).join("manifest.json");
    let text = fs::read_to_string(path).expect("a manifest");
    let manifest: Value = serde_json::from_str(&text).expect("JSON");
    manifest["codec"]["hash"].clone()
}

/// An autoencoder alone, under the names of either layout, is the autoencoder that it came from.
fn autoencoders_alone(fixture: &Fixture, wrong: &mut Wrong) {
    let whole = TensorFile::open(&fixture.path("base.safetensors")).expect("opens");
    let configs = whole.metadata()[CONFIGS_KEY].clone();
    let mut original = Vec::new();
    for name in whole.names() {
        if let Some(own) = name.strip_prefix(VAE) {
            original.push((own.to_owned(), whole.tensor(name).expect("a tensor")));
        }
    }
    let folder = fixture.path("base/vae/diffusion_pytorch_model.safetensors");
    let folder = TensorFile::open(&folder).expect("opens");
    let mut diffusers = Vec::new();
    for name in folder.names() {
        let tensor = folder.tensor(name).expect("a tensor");
        diffusers.push((name.to_owned(), tensor));
    }
    for (name, tensors) in [("original", original), ("diffusers", diffusers)] {
        let file = fixture.path(&format!("{name}.vae.safetensors"));
        write(&file, &tensors, &[(CONFIGS_KEY, &configs)]);
        for reader in READERS {
            let is_few = name == "original" || reader.name == "prep --vae";
            if !is_few || NO_SINGLE_FILE.contains(&reader.name) {
                continue;
            }
            let output = (reader.run)(fixture, &file, &[]);
            let what = format!("{}, {name}", reader.name);
            match reader.name {
                "prep --vae" => {
                    wrong.expect_success(&what, &output);
                    assert_eq!(vae_hash(fixture, "again"), vae_hash(fixture, "data"));
                }
                "inspect --vae" => wrong.expect_success(&what, &output),
                "forward clip-g" => wrong.expect_refusal(&what, &output, &["clip-g"]),
                _ => wrong.expect_refusal(&what, &output, &["unet"]),
            }
        }
    }
}

fn write(path: &Path, tensors: &[(String, Tensor)], metadata: &[(&str, &str)]) {
    let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    write_tensors(path, tensors, None, metadata).expect("written");
}

/// Writes a file of zeros in fp16 with these names and shapes.
fn write_zeros(path: &Path, shapes: &BTreeMap<String, Vec<i64>>, metadata: &Value) {
    let mut header = json!({ "__metadata__": metadata });
    let mut end = 0;
    for (name, shape) in shapes {
        let start = end;
        end += 2 * shape.iter().product::<i64>();
        header[name] = json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]});
    }
    let header = header.to_string();
    let mut file = File::create(path).expect("created");
    file.write_all(&(header.len() as u64).to_le_bytes())
        .expect("written");
    file.write_all(header.as_bytes()).expect("written");
    // The zeros take no space on the disk.
    file.set_len(8 + header.len() as u64 + end as u64)
        .expect("made longer");
}

/// Names and shapes of SDXL's autoencoder in the original layout, without the prefix.
fn sdxl_vae() -> BTreeMap<String, Vec<i64>> {
    let mut shapes = BTreeMap::new();
    let mut add = |name: String, shape: &[i64]| {
        shapes.insert(format!("{name}.bias"), shape[..1].to_vec());
        shapes.insert(format!("{name}.weight"), shape.to_vec());
    };
    let mut block = |at: &str, from: i64, to: i64| {
        add(format!("{at}.norm1"), &[from]);
        add(format!("{at}.conv1"), &[to, from, 3, 3]);
        add(format!("{at}.norm2"), &[to]);
        add(format!("{at}.conv2"), &[to, to, 3, 3]);
        if from != to {
            add(format!("{at}.nin_shortcut"), &[to, from, 1, 1]);
        }
    };
    for half in ["encoder", "decoder"] {
        block(&format!("{half}.mid.block_1"), 512, 512);
        block(&format!("{half}.mid.block_2"), 512, 512);
    }
    for (level, [from, to]) in [[128, 128], [128, 256], [256, 512], [512, 512]]
        .iter()
        .enumerate()
    {
        block(&format!("encoder.down.{level}.block.0"), *from, *to);
        block(&format!("encoder.down.{level}.block.1"), *to, *to);
    }
    for (level, [from, to]) in [[256, 128], [512, 256], [512, 512], [512, 512]]
        .iter()
        .enumerate()
    {
        block(&format!("decoder.up.{level}.block.0"), *from, *to);
        block(&format!("decoder.up.{level}.block.1"), *to, *to);
        block(&format!("decoder.up.{level}.block.2"), *to, *to);
    }
    for (half, first, last) in [("encoder", 3, 8), ("decoder", 4, 3)] {
        let [inner, outer] = if half == "encoder" {
            [512, 128]
        } else {
            [128, 512]
        };
        add(format!("{half}.conv_in"), &[outer, first, 3, 3]);
        add(format!("{half}.norm_out"), &[inner]);
        add(format!("{half}.conv_out"), &[last, inner, 3, 3]);
        add(format!("{half}.mid.attn_1.norm"), &[512]);
        for projection in ["q", "k", "v", "proj_out"] {
            add(format!("{half}.mid.attn_1.{projection}"), &[512, 512, 1, 1]);
        }
    }
    for (level, width) in [(0, 128), (1, 256), (2, 512)] {
        add(
            format!("encoder.down.{level}.downsample.conv"),
            &[width, width, 3, 3],
        );
    }
    for (level, width) in [(1, 256), (2, 512), (3, 512)] {
        add(
            format!("decoder.up.{level}.upsample.conv"),
            &[width, width, 3, 3],
        );
    }
    add("quant_conv".into(), &[8, 8, 1, 1]);
    add("post_quant_conv".into(), &[4, 4, 1, 1]);
    shapes
}

/// Files of SDXL's sizes by other tools: without configurations, some with a hash that is not
/// theirs.
#[test]
fn autoencoders_of_other_tools_are_read_or_refused_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pictures = folder.path().join("pictures");
    fs::create_dir(&pictures).expect("a folder");
    let picture = image::RgbImage::from_pixel(64, 64, image::Rgb([9, 90, 120]));
    picture.save(pictures.join("a.png")).expect("written");
    fs::write(pictures.join("a.txt"), "a colour").expect("written");
    let prep = |vae: &Path| {
        let out = folder.path().join("data");
        let arguments = ["prep", "pictures", "--out", text(&out), "--vae", text(vae)];
        let set = [
            "prep.area_px=4096",
            "prep.step_px=32",
            "prep.bucket_min_px=64",
            "prep.bucket_max_px=64",
            "prep.min_side_px=32",
        ];
        let set: Vec<&str> = set.iter().flat_map(|set| ["--set", set]).collect();
        crate::fixture::rectiflow_in(folder.path(), &[&arguments[..], &set].concat())
    };
    let file = |name: &str| -> PathBuf { folder.path().join(name) };

    // SDXL's own, with the hash of other tensors.
    let shapes = sdxl_vae();
    let vae = file("sdxl_vae.safetensors");
    write_zeros(&vae, &shapes, &json!({ HASH: "0x1234" }));
    let output = prep(&vae);
    let message = stderr(&output);
    assert!(output.status.success(), "{message}");
    for words in ["an autoencoder alone", HASH, "\"0x1234\"", "another tool"] {
        assert_eq!(message.matches(words).count(), 1, "{words}: {message}");
    }
    // Without one there is nothing to compare.
    write_zeros(&vae, &shapes, &json!({}));
    let message = stderr(&prep(&vae));
    assert!(!message.contains(HASH), "{message}");

    // Those of other models.
    let mut wrong = Wrong::default();
    let mut sixteen = shapes.clone();
    sixteen.insert("decoder.conv_in.weight".into(), vec![512, 16, 3, 3]);
    let tiny = ["decoder.layers.0.weight", "encoder.layers.0.weight"];
    let tiny = tiny.map(|name| (name.to_owned(), vec![64, 3, 3, 3]));
    let video = ["decoder.conv1.weight", "encoder.conv1.weight"];
    let video = video.map(|name| (name.to_owned(), vec![96, 3, 3, 3, 3]));
    let mut cut = shapes.clone();
    cut.remove("encoder.mid.attn_1.q.weight");
    for (name, shapes, words) in [
        ("ae", sixteen, ["16 latent channels", "Flux"]),
        ("taesd", tiny.into(), ["TAESD", "SDXL's autoencoder"]),
        ("video", video.into(), ["one part of a model", "video"]),
        ("cut", cut, ["attentions.0.to_q.weight", "cut"]),
    ] {
        let path = file(&format!("{name}.safetensors"));
        write_zeros(&path, &shapes, &json!({}));
        wrong.expect_refusal(name, &prep(&path), &words);
    }
    wrong.assert_none();
}
