//! The table of names: the tensors of a diffusers folder <-> those of a single-file SDXL
//! checkpoint.
//!
//! A single file holds all four networks under prefixes, with the names of the code that SDXL was
//! trained with (sgm for the UNet, OpenCLIP for bigG, CompVis for the VAE). Most tensors only
//! change their name. Four differences go further, and are classic mistakes:
//!
//! - bigG's query, key and value projections are one stacked tensor, `in_proj`;
//! - bigG's `text_projection` is **transposed** (some trainers omit this, and train on a wrong
//!   pooled vector);
//! - the VAE's attention projections are 1x1 convolutions;
//! - the VAE decoder's levels are numbered in the opposite order.
//!
//! The table is built from the configurations, so a tiny model has one too. It maps modules, and
//! names below a module stay the same; it does not know which tensors exist. Pure: no file, no
//! tensor.

use std::collections::HashMap;

use crate::{
    config::{
        clip::ClipConfig,
        unet::{LevelConfig, UNetConfig},
        vae::VaeConfig,
    },
    weights::component::Component,
};

/// The single-file name of the UNet's first weight, without the UNet's prefix. A file that holds a
/// UNet alone often has it so.
pub(crate) const FIRST_UNET_WEIGHT: &str = "input_blocks.0.0.weight";

/// Returns the prefix of a component's names in a single file.
pub fn single_prefix(component: Component) -> &'static str {
    match component {
        Component::UNet => "model.diffusion_model.",
        Component::ClipL => "conditioner.embedders.0.transformer.",
        Component::ClipG => "conditioner.embedders.1.model.",
        Component::Vae => "first_stage_model.",
    }
}

/// The difference between a tensor's values in the two layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// None.
    Same,
    /// `[a, b]` in one layout is `[b, a]` in the other.
    Transposed,
    /// `[a, b]` in diffusers, `[a, b, 1, 1]` in the single file.
    Pointwise,
    /// Several diffusers tensors, stacked along the first dimension in the single file; this is
    /// number `index` of `0..of`.
    Stacked {
        /// The position in the stack.
        index: usize,
        /// Number of tensors in the stack.
        of: usize,
    },
}

impl Form {
    /// Returns the single file's shape of a tensor with this diffusers shape.
    pub fn single_shape(self, shape: &[i64]) -> Vec<i64> {
        match self {
            Self::Same => shape.to_vec(),
            Self::Transposed => shape.iter().rev().copied().collect(),
            Self::Pointwise => shape.iter().copied().chain([1, 1]).collect(),
            Self::Stacked { of, .. } => {
                let (first, rest) = shape
                    .split_first()
                    .expect("a stacked tensor has a first dimension");
                [first * of as i64].iter().chain(rest).copied().collect()
            }
        }
    }
}

impl Form {
    /// Returns the diffusers shape of a tensor with this shape in the single file; `None` for an
    /// impossible shape.
    pub fn diffusers_shape(self, shape: &[i64]) -> Option<Vec<i64>> {
        match (self, shape) {
            (Self::Same, _) => Some(shape.to_vec()),
            (Self::Transposed, _) => Some(shape.iter().rev().copied().collect()),
            // Some files keep these projections as matrices.
            (Self::Pointwise, [_, _]) => Some(shape.to_vec()),
            (Self::Pointwise, [a, b, 1, 1]) => Some(vec![*a, *b]),
            (Self::Stacked { of, .. }, [first, rest @ ..]) if first % of as i64 == 0 => {
                Some([first / of as i64].iter().chain(rest).copied().collect())
            }
            _ => None,
        }
    }
}

/// A tensor of the single file, and the form in which it holds a diffusers tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SingleKey {
    /// Its name, with the prefix.
    pub name: String,
    /// The conversion of the diffusers tensor.
    pub form: Form,
}

/// A diffusers tensor that a tensor of the single file holds, completely or in part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiffusersKey {
    /// The component that has the tensor.
    pub component: Component,
    /// Its name in that component's weight file.
    pub name: String,
    /// The conversion that was applied to it.
    pub form: Form,
}

#[derive(Debug)]
struct Row {
    component: Component,
    diffusers: String,
    single: String,
    form: Form,
}

/// The table for models of one configuration.
#[derive(Debug)]
pub struct KeyTable {
    rows: Vec<Row>,
    by_diffusers: HashMap<(Component, String), usize>,
    by_single: HashMap<String, Vec<usize>>,
}

