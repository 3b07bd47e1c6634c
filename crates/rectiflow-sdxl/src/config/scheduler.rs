//! What a scheduler's configuration says about its model: what the UNet predicts, and a flow
//! model's shift.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{config::reader::read_object, error::Result, flow::Parameterization};

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

impl SchedulerConfig {
    /// Reads a `scheduler_config.json`.
    ///
    /// # Errors
    /// As [`read_object`].
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self::from_json(read_object(path)?))
    }

    /// Extracts what the UNet predicts and the shift. Accepts any contents, since sampling does not
    /// use diffusers' schedulers.
    pub fn from_json(json: Map<String, Value>) -> Self {
        let flow_match = text(&json, "_class_name").starts_with("FlowMatch");
        let parameterization = parameterization(&json, flow_match);
        let flow_shift = if parameterization == Some(Parameterization::Flow) {
            let key = if flow_match { "shift" } else { "flow_shift" };
            json.get(key).and_then(Value::as_f64)
        } else {
            None
        };
        Self {
            parameterization,
            flow_shift,
            json,
        }
    }
}

/// Returns what the UNet predicts; `flow_match` says whether the scheduler is one of diffusers'
/// flow-matching ones.
fn parameterization(json: &Map<String, Value>, flow_match: bool) -> Option<Parameterization> {
    let flow_sigmas = json.get("use_flow_sigmas").and_then(Value::as_bool);
    if flow_match || flow_sigmas == Some(true) {
        return Some(Parameterization::Flow);
    }
    match text(json, "prediction_type") {
        "flow_prediction" => Some(Parameterization::Flow),
        "epsilon" => Some(Parameterization::Eps),
        "v_prediction" => Some(Parameterization::V),
        _ => None,
    }
}

/// Returns the text of a key; empty if it has none.
fn text<'a>(json: &'a Map<String, Value>, key: &str) -> &'a str {
    json.get(key).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(json: Value) -> Map<String, Value> {
        json.as_object().unwrap().clone()
    }

    #[test]
    fn schedulers_say_what_the_model_predicts() {
        let read = |json: Value| {
            let config = SchedulerConfig::from_json(object(json));
            (config.parameterization, config.flow_shift)
        };
        let flow = Some(Parameterization::Flow);
        assert_eq!(
            read(serde_json::json!({"prediction_type": "epsilon"})),
            (Some(Parameterization::Eps), None)
        );
        assert_eq!(
            read(serde_json::json!({"prediction_type": "v_prediction"})),
            (Some(Parameterization::V), None)
        );
        let dpm = serde_json::json!({
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": true,
            "flow_shift": 3.0,
        });
        assert_eq!(read(dpm), (flow, Some(3.0)));
        let euler =
            serde_json::json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0});
        assert_eq!(read(euler), (flow, Some(6.0)));
        assert_eq!(read(serde_json::json!({"_class_name": "X"})), (None, None));
    }
}
