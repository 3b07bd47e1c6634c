//! CLIP's text encoders: OpenAI's CLIP-L and OpenCLIP's bigG, as computed by transformers.
//!
//! SDXL uses the states before the last layer, without the final norm, and bigG's projected pooled
//! output. Names are those of transformers (with the prefix "text_model."); files without that
//! prefix, as transformers 5 writes for CLIP-L, are read too.

use tch::{Device, Kind, Tensor};

use crate::{
    config::{activation::Activation, clip::ClipConfig},
    error::{Error, Result},
    nets::{
        attention::{Mask, attend},
        layers::{LayerNorm, Linear},
    },
    torch::ffi::Torch,
    weights::{Parameters, Scope, Weights, init::Init},
};

/// A text encoder.
#[derive(Debug)]
pub struct ClipText {
    /// Its sizes.
    pub config: ClipConfig,
    /// Its tensors by their transformers names.
    pub parameters: Parameters,
    device: Device,
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
    text_projection: Option<Linear>,
}

/// The output of a text encoder.
#[derive(Debug)]
pub struct ClipOutput {
    /// The states before the last layer, not normed: `hidden_states[-2]` in transformers.
    /// `[b, n, hidden_size]`
    pub hidden: Tensor,
    /// The last layer's normed state at the end of the text, projected if the model has a
    /// projection. `[b, pooled_dim]`
    pub pooled: Tensor,
}

/// Prefix of all names except the projection's.
const PREFIX: &str = "text_model.";

impl ClipText {
    /// Builds the encoder from its tensors.
    ///
    /// # Errors
    /// [`Error::Weights`] if they are not exactly those of the configuration.
    pub fn new(config: ClipConfig, mut weights: Weights) -> Result<Self> {
        if lacks_prefix(weights.names().into_iter()) {
            weights.rename(with_prefix);
        }
        let device = weights.device();
        let c = &config;
        let mut root = weights.root();
        let mut model = root.sub("text_model");
        // Embeddings.
        let mut embeddings = model.sub("embeddings");
        let token_embedding = embedding(&mut embeddings, "token", c.vocab_size, c);
        let num_positions = c.max_position_embeddings;
        let position_embedding = embedding(&mut embeddings, "position", num_positions, c);
        // Layers, and what follows them.
        let layers = layers(&mut model, c);
        let final_layer_norm = norm(&mut model, "final_layer_norm", c);
        let text_projection = projection(&mut root, c);
        let parameters = weights.finish()?;
        Ok(Self {
            config,
            parameters,
            device,
            token_embedding,
            position_embedding,
            layers,
            final_layer_norm,
            text_projection,
        })
    }

    /// Returns the device of the tensors.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Returns the dtype of the activations. Embeddings and norms can have another.
    pub fn kind(&self) -> Kind {
        self.layers[0].fc1.kind()
    }

    /// Encodes token ids, `[b, n]` int64.
    ///
    /// # Errors
    /// [`Error::Input`] for a wrong shape, dtype or id, [`Error::Torch`] if libtorch fails (out of
    /// memory).
    pub fn forward(&self, ids: &Tensor) -> Result<ClipOutput> {
        self.check(ids)?;
        let doing = || format!("text encoder forward of {:?}", ids.size());
        let ids = ids
            .f_to_device(self.device)
            .map_err(Error::torch(doing()))?;
        self.calculate(&ids).map_err(Error::torch(doing()))
    }

    fn calculate(&self, ids: &Tensor) -> Torch<ClipOutput> {
        let hidden = self.penultimate(ids)?;
        let pooled = self.pool(&hidden, ids)?;
        Ok(ClipOutput { hidden, pooled })
    }

    /// Encodes token ids, but returns only the states before the last layer:
    /// [`ClipOutput::hidden`], `[b, n, hidden_size]`.
    ///
    /// # Errors
    /// As [`ClipText::forward`].
    pub fn hidden(&self, ids: &Tensor) -> Result<Tensor> {
        self.check(ids)?;
        ids.f_to_device(self.device)
            .and_then(|ids| self.penultimate(&ids))
            .map_err(Error::torch(format!(
                "text encoder forward of {:?}",
                ids.size()
            )))
    }

    fn penultimate(&self, ids: &Tensor) -> Torch {
        let num_tokens = ids.size()[1];
        // [b, n, d]
        let tokens = Tensor::f_embedding(&self.token_embedding, ids, -1, false, false)?;
        let mut hidden = tokens
            .f_add(&self.position_embedding.f_narrow(0, 0, num_tokens)?)?
            .f_to_kind(self.kind())?;
        for layer in &self.layers[..self.layers.len() - 1] {
            hidden = layer.forward(&hidden)?;
        }
        Ok(hidden)
    }

    fn pool(&self, penultimate: &Tensor, ids: &Tensor) -> Torch {
        let last = &self.layers[self.layers.len() - 1];
        let normed = self.final_layer_norm.forward(&last.forward(penultimate)?)?;
        let (b, _, d) = normed.size3()?;
        let at = self
            .end_of_text(ids)?
            .f_reshape([b, 1, 1])?
            .f_expand([b, 1, d], false)?;
        let pooled = normed.f_gather(1, &at, false)?.f_squeeze_dim(1)?; // [b, d]
        match &self.text_projection {
            Some(projection) => projection.forward(&pooled),
            None => Ok(pooled),
        }
    }

    /// Returns the position of each text's end, `[b]`. Configurations older than transformers 4.32
    /// contain the wrong id 2; the end is then the largest id, which is the correct one in CLIP's
    /// vocabulary.
    fn end_of_text(&self, ids: &Tensor) -> Torch {
        if self.config.eos_token_id == 2 {
            ids.f_argmax(1, false)
        } else {
            // argmax returns the first of equal values.
            ids.f_eq(self.config.eos_token_id)?
                .f_to_kind(Kind::Int)?
                .f_argmax(1, false)
        }
    }

