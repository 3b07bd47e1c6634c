//! The sizes of a text encoder: transformers' `CLIPTextModel`, with or without a projection.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{
    config::{
        activation::Activation,
        reader::{Reader, read_object},
    },
    error::Result,
};

/// transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`.
#[derive(Debug, Clone)]
pub struct ClipConfig {
    /// Number of tokens; ids are below it.
    pub vocab_size: i64,
    /// Width of the hidden states.
    pub hidden_size: i64,
    /// Width inside the MLPs.
    pub intermediate_size: i64,
    /// Number of transformer layers, at least 2.
    pub num_hidden_layers: usize,
    /// Number of attention heads.
    pub num_attention_heads: i64,
    /// Largest number of tokens in a sequence.
    pub max_position_embeddings: i64,
    /// Activation of the MLPs.
    pub hidden_act: Activation,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// Width of the projected pooled output; `None` without a projection.
    pub projection_dim: Option<i64>,
    /// The token whose first position holds the pooled output. The value 2 (from old
    /// configurations) means the highest token id instead, as in transformers.
    pub eos_token_id: i64,
    /// Scale of the initial weights.
    pub initializer_factor: f64,
    /// The JSON that was read.
    pub json: Map<String, Value>,
}

/// The activations of the MLPs that are supported.
const ACTIVATIONS: [Activation; 2] = [Activation::QuickGelu, Activation::Gelu];

impl ClipConfig {
    /// Reads a `config.json`. `projected` says whether the pooled output is projected if the file
    /// has no `architectures` (true for bigG, false for CLIP-L).
    ///
    /// # Errors
    /// As [`read_object`] and [`Self::from_json`].
    pub fn read(path: &Path, projected: bool) -> Result<Self> {
        Self::from_json(read_object(path)?, projected, &path.display().to_string())
    }

    /// Checks the contents of a `config.json`; `what` names it in messages.
    ///
    /// # Errors
    /// [`crate::error::Error::Config`] with every unsupported or contradictory value.
    pub fn from_json(json: Map<String, Value>, projected: bool, what: &str) -> Result<Self> {
        let mut r = Reader::new(&json);
        let is_projected = is_projected(&mut r, projected);
        r.only("model_type", "clip_text_model", &["clip_text_model"]);
        r.unset("attention_dropout", &Value::from(0.0));
        let hidden_size = r.positive("hidden_size", 512);
        let num_attention_heads = r.positive("num_attention_heads", 8);
        check_heads(&mut r, num_attention_heads, hidden_size);
        let num_hidden_layers = num_hidden_layers(&mut r);
        let projection_dim = r.positive("projection_dim", 512);
        let config = Self {
            vocab_size: r.positive("vocab_size", 49408),
            hidden_size,
            intermediate_size: r.positive("intermediate_size", 2048),
            num_hidden_layers,
            num_attention_heads,
            max_position_embeddings: r.positive("max_position_embeddings", 77),
            hidden_act: r.activation("hidden_act", Activation::QuickGelu, &ACTIVATIONS),
            layer_norm_eps: r.epsilon("layer_norm_eps"),
            projection_dim: is_projected.then_some(projection_dim),
            eos_token_id: r.count("eos_token_id", 49407) as i64,
            initializer_factor: r.number_in("initializer_factor", 1.0, 0.0..=1000.0),
            json: Map::new(),
        };
        r.finish(what)?;
        Ok(Self { json, ..config })
    }

    /// Returns the width of the pooled output, projected or not.
    pub fn pooled_dim(&self) -> i64 {
        self.projection_dim.unwrap_or(self.hidden_size)
    }
}

/// Reads from the class whether the pooled output is projected; `default` applies without a class.
fn is_projected(r: &mut Reader<'_>, default: bool) -> bool {
    const PLAIN: &str = "CLIPTextModel";
    const PROJECTED: &str = "CLIPTextModelWithProjection";
    let default = if default { PROJECTED } else { PLAIN };
    r.first_of("architectures", default, &[PLAIN, PROJECTED]) == PROJECTED
}

fn check_heads(r: &mut Reader<'_>, num_heads: i64, hidden_size: i64) {
    r.divides("num_attention_heads", num_heads, "hidden_size", hidden_size);
}

/// Reads the number of layers, of which the last one's output is not used.
fn num_hidden_layers(r: &mut Reader<'_>) -> usize {
    const KEY: &str = "num_hidden_layers";
    let num_layers = r.num_layers(KEY, 12);
    if num_layers < 2 {
        let expected = "at least 2 (the penultimate layer's states are used)";
        r.problem(KEY, expected, "1");
    }
    num_layers
}
