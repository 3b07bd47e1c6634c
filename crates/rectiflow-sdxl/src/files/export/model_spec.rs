//! The header of a single file: the keys of the ModelSpec standard (version 1.0.1), and our own.
//!
//! Programs read the architecture, the title and the resolution, people the rest. A date is left
//! out, so that the same weights produce the same bytes. The model card is separate.

use serde_json::{Map, Value};

use crate::{
    config::{unet::UNetConfig, vae::VaeConfig},
    error::Result,
    files::{bundle::Bundle, export::options::ExportOptions, single_file::CONFIGS_KEY},
    flow::Parameterization,
    sample::SampleSettings,
    weights::component::{Component, PARAMETERIZATION_KEY, SHIFT_KEY},
};

/// The architecture's and its reference implementation's names in the standard.
const ARCHITECTURE: &str = "stable-diffusion-xl-v1-base";
const IMPLEMENTATION: &str = "https://github.com/Stability-AI/generative-models";

/// Returns the entries of the header except the hash. `configs` holds the four configurations by
/// component folder.
pub(crate) fn metadata(
    bundle: &Bundle<'_>,
    parameterization: Parameterization,
    options: &ExportOptions,
    configs: Map<String, Value>,
) -> Result<Vec<(String, String)>> {
    let side = side_px(bundle)?;
    let prediction = prediction_type(parameterization);
    let shift = match parameterization {
        Parameterization::Flow => options.sampling_shift.to_string(),
        _ => String::new(),
    };
    let own = [
        ("format", "pt".to_owned()),
        // The standard's keys.
        ("modelspec.sai_model_spec", "1.0.1".into()),
        ("modelspec.architecture", ARCHITECTURE.into()),
        ("modelspec.implementation", IMPLEMENTATION.into()),
        ("modelspec.title", options.title.clone()),
        ("modelspec.description", options.description.clone()),
        ("modelspec.resolution", format!("{side}x{side}")),
        ("modelspec.prediction_type", prediction.into()),
        (
            "modelspec.usage_hint",
            usage_hint(parameterization, options.sampling_shift),
        ),
        // Our own.
        (PARAMETERIZATION_KEY, parameterization.to_string()),
        (SHIFT_KEY, shift),
        (CONFIGS_KEY, Value::Object(configs).to_string()),
    ];
    let mut entries = Vec::new();
    for (key, value) in own {
        if !value.is_empty() {
            entries.push((key.to_owned(), value));
        }
    }
    entries.extend(options.metadata.iter().cloned());
    Ok(entries)
}

/// Returns the side of the pictures that the model is trained for, in pixels.
fn side_px(bundle: &Bundle<'_>) -> Result<u64> {
    let vae = bundle.config(Component::Vae).clone();
    let vae = VaeConfig::from_json(vae, &Component::Vae.config_name())?;
    let unet = bundle.config(Component::UNet);
    let unet = UNetConfig::from_json(unet.clone(), &Component::UNet.config_name())?;
    Ok(unet.sample_size * u64::from(vae.down_factor()))
}

/// The standard defines "v" and "epsilon", and permits others.
fn prediction_type(parameterization: Parameterization) -> &'static str {
    match parameterization {
        Parameterization::Flow => "flow",
        Parameterization::Eps => "epsilon",
        Parameterization::V | Parameterization::VZtsnr => "v",
    }
}

/// Returns how to set up sampling in ComfyUI; no program infers "flow" from a file, all infer v
/// from the marker tensors. Empty for eps.
pub fn usage_hint(parameterization: Parameterization, shift: f64) -> String {
    match parameterization {
        Parameterization::Flow => format!(
            "A rectified-flow model: in ComfyUI put ModelSamplingSD3 (shift {shift}; 3 to 6 is \
             useful) behind the checkpoint loader. Euler, schedule simple or beta, CFG about {}.",
            SampleSettings::default().cfg
        ),
        Parameterization::V => "A v-prediction model: ComfyUI, Forge and reForge know it by the \
                                tensor v_pred; elsewhere choose v-prediction."
            .into(),
        Parameterization::VZtsnr => "A v-prediction model with zero terminal SNR: ComfyUI, Forge \
                                     and reForge know it by the tensors v_pred and ztsnr; \
                                     elsewhere choose v-prediction and zero terminal SNR."
            .into(),
        Parameterization::Eps => String::new(),
    }
}
