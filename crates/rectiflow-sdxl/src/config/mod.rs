//! Model sizes, read from the `config.json` files of diffusers and transformers.
//!
//! Missing keys take upstream's defaults. A key that is known but asks for something this program does not have is an
//! error that names the key, what is supported and what was found; all problems of a file are reported together. Unknown
//! keys are left alone, as upstream does: the files carry notes of their own (`_name_or_path`, `torch_dtype`). Each
//! configuration keeps the JSON it came from, so that an export writes back what was read.
//!
//! Not here: SDXL's own numbers. The real model and a tiny one differ in their files only.

pub(crate) mod config_reader;

use std::{fs, path::Path};

use serde_json::{Map, Value};

use crate::{
    config::config_reader::Reader,
    error::{Error, Result},
    flow::Parameterization,
};

/// The non-linearity of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x)
    Silu,
    /// x Phi(x), exactly
    Gelu,
    /// x sigmoid(1.702 x)
    QuickGelu,
}

/// One level of the UNet, on its way down or up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LevelConfig {
    /// Output channels.
    pub channels: i64,
    /// Attention heads.
    pub num_heads: i64,
    /// Width of the context.
    pub context_dim: i64,
    /// For each residual block, how many transformer blocks follow it; empty where the level has no attention.
    pub transformer_layers: Vec<usize>,
    /// Residual blocks.
    pub num_resnets: usize,
}

/// diffusers' `UNet2DConditionModel`, as SDXL uses it.
#[derive(Debug, Clone)]
pub struct UNetConfig {
    /// Channels of the latents.
    pub in_channels: i64,
    /// Channels of the output.
    pub out_channels: i64,
    /// The levels from the finest to the coarsest.
    pub down: Vec<LevelConfig>,
    /// The middle, at the coarsest level; always with one transformer between two residual blocks.
    pub mid: LevelConfig,
    /// The levels from the coarsest to the finest.
    pub up: Vec<LevelConfig>,
    /// Whether the transformers' outer projections are linear layers rather than 1x1 convolutions.
    pub use_linear_projection: bool,
    /// Groups of every group norm.
    pub norm_num_groups: i64,
    /// Epsilon of the residual blocks' norms.
    pub norm_eps: f64,
    /// Width of the embedding of time and size.
    pub time_embed_dim: i64,
    /// Width of the sinusoid of each of the six size numbers.
    pub addition_time_embed_dim: i64,
    /// Width of the pooled text.
    pub pooled_dim: i64,
    /// Whether sinusoids have the cosines first.
    pub flip_sin_to_cos: bool,
    /// The sinusoids' frequency shift.
    pub freq_shift: f64,
    /// Padding of the stride-2 convolutions.
    pub downsample_padding: i64,
    /// What was read.
    pub json: Map<String, Value>,
}

/// How many size numbers condition the UNet: original, crop and target, each height and width.
pub const NUM_TIME_IDS: i64 = 6;

