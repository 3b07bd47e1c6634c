//! Weights stored in 8 bits: which names and formats other tools use, and what of them is read.
//!
//! An fp8 tensor is read as bf16, which holds each of its values exactly. A *scaled* fp8 weight has
//! a scale beside it, which is multiplied in: `NAME.scale_weight` with a marker `scaled_fp8`, or in
//! later versions of ComfyUI `NAME.weight_scale` with a description `NAME.comfy_quant`. Scales of
//! activations (`scale_input`, `input_scale`) serve fp8 arithmetic only and are not used. Formats
//! of fewer bits, rotated weights and scales of blocks are refused by name. Pure.

use serde_json::Value;
use tch::Kind;

/// Key in a single file's header: the formats of its layers, as JSON.
pub(crate) const FORMATS_KEY: &str = "_quantization_metadata";

/// What a tensor beside a weight is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Companion {
    /// The number that the weight is multiplied by.
    Scale,
    /// The scale of a layer's input.
    InputScale,
    /// The description of the format, JSON in bytes.
    Format,
}

const COMPANIONS: [(&str, Companion); 5] = [
    (".scale_weight", Companion::Scale),
    (".weight_scale", Companion::Scale),
    (".scale_input", Companion::InputScale),
    (".input_scale", Companion::InputScale),
    (".comfy_quant", Companion::Format),
];

/// Returns the weight that a tensor accompanies, and what the tensor is to it; `None` for other
/// tensors.
pub(crate) fn companion_of(name: &str) -> Option<(String, Companion)> {
    for (suffix, companion) in COMPANIONS {
        if let Some(layer) = name.strip_suffix(suffix) {
            return Some((format!("{layer}.weight"), companion));
        }
    }
    None
}

/// Whether a tensor only marks a file as scaled fp8.
pub(crate) fn is_marker(name: &str) -> bool {
    name == "scaled_fp8" || name.ends_with(".scaled_fp8")
}

/// Whether a dtype is one of the fp8 formats.
pub(crate) fn is_fp8(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Float8e4m3fn | Kind::Float8e5m2 | Kind::Float8e4m3fnuz | Kind::Float8e5m2fnuz
    )
}

/// Returns the dtype that tensors of a dtype in a file are read as.
pub(crate) fn read_as(kind: Kind) -> Kind {
    if is_fp8(kind) { Kind::BFloat16 } else { kind }
}

/// Returns why a layer's format, JSON such as `{"format": "float8_e4m3fn"}`, cannot be read; `None`
/// if it can.
pub(crate) fn format_problem(format: &Value) -> Option<String> {
    let name = format.get("format").and_then(Value::as_str).unwrap_or("");
    if !name.starts_with("float8_") {
        return Some(format!(
            "its format is {name:?}; only float8_e4m3fn and float8_e5m2 can be read"
        ));
    }
    let is_rotated = format.get("convrot").and_then(Value::as_bool) == Some(true);
    is_rotated.then(|| "its weights are rotated (convrot), which cannot be read".into())
}

/// Returns why the formats in a header ([`FORMATS_KEY`]) cannot be read, with the first layer;
/// `None` if they can.
pub(crate) fn formats_problem(text: &str) -> Option<String> {
    let Ok(formats) = serde_json::from_str::<Value>(text) else {
        return Some("it is not JSON".into());
    };
    let layers = formats.get("layers").and_then(Value::as_object)?;
    for (layer, format) in layers {
        if let Some(problem) = format_problem(format) {
            return Some(format!("layer {layer}: {problem}"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn companions_are_known_by_their_last_name() {
        for (name, weight, companion) in [
            ("a.b.scale_weight", "a.b.weight", Companion::Scale),
            ("a.b.weight_scale", "a.b.weight", Companion::Scale),
            ("a.b.scale_input", "a.b.weight", Companion::InputScale),
            ("a.b.input_scale", "a.b.weight", Companion::InputScale),
            ("a.b.comfy_quant", "a.b.weight", Companion::Format),
        ] {
            assert_eq!(
                companion_of(name),
                Some((weight.into(), companion)),
                "{name}"
            );
        }
        for name in [
            "a.b.weight",
            "scale_weight",
            "a.scale_weight.bias",
            "a.weight_scale_2",
        ] {
            assert_eq!(companion_of(name), None, "{name}");
        }
        assert!(is_marker("scaled_fp8") && is_marker("model.diffusion_model.scaled_fp8"));
        assert!(!is_marker("unscaled_fp8"));
    }

    #[test]
    fn formats_that_are_not_plain_fp8_are_refused_by_name() {
        for (format, problem) in [
            (json!({"format": "float8_e4m3fn"}), None),
            (
                json!({"format": "float8_e5m2", "full_precision_matrix_mult": true}),
                None,
            ),
            (json!({"format": "nvfp4"}), Some("nvfp4")),
            (
                json!({"format": "int8_tensorwise", "convrot": true}),
                Some("int8_tensorwise"),
            ),
            (
                json!({"format": "float8_e4m3fn", "convrot": true}),
                Some("rotated"),
            ),
            (json!({}), Some("\"\"")),
            (json!(3), Some("\"\"")),
        ] {
            let found = format_problem(&format);
            match problem {
                None => assert_eq!(found, None, "{format}"),
                Some(word) => assert!(found.expect(word).contains(word), "{format}"),
            }
            let header = json!({"layers": {"x.y": format}}).to_string();
            assert_eq!(
                formats_problem(&header).is_some(),
                problem.is_some(),
                "{header}"
            );
        }
        assert!(formats_problem("{").is_some());
        assert_eq!(formats_problem("{}"), None);
    }
}