/// Modules of a UNet's residual block.
const UNET_RESNET: [(&str, &str); 6] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

/// Modules of the UNet outside its levels.
const UNET_ENDS: [(&str, &str); 7] = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];

/// Modules of a bigG layer, without the stacked projections.
const CLIP_G_LAYER: [(&str, &str); 5] = [
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
];

/// Modules of bigG outside its layers, without the projection.
const CLIP_G_ENDS: [(&str, &str); 3] = [
    ("text_model.embeddings.token_embedding", "token_embedding"),
    (
        "text_model.embeddings.position_embedding.weight",
        "positional_embedding",
    ),
    ("text_model.final_layer_norm", "ln_final"),
];

/// Modules at both ends of the VAE's encoder, and of its decoder.
const VAE_ENDS: [(&str, &str); 3] = [
    ("conv_in", "conv_in"),
    ("conv_norm_out", "norm_out"),
    ("conv_out", "conv_out"),
];

/// Modules of a VAE's residual block.
const VAE_RESNET: [(&str, &str); 5] = [
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("conv_shortcut", "nin_shortcut"),
];

/// Projections of the VAE's attention.
const VAE_PROJECTIONS: [(&str, &str); 4] = [
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
];

impl KeyTable {
    /// Builds the table for a model of these sizes.
    pub fn new(unet: &UNetConfig, clip_g: &ClipConfig, vae: &VaeConfig) -> Self {
        let mut table = Self {
            rows: Vec::new(),
            by_diffusers: HashMap::new(),
            by_single: HashMap::new(),
        };
        table.add_unet(unet);
        table.add(Component::ClipL, "text_model".into(), "text_model".into());
        table.add_clip_g(clip_g.num_hidden_layers);
        table.add_vae(vae.block_out_channels.len(), vae.layers_per_block);
        table
    }

    /// Returns the place of a diffusers tensor in the single file; `None` if the layout has no
    /// place for it.
    pub fn to_single(&self, component: Component, name: &str) -> Option<SingleKey> {
        let (module, rest) = longest_known(name, |part| {
            self.by_diffusers
                .contains_key(&(component, part.to_owned()))
        })?;
        let row = &self.rows[self.by_diffusers[&(component, module.to_owned())]];
        Some(SingleKey {
            name: format!("{}{rest}", row.single),
            form: row.form_of(rest),
        })
    }

    /// Returns the diffusers tensors that a tensor of the single file holds: one, or for a stack
    /// several in its order. Empty for tensors of no component: a copy of averaged weights, a
    /// constant, or part of another architecture.
    pub fn to_diffusers(&self, name: &str) -> Vec<DiffusersKey> {
        let Some((module, rest)) = longest_known(name, |part| self.by_single.contains_key(part))
        else {
            return Vec::new();
        };
        let rows = self.by_single[module].iter().map(|&row| &self.rows[row]);
        rows.map(|row| DiffusersKey {
            component: row.component,
            name: format!("{}{rest}", row.diffusers),
            form: row.form_of(rest),
        })
        .collect()
    }

    fn add_unet(&mut self, unet: &UNetConfig) {
        for (diffusers, single) in UNET_ENDS {
            self.add(Component::UNet, diffusers.into(), single.into());
        }
        self.add_unet_down(&unet.down);
        self.add_unet_resnet("mid_block.resnets.0", "middle_block.0");
        self.add(
            Component::UNet,
            "mid_block.attentions.0".into(),
            "middle_block.1".into(),
        );
        self.add_unet_resnet("mid_block.resnets.1", "middle_block.2");
        self.add_unet_up(&unet.up);
    }

    fn add_unet_down(&mut self, levels: &[LevelConfig]) {
        let mut block = 1;
        for (i, level) in levels.iter().enumerate() {
            self.add_unet_level(&format!("down_blocks.{i}"), "input_blocks", block, level);
            block += level.num_resnets;
            if i + 1 < levels.len() {
                let from = format!("down_blocks.{i}.downsamplers.0.conv");
                self.add(Component::UNet, from, format!("input_blocks.{block}.0.op"));
                block += 1;
            }
        }
    }

    fn add_unet_up(&mut self, levels: &[LevelConfig]) {
        let mut block = 0;
        for (i, level) in levels.iter().enumerate() {
            self.add_unet_level(&format!("up_blocks.{i}"), "output_blocks", block, level);
            block += level.num_resnets;
            if i + 1 < levels.len() {
                // The last block of the level also holds its upsampler.
                let place = if level.has_attention() { 2 } else { 1 };
                let from = format!("up_blocks.{i}.upsamplers.0.conv");
                let to = format!("output_blocks.{}.{place}.conv", block - 1);
                self.add(Component::UNet, from, to);
            }
        }
    }