impl UNetConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Malformed`], [`Error::Config`].
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_json(read_object(path)?, &path.display().to_string())
    }

    /// Checks the contents of a `config.json`; `what` names it in messages.
    ///
    /// # Errors
    /// [`Error::Config`] with every unsupported or contradictory value.
    pub fn from_json(json: Map<String, Value>, what: &str) -> Result<Self> {
        let mut r = Reader::new(&json);
        check_unsupported_unet(&mut r);
        let widths = r.positive_list("block_out_channels", &[320, 640, 1280, 1280]);
        let levels = Levels::read(&mut r, &widths);
        let norm_num_groups = r.positive("norm_num_groups", 32);
        for &width in &widths {
            r.divides("norm_num_groups", norm_num_groups, "block_out_channels", width);
        }
        let addition_time_embed_dim = r.positive("addition_time_embed_dim", 256);
        let projection = r.positive("projection_class_embeddings_input_dim", 2816);
        let pooled_dim = projection - NUM_TIME_IDS * addition_time_embed_dim;
        if pooled_dim < 1 {
            let expected = format!("more than {NUM_TIME_IDS} x addition_time_embed_dim ({addition_time_embed_dim})");
            r.problem("projection_class_embeddings_input_dim", &expected, &projection.to_string());
        }
        r.activation("act_fn", Activation::Silu, &[Activation::Silu]);
        let config = Self {
            in_channels: r.positive("in_channels", 4),
            out_channels: r.positive("out_channels", 4),
            mid: levels.mid(),
            up: levels.up(),
            down: levels.down,
            use_linear_projection: r.boolean("use_linear_projection", false),
            norm_num_groups,
            norm_eps: r.number("norm_eps", 1e-5),
            time_embed_dim: r.optional_positive("time_embedding_dim").unwrap_or(widths[0] * 4),
            addition_time_embed_dim,
            pooled_dim,
            flip_sin_to_cos: r.boolean("flip_sin_to_cos", true),
            freq_shift: r.number("freq_shift", 0.0),
            downsample_padding: r.count("downsample_padding", 1) as i64,
            json: Map::new(),
        };
        r.finish(what)?;
        Ok(Self { json, ..config })
    }

    /// Width of the context, the same at every level.
    pub fn context_dim(&self) -> i64 {
        self.mid.context_dim
    }

    /// By how much the coarsest level is smaller than the latents: sizes that are multiples of it need no odd cases.
    pub fn down_factor(&self) -> u32 {
        1 << (self.down.len() - 1)
    }
}

/// Everything about the UNet that diffusers can vary and SDXL does not.
fn check_unsupported_unet(r: &mut Reader<'_>) {
    r.only("_class_name", "UNet2DConditionModel", &["UNet2DConditionModel"]);
    r.only("mid_block_type", "UNetMidBlock2DCrossAttn", &["UNetMidBlock2DCrossAttn"]);
    r.only("resnet_time_scale_shift", "default", &["default"]);
    r.only("time_embedding_type", "positional", &["positional"]);
    r.only("attention_type", "default", &["default"]);
    // diffusers' own default is null, which is not SDXL.
    r.required("addition_embed_type", &["text_time"]);
    for key in [
        "center_input_sample",
        "only_cross_attention",
        "dual_cross_attention",
        "upcast_attention",
        "resnet_skip_time_act",
        "class_embeddings_concat",
    ] {
        r.unset(key, &Value::Bool(false));
    }
    r.unset("dropout", &Value::from(0.0));
    for key in ["mid_block_scale_factor", "resnet_out_scale_factor"] {
        r.unset(key, &Value::from(1.0));
    }
    for key in ["conv_in_kernel", "conv_out_kernel"] {
        r.unset(key, &Value::from(3));
    }
    for key in [
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "num_attention_heads",
        "class_embed_type",
        "num_class_embeds",
        "time_embedding_act_fn",
        "timestep_post_act",
        "time_cond_proj_dim",
        "cross_attention_norm",
    ] {
        r.unset(key, &Value::Null);
    }
}

/// The UNet's levels, as diffusers spreads them over eight keys.
struct Levels {
    down: Vec<LevelConfig>,
    has_attention_up: Vec<bool>,
    layers_up: Vec<Vec<usize>>,
    layers_mid: usize,
}

impl Levels {
    fn read(r: &mut Reader<'_>, widths: &[i64]) -> Self {
        let num_levels = widths.len();
        let attending = ["DownBlock2D", "CrossAttnDownBlock2D"];
        let has_attention = r.block_types("down_block_types", attending, &[true, true, true, false], num_levels);
        let attending = ["UpBlock2D", "CrossAttnUpBlock2D"];
        let has_attention_up = r.block_types("up_block_types", attending, &[false, true, true, true], num_levels);
        let num_resnets = r.num_blocks_per_level("layers_per_block", 2, num_levels);
        let heads = r.per_level("attention_head_dim", 8, num_levels);
        let context = r.per_level("cross_attention_dim", 1280, num_levels);
        if context.iter().any(|&c| c != context[0]) {
            r.problem("cross_attention_dim", "the same width at every level", &format!("{context:?}"));
        }
        for (&width, &num_heads) in widths.iter().zip(&heads) {
            r.divides("attention_head_dim", num_heads, "block_out_channels", width);
        }
        let up_resnets: Vec<usize> = num_resnets.iter().rev().map(|n| n + 1).collect();
        let layers = r.layers("transformer_layers_per_block", &num_resnets);
        let layers_up = r.layers_up(&up_resnets);
        let layers_mid = r.layers_mid("transformer_layers_per_block");
        let down = (0..num_levels).map(|i| LevelConfig {
            channels: widths[i],
            num_heads: heads[i],
            context_dim: context[i],
            transformer_layers: if has_attention[i] { layers[i].clone() } else { Vec::new() },
            num_resnets: num_resnets[i],
        });
        Self { down: down.collect(), has_attention_up, layers_up, layers_mid }
    }

    fn mid(&self) -> LevelConfig {
        let coarsest = &self.down[self.down.len() - 1];
        LevelConfig { transformer_layers: vec![self.layers_mid], num_resnets: 2, ..coarsest.clone() }
    }

    fn up(&self) -> Vec<LevelConfig> {
        let level = |(i, down): (usize, &LevelConfig)| LevelConfig {
            transformer_layers: if self.has_attention_up[i] { self.layers_up[i].clone() } else { Vec::new() },
            num_resnets: down.num_resnets + 1,
            ..down.clone()
        };
        self.down.iter().rev().enumerate().map(level).collect()
    }
}

/// transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`.
#[derive(Debug, Clone)]
pub struct ClipConfig {
    /// Token ids are below this.
    pub vocab_size: i64,
    /// Width of the hidden states.
    pub hidden_size: i64,
    /// Width inside the MLPs.
    pub intermediate_size: i64,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: i64,
    /// Most tokens.
    pub max_position_embeddings: i64,
    /// Non-linearity of the MLPs.
    pub hidden_act: Activation,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// Width of the pooled output where it is projected, `None` where it is not.
    pub projection_dim: Option<i64>,
    /// The token whose state is the pooled output: its first position. The value 2 (what old configurations hold) means
    /// the highest token id instead, as in transformers.
    pub eos_token_id: i64,
    /// Scale of the initial weights.
    pub initializer_factor: f64,
    /// What was read.
    pub json: Map<String, Value>,
}

