//! The UNet's sizes: diffusers' `UNet2DConditionModel`, which describes its levels in eight keys.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{
    config::{
        activation::Activation,
        reader::{Reader, read_object},
    },
    error::Result,
};

/// One level of the UNet, on the down path or the up path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LevelConfig {
    /// Output channels.
    pub channels: i64,
    /// Number of attention heads.
    pub num_heads: i64,
    /// Width of the text context.
    pub context_dim: i64,
    /// Number of transformer blocks after each residual block; empty if the level has no attention.
    pub transformer_layers: Vec<usize>,
    /// Number of residual blocks.
    pub num_resnets: usize,
}

impl LevelConfig {
    /// Returns true if transformers follow the residual blocks.
    pub(crate) fn has_attention(&self) -> bool {
        !self.transformer_layers.is_empty()
    }
}

/// diffusers' `UNet2DConditionModel`, as SDXL uses it.
#[derive(Debug, Clone)]
pub struct UNetConfig {
    /// Channels of the latents.
    pub in_channels: i64,
    /// Channels of the output.
    pub out_channels: i64,
    /// The down path, from the finest level to the coarsest.
    pub down: Vec<LevelConfig>,
    /// The middle, at the coarsest level: always one transformer between two residual blocks.
    pub mid: LevelConfig,
    /// The up path, from the coarsest level to the finest.
    pub up: Vec<LevelConfig>,
    /// Whether the transformers' outer projections are linear layers rather than 1x1 convolutions.
    pub use_linear_projection: bool,
    /// Number of groups of every group norm.
    pub norm_num_groups: i64,
    /// Epsilon of the residual blocks' norms.
    pub norm_eps: f64,
    /// Width of the embedding of time and size.
    pub time_embed_dim: i64,
    /// Width of the sinusoid of each of the six size values.
    pub addition_time_embed_dim: i64,
    /// Width of the pooled text embedding.
    pub pooled_dim: i64,
    /// Whether the cosines come before the sines in sinusoids.
    pub flip_sin_to_cos: bool,
    /// The sinusoids' frequency shift.
    pub freq_shift: f64,
    /// Padding of the stride-2 convolutions.
    pub downsample_padding: i64,
    /// Side of the latents that the model is trained for.
    pub sample_size: u64,
    /// The JSON that was read.
    pub json: Map<String, Value>,
}

/// Number of size values that condition the UNet: original, crop and target, each height and width.
pub const NUM_TIME_IDS: i64 = 6;

impl UNetConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// As [`read_object`] and [`Self::from_json`].
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_json(read_object(path)?, &path.display().to_string())
    }

    /// Checks the contents of a `config.json`; `what` names it in messages.
    ///
    /// # Errors
    /// [`crate::error::Error::Config`] with every unsupported or contradictory value.
    pub fn from_json(json: Map<String, Value>, what: &str) -> Result<Self> {
        let mut r = Reader::new(&json);
        check_unsupported_unet(&mut r);
        // What is checked against other values.
        let widths = r.positive_list("block_out_channels", &[320, 640, 1280, 1280]);
        let levels = Levels::read(&mut r, &widths);
        let norm_num_groups = r.norm_num_groups(&widths);
        let addition_time_embed_dim = r.positive("addition_time_embed_dim", 256);
        let pooled_dim = pooled_dim(&mut r, addition_time_embed_dim);
        r.activation("act_fn", Activation::Silu, &[Activation::Silu]);
        // The rest.
        let config = Self {
            in_channels: r.positive("in_channels", 4),
            out_channels: r.positive("out_channels", 4),
            mid: levels.mid(),
            up: levels.up(),
            down: levels.down,
            use_linear_projection: r.boolean("use_linear_projection", false),
            norm_num_groups,
            norm_eps: r.epsilon("norm_eps"),
            time_embed_dim: r
                .optional_positive("time_embedding_dim")
                .unwrap_or(widths[0] * 4),
            addition_time_embed_dim,
            pooled_dim,
            flip_sin_to_cos: r.boolean("flip_sin_to_cos", true),
            freq_shift: r.number_in("freq_shift", 0.0, 0.0..=1.0),
            downsample_padding: downsample_padding(&mut r),
            sample_size: r.side("sample_size", 128),
            json: Map::new(),
        };
        r.finish(what)?;
        Ok(Self { json, ..config })
    }

    /// Returns the width of pooled text and size values together, the input of their embedding.
    pub fn added_dim(&self) -> i64 {
        self.pooled_dim + NUM_TIME_IDS * self.addition_time_embed_dim
    }

    /// Returns the width of the text context, the same at every level.
    pub fn context_dim(&self) -> i64 {
        self.mid.context_dim
    }

    /// Returns the factor by which the coarsest level is smaller than the latents. Sizes that are
    /// multiples of it halve evenly at every level.
    pub fn down_factor(&self) -> u32 {
        1 << (self.down.len() - 1)
    }
}

