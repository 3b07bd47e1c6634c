//! What a scheduler's configuration says about its model: what the UNet predicts, on which noise
//! schedule, and a flow model's shift.
//!
//! A diffusers scheduler has two kinds of settings. Those of the model (betas, number of training
//! steps, prediction) are used, or refused by name. Those of diffusers' sampler (spacing of
//! timesteps, order, thresholding) are not used: `rectiflow sample` has its own.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{
    config::reader::{Reader, read_object},
    error::Result,
    flow::Parameterization,
};

/// The part of diffusers' `scheduler_config.json` that is used.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// What the UNet predicts; `None` if the file does not say.
    pub parameterization: Option<Parameterization>,
    /// The shift of a flow model's sigmas; `None` if the file has none.
    pub flow_shift: Option<f64>,
    /// The JSON that was read.
    pub json: Map<String, Value>,
}

/// Settings of a noise schedule that SDXL does not have, with the only value that is supported.
const UNSUPPORTED: [(&str, Value); 6] = [
    ("trained_betas", Value::Null),
    ("sigma_min", Value::Null),
    ("sigma_max", Value::Null),
    ("shift_terminal", Value::Null),
    ("use_dynamic_shifting", Value::Bool(false)),
    ("invert_sigmas", Value::Bool(false)),
];

impl SchedulerConfig {
    /// Reads a `scheduler_config.json`.
    ///
    /// # Errors
    /// As [`read_object`] and [`Self::from_json`].
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_json(read_object(path)?, &path.display().to_string())
    }

    /// Extracts what the UNet predicts and the shift; `what` names the file in messages. Keys that
    /// are missing take SDXL's values.
    ///
    /// # Errors
    /// [`crate::error::Error::Config`] with every setting of another noise schedule than SDXL's.
    pub fn from_json(json: Map<String, Value>, what: &str) -> Result<Self> {
        let mut r = Reader::new(&json);
        let class = text(&json, "_class_name").to_owned();
        check_class(&mut r, &class);
        let is_flow_match = class.starts_with("FlowMatch");
        let is_flow = is_flow_match || r.boolean("use_flow_sigmas", false);
        let predicted = predicted(&mut r, is_flow);
        check_schedule(&mut r, predicted);
        let is_rescaled = r.boolean("rescale_betas_zero_snr", false);
        let parameterization = match predicted {
            Some(Parameterization::V) if is_rescaled => Some(Parameterization::VZtsnr),
            // diffusers takes epsilon where the file says nothing.
            Some(Parameterization::Eps) | None if is_rescaled => {
                let expected = "false for a model that predicts noise (at zero signal-to-noise \
                                ratio its input is the noise alone, which tells nothing about \
                                the picture), or prediction_type v_prediction";
                r.problem("rescale_betas_zero_snr", expected, "true");
                predicted
            }
            other => other,
        };
        let flow_shift = if parameterization == Some(Parameterization::Flow) {
            flow_shift(&mut r, is_flow_match)
        } else {
            None
        };
        r.finish(what)?;
        Ok(Self {
            parameterization,
            flow_shift,
            json,
        })
    }
}

/// Checks that the scheduler is not one for models of another kind.
fn check_class(r: &mut Reader<'_>, class: &str) {
    let expected = "a scheduler for models that predict noise, v or a flow";
    if class.starts_with("EDM") {
        let found = format!("{class} (an EDM model, as Playground 2.5 and CosXL)");
        r.problem("_class_name", expected, &found);
    }
    if class.starts_with("CM") || class.starts_with("VQ") {
        r.problem("_class_name", expected, class);
    }
}

/// Returns what the UNet predicts; `is_flow` says whether the scheduler's sigmas are those of flow
/// matching.
fn predicted(r: &mut Reader<'_>, is_flow: bool) -> Option<Parameterization> {
    const NAMES: [&str; 3] = ["epsilon", "v_prediction", "flow_prediction"];
    let name = r.only("prediction_type", "", &NAMES);
    if is_flow {
        return Some(Parameterization::Flow);
    }
    match name.as_str() {
        "epsilon" => Some(Parameterization::Eps),
        "v_prediction" => Some(Parameterization::V),
        "flow_prediction" => Some(Parameterization::Flow),
        _ => None,
    }
}