impl ClipConfig {
    /// Reads a `config.json`. `projected`: whether the pooled output is projected where the file's `architectures` does
    /// not say (bigG's is, CLIP-L's is not).
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Malformed`], [`Error::Config`].
    pub fn read(path: &Path, projected: bool) -> Result<Self> {
        Self::from_json(read_object(path)?, projected, &path.display().to_string())
    }

    /// Checks the contents of a `config.json`; `what` names it in messages.
    ///
    /// # Errors
    /// [`Error::Config`] with every unsupported or contradictory value.
    pub fn from_json(json: Map<String, Value>, projected: bool, what: &str) -> Result<Self> {
        const PLAIN: &str = "CLIPTextModel";
        const PROJECTED: &str = "CLIPTextModelWithProjection";
        let mut r = Reader::new(&json);
        let class = r.first_of("architectures", if projected { PROJECTED } else { PLAIN }, &[PLAIN, PROJECTED]);
        r.only("model_type", "clip_text_model", &["clip_text_model"]);
        r.unset("attention_dropout", &Value::from(0.0));
        let hidden_size = r.positive("hidden_size", 512);
        let num_attention_heads = r.positive("num_attention_heads", 8);
        r.divides("num_attention_heads", num_attention_heads, "hidden_size", hidden_size);
        let num_hidden_layers = r.num_layers("num_hidden_layers", 12);
        if num_hidden_layers < 2 {
            r.problem("num_hidden_layers", "at least 2 (the last but one layer's states are used)", "1");
        }
        let projection_dim = r.positive("projection_dim", 512);
        let config = Self {
            vocab_size: r.positive("vocab_size", 49408),
            hidden_size,
            intermediate_size: r.positive("intermediate_size", 2048),
            num_hidden_layers,
            num_attention_heads,
            max_position_embeddings: r.positive("max_position_embeddings", 77),
            hidden_act: r.activation("hidden_act", Activation::QuickGelu, &[Activation::QuickGelu, Activation::Gelu]),
            layer_norm_eps: r.number("layer_norm_eps", 1e-5),
            projection_dim: (class == PROJECTED).then_some(projection_dim),
            eos_token_id: r.count("eos_token_id", 49407) as i64,
            initializer_factor: r.number("initializer_factor", 1.0),
            json: Map::new(),
        };
        r.finish(what)?;
        Ok(Self { json, ..config })
    }

    /// Width of the pooled output.
    pub fn pooled_dim(&self) -> i64 {
        self.projection_dim.unwrap_or(self.hidden_size)
    }
}

/// diffusers' `AutoencoderKL`.
#[derive(Debug, Clone)]
pub struct VaeConfig {
    /// Channels of the pictures.
    pub in_channels: i64,
    /// Channels of the decoded pictures.
    pub out_channels: i64,
    /// Channels of the latents.
    pub latent_channels: i64,
    /// Channels of each level, from the finest to the coarsest.
    pub block_out_channels: Vec<i64>,
    /// Residual blocks a level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Groups of every group norm.
    pub norm_num_groups: i64,
    /// Whether the encoder ends in a 1x1 convolution.
    pub use_quant_conv: bool,
    /// Whether the decoder begins with a 1x1 convolution.
    pub use_post_quant_conv: bool,
    /// Whether the middles have attention.
    pub mid_block_add_attention: bool,
    /// What latents are multiplied by before they are noised (SDXL: 0.13025).
    pub scaling_factor: f64,
    /// Whether the weights overflow in fp16: such a VAE is run in fp32 or bf16.
    pub force_upcast: bool,
    /// What was read.
    pub json: Map<String, Value>,
}

impl VaeConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Malformed`], [`Error::Config`].
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_json(read_object(path)?, &path.display().to_string())
    }

    /// Checks the contents of a `config.json`; `what` names it in messages.
    ///
    /// # Errors
    /// [`Error::Config`] with every unsupported or contradictory value.
    pub fn from_json(json: Map<String, Value>, what: &str) -> Result<Self> {
        let mut r = Reader::new(&json);
        r.only("_class_name", "AutoencoderKL", &["AutoencoderKL"]);
        r.activation("act_fn", Activation::Silu, &[Activation::Silu]);
        let block_out_channels = r.positive_list("block_out_channels", &[64]);
        let num_levels = block_out_channels.len();
        // Only one type each exists; the keys still say how many levels the writer meant.
        r.block_types("down_block_types", ["DownEncoderBlock2D", "DownEncoderBlock2D"], &[true], num_levels);
        r.block_types("up_block_types", ["UpDecoderBlock2D", "UpDecoderBlock2D"], &[true], num_levels);
        let norm_num_groups = r.positive("norm_num_groups", 32);
        for &width in &block_out_channels {
            r.divides("norm_num_groups", norm_num_groups, "block_out_channels", width);
        }
        for key in ["shift_factor", "latents_mean", "latents_std"] {
            r.unset(key, &Value::Null);
        }
        let scaling_factor = r.number("scaling_factor", 0.18215);
        if !(scaling_factor > 0.0 && scaling_factor.is_finite()) {
            r.problem("scaling_factor", "a positive number", &scaling_factor.to_string());
        }
        let config = Self {
            in_channels: r.positive("in_channels", 3),
            out_channels: r.positive("out_channels", 3),
            latent_channels: r.positive("latent_channels", 4),
            block_out_channels,
            layers_per_block: r.num_blocks("layers_per_block", 1),
            norm_num_groups,
            use_quant_conv: r.boolean("use_quant_conv", true),
            use_post_quant_conv: r.boolean("use_post_quant_conv", true),
            mid_block_add_attention: r.boolean("mid_block_add_attention", true),
            scaling_factor,
            force_upcast: r.boolean("force_upcast", true),
            json: Map::new(),
        };
        r.finish(what)?;
        Ok(Self { json, ..config })
    }

    /// Pixels per latent, on each side.
    pub fn down_factor(&self) -> u32 {
        1 << (self.block_out_channels.len() - 1)
    }
}

