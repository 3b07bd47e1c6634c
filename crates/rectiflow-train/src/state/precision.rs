//! The dtype of each parameter in the model's computation: fp32, or bf16 beside the rest of the
//! fp32 masters.
//!
//! The large matrices and kernels, whose products are sums of many terms, are in bf16. The
//! following stay in fp32: the norms' weights (near 1, where steps of bf16 are 0.8%), embeddings (a
//! row's gradient is a sum over all positions of a token), the embeddings of time and size, and the
//! last convolution, whose result is compared with the target. docs/numerics.md has the table; a
//! test compares the gradients with those of PyTorch's autocast.

use rectiflow_sdxl::weights::Parameters;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::state::halves::rounded;

/// The precision that the model computes in while it trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Precision {
    /// fp32 throughout.
    #[default]
    #[serde(rename = "fp32")]
    Fp32,
    /// bf16 weights and activations; the masters, which complete the weights, gradient sums and
    /// the optimiser stay in fp32.
    #[serde(rename = "bf16")]
    Bf16,
}

impl Precision {
    /// Returns the bytes of a value in the model's computation.
    pub fn value_bytes(self) -> u64 {
        match self {
            Self::Fp32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Returns the dtype of a parameter in the model's computation, by its name in diffusers'
    /// layout.
    pub(crate) fn kind_of(self, name: &str) -> Kind {
        match self {
            Self::Bf16 if !Self::keeps_fp32(name) => Kind::BFloat16,
            Self::Fp32 | Self::Bf16 => Kind::Float,
        }
    }

    /// Returns whether a parameter with this name stays in fp32 regardless of the precision.
    pub(crate) fn keeps_fp32(name: &str) -> bool {
        name.contains("norm") || name.contains("embedding.") || name.starts_with("conv_out.")
    }

    /// Converts the parameters of a model that is not trained, in place.
    pub(crate) fn convert(self, parameters: &Parameters) {
        for (name, tensor) in parameters.iter() {
            let kind = self.kind_of(name);
            if kind != tensor.kind() {
                tensor.shallow_clone().set_data(&rounded(tensor, kind));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rectiflow_sdxl::{
        model::OpenOptions,
        tensor_file::TensorFile,
        unet::{UNet, UNetInput},
    };
    use tch::Tensor;

    use super::*;
    use crate::state::{flat::FlatParameters, layout::narrow};

    /// Relative L2 errors of PyTorch's autocast, by scripts/golden/autocast.py.
    #[derive(Debug, Deserialize)]
    struct Autocast {
        output: f64,
        gradient: f64,
    }

    fn error(ours: &Tensor, exact: &Tensor) -> (f64, f64) {
        let exact = exact.to_kind(Kind::Double);
        let difference = ours.detach().to_kind(Kind::Double) - &exact;
        (
            difference.norm().double_value(&[]),
            exact.norm().double_value(&[]),
        )
    }

    #[test]
    fn gradients_in_bf16_are_at_least_as_exact_as_autocasts() {
        rectiflow_sdxl::test_threads::set();
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rectiflow-sdxl/tests/golden");
        let golden = include_str!("../../tests/golden/autocast.json");
        let golden: std::collections::BTreeMap<String, Autocast> =
            serde_json::from_str(golden).expect("JSON");
        for (name, theirs) in golden {
            let unet = UNet::open(&models.join(&name), &OpenOptions::default())
                .expect("the golden model opens");
            let flat = FlatParameters::adopt(&[("unet", &unet.parameters)], Precision::Bf16);
            let open = |file: &str| {
                TensorFile::open(&models.join(&name).join(file)).expect("the golden file opens")
            };
            let (cases, exact) = (open("cases.safetensors"), open("gradients.safetensors"));
            let get = |key: &str| cases.tensor(&format!("1.{key}")).expect("the case has it");
            let prediction = unet.forward(&UNetInput {
                sample: &get("sample"),
                timestep: &get("timestep"),
                context: &get("encoder_hidden_states"),
                context_mask: None,
                text_embeds: &get("text_embeds"),
                time_ids: &get("time_ids"),
            });
            let prediction = prediction.expect("the case fits");
            let (difference, size) = error(&prediction, &get("out"));
            flat.gradients.begin(1, None);
            let loss = prediction
                .to_kind(Kind::Float)
                .mse_loss(&get("target"), tch::Reduction::Mean);
            flat.gradients
                .adder()
                .add(0, &loss)
                .expect("the backward pass runs");
            let sum = flat.gradients.finish().joined();
            let errors: Vec<(f64, f64)> = flat
                .slices
                .iter()
                .map(|slice| {
                    let exact = exact
                        .tensor(&slice.name["unet.".len()..])
                        .expect("the golden file has it");
                    error(&narrow(&sum, &slice.range), &exact.flatten(0, -1))
                })
                .collect();
            let norm = |of: fn(&(f64, f64)) -> f64| {
                errors
                    .iter()
                    .map(|error| of(error).powi(2))
                    .sum::<f64>()
                    .sqrt()
            };
            let ours = Autocast {
                output: difference / size,
                gradient: norm(|error| error.0) / norm(|error| error.1),
            };
            // The median over tensors, most of which are small, differs: see docs/numerics.md.
            let as_exact = ours.output <= theirs.output && ours.gradient <= theirs.gradient;
            assert!(as_exact, "{name}: {ours:?}, autocast {theirs:?}");
            assert!(ours.gradient > 1e-4, "{name}: this was not bf16: {ours:?}");
        }
    }

    #[test]
    fn norms_embeddings_and_the_last_convolution_stay() {
        let kinds = |names: &[&str]| {
            names
                .iter()
                .map(|name| Precision::Bf16.kind_of(name))
                .collect::<Vec<_>>()
        };
        let stay = [
            "conv_out.weight",
            "conv_norm_out.bias",
            "time_embedding.linear_1.weight",
            "add_embedding.linear_2.bias",
            "down_blocks.0.resnets.0.norm1.weight",
            "mid_block.attentions.0.transformer_blocks.0.norm3.bias",
            "text_model.embeddings.token_embedding.weight",
            "text_model.encoder.layers.0.layer_norm1.weight",
        ];
        assert_eq!(kinds(&stay), vec![Kind::Float; stay.len()]);
        let go = [
            "conv_in.weight",
            "down_blocks.0.resnets.0.time_emb_proj.weight",
            "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias",
            "text_model.encoder.layers.0.mlp.fc1.weight",
            "text_projection.weight",
        ];
        assert_eq!(kinds(&go), vec![Kind::BFloat16; go.len()]);
        assert!(
            go.iter()
                .all(|name| Precision::Fp32.kind_of(name) == Kind::Float)
        );
    }
}