/// Checks that the noise schedule is SDXL's.
fn check_schedule(r: &mut Reader<'_>, predicted: Option<Parameterization>) {
    r.unset("num_train_timesteps", &json!(1000));
    r.only("timestep_type", "discrete", &["discrete"]);
    for (key, only) in &UNSUPPORTED {
        r.unset(key, only);
    }
    // Betas have no meaning for a flow model, but diffusers writes them for it too: those of the
    // model that it was converted from, or the defaults of the class.
    if predicted != Some(Parameterization::Flow) {
        r.unset("beta_start", &json!(0.00085));
        r.unset("beta_end", &json!(0.012));
        r.only("beta_schedule", "scaled_linear", &["scaled_linear"]);
    }
}

/// Reads the shift of a flow model's sigmas.
fn flow_shift(r: &mut Reader<'_>, is_flow_match: bool) -> Option<f64> {
    let key = if is_flow_match { "shift" } else { "flow_shift" };
    r.typed(key, None, "a positive number", |value| {
        value.as_f64().filter(|shift| *shift > 0.0).map(Some)
    })
}

/// Returns the text of a key; empty if it has none.
fn text<'a>(json: &'a Map<String, Value>, key: &str) -> &'a str {
    json.get(key).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::reader::parsed_object;

    fn read(json: Value) -> Result<SchedulerConfig> {
        SchedulerConfig::from_json(json.as_object().unwrap().clone(), "scheduler_config.json")
    }

    /// The settings that SDXL's own scheduler has, with changes.
    fn sdxl(changes: &Value) -> Value {
        let mut json = json!({"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085,
            "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
            "prediction_type": "epsilon", "trained_betas": null, "timestep_type": "discrete",
            "rescale_betas_zero_snr": false, "sigma_min": null, "sigma_max": null});
        json.as_object_mut()
            .unwrap()
            .extend(changes.as_object().unwrap().clone());
        json
    }

    #[test]
    fn schedulers_say_what_the_model_predicts() {
        let read = |json: Value| {
            let config = read(json).unwrap();
            (config.parameterization, config.flow_shift)
        };
        let flow = Some(Parameterization::Flow);
        assert_eq!(
            read(json!({"prediction_type": "epsilon"})),
            (Some(Parameterization::Eps), None)
        );
        assert_eq!(
            read(json!({"prediction_type": "v_prediction"})),
            (Some(Parameterization::V), None)
        );
        let dpm = json!({
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": true,
            "flow_shift": 3.0,
        });
        assert_eq!(read(dpm), (flow, Some(3.0)));
        let euler = json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0});
        assert_eq!(read(euler), (flow, Some(6.0)));
        assert_eq!(read(json!({"_class_name": "X"})), (None, None));
    }

    #[test]
    fn zero_terminal_snr_is_read_for_v_and_means_nothing_to_flow() {
        let predicted = |changes: Value| read(sdxl(&changes)).unwrap().parameterization;
        for (changes, expected) in [
            (
                json!({"prediction_type": "v_prediction", "rescale_betas_zero_snr": true}),
                Parameterization::VZtsnr,
            ),
            (
                json!({"prediction_type": "v_prediction", "rescale_betas_zero_snr": null}),
                Parameterization::V,
            ),
            (
                json!({"use_flow_sigmas": true, "rescale_betas_zero_snr": true}),
                Parameterization::Flow,
            ),
        ] {
            assert_eq!(predicted(changes.clone()), Some(expected), "{changes}");
        }
    }

    #[test]
    fn settings_of_other_noise_schedules_are_refused_by_name() {
        for (changes, names) in [
            (
                json!({"beta_start": 0.0001}),
                &["beta_start", "0.00085", "0.0001"][..],
            ),
            (json!({"beta_end": 0.02}), &["beta_end"]),
            (json!({"beta_end": "NaN"}), &["beta_end", "NaN"]),
            (
                json!({"beta_schedule": "squaredcos_cap_v2"}),
                &["beta_schedule", "squaredcos"],
            ),
            (
                json!({"beta_schedule": "linear"}),
                &["beta_schedule", "scaled_linear"],
            ),
            (json!({"trained_betas": [0.1, 0.2]}), &["trained_betas"]),
            (
                json!({"num_train_timesteps": 500}),
                &["num_train_timesteps", "1000"],
            ),
            (json!({"num_train_timesteps": -1}), &["num_train_timesteps"]),
            (
                json!({"prediction_type": "sample"}),
                &["prediction_type", "epsilon", "sample"],
            ),
            (json!({"prediction_type": 3}), &["prediction_type"]),
            (
                json!({"rescale_betas_zero_snr": true}),
                &["rescale_betas_zero_snr", "noise alone"],
            ),
            (
                json!({"rescale_betas_zero_snr": true, "prediction_type": null}),
                &["rescale_betas_zero_snr", "noise alone"],
            ),
            (
                json!({"rescale_betas_zero_snr": "yes"}),
                &["rescale_betas_zero_snr", "true or false"],
            ),
            (json!({"timestep_type": "continuous"}), &["timestep_type"]),
            (json!({"sigma_max": 80.0}), &["sigma_max"]),
            (
                json!({"_class_name": "EDMEulerScheduler"}),
                &["EDMEulerScheduler", "Playground"],
            ),
            (
                json!({"_class_name": "EDMDPMSolverMultistepScheduler"}),
                &["EDM model"],
            ),
            (
                json!({"_class_name": "CMStochasticIterativeScheduler"}),
                &["CMStochastic"],
            ),
            (
                json!({"use_flow_sigmas": true, "flow_shift": 0.0}),
                &["flow_shift", "positive"],
            ),
            (
                json!({"use_flow_sigmas": true, "flow_shift": "NaN"}),
                &["flow_shift"],
            ),
            (json!({"use_flow_sigmas": "true"}), &["use_flow_sigmas"]),
            (
                json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -1,
                    "use_dynamic_shifting": true, "invert_sigmas": true, "shift_terminal": 0.1}),
                &[
                    "shift",
                    "use_dynamic_shifting",
                    "invert_sigmas",
                    "shift_terminal",
                ],
            ),
        ] {
            let error = read(sdxl(&changes))
                .expect_err(&changes.to_string())
                .to_string();
            assert!(error.starts_with("scheduler_config.json: "), "{error}");
            for name in names {
                assert!(error.contains(name), "{changes}: {error}");
            }
        }
    }

    #[test]
    fn settings_of_diffusers_samplers_are_let_through() {
        let text = br#"{"_class_name": "DPMSolverMultistepScheduler", "beta_start": 0.00085,
            "beta_end": 0.012, "beta_schedule": "scaled_linear", "lambda_min_clipped": -Infinity,
            "prediction_type": "epsilon", "timestep_spacing": "trailing", "steps_offset": 0,
            "use_karras_sigmas": true, "algorithm_type": "sde-dpmsolver++", "thresholding": true,
            "variance_type": null, "clip_sample": false, "flow_shift": 1.0, "a_new_key": NaN}"#;
        let json = parsed_object(text).unwrap();
        let config = SchedulerConfig::from_json(json, "x").unwrap();
        assert_eq!(config.parameterization, Some(Parameterization::Eps));
        assert_eq!(config.flow_shift, None, "only a flow model has a shift");
        // Betas of the model that a flow model was converted from, or diffusers' defaults.
        let flow = sdxl(
            &json!({"use_flow_sigmas": true, "beta_start": 0.0001, "beta_schedule": "linear"}),
        );
        assert_eq!(
            read(flow).unwrap().parameterization,
            Some(Parameterization::Flow)
        );
    }
}