/// What of diffusers' `scheduler_config.json` matters here.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// What the UNet predicts, where the file says so.
    pub parameterization: Option<Parameterization>,
    /// The shift of a flow model's sigmas, where the file has one.
    pub flow_shift: Option<f64>,
    /// What was read.
    pub json: Map<String, Value>,
}

impl SchedulerConfig {
    /// Reads a `scheduler_config.json`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Malformed`].
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self::from_json(read_object(path)?))
    }

    /// Looks for what the UNet predicts. Nothing in it is refused: the schedulers of this program are its own.
    pub fn from_json(json: Map<String, Value>) -> Self {
        let text = |key| json.get(key).and_then(Value::as_str);
        let flow_match = text("_class_name").is_some_and(|class| class.starts_with("FlowMatch"));
        let flow_sigmas = json.get("use_flow_sigmas").and_then(Value::as_bool).unwrap_or(false);
        let parameterization = match text("prediction_type") {
            _ if flow_match || flow_sigmas => Some(Parameterization::Flow),
            Some("flow_prediction") => Some(Parameterization::Flow),
            Some("epsilon") => Some(Parameterization::Eps),
            Some("v_prediction") => Some(Parameterization::V),
            _ => None,
        };
        let shift = if flow_match { json.get("shift") } else { json.get("flow_shift") };
        let flow_shift = shift.and_then(Value::as_f64).filter(|_| parameterization == Some(Parameterization::Flow));
        Self { parameterization, flow_shift, json }
    }
}