    fn add_unet_level(&mut self, from: &str, to: &str, first: usize, level: &LevelConfig) {
        for j in 0..level.num_resnets {
            self.add_unet_resnet(
                &format!("{from}.resnets.{j}"),
                &format!("{to}.{}.0", first + j),
            );
            if level.has_attention() {
                self.add(
                    Component::UNet,
                    format!("{from}.attentions.{j}"),
                    format!("{to}.{}.1", first + j),
                );
            }
        }
    }

    fn add_unet_resnet(&mut self, from: &str, to: &str) {
        self.add_modules(Component::UNet, from, to, &UNET_RESNET);
    }

    fn add_clip_g(&mut self, num_layers: usize) {
        for i in 0..num_layers {
            self.add_clip_g_layer(i);
        }
        for (diffusers, single) in CLIP_G_ENDS {
            self.add(Component::ClipG, diffusers.into(), single.into());
        }
        self.add_form(
            Component::ClipG,
            "text_projection.weight".into(),
            "text_projection".into(),
            Form::Transposed,
        );
    }

    fn add_clip_g_layer(&mut self, i: usize) {
        let from = format!("text_model.encoder.layers.{i}");
        let to = format!("transformer.resblocks.{i}");
        self.add_modules(Component::ClipG, &from, &to, &CLIP_G_LAYER);
        for (index, part) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
            for leaf in ["weight", "bias"] {
                self.add_form(
                    Component::ClipG,
                    format!("{from}.self_attn.{part}.{leaf}"),
                    format!("{to}.attn.in_proj_{leaf}"),
                    Form::Stacked { index, of: 3 },
                );
            }
        }
    }

    fn add_vae(&mut self, num_levels: usize, layers_per_block: usize) {
        for name in ["quant_conv", "post_quant_conv"] {
            self.add(Component::Vae, name.into(), name.into());
        }
        self.add_vae_ends("encoder");
        self.add_vae_ends("decoder");
        for i in 0..num_levels {
            let from = format!("encoder.down_blocks.{i}");
            let to = format!("encoder.down.{i}");
            self.add_vae_level(&from, &to, layers_per_block);
            self.add_vae_resampling(&from, "downsampler", &to, "downsample");
        }
        for i in 0..num_levels {
            let from = format!("decoder.up_blocks.{i}");
            let to = format!("decoder.up.{}", num_levels - 1 - i);
            self.add_vae_level(&from, &to, layers_per_block + 1);
            self.add_vae_resampling(&from, "upsampler", &to, "upsample");
        }
    }

    /// Adds what a half of the autoencoder has besides its levels.
    fn add_vae_ends(&mut self, half: &str) {
        self.add_modules(Component::Vae, half, half, &VAE_ENDS);
        for j in 0..2 {
            let from = format!("{half}.mid_block.resnets.{j}");
            let to = format!("{half}.mid.block_{}", j + 1);
            self.add_modules(Component::Vae, &from, &to, &VAE_RESNET);
        }
        let from = format!("{half}.mid_block.attentions.0");
        let to = format!("{half}.mid.attn_1");
        self.add_modules(Component::Vae, &from, &to, &[("group_norm", "norm")]);
        for (part, single) in VAE_PROJECTIONS {
            self.add_form(
                Component::Vae,
                format!("{from}.{part}"),
                format!("{to}.{single}"),
                Form::Pointwise,
            );
        }
    }

    fn add_vae_resampling(&mut self, from: &str, part: &str, to: &str, single: &str) {
        self.add(
            Component::Vae,
            format!("{from}.{part}s.0.conv"),
            format!("{to}.{single}.conv"),
        );
    }

    fn add_vae_level(&mut self, from: &str, to: &str, num_resnets: usize) {
        for j in 0..num_resnets {
            self.add_modules(
                Component::Vae,
                &format!("{from}.resnets.{j}"),
                &format!("{to}.block.{j}"),
                &VAE_RESNET,
            );
        }
    }

    fn add_modules(
        &mut self,
        component: Component,
        from: &str,
        to: &str,
        modules: &[(&str, &str)],
    ) {
        for (diffusers, single) in modules {
            self.add(
                component,
                format!("{from}.{diffusers}"),
                format!("{to}.{single}"),
            );
        }
    }

    fn add(&mut self, component: Component, diffusers: String, single: String) {
        self.add_form(component, diffusers, single, Form::Same);
    }

    fn add_form(&mut self, component: Component, diffusers: String, single: String, form: Form) {
        let single = format!("{}{single}", single_prefix(component));
        let row = self.rows.len();
        let known = self
            .by_diffusers
            .insert((component, diffusers.clone()), row);
        assert!(
            known.is_none(),
            "{}: {diffusers} is in the table twice",
            component.name()
        );
        self.by_single.entry(single.clone()).or_default().push(row);
        self.rows.push(Row {
            component,
            diffusers,
            single,
            form,
        });
    }
}