/// Reads the padding of the down-sampling convolutions; with more, sizes would not halve.
fn downsample_padding(r: &mut Reader<'_>) -> i64 {
    r.typed("downsample_padding", 1, "0 or 1", |value| {
        value.as_i64().filter(|padding| (0..=1).contains(padding))
    })
}

/// Reads the width of pooled text and size values together, and returns that of the text alone.
fn pooled_dim(r: &mut Reader<'_>, addition_time_embed_dim: i64) -> i64 {
    const KEY: &str = "projection_class_embeddings_input_dim";
    let projection = r.positive(KEY, 2816);
    let pooled_dim = projection - NUM_TIME_IDS * addition_time_embed_dim;
    if pooled_dim < 1 {
        let expected = format!(
            "more than {NUM_TIME_IDS} x addition_time_embed_dim ({addition_time_embed_dim})"
        );
        r.problem(KEY, &expected, &projection.to_string());
    }
    pooled_dim
}

/// Features that must be off.
const OFF: [&str; 6] = [
    "center_input_sample",
    "only_cross_attention",
    "dual_cross_attention",
    "upcast_attention",
    "resnet_skip_time_act",
    "class_embeddings_concat",
];

/// Features that must be absent.
const ABSENT: [&str; 9] = [
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "num_attention_heads",
    "class_embed_type",
    "num_class_embeds",
    "time_embedding_act_fn",
    "timestep_post_act",
    "time_cond_proj_dim",
    "cross_attention_norm",
];

/// Keys with one supported value.
const ONLY: [(&str, &str); 5] = [
    ("_class_name", "UNet2DConditionModel"),
    ("mid_block_type", "UNetMidBlock2DCrossAttn"),
    ("resnet_time_scale_shift", "default"),
    ("time_embedding_type", "positional"),
    ("attention_type", "default"),
];

/// Refuses everything that diffusers can vary and SDXL does not.
fn check_unsupported_unet(r: &mut Reader<'_>) {
    for (key, supported) in ONLY {
        r.only(key, supported, &[supported]);
    }
    // diffusers' default is null, which is not SDXL.
    r.required("addition_embed_type", &["text_time"]);
    for key in OFF {
        r.unset(key, &Value::Bool(false));
    }
    r.unset("dropout", &Value::from(0.0));
    for key in ["mid_block_scale_factor", "resnet_out_scale_factor"] {
        r.unset(key, &Value::from(1.0));
    }
    for key in ["conv_in_kernel", "conv_out_kernel"] {
        r.unset(key, &Value::from(3));
    }
    for key in ABSENT {
        r.unset(key, &Value::Null);
    }
}

/// The UNet's levels, collected from diffusers' eight keys.
struct Levels {
    down: Vec<LevelConfig>,
    has_attention_up: Vec<bool>,
    layers_up: Vec<Vec<usize>>,
    layers_mid: usize,
}

impl Levels {
    fn read(r: &mut Reader<'_>, widths: &[i64]) -> Self {
        let num_levels = widths.len();
        // Block types and sizes of each level.
        let has_attention = has_attention_down(r, num_levels);
        let has_attention_up = has_attention_up(r, num_levels);
        let num_resnets = r.num_blocks_per_level("layers_per_block", 2, num_levels);
        let heads = r.per_level("attention_head_dim", 8, num_levels);
        let context_dim = context_dim(r, num_levels);
        for (&width, &num_heads) in widths.iter().zip(&heads) {
            r.divides("attention_head_dim", num_heads, "block_out_channels", width);
        }
        // Transformer layers of each residual block.
        let up_resnets: Vec<usize> = num_resnets.iter().rev().map(|n| n + 1).collect();
        let mut layers = r.layers("transformer_layers_per_block", &num_resnets);
        let layers_up = r.layers_up(&up_resnets);
        let layers_mid = r.layers_mid("transformer_layers_per_block");
        let mut down = Vec::new();
        for i in 0..num_levels {
            down.push(LevelConfig {
                channels: widths[i],
                num_heads: heads[i],
                context_dim,
                transformer_layers: only_if(has_attention[i], std::mem::take(&mut layers[i])),
                num_resnets: num_resnets[i],
            });
        }
        Self {
            down,
            has_attention_up,
            layers_up,
            layers_mid,
        }
    }

    fn mid(&self) -> LevelConfig {
        let coarsest = &self.down[self.down.len() - 1];
        LevelConfig {
            transformer_layers: vec![self.layers_mid],
            num_resnets: 2,
            ..coarsest.clone()
        }
    }

    fn up(&self) -> Vec<LevelConfig> {
        let mut up = Vec::new();
        for (i, down) in self.down.iter().rev().enumerate() {
            up.push(LevelConfig {
                transformer_layers: only_if(self.has_attention_up[i], self.layers_up[i].clone()),
                num_resnets: down.num_resnets + 1,
                ..down.clone()
            });
        }
        up
    }
}

