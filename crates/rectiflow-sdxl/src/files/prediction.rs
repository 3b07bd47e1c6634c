//! What a model's files say that its UNet predicts, and where they say so.
//!
//! No format has one key for it, and tools disagree. In a single file a marker tensor wins over a
//! text in the header: ComfyUI, Forge and reForge go by the tensors `v_pred` and `ztsnr`, and
//! trainers stamp `modelspec.prediction_type` without looking (kohya's scripts and their flow forks
//! write "epsilon" for flow models too). A diffusers folder says it in the UNet's header, if this
//! program wrote it, or in the scheduler's configuration.
//!
//! Not here: files that predict something that is not supported (`foreign`).

use std::fmt::Write as _;

use crate::{
    error::{Error, Result},
    flow::Parameterization,
    weights::{
        component::{PARAMETERIZATION_KEY, SHIFT_KEY},
        tensor_file::TensorFile,
    },
};

/// The empty tensor that says v in a single file.
pub const V_TENSOR: &str = "v_pred";

/// The empty tensor that says zero terminal SNR in a single file, beside [`V_TENSOR`].
pub const ZTSNR_TENSOR: &str = "ztsnr";

/// Keys of a header in which tools write what the model predicts: the standard's, and ComfyUI's.
const TEXT_KEYS: [&str; 2] = ["modelspec.prediction_type", "modelspec.predict_key"];

/// What a model's files say of its prediction.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prediction {
    /// What the UNet predicts; `None` if the files do not say.
    pub parameterization: Option<Parameterization>,
    /// Whether the files say that the noise schedule has zero terminal SNR.
    pub has_zero_terminal_snr: bool,
    /// Where the files say so, for messages; empty if they do not.
    pub source: String,
    /// The shift that a single file of this program names for a flow model.
    pub shift: Option<f64>,
}

impl Prediction {
    /// Returns a prediction that `source` names.
    pub fn named(parameterization: Parameterization, source: impl Into<String>) -> Self {
        Self {
            parameterization: Some(parameterization),
            has_zero_terminal_snr: parameterization == Parameterization::VZtsnr,
            source: source.into(),
            shift: None,
        }
    }

    /// Reads what a single file says.
    ///
    /// # Errors
    /// [`Error::Malformed`] if one of this program's own keys has an unknown value.
    pub(crate) fn of_single_file(file: &TensorFile) -> Result<Self> {
        let has_zero_terminal_snr = file.shape(ZTSNR_TENSOR).is_some();
        let mut found = of_texts(file)?;
        if file.shape(V_TENSOR).is_some() {
            found = of_marker(found, has_zero_terminal_snr);
        }
        found.has_zero_terminal_snr |= has_zero_terminal_snr;
        if found.parameterization == Some(Parameterization::V) && found.has_zero_terminal_snr {
            found.parameterization = Some(Parameterization::VZtsnr);
        }
        found.shift = shift_of(file)?;
        Ok(found)
    }

    /// Returns what the model predicts: as `argument` says, or else as the files say; `None` if
    /// neither does. An argument `v` keeps the noise schedule of the files.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a model that predicts noise on a schedule with zero terminal SNR.
    pub fn settled(&self, argument: Option<Parameterization>) -> Result<Option<Parameterization>> {
        match argument.or(self.parameterization) {
            Some(Parameterization::Eps) if self.has_zero_terminal_snr => Err(Error::Invalid {
                what: "the model".into(),
                reason: "it is said to predict noise (eps), and to have zero terminal SNR (the \
                         tensor ztsnr), where the input is the noise alone, which tells nothing \
                         about the picture; specify v_ztsnr or flow (--parameterization)"
                    .into(),
            }),
            Some(Parameterization::V) if self.has_zero_terminal_snr => {
                Ok(Some(Parameterization::VZtsnr))
            }
            settled => Ok(settled),
        }
    }

    /// Says in one line what the model is taken for, from where, and how to say otherwise; `None`
    /// if the files do not say what it predicts.
    pub fn line(&self) -> Option<String> {
        let parameterization = self.parameterization?;
        let predicts = match parameterization {
            Parameterization::Flow => "predicts velocity (flow)",
            Parameterization::Eps => "predicts noise (eps)",
            Parameterization::V => "predicts v",
            Parameterization::VZtsnr => "predicts v with zero terminal SNR (v_ztsnr)",
        };
        let mut line = format!("taken for a model that {predicts}, by {}", self.source);
        let is_stamp = TEXT_KEYS.iter().any(|key| self.source.contains(key));
        if is_stamp && parameterization == Parameterization::Eps {
            line += "; trainers write this on flow models too";
        }
        let other = if parameterization == Parameterization::Flow {
            "eps or v"
        } else {
            "flow"
        };
        let _ = write!(
            line,
            "; if it is something else, specify it (--parameterization {other})"
        );
        Some(line)
    }
}

/// Returns what the marker tensors say, which win over the texts that said `texts`.
fn of_marker(texts: Prediction, has_zero_terminal_snr: bool) -> Prediction {
    let mut source = if has_zero_terminal_snr {
        format!("the tensors {V_TENSOR} and {ZTSNR_TENSOR}")
    } else {
        format!("the tensor {V_TENSOR}")
    };
    if texts
        .parameterization
        .is_some_and(|said| !said.predicts_v())
    {
        let _ = write!(source, " (which wins over {})", texts.source);
    }
    Prediction {
        source,
        has_zero_terminal_snr: texts.has_zero_terminal_snr,
        parameterization: Some(Parameterization::V),
        shift: None,
    }
}

/// Returns the shift that a header names.
fn shift_of(file: &TensorFile) -> Result<Option<f64>> {
    let Some(text) = file.metadata().get(SHIFT_KEY) else {
        return Ok(None);
    };
    match text.parse::<f64>() {
        Ok(shift) if shift.is_finite() && shift > 0.0 => Ok(Some(shift)),
        _ => Err(Error::Malformed {
            path: file.path().to_owned(),
            kind: "model",
            reason: format!("{SHIFT_KEY} in its header is {text:?}, expected a positive number"),
        }),
    }
}

/// Returns what the texts of a header say: this program's key, or else those of other tools.
fn of_texts(file: &TensorFile) -> Result<Prediction> {
    let metadata = file.metadata();
    if let Some(name) = metadata.get(PARAMETERIZATION_KEY) {
        let parameterization = name.parse().map_err(|error: Error| Error::Malformed {
            path: file.path().to_owned(),
            kind: "model",
            reason: format!("{PARAMETERIZATION_KEY} in its header: {error}"),
        })?;
        let source = format!("{PARAMETERIZATION_KEY} in its header");
        return Ok(Prediction::named(parameterization, source));
    }
    for key in TEXT_KEYS {
        let Some(value) = metadata.get(key) else {
            continue;
        };
        if let Some(parameterization) = by_other_names(value) {
            let source = format!("{key} {value:?} in its header");
            return Ok(Prediction::named(parameterization, source));
        }
    }
    Ok(Prediction::default())
}

/// Returns what a value of another tool's key means; `None` for an unknown one.
fn by_other_names(value: &str) -> Option<Parameterization> {
    let value = value.trim().to_ascii_lowercase().replace(['-', ' '], "_");
    Some(match value.as_str() {
        "epsilon" | "eps" | "noise" => Parameterization::Eps,
        "v" | "v_pred" | "v_prediction" => Parameterization::V,
        "flow" | "flow_prediction" | "flow_matching" | "rectified_flow" => Parameterization::Flow,
        _ => return None,
    })
}