/// The JSON object in a file.
///
/// # Errors
/// [`Error::Io`], or [`Error::Malformed`] if it is not one.
pub fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::Malformed {
        path: path.to_owned(),
        kind: "JSON object",
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(json: Value) -> Map<String, Value> {
        json.as_object().unwrap().clone()
    }

    fn sdxl() -> Map<String, Value> {
        object(serde_json::json!({
            "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "layers_per_block": 2,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "mid_block_only_cross_attention": null,
            "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": true, "upcast_attention": null
        }))
    }

    #[test]
    fn reads_sdxl() {
        let config = UNetConfig::from_json(sdxl(), "x").unwrap();
        let layers = |levels: &[LevelConfig]| levels.iter().map(|l| l.transformer_layers.clone()).collect::<Vec<_>>();
        assert_eq!(layers(&config.down), [vec![], vec![2, 2], vec![10, 10]]);
        assert_eq!(layers(&config.up), [vec![10, 10, 10], vec![2, 2, 2], vec![]]);
        assert_eq!(config.mid.transformer_layers, [10]);
        assert_eq!((config.time_embed_dim, config.pooled_dim, config.down_factor()), (1280, 1280, 4));
        assert_eq!(config.json, sdxl(), "an export writes back what was read");
    }

    #[test]
    fn reads_layers_nested_per_block_as_distilled_models_have_them() {
        let mut json = sdxl();
        json.insert("transformer_layers_per_block".into(), serde_json::json!([0, [2, 2], [4, 4]]));
        let error = UNetConfig::from_json(json.clone(), "x").unwrap_err().to_string();
        assert!(error.contains("reverse_transformer_layers_per_block"), "{error}");
        json.insert("reverse_transformer_layers_per_block".into(), serde_json::json!([[4, 4, 10], [2, 1, 1], 1]));
        let config = UNetConfig::from_json(json, "x").unwrap();
        assert_eq!(config.mid.transformer_layers, [4]);
        assert_eq!(config.up[0].transformer_layers, [4, 4, 10]);
        assert_eq!(config.up[1].transformer_layers, [2, 1, 1]);
    }

    #[test]
    fn every_problem_names_its_key() {
        let mut json = sdxl();
        for (key, value) in [
            ("addition_embed_type", serde_json::json!(null)),
            ("attention_head_dim", serde_json::json!([5, 10])),
            ("norm_num_groups", serde_json::json!(7)),
            ("class_embed_type", serde_json::json!("timestep")),
            ("use_linear_projection", serde_json::json!("yes")),
            ("in_channels", serde_json::json!(-4)),
            ("down_block_types", serde_json::json!(["DownBlock2D", "Odd", "DownBlock2D"])),
        ] {
            json.insert(key.into(), value);
        }
        let Err(Error::Config { what, problems }) = UNetConfig::from_json(json, "unet/config.json") else {
            panic!("must be refused")
        };
        assert_eq!(what, "unet/config.json");
        for key in [
            "addition_embed_type",
            "attention_head_dim",
            "norm_num_groups",
            "class_embed_type",
            "Odd",
            "use_linear_projection",
            "in_channels",
        ] {
            assert!(problems.iter().any(|p| p.contains(key)), "{key}: {problems:#?}");
        }
    }

    #[test]
    fn empty_and_absurd_lists_are_errors() {
        for widths in
            [serde_json::json!([]), serde_json::json!([0]), serde_json::json!("320"), serde_json::json!([4.5])]
        {
            let mut json = sdxl();
            json.insert("block_out_channels".into(), widths.clone());
            assert!(UNetConfig::from_json(json, "x").is_err(), "{widths}");
            let json = object(serde_json::json!({"block_out_channels": widths}));
            assert!(VaeConfig::from_json(json, "x").is_err(), "{widths}");
        }
        assert!(ClipConfig::from_json(object(serde_json::json!({"num_attention_heads": 0})), false, "x").is_err());
    }

    #[test]
    fn a_few_bytes_cannot_describe_millions_of_layers() {
        let many = serde_json::json!(1 << 24);
        for (key, value) in [
            ("layers_per_block", many.clone()),
            ("layers_per_block", serde_json::json!([1 << 24, 2, 2])),
            ("transformer_layers_per_block", many.clone()),
            ("transformer_layers_per_block", serde_json::json!([1, 2, 1 << 24])),
        ] {
            let mut json = sdxl();
            json.insert(key.into(), value);
            let error = UNetConfig::from_json(json, "x").unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
        let clip = object(serde_json::json!({"num_hidden_layers": many}));
        assert!(ClipConfig::from_json(clip, false, "x").unwrap_err().to_string().contains("num_hidden_layers"));
        let vae = object(serde_json::json!({"layers_per_block": many}));
        assert!(VaeConfig::from_json(vae, "x").unwrap_err().to_string().contains("layers_per_block"));
    }

    #[test]
    fn clip_and_vae_take_upstreams_defaults() {
        let clip = ClipConfig::from_json(Map::new(), false, "x").unwrap();
        assert_eq!((clip.hidden_size, clip.projection_dim, clip.eos_token_id), (512, None, 49407));
        assert_eq!(clip.hidden_act, Activation::QuickGelu);
        let json = object(serde_json::json!({"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 9}));
        assert_eq!(ClipConfig::from_json(json, false, "x").unwrap().projection_dim, Some(9));
        let vae = VaeConfig::from_json(object(serde_json::json!({"scaling_factor": 0.13025})), "x").unwrap();
        assert_eq!((vae.down_factor(), vae.layers_per_block, vae.scaling_factor), (1, 1, 0.13025));
    }

    #[test]
    fn schedulers_say_what_the_model_predicts() {
        let read = |json: Value| {
            let config = SchedulerConfig::from_json(object(json));
            (config.parameterization, config.flow_shift)
        };
        let flow = Some(Parameterization::Flow);
        assert_eq!(read(serde_json::json!({"prediction_type": "epsilon"})), (Some(Parameterization::Eps), None));
        assert_eq!(read(serde_json::json!({"prediction_type": "v_prediction"})), (Some(Parameterization::V), None));
        let dpm = serde_json::json!({"prediction_type": "flow_prediction", "use_flow_sigmas": true, "flow_shift": 3.0});
        assert_eq!(read(dpm), (flow, Some(3.0)));
        let euler = serde_json::json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0});
        assert_eq!(read(euler), (flow, Some(6.0)));
        assert_eq!(read(serde_json::json!({"_class_name": "X"})), (None, None));
    }
}