/// Returns the layers of a level with attention; a level without it has none.
fn only_if(has_attention: bool, layers: Vec<usize>) -> Vec<usize> {
    if has_attention { layers } else { Vec::new() }
}

fn has_attention_down(r: &mut Reader<'_>, num_levels: usize) -> Vec<bool> {
    let types = ["DownBlock2D", "CrossAttnDownBlock2D"];
    let default = [true, true, true, false];
    r.block_types("down_block_types", types, &default, num_levels)
}

fn has_attention_up(r: &mut Reader<'_>, num_levels: usize) -> Vec<bool> {
    let types = ["UpBlock2D", "CrossAttnUpBlock2D"];
    let default = [false, true, true, true];
    r.block_types("up_block_types", types, &default, num_levels)
}

/// Returns the width of the text context, which must be the same at every level.
fn context_dim(r: &mut Reader<'_>, num_levels: usize) -> i64 {
    const KEY: &str = "cross_attention_dim";
    let context = r.per_level(KEY, 1280, num_levels);
    if context.iter().any(|&width| width != context[0]) {
        r.problem(
            KEY,
            "the same width at every level",
            &format!("{context:?}"),
        );
    }
    context[0]
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::error::Error;

    pub(crate) fn object(json: Value) -> Map<String, Value> {
        json.as_object().unwrap().clone()
    }

    /// SDXL's configuration.
    pub(crate) fn sdxl() -> Map<String, Value> {
        object(serde_json::json!({
            "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0",
            "act_fn": "silu",
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
            "layers_per_block": 2,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
            "mid_block_only_cross_attention": null,
            "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": true,
            "upcast_attention": null
        }))
    }

    #[test]
    fn reads_sdxl() {
        let config = UNetConfig::from_json(sdxl(), "x").unwrap();
        let layers = |levels: &[LevelConfig]| {
            levels
                .iter()
                .map(|l| l.transformer_layers.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(layers(&config.down), [vec![], vec![2, 2], vec![10, 10]]);
        assert_eq!(
            layers(&config.up),
            [vec![10, 10, 10], vec![2, 2, 2], vec![]]
        );
        assert_eq!(config.mid.transformer_layers, [10]);
        assert_eq!(
            (
                config.time_embed_dim,
                config.pooled_dim,
                config.down_factor()
            ),
            (1280, 1280, 4)
        );
        assert_eq!(config.json, sdxl(), "an export writes back what was read");
    }

    #[test]
    fn reads_layers_nested_per_block_as_distilled_models_have_them() {
        let mut json = sdxl();
        json.insert(
            "transformer_layers_per_block".into(),
            serde_json::json!([0, [2, 2], [4, 4]]),
        );
        let error = UNetConfig::from_json(json.clone(), "x")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("reverse_transformer_layers_per_block"),
            "{error}"
        );
        json.insert(
            "reverse_transformer_layers_per_block".into(),
            serde_json::json!([[4, 4, 10], [2, 1, 1], 1]),
        );
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
            (
                "down_block_types",
                serde_json::json!(["DownBlock2D", "Odd", "DownBlock2D"]),
            ),
        ] {
            json.insert(key.into(), value);
        }
        let Err(Error::Config { what, problems }) = UNetConfig::from_json(json, "unet/config.json")
        else {
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
            assert!(
                problems.iter().any(|p| p.contains(key)),
                "{key}: {problems:#?}"
            );
        }
    }

    #[test]
    fn numbers_out_of_range_are_named() {
        for (key, value) in [
            ("norm_eps", serde_json::json!(-1e-5)),
            ("norm_eps", serde_json::json!(0)),
            ("norm_eps", serde_json::json!(1e300)),
            ("freq_shift", serde_json::json!(128)),
            ("freq_shift", serde_json::json!(-1)),
            ("downsample_padding", serde_json::json!(65536)),
            ("downsample_padding", serde_json::json!(-1)),
            (
                "sample_size",
                serde_json::json!(9_223_372_036_854_775_808_u64),
            ),
            ("sample_size", serde_json::json!([128, 1_i64 << 40])),
            ("cross_attention_dim", serde_json::json!(1 << 30)),
            (
                "block_out_channels",
                serde_json::json!([320, 640, 1_i64 << 40]),
            ),
            ("time_embedding_dim", serde_json::json!(0)),
            ("layers_per_block", serde_json::json!(1_000_000)),
            ("transformer_layers_per_block", serde_json::json!(1_000_000)),
        ] {
            let mut json = sdxl();
            json.insert(key.into(), value.clone());
            let error = UNetConfig::from_json(json, "x").expect_err(key).to_string();
            assert!(error.contains(key), "{key} {value}: {error}");
        }
    }
}
