//! The JSON files that upstream's loaders require: a component's configuration, the pipeline's
//! index, the scheduler's configuration.

use serde_json::{Map, Value, json};
use tch::Kind;

use crate::{
    config::scheduler::SchedulerConfig, flow::Parameterization, weights::component::Component,
};

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

/// Schedulers that the stock SDXL pipeline of diffusers takes. Its flow-matching ones lack two
/// members that the pipeline uses.
const PIPELINE_SCHEDULERS: [&str; 16] = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
];

/// Returns `model_index.json`, which names the pipeline's classes; `scheduler` is the configuration
/// of the scheduler.
pub(crate) fn model_index(scheduler: &Value) -> Value {
    json!({
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        // The empty negative prompt is encoded, as in training and in ComfyUI, not replaced by
        // zeros.
        "force_zeros_for_empty_prompt": false,
        "scheduler": ["diffusers", scheduler["_class_name"]],
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

/// Returns `scheduler_config.json`: the one that was `read`, if it predicts the same and the stock
/// pipeline takes it, otherwise this program's. `sampling_shift` is used for flow only.
pub(crate) fn scheduler_config(
    parameterization: Parameterization,
    sampling_shift: f64,
    read: Option<&SchedulerConfig>,
) -> Value {
    if let Some(read) = read
        && read.parameterization == Some(parameterization)
        && let Some(class) = read.json.get("_class_name").and_then(Value::as_str)
        && PIPELINE_SCHEDULERS.contains(&class)
    {
        return kept(read, sampling_shift);
    }
    own_scheduler_config(parameterization, sampling_shift)
}

/// Returns a configuration that was read, for writing.
fn kept(read: &SchedulerConfig, sampling_shift: f64) -> Value {
    let mut config = read.json.clone();
    // JSON lacks these numbers; where diffusers writes one, it is the key's default.
    config.retain(|_, value| !matches!(value.as_str(), Some("-Infinity" | "Infinity" | "NaN")));
    if read.parameterization == Some(Parameterization::Flow) {
        config.insert("flow_shift".into(), json!(sampling_shift));
    }
    Value::Object(config)
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

/// Returns the same for zero terminal SNR, where sampling has to begin at the last step: the
/// spacing of timesteps is trailing (arXiv 2305.08891).
fn euler_discrete_ztsnr() -> Value {
    json!({
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": true,
        "interpolation_type": "linear",
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "use_karras_sigmas": false
    })
}

fn own_scheduler_config(parameterization: Parameterization, sampling_shift: f64) -> Value {
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
        Parameterization::VZtsnr => euler_discrete_ztsnr(),
    };
    let (Value::Object(config), Value::Object(more)) = (&mut config, more) else {
        unreachable!("both are objects")
    };
    config.extend(more);
    Value::Object(std::mem::take(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: Value) -> SchedulerConfig {
        SchedulerConfig::from_json(json.as_object().unwrap().clone(), "x").unwrap()
    }

    #[test]
    fn own_configurations_say_what_they_are_for() {
        for (_, parameterization) in Parameterization::ALL {
            let config = scheduler_config(parameterization, 4.5, None);
            let back = read(config.clone());
            assert_eq!(back.parameterization, Some(parameterization), "{config}");
            let is_flow = parameterization == Parameterization::Flow;
            assert_eq!(back.flow_shift, is_flow.then_some(4.5));
            assert_eq!(model_index(&config)["scheduler"][1], config["_class_name"]);
        }
    }

    #[test]
    fn what_was_read_is_kept_where_the_pipeline_takes_it() {
        let dpm = json!({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": true,
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": true, "x": 7,
            "lambda_min_clipped": "-Infinity"});
        let kept = scheduler_config(Parameterization::VZtsnr, 6.0, Some(&read(dpm.clone())));
        let mut expected = dpm.clone();
        expected
            .as_object_mut()
            .unwrap()
            .remove("lambda_min_clipped");
        assert_eq!(kept, expected, "an infinity is no JSON");
        // A flow model keeps its solver; the shift is the caller's.
        let flow = json!({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": true,
            "flow_shift": 3.0, "solver_order": 2});
        let kept = scheduler_config(Parameterization::Flow, 5.0, Some(&read(flow)));
        assert_eq!(
            (&kept["flow_shift"], &kept["solver_order"]),
            (&json!(5.0), &json!(2))
        );
        // Another parameterization, or a scheduler that the pipeline does not take.
        let own = own_scheduler_config(Parameterization::Flow, 5.0);
        for other in [
            dpm,
            json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}),
            json!({"_class_name": "../../x", "use_flow_sigmas": true}),
            json!({"use_flow_sigmas": true}),
            json!({}),
        ] {
            let config = scheduler_config(Parameterization::Flow, 5.0, Some(&read(other.clone())));
            assert_eq!(config, own, "{other}");
        }
    }
}
