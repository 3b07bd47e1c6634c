//! The models against diffusers and transformers: outputs and gradients of small random models.
//!
//! The references come from `scripts/golden/models.py`, computed in float64. The tolerance is a
//! relative L2 error of 1e-5 for outputs and 1e-4 for each parameter's gradient.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};

use rectiflow_sdxl::{
    clip::ClipText,
    error::Result,
    forward::{Pass, forward},
    model::{Component, OpenOptions},
    tensor_file::{TensorFile, write_tensors},
    unet::{Perturbation, UNet, UNetInput, UNetPart},
    vae::Vae,
};
use tch::{Kind, Tensor};

const MAX_OUTPUT_ERROR: f64 = 1e-5;
const MAX_GRADIENT_ERROR: f64 = 1e-4;

fn golden(name: &str) -> PathBuf {
    // The models are tiny: two threads would only wait for each other, for minutes if tests run in
    // parallel.
    rectiflow_sdxl::test_threads::set();
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn cases(name: &str) -> TensorFile {
    TensorFile::open(&golden(name).join("cases.safetensors")).unwrap()
}

/// |ours - reference| / |reference|
fn relative_error(ours: &Tensor, reference: &Tensor) -> f64 {
    assert_eq!(ours.size(), reference.size());
    let (ours, reference) = (
        ours.detach().to_kind(Kind::Double),
        reference.to_kind(Kind::Double),
    );
    (&ours - &reference).norm().double_value(&[]) / reference.norm().double_value(&[])
}

#[track_caller]
fn agrees(what: &str, ours: &Tensor, reference: &Tensor) {
    let error = relative_error(ours, reference);
    assert!(
        error <= MAX_OUTPUT_ERROR,
        "{what}: relative L2 error {error:.2e}"
    );
}

/// The tensors of one UNet case.
struct UNetCase {
    sample: Tensor,
    timestep: Tensor,
    context: Tensor,
    text_embeds: Tensor,
    time_ids: Tensor,
}

impl UNetCase {
    fn read(file: &TensorFile, i: usize) -> Self {
        let get = |name: &str| file.tensor(&format!("{i}.{name}")).unwrap();
        Self {
            sample: get("sample"),
            timestep: get("timestep"),
            context: get("encoder_hidden_states"),
            text_embeds: get("text_embeds"),
            time_ids: get("time_ids"),
        }
    }

    fn input(&self) -> UNetInput<'_> {
        UNetInput {
            sample: &self.sample,
            timestep: &self.timestep,
            context: &self.context,
            context_mask: None,
            text_embeds: &self.text_embeds,
            time_ids: &self.time_ids,
        }
    }
}

/// SDXL's topology, and one that differs in everything that the configuration can vary.
const UNETS: [&str; 2] = ["unet", "unet-nested"];

#[test]
fn unet_outputs_equal_diffusers() {
    for name in UNETS {
        let unet = UNet::open(&golden(name), &OpenOptions::default()).unwrap();
        let file = cases(name);
        for i in 0..4 {
            let case = UNetCase::read(&file, i);
            let ours = tch::no_grad(|| unet.forward(&case.input())).unwrap();
            agrees(
                &format!("{name} case {i}"),
                &ours,
                &file.tensor(&format!("{i}.out")).unwrap(),
            );
        }
    }
}

/// Perturbed-attention guidance's extra pass (scripts/golden/pag.py): the second half of the batch
/// has no self-attention in some parts of the UNet, the first half is unaffected.
#[test]
fn perturbed_attention_equals_diffusers() {
    let unet = UNet::open(&golden("unet"), &OpenOptions::default()).unwrap();
    let case = UNetCase::read(&cases("unet"), 1);
    let twice = |tensor: &Tensor| Tensor::cat(&[tensor, tensor], 0);
    let case = UNetCase {
        sample: twice(&case.sample),
        timestep: twice(&case.timestep),
        context: twice(&case.context),
        text_embeds: twice(&case.text_embeds),
        time_ids: twice(&case.time_ids),
    };
    let file = TensorFile::open(&golden("unet").join("perturbed.safetensors")).unwrap();
    let elsewhere = [UNetPart::Down(2), UNetPart::Up(1)];
    for (name, parts) in [
        ("mid", &[UNetPart::Mid][..]),
        ("down.2 and up.1", &elsewhere),
    ] {
        let perturbation = Perturbation {
            parts,
            first_row: 2,
        };
        let ours =
            tch::no_grad(|| unet.forward_perturbed(&case.input(), Some(perturbation))).unwrap();
        let theirs = file.tensor(name).unwrap();
        for (half, what) in ours
            .chunk(2, 0)
            .iter()
            .zip(theirs.chunk(2, 0))
            .zip(["plain", "perturbed"])
        {
            agrees(&format!("{name}, {what}"), half.0, &half.1);
        }
    }
}

#[test]
fn unet_gradients_equal_diffusers() {
    for name in UNETS {
        let unet = UNet::open(&golden(name), &OpenOptions::default()).unwrap();
        unet.parameters.set_requires_grad(true);
        let file = cases(name);
        let out = unet.forward(&UNetCase::read(&file, 1).input()).unwrap();
        out.mse_loss(&file.tensor("1.target").unwrap(), tch::Reduction::Mean)
            .backward();
        let gradients = TensorFile::open(&golden(name).join("gradients.safetensors")).unwrap();
        assert_eq!(gradients.names().count(), unet.parameters.len());
        for (parameter, tensor) in unet.parameters.iter() {
            let error = relative_error(&tensor.grad(), &gradients.tensor(parameter).unwrap());
            assert!(
                error <= MAX_GRADIENT_ERROR,
                "{name} {parameter}: relative L2 error {error:.2e}"
            );
        }
    }
}