    /// Checks the ids. A CUDA kernel that reads beyond the table would end the process, so the
    /// values of ids on the CPU are checked too (a tokenizer's ids are).
    fn check(&self, ids: &Tensor) -> Result<()> {
        let (size, kind) = (ids.size(), ids.kind());
        let max = self.config.max_position_embeddings;
        if size.len() != 2 || size.contains(&0) || size[1] > max || kind != Kind::Int64 {
            let expected = format!("[b, n] Int64 with n from 1 to {max}");
            let found = format!("{size:?} {kind:?}");
            return Err(Error::input("input_ids", expected, found));
        }
        if ids.device() == Device::Cpu {
            check_range(ids, self.config.vocab_size)
        } else {
            Ok(())
        }
    }
}

fn check_range(ids: &Tensor, vocab_size: i64) -> Result<()> {
    let low = ids.min().int64_value(&[]);
    let high = ids.max().int64_value(&[]);
    if low >= 0 && high < vocab_size {
        return Ok(());
    }
    let expected = format!("ids from 0 to {}", vocab_size - 1);
    Err(Error::input(
        "input_ids",
        expected,
        format!("{low} to {high}"),
    ))
}

/// Takes an embedding of `num_rows` tokens or positions.
fn embedding(scope: &mut Scope<'_>, of: &str, num_rows: i64, config: &ClipConfig) -> Tensor {
    let init = Init::Normal {
        std: 0.02 * config.initializer_factor,
    };
    let shape = [num_rows, config.hidden_size];
    scope.take(&format!("{of}_embedding.weight"), &shape, init)
}

fn layers(model: &mut Scope<'_>, config: &ClipConfig) -> Vec<Layer> {
    let mut layers = Vec::new();
    for i in 0..config.num_hidden_layers {
        let mut scope = model.sub(format_args!("encoder.layers.{i}"));
        layers.push(Layer::new(&mut scope, config));
    }
    layers
}

fn norm(scope: &mut Scope<'_>, name: &str, config: &ClipConfig) -> LayerNorm {
    LayerNorm::new(
        &mut scope.sub(name),
        config.hidden_size,
        config.layer_norm_eps,
    )
}

/// Builds the projection of the pooled output, if the model has one.
fn projection(root: &mut Scope<'_>, config: &ClipConfig) -> Option<Linear> {
    let width = config.hidden_size;
    let dim = config.projection_dim?;
    let mut scope = root.sub("text_projection");
    let std = config.initializer_factor / (width as f64).sqrt();
    Some(Linear::normal(&mut scope, [width, dim], std, false))
}

/// Returns true if these are an encoder's names without the usual prefix, as transformers 5 writes
/// for CLIP-L.
pub(crate) fn lacks_prefix<'a>(mut names: impl Iterator<Item = &'a str>) -> bool {
    names.all(|name| !name.starts_with(PREFIX))
}

/// Returns the usual name of a tensor named without its prefix.
pub(crate) fn with_prefix(name: &str) -> String {
    if name == "text_projection.weight" {
        name.to_owned()
    } else {
        format!("{PREFIX}{name}")
    }
}

/// Causal self-attention and an MLP.
#[derive(Debug)]
struct Layer {
    layer_norm1: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    num_heads: i64,
    activation: Activation,
}

/// Standard deviations of a layer's initial weights, as in transformers'
/// `CLIPPreTrainedModel._init_weights`.
struct InitialStd {
    /// Of attention's output projection.
    narrow: f64,
    /// Of the other projections, and of the MLP's second layer.
    deep: f64,
    /// Of the MLP's first layer.
    wide: f64,
}

impl InitialStd {
    fn of(config: &ClipConfig) -> Self {
        let width = config.hidden_size as f64;
        let factor = config.initializer_factor;
        let narrow = factor / width.sqrt();
        Self {
            narrow,
            deep: narrow / (2.0 * config.num_hidden_layers as f64).sqrt(),
            wide: factor / (2.0 * width).sqrt(),
        }
    }
}

impl Layer {
    fn new(scope: &mut Scope<'_>, config: &ClipConfig) -> Self {
        let width = config.hidden_size;
        let inner = config.intermediate_size;
        let InitialStd { narrow, deep, wide } = InitialStd::of(config);
        let mut linear =
            |name: &str, widths, std| Linear::normal(&mut scope.sub(name), widths, std, true);
        Self {
            query: linear("self_attn.q_proj", [width, width], deep),
            key: linear("self_attn.k_proj", [width, width], deep),
            value: linear("self_attn.v_proj", [width, width], deep),
            out: linear("self_attn.out_proj", [width, width], narrow),
            fc1: linear("mlp.fc1", [width, inner], wide),
            fc2: linear("mlp.fc2", [inner, width], deep),
            layer_norm1: norm(scope, "layer_norm1", config),
            layer_norm2: norm(scope, "layer_norm2", config),
            num_heads: config.num_attention_heads,
            activation: config.hidden_act,
        }
    }

    fn forward(&self, x: &Tensor) -> Torch {
        let normed = self.layer_norm1.forward(x)?;
        let q = self.query.forward(&normed)?;
        let k = self.key.forward(&normed)?;
        let v = self.value.forward(&normed)?;
        let x = self
            .out
            .forward(&attend(&q, &k, &v, self.num_heads, Mask::Causal)?)?
            .f_add(x)?;
        let inner = self.fc1.forward(&self.layer_norm2.forward(&x)?)?;
        self.fc2
            .forward(&self.activation.forward(&inner)?)?
            .f_add(&x)
    }
}
