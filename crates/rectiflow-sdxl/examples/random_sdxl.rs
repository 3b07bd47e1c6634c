//! Writes an SDXL of random weights and true shapes, for full-size tests without the real weights.
//!
//! ```text
//! cargo run --release -p rectiflow-sdxl --example random_sdxl -- OUT [fp32|fp16|bf16] [CONFIGS]
//! ```
//!
//! OUT becomes a diffusers folder of 3.5 billion parameters (6.9 GB in fp16), with the
//! configurations of SDXL 1.0 or of the model folder CONFIGS. Norms start as the identity, the rest
//! in the range of PyTorch's initialization, so that a forward pass stays finite in every dtype.
//! The weights are a function of their names; one tensor is in memory at a time.
#![allow(clippy::print_stderr, reason = "a program for the terminal")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, ValueEnum};
use rectiflow_sdxl::{
    Result,
    bundle::sdxl_configs,
    clip::ClipText,
    config::{ClipConfig, UNetConfig, VaeConfig, read_object},
    durable::write_bytes,
    error::Error,
    folder,
    init::Init,
    model::Component,
    sample::SampleSettings,
    tensor_file::{Metadata, Planned, write_streamed},
    unet::UNet,
    vae::Vae,
    weights::{Parameters, Weights},
};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

/// Writes an SDXL of random weights as a diffusers folder.
#[derive(Debug, Parser)]
struct Arguments {
    /// The model folder to write.
    out: PathBuf,
    /// The dtype of the weights.
    #[arg(value_enum, default_value_t = Dtype::Fp16)]
    dtype: Dtype,
    /// A model folder whose configurations replace those of SDXL 1.0.
    configs: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dtype {
    Fp32,
    Fp16,
    Bf16,
}

impl Dtype {
    fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
        }
    }

    fn kind(self) -> Kind {
        match self {
            Self::Fp32 => Kind::Float,
            Self::Fp16 => Kind::Half,
            Self::Bf16 => Kind::BFloat16,
        }
    }
}

fn main() -> ExitCode {
    rectiflow_sdxl::waiting::sleep_soon();
    let arguments = Arguments::parse();
    match write_model(&arguments) {
        Ok(num_parameters) => {
            let (out, dtype) = (arguments.out.display(), arguments.dtype.name());
            eprintln!("{out}: {num_parameters} parameters in {dtype}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Writes all components; returns the number of parameters.
fn write_model(arguments: &Arguments) -> Result<usize> {
    let out = &arguments.out;
    let mut num_parameters = 0;
    for component in Component::ALL {
        let config = match &arguments.configs {
            Some(model) => read_object(&folder::find(component, model)?.join("config.json"))?,
            None => sdxl_configs()
                .remove(&component)
                .expect("there is one for every component"),
        };
        let folder = out.join(component.folder());
        create(&folder)?;
        let text = serde_json::to_vec_pretty(&config).expect("a JSON value serialises");
        write_bytes(&folder.join("config.json"), &text)?;
        let shapes = shapes(component, config)?;
        let path = folder.join(component.weights_name());
        num_parameters += write_component(&shapes, &path, arguments.dtype.kind())?;
    }
    let folder = out.join("scheduler");
    create(&folder)?;
    let scheduler = json!({
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": true,
        "flow_shift": SampleSettings::default().shift,
    });
    write_bytes(
        &folder.join("scheduler_config.json"),
        scheduler.to_string().as_bytes(),
    )?;
    Ok(num_parameters)
}

fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))
}

/// A component's tensors by name, without their values.
fn shapes(component: Component, config: Map<String, Value>) -> Result<Parameters> {
    let (weights, what) = (Weights::shapes_only(), component.folder());
    let parameters = match component {
        Component::UNet => UNet::new(UNetConfig::from_json(config, what)?, weights)?.parameters,
        Component::ClipL => {
            ClipText::new(ClipConfig::from_json(config, false, what)?, weights)?.parameters
        }
        Component::ClipG => {
            ClipText::new(ClipConfig::from_json(config, true, what)?, weights)?.parameters
        }
        Component::Vae => Vae::new(VaeConfig::from_json(config, what)?, weights)?.parameters,
    };
    Ok(parameters)
}

/// Writes a component's weights, one tensor after the other; returns the number of values.
fn write_component(shapes: &Parameters, path: &Path, kind: Kind) -> Result<usize> {
    let mut planned = Vec::new();
    for (name, tensor) in shapes.iter() {
        planned.push(Planned {
            name: name.to_owned(),
            kind,
            shape: tensor.size(),
        });
    }
    let metadata = Metadata {
        entries: &[("format", "pt")],
        hash: None,
    };
    write_streamed(path, planned, metadata, &mut |name| {
        let shape = shapes
            .get(name)
            .expect("only planned tensors are requested")
            .size();
        let num_values = shape.iter().product::<i64>() as usize;
        let values = start(name, &shape).values(0, name, num_values);
        Ok(Tensor::from_slice(&values).reshape(&shape))
    })?;
    Ok(shapes.num_elements())
}

/// The distribution of a tensor's values, by its name and shape.
fn start(name: &str, shape: &[i64]) -> Init {
    match shape {
        [_] if name.ends_with("weight") => Init::Ones,
        [_] => Init::Zeros,
        _ if name.contains("embedding.weight") => Init::Normal { std: 0.02 },
        [_, inputs @ ..] => Init::fan_in(inputs.iter().product()),
        [] => Init::Zeros,
    }
}