#[test]
fn text_encoders_equal_transformers() {
    for (name, which) in [("clip-l", Component::ClipL), ("clip-g", Component::ClipG)] {
        let clip = ClipText::open(&golden(name), which, &OpenOptions::default()).unwrap();
        let file = cases(name);
        let ids = file.tensor("input_ids").unwrap();
        let ours = tch::no_grad(|| clip.forward(&ids)).unwrap();
        agrees(
            &format!("{name} hidden"),
            &ours.hidden,
            &file.tensor("hidden").unwrap(),
        );
        agrees(
            &format!("{name} pooled"),
            &ours.pooled,
            &file.tensor("pooled").unwrap(),
        );
        assert!(
            tch::no_grad(|| clip.hidden(&ids))
                .unwrap()
                .equal(&ours.hidden)
        );
    }
}

#[test]
fn vae_equals_diffusers_both_ways() {
    for name in ["vae", "vae-plain"] {
        let vae = Vae::open(&golden(name), &OpenOptions::default()).unwrap();
        let file = cases(name);
        for i in 0..2 {
            let get = |key: &str| file.tensor(&format!("{i}.{key}")).unwrap();
            let (mean, logvar) = tch::no_grad(|| vae.encode(&get("pixels"))).unwrap();
            agrees(&format!("{name} case {i} mean"), &mean, &get("mean"));
            agrees(&format!("{name} case {i} logvar"), &logvar, &get("logvar"));
            let pixels = tch::no_grad(|| vae.decode(&get("latents"))).unwrap();
            agrees(&format!("{name} case {i} pixels"), &pixels, &get("decoded"));
        }
    }
}

/// A pass of `rectiflow forward` and the golden case that it must reproduce.
struct ForwardCase {
    pass: Pass,
    model: &'static str,
    /// Names of the inputs, in the input file and in the case.
    inputs: &'static [&'static str],
    /// Names of the outputs in the output file, and in the case.
    outputs: &'static [(&'static str, &'static str)],
}

const UNET_INPUTS: &[&str] = &[
    "sample",
    "timestep",
    "encoder_hidden_states",
    "text_embeds",
    "time_ids",
];
const CLIP_OUTPUTS: &[(&str, &str)] = &[("hidden", "hidden"), ("pooled", "pooled")];
const FORWARD_CASES: [ForwardCase; 5] = [
    ForwardCase {
        pass: Pass::UNet,
        model: "unet",
        inputs: UNET_INPUTS,
        outputs: &[("sample", "out")],
    },
    ForwardCase {
        pass: Pass::ClipL,
        model: "clip-l",
        inputs: &["input_ids"],
        outputs: CLIP_OUTPUTS,
    },
    ForwardCase {
        pass: Pass::ClipG,
        model: "clip-g",
        inputs: &["input_ids"],
        outputs: CLIP_OUTPUTS,
    },
    ForwardCase {
        pass: Pass::VaeEncode,
        model: "vae",
        inputs: &["pixels"],
        outputs: &[("mean", "mean"), ("logvar", "logvar")],
    },
    ForwardCase {
        pass: Pass::VaeDecode,
        model: "vae",
        inputs: &["latents"],
        outputs: &[("pixels", "decoded")],
    },
];

impl ForwardCase {
    /// The name of a tensor in the golden file.
    fn key(&self, key: &str) -> String {
        if self.model.starts_with("clip") {
            key.to_owned()
        } else {
            format!("0.{key}")
        }
    }

    /// Writes these tensors to a file and runs the pass on it.
    fn run(&self, folder: &Path, tensors: &[(&str, Tensor)]) -> Result<usize> {
        let input = folder.join("in");
        let named = tensors.iter().map(|(name, tensor)| (*name, tensor));
        write_tensors(&input, named, None, &[]).unwrap();
        let options = OpenOptions::default();
        let output = folder.join("out");
        let written = forward(
            self.pass,
            &golden(self.model),
            &TensorFile::open(&input)?,
            &output,
            &options,
        )?;
        Ok(written.len())
    }
}

/// The passes of `rectiflow forward`, from file to file, over the golden cases.
#[test]
fn forward_passes_read_and_write_the_documented_names() {
    let folder = tempfile::tempdir().unwrap();
    for case in FORWARD_CASES {
        let file = cases(case.model);
        let mut tensors = Vec::new();
        for name in case.inputs {
            tensors.push((*name, file.tensor(&case.key(name)).unwrap()));
        }
        let written = case.run(folder.path(), &tensors).unwrap();
        assert_eq!(written, case.outputs.len());
        let result = TensorFile::open(&folder.path().join("out")).unwrap();
        for (name, reference) in case.outputs {
            agrees(
                &format!("{:?} {name}", case.pass),
                &result.tensor(name).unwrap(),
                &file.tensor(&case.key(reference)).unwrap(),
            );
        }
        // Without its first input the error names it.
        let error = case.run(folder.path(), &tensors[1..]).unwrap_err();
        assert!(error.to_string().contains(case.inputs[0]), "{error}");
    }
}
