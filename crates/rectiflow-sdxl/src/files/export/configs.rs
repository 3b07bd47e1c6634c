//! The JSON files that upstream's loaders require: a component's configuration, the pipeline's
//! index, the scheduler's configuration.

use serde_json::{Map, Value, json};
use tch::Kind;

use crate::{flow::Parameterization, weights::component::Component};

/// The diffusers version whose configuration keys are written.
const DIFFUSERS_VERSION: &str = "0.42.1";

/// Returns a component's configuration for upstream's loaders: the one that was read, plus the keys
/// that they require.
pub(crate) fn component_config(
    component: Component,
    config: &Map<String, Value>,
    kind: Option<Kind>,
) -> Map<String, Value> {
    let mut config = config.clone();
    let mut default = |key: &str, value: Value| {
        config.entry(key).or_insert(value);
    };
    match component {
        Component::UNet => default("_class_name", json!("UNet2DConditionModel")),
        Component::Vae => default("_class_name", json!("AutoencoderKL")),
        Component::ClipL | Component::ClipG => {
            let class = if component == Component::ClipL {
                "CLIPTextModel"
            } else {
                "CLIPTextModelWithProjection"
            };
            default("architectures", json!([class]));
            default("model_type", json!("clip_text_model"));
            config.remove("dtype");
            if let Some(name) = kind.and_then(torch_name) {
                config.insert("torch_dtype".into(), json!(name));
            }
        }
    }
    config
}

fn torch_name(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Float => Some("float32"),
        Kind::Half => Some("float16"),
        Kind::BFloat16 => Some("bfloat16"),
        _ => None,
    }
}

/// Returns `model_index.json`, which names the pipeline's classes.
pub(crate) fn model_index(parameterization: Parameterization) -> Value {
    let scheduler = match parameterization {
        Parameterization::Flow => "DPMSolverMultistepScheduler",
        Parameterization::Eps | Parameterization::V => "EulerDiscreteScheduler",
    };
    json!({
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        // The empty negative prompt is encoded, as in training and in ComfyUI, not replaced by
        // zeros.
        "force_zeros_for_empty_prompt": false,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [null, null],
        "image_encoder": [null, null]
    })
}

/// Returns the part of `scheduler_config.json` that differs from flow's, as published with SDXL
/// 1.0.
fn euler_discrete(prediction_type: &str) -> Value {
    json!({
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": prediction_type,
        "interpolation_type": "linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "use_karras_sigmas": false
    })
}

/// Returns `scheduler_config.json`. `sampling_shift` is used for flow only.
pub(crate) fn scheduler_config(parameterization: Parameterization, sampling_shift: f64) -> Value {
    let mut config = json!({
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear"
    });
    let more = match parameterization {
        Parameterization::Flow => json!({
            "_class_name": "DPMSolverMultistepScheduler",
            "solver_order": 1,
            "algorithm_type": "dpmsolver++",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": true,
            "flow_shift": sampling_shift,
            "final_sigmas_type": "zero"
        }),

        Parameterization::Eps => euler_discrete("epsilon"),
        Parameterization::V => euler_discrete("v_prediction"),
    };
    let (Value::Object(config), Value::Object(more)) = (&mut config, more) else {
        unreachable!("both are objects")
    };
    config.extend(more);
    Value::Object(std::mem::take(config))
}