impl Row {
    /// Returns the form of a tensor below the module: biases of 1x1 convolutions have the shape of
    /// linear layers' biases.
    fn form_of(&self, rest: &str) -> Form {
        if self.form == Form::Pointwise && rest != ".weight" {
            Form::Same
        } else {
            self.form
        }
    }
}

/// Splits a name at a dot, after its longest known prefix.
fn longest_known(name: &str, is_known: impl Fn(&str) -> bool) -> Option<(&str, &str)> {
    let mut end = name.len();
    loop {
        if is_known(&name[..end]) {
            return Some(name.split_at(end));
        }
        end = name[..end].rfind('.')?;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::{Map, Value, json};

    use super::*;
    use crate::{
        nets::{clip::ClipText, unet::UNet, vae::Vae},
        weights::Weights,
    };

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    /// All configurations of a model: SDXL's own sizes, or tiny ones with other numbers of levels
    /// and blocks.
    struct Configs {
        unet: UNetConfig,
        clip_l: ClipConfig,
        clip_g: ClipConfig,
        vae: VaeConfig,
    }

    fn sdxl() -> Configs {
        let read = |text| serde_json::from_str(text).unwrap();
        let unet = read(include_str!("../../configs/unet/config.json"));
        let clip_l = read(include_str!("../../configs/text_encoder/config.json"));
        let clip_g = read(include_str!("../../configs/text_encoder_2/config.json"));
        let vae = read(include_str!("../../configs/vae/config.json"));
        Configs::new(unet, clip_l, clip_g, vae)
    }

    fn tiny() -> Configs {
        let unet = json!({
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "attention_head_dim": [2, 2],
            "block_out_channels": [8, 16], "cross_attention_dim": 12, "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "reverse_transformer_layers_per_block": null,
            "projection_class_embeddings_input_dim": 56, "transformer_layers_per_block": 1,
            "use_linear_projection": true
        });
        let clip_l = json!({"hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 2,
            "num_hidden_layers": 2});
        let clip_g = json!({"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "projection_dim": 6});
        let vae = json!({"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
            "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"]});
        Configs::new(unet, clip_l, clip_g, vae)
    }

    impl Configs {
        fn new(unet: Value, clip_l: Value, clip_g: Value, vae: Value) -> Self {
            Self {
                unet: UNetConfig::from_json(object(unet), "unet").unwrap(),
                clip_l: ClipConfig::from_json(object(clip_l), false, "clip_l").unwrap(),
                clip_g: ClipConfig::from_json(object(clip_g), true, "clip_g").unwrap(),
                vae: VaeConfig::from_json(object(vae), "vae").unwrap(),
            }
        }

        fn table(&self) -> KeyTable {
            KeyTable::new(&self.unet, &self.clip_g, &self.vae)
        }

        /// Returns names and shapes of all tensors of a network.
        fn tensors(&self, component: Component) -> Vec<(String, Vec<i64>)> {
            let shapes = Weights::shapes_only();
            let parameters = match component {
                Component::UNet => UNet::new(self.unet.clone(), shapes).unwrap().parameters,
                Component::ClipL => {
                    ClipText::new(self.clip_l.clone(), shapes)
                        .unwrap()
                        .parameters
                }
                Component::ClipG => {
                    ClipText::new(self.clip_g.clone(), shapes)
                        .unwrap()
                        .parameters
                }
                Component::Vae => Vae::new(self.vae.clone(), shapes).unwrap().parameters,
            };
            parameters
                .iter()
                .map(|(name, tensor)| (name.to_owned(), tensor.size()))
                .collect()
        }
    }

    /// Maps every tensor in both directions, and returns the single file's shapes.
    fn round_trip(configs: &Configs) -> BTreeMap<String, Vec<i64>> {
        let table = configs.table();
        let mut single = BTreeMap::new();
        for component in Component::ALL {
            for (name, shape) in configs.tensors(component) {
                let key = table
                    .to_single(component, &name)
                    .unwrap_or_else(|| panic!("no place for {name}"));
                let back = table.to_diffusers(&key.name);
                let index = if let Form::Stacked { index, .. } = key.form {
                    index
                } else {
                    0
                };
                assert_eq!(
                    key.form.diffusers_shape(&key.form.single_shape(&shape)),
                    Some(shape.clone())
                );
                let expected = DiffusersKey {
                    component,
                    name: name.clone(),
                    form: key.form,
                };
                assert_eq!(back[index], expected, "{}", key.name);
                let single_shape = key.form.single_shape(&shape);
                let known = single.insert(key.name.clone(), single_shape.clone());
                match key.form {
                    Form::Stacked { of, .. } => {
                        assert!(back.len() == of && known.is_none_or(|shape| shape == single_shape))
                    }
                    _ => assert!(
                        back.len() == 1 && known.is_none(),
                        "two tensors for {}",
                        key.name
                    ),
                }
            }
        }
        single
    }

    #[test]
    fn every_name_of_the_real_model_goes_there_and_back() {
        let single = round_trip(&sdxl());
        let count = |component: Component| {
            single
                .keys()
                .filter(|n| n.starts_with(single_prefix(component)))
                .count()
        };
        // The tensors of the published checkpoint without `position_ids` and `logit_scale`, which
        // are no parameters here.
        assert_eq!(Component::ALL.map(count), [1680, 196, 389, 248]);
        for (name, shape) in [
            (
                "model.diffusion_model.input_blocks.3.0.op.weight",
                vec![320, 320, 3, 3],
            ),
            (
                "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
                vec![640, 320, 1, 1],
            ),
            (
                "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight",
                vec![1280, 2048],
            ),
            (
                "model.diffusion_model.middle_block.1.proj_in.weight",
                vec![1280, 1280],
            ),
            (
                "model.diffusion_model.output_blocks.2.2.conv.weight",
                vec![1280, 1280, 3, 3],
            ),
            (
                "model.diffusion_model.output_blocks.8.0.in_layers.0.weight",
                vec![640],
            ),
            (
                "model.diffusion_model.label_emb.0.0.weight",
                vec![1280, 2816],
            ),
            (
                "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight",
                vec![3072, 768],
            ),
            (
                "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight",
                vec![3840, 1280],
            ),
            (
                "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias",
                vec![3840],
            ),
            (
                "conditioner.embedders.1.model.positional_embedding",
                vec![77, 1280],
            ),
            (
                "conditioner.embedders.1.model.text_projection",
                vec![1280, 1280],
            ),
            (
                "first_stage_model.encoder.mid.attn_1.proj_out.weight",
                vec![512, 512, 1, 1],
            ),
            (
                "first_stage_model.encoder.mid.attn_1.proj_out.bias",
                vec![512],
            ),
            (
                "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
                vec![128, 256, 1, 1],
            ),
            (
                "first_stage_model.decoder.up.3.upsample.conv.weight",
                vec![512, 512, 3, 3],
            ),
            ("first_stage_model.quant_conv.weight", vec![8, 8, 1, 1]),
        ] {
            assert_eq!(single.get(name), Some(&shape), "{name}");
        }
    }

    #[test]
    fn a_tiny_model_with_other_blocks_goes_there_and_back() {
        let single = round_trip(&tiny());
        assert_eq!(
            single["conditioner.embedders.1.model.text_projection"],
            [8, 6],
            "transposed: diffusers has [6, 8]"
        );
        assert!(single.contains_key("model.diffusion_model.input_blocks.1.1.norm.weight"));
        assert!(single.contains_key("model.diffusion_model.output_blocks.1.2.conv.weight"));
    }

    #[test]
    fn foreign_names_have_no_place() {
        let table = sdxl().table();
        for name in [
            "model_ema.diffusion_modelinput_blocks00weight",
            "conditioner.embedders.1.model.logit_scale",
            "denoiser.sigmas",
            "model.diffusion_model.input_blocks.99.0.in_layers.0.weight",
            "",
            ".",
        ] {
            assert!(table.to_diffusers(name).is_empty(), "{name}");
        }
        assert_eq!(
            table.to_single(Component::UNet, "down_blocks.7.resnets.0.norm1.weight"),
            None
        );
        assert_eq!(table.to_single(Component::Vae, "conv_out.weight"), None);
    }
}
