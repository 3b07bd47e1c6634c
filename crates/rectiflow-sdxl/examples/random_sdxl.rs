//! Writes an SDXL of random weights and true shapes, to try full-size work without the real weights.
//!
//! ```text
//! cargo run --release -p rectiflow-sdxl --example random_sdxl -- OUT [fp32|fp16|bf16] [CONFIGS]
//! ```
//!
//! OUT becomes a diffusers folder of 3.5 billion parameters (6.9 GB in fp16), with the configurations of SDXL 1.0 or of
//! the model folder CONFIGS. Norms begin as the identity, the rest in the range that PyTorch draws it from, so that a
//! forward pass stays finite in every dtype. The weights are a function of their names; one is in memory at a time.
#![allow(clippy::print_stderr, reason = "a program for the terminal")]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

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

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (out, dtype, configs) = match &arguments[..] {
        [out] => (out, "fp16", None),
        [out, dtype] => (out, dtype.as_str(), None),
        [out, dtype, configs] => (out, dtype.as_str(), Some(Path::new(configs))),
        _ => return usage(),
    };
    let kind = match dtype {
        "fp32" => Kind::Float,
        "fp16" => Kind::Half,
        "bf16" => Kind::BFloat16,
        _ => return usage(),
    };
    match write_model(Path::new(out), kind, configs) {
        Ok(num_parameters) => {
            eprintln!("{out}: {num_parameters} parameters in {dtype}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: random_sdxl OUT [fp32|fp16|bf16] [CONFIGS]");
    ExitCode::from(2)
}

fn write_model(out: &Path, kind: Kind, configs: Option<&Path>) -> Result<usize> {
    let mut num_parameters = 0;
    for component in Component::ALL {
        let config = match configs {
            Some(model) => read_object(&folder::find(component, model)?.join("config.json"))?,
            None => sdxl_configs().remove(&component).expect("there is one for every component"),
        };
        let folder = out.join(component.folder());
        create(&folder)?;
        let text = serde_json::to_vec_pretty(&config).expect("a JSON value serialises");
        write_bytes(&folder.join("config.json"), &text)?;
        let shapes = shapes(component, config)?;
        num_parameters += write_component(&shapes, &folder.join(component.weights_name()), kind)?;
    }
    create(&out.join("scheduler"))?;
    let shift = SampleSettings::default().shift;
    let scheduler = json!({"prediction_type": "flow_prediction", "use_flow_sigmas": true, "flow_shift": shift});
    write_bytes(&out.join("scheduler").join("scheduler_config.json"), scheduler.to_string().as_bytes())?;
    Ok(num_parameters)
}

fn create(folder: &PathBuf) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))
}

fn shapes(component: Component, config: Map<String, Value>) -> Result<Parameters> {
    let (weights, what) = (Weights::shapes_only(), component.folder());
    Ok(match component {
        Component::UNet => UNet::new(UNetConfig::from_json(config, what)?, weights)?.parameters,
        Component::ClipL => ClipText::new(ClipConfig::from_json(config, false, what)?, weights)?.parameters,
        Component::ClipG => ClipText::new(ClipConfig::from_json(config, true, what)?, weights)?.parameters,
        Component::Vae => Vae::new(VaeConfig::from_json(config, what)?, weights)?.parameters,
    })
}

fn write_component(shapes: &Parameters, path: &Path, kind: Kind) -> Result<usize> {
    let planned = shapes.iter().map(|(name, tensor)| Planned { name: name.to_owned(), kind, shape: tensor.size() });
    let metadata = Metadata { entries: &[("format", "pt")], hash: None };
    write_streamed(path, planned.collect(), metadata, &mut |name| {
        let shape = shapes.get(name).expect("only planned tensors are asked for").size();
        let num_values = shape.iter().product::<i64>() as usize;
        Ok(Tensor::from_slice(&start(name, &shape).values(0, name, num_values)).reshape(&shape))
    })?;
    Ok(shapes.num_elements())
}

/// The distribution of a tensor, by its name and shape.
fn start(name: &str, shape: &[i64]) -> Init {
    match shape {
        [_] if name.ends_with("weight") => Init::Ones,
        [_] => Init::Zeros,
        _ if name.contains("embedding.weight") => Init::Normal { std: 0.02 },
        [_, inputs @ ..] => Init::fan_in(inputs.iter().product()),
        [] => Init::Zeros,
    }
}
