//! What training a UNet keeps in memory between its forward and its backward pass, from the configuration alone.
//!
//! Counted is what autograd saves, operation by operation as `unet_blocks` and `layers` do them: the inputs of norms,
//! non-linearities, convolutions and linear layers. Statistics of norms and masks are too small to count. A block that is
//! recomputed keeps what goes into it; its own results then exist for one block at a time.

pub mod flops;
pub mod walk;

use std::collections::BTreeSet;

pub use crate::torch::kernels::keeps_less;
use crate::{
    config::{
        clip::ClipConfig,
        unet::{LevelConfig, NUM_TIME_IDS, UNetConfig},
    },
    cost::{
        flops::unet_block,
        walk::{Block, BlockKind},
    },
};

/// The sizes of one micro-batch.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Samples.
    pub batch: u64,
    /// Height of the latents.
    pub height: u64,
    /// Width of the latents.
    pub width: u64,
    /// Tokens of context a sample.
    pub tokens: u64,
    /// Bytes of an activation: 4 in fp32, 2 in bf16.
    pub bytes: u64,
    /// Whether chains of elementwise operations are one ([`keeps_less`]), which keep only what goes into them.
    pub fused: bool,
}

/// A part of the UNet, in the order of the calculation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartCost {
    /// The place of its tensors, e.g. `down_blocks.0.resnets.1`.
    pub name: String,
    /// Whether it can be recomputed.
    pub is_block: bool,
    /// Bytes kept until its backward pass is done.
    pub kept_bytes: u64,
    /// Bytes kept where it is recomputed.
    pub input_bytes: u64,
    /// Its parameters.
    pub num_parameters: u64,
    /// Floating-point operations of calculating it once more; 0 for what cannot be recomputed.
    pub flops: u64,
}

impl PartCost {
    /// Bytes that are not kept where it is recomputed.
    fn saved_bytes(&self) -> u64 {
        self.kept_bytes.saturating_sub(self.input_bytes)
    }
}

/// All parts of a UNet.
pub fn parts(config: &UNetConfig, load: Load) -> Vec<PartCost> {
    let mut walk =
        Walk { config, load, side: [load.height, load.width], time: config.time_embed_dim as u64, parts: Vec::new() };
    let finest = config.down[0].channels as u64;
    let add = (config.pooled_dim + NUM_TIME_IDS * config.addition_time_embed_dim) as u64;
    let embedding = |inputs: u64, width: u64| inputs * width + width * width + 2 * width;
    walk.plain("time_embedding", 0, embedding(finest, walk.time));
    walk.plain("add_embedding", 0, embedding(add, walk.time));
    walk.plain("conv_in", walk.latents(config.in_channels as u64), conv(config.in_channels as u64, finest, 3));
    let mut skips = vec![(finest, walk.side)];
    let mut channels = finest;
    for (index, level) in config.down.iter().enumerate() {
        for i in 0..level.num_resnets {
            let name = format!("down_blocks.{index}");
            walk.resnet(&format!("{name}.resnets.{i}"), [channels, 0], level.channels as u64);
            channels = level.channels as u64;
            walk.transformer(&format!("{name}.attentions.{i}"), level, level.transformer_layers.get(i));
            skips.push((channels, walk.side));
        }
        if index + 1 < config.down.len() {
            let kept = walk.pixels() * channels * load.bytes;
            walk.plain(&format!("down_blocks.{index}.downsamplers.0"), kept, conv(channels, channels, 3));
            walk.side = walk.side.map(|side| side.div_ceil(2));
            skips.push((channels, walk.side));
        }
    }
    walk.resnet("mid_block.resnets.0", [channels, 0], channels);
    walk.transformer("mid_block.attentions.0", &config.mid, config.mid.transformer_layers.first());
    walk.resnet("mid_block.resnets.1", [channels, 0], channels);
    for (index, level) in config.up.iter().enumerate() {
        for i in 0..level.num_resnets {
            let (skip, _) = skips.pop().expect("the way down keeps one result for each residual block of the way up");
            let name = format!("up_blocks.{index}");
            walk.resnet(&format!("{name}.resnets.{i}"), [channels, skip], level.channels as u64);
            channels = level.channels as u64;
            walk.transformer(&format!("{name}.attentions.{i}"), level, level.transformer_layers.get(i));
        }
        if let (true, Some((_, side))) = (index + 1 < config.up.len(), skips.last()) {
            walk.side = *side;
            let kept = walk.pixels() * channels * load.bytes;
            walk.plain(&format!("up_blocks.{index}.upsamplers.0"), kept, conv(channels, channels, 3));
        }
    }
    // The norm's input, its result, and after the non-linearity what the last convolution takes in fp32.
    let kept = walk.pixels() * channels * (load.bytes * if load.fused { 1 } else { 2 } + 4);
    walk.plain("conv_norm_out", kept, 2 * channels);
    walk.plain("conv_out", 0, conv(channels, config.out_channels as u64, 3));
    walk.parts
}

/// Bytes that a text encoder keeps for its backward pass over `tokens` tokens: in each layer what goes into and out of
/// both norms, queries, keys, values and what they mix, and three times the MLP's width.
pub fn text_encoder_bytes(config: &ClipConfig, tokens: u64, bytes: u64) -> u64 {
    let layer = 8 * config.hidden_size as u64 + 3 * config.intermediate_size as u64;
    config.num_hidden_layers as u64 * layer * tokens * bytes
}

/// The weight and bias of a convolution.
fn conv(inputs: u64, outputs: u64, kernel: u64) -> u64 {
    (inputs * kernel * kernel + 1) * outputs
}

/// The calculation, as far as it has come.
struct Walk<'a> {
    config: &'a UNetConfig,
    load: Load,
    /// Height and width at this level.
    side: [u64; 2],
    time: u64,
    parts: Vec<PartCost>,
}

impl Walk<'_> {
    /// Pixels, or tokens of the picture, of the micro-batch.
    fn pixels(&self) -> u64 {
        self.load.batch * self.side[0] * self.side[1]
    }

    fn latents(&self, channels: u64) -> u64 {
        self.pixels() * channels * self.load.bytes
    }

    fn plain(&mut self, name: &str, kept_bytes: u64, num_parameters: u64) {
        let name = name.to_owned();
        let input_bytes = kept_bytes;
        self.parts.push(PartCost { name, is_block: false, kept_bytes, input_bytes, num_parameters, flops: 0 });
    }

    /// Operations of a forward pass of a block at this level.
    fn flops(&self, kind: BlockKind) -> u64 {
        let block = Block { kind, size: self.side.map(|side| side as i64), repeats: 1 };
        self.load.batch * unet_block(self.config, &block, self.load.tokens as i64).total()
    }

    /// A residual block of `inputs` and, on the way up, `skipped` channels beside them.
    fn resnet(&mut self, name: &str, [inputs, skipped]: [u64; 2], outputs: u64) {
        let both = inputs + skipped;
        // Both norms: what goes in, what comes out, and that after the non-linearity.
        let each = if self.load.fused { 2 } else { 3 };
        let kept = self.latents(each * (both + outputs));
        let shortcut = if both == outputs { 0 } else { conv(both, outputs, 1) };
        let time = (self.time + 1) * outputs;
        let num_parameters =
            2 * (both + outputs) + conv(both, outputs, 3) + conv(outputs, outputs, 3) + shortcut + time;
        self.parts.push(PartCost {
            name: name.to_owned(),
            is_block: true,
            kept_bytes: kept,
            // What the way down keeps is counted there.
            input_bytes: self.latents(inputs),
            num_parameters,
            flops: self.flops(BlockKind::Resnet { channels: [both as i64, outputs as i64] }),
        });
    }

    /// A transformer: its entrance and exit, and its blocks. Nothing where there is none.
    fn transformer(&mut self, name: &str, level: &LevelConfig, num_blocks: Option<&usize>) {
        let Some(&num_blocks) = num_blocks else { return };
        let (dim, context) = (level.channels as u64, level.context_dim as u64);
        let entrance = self.latents(2 * dim);
        self.plain(&format!("{name}.norm"), entrance, 2 * dim + (dim + 1) * dim);
        let tokens = self.load.batch * self.load.tokens;
        // Twelve around the three norms, the queries, keys and values; inside the MLP eight for values and gates, four for the
        // gates' GELU where that is an operation of its own, four for the products.
        let widths = 12 + if self.load.fused { 12 } else { 16 };
        let kept = self.latents(widths * dim) + 2 * tokens * dim * self.load.bytes;
        let flops = self.flops(BlockKind::Layer { channels: level.channels, context_dim: level.context_dim });
        let attention = |width: u64| 2 * dim * dim + 2 * width * dim + dim;
        let mlp = (dim + 1) * 8 * dim + (4 * dim + 1) * dim;
        for block in 0..num_blocks {
            self.parts.push(PartCost {
                name: format!("{name}.transformer_blocks.{block}"),
                is_block: true,
                kept_bytes: kept,
                input_bytes: self.latents(dim),
                num_parameters: 6 * dim + attention(dim) + attention(context) + mlp,
                flops,
            });
        }
        let exit = self.latents(dim);
        self.plain(&format!("{name}.proj_out"), exit, (dim + 1) * dim);
    }
}

/// The most memory that activations and gradients take together at a time during a backward pass, in bytes. `is_recomputed`
/// says which parts are recomputed; `gradient_bytes` is what a parameter's gradient takes once it is there.
pub fn peak_bytes(parts: &[PartCost], gradient_bytes: u64, is_recomputed: impl Fn(&PartCost) -> bool) -> u64 {
    let waiting = |part: &PartCost| if is_recomputed(part) { part.input_bytes } else { part.kept_bytes };
    let mut held: u64 = parts.iter().map(waiting).sum();
    let mut peak = held;
    for part in parts.iter().rev() {
        let own = waiting(part);
        let room = if is_recomputed(part) { part.kept_bytes } else { 0 };
        // The gradients of what a part keeps come and go: at a time about a quarter of it is there.
        peak = peak.max(held + room + part.kept_bytes / 4 + gradient_bytes * part.num_parameters);
        held += gradient_bytes * part.num_parameters;
        held -= own;
    }
    peak
}

/// The blocks to recompute until what is left `fits`: those first that save most bytes for an operation; all, where that is not
/// enough. By name.
pub fn choose(parts: &[PartCost], fits: impl Fn(&BTreeSet<String>) -> bool) -> BTreeSet<String> {
    let mut blocks: Vec<&PartCost> = parts.iter().filter(|part| part.is_block && part.saved_bytes() > 0).collect();
    // How much more a saves for an operation than b, without a division. Equal ones stay in the order of the calculation.
    let gain = |a: &PartCost, b: &PartCost| u128::from(a.saved_bytes()) * u128::from(b.flops.max(1));
    blocks.sort_by(|a, b| gain(b, a).cmp(&gain(a, b)));
    let mut chosen = BTreeSet::new();
    for block in blocks {
        if fits(&chosen) {
            break;
        }
        chosen.insert(block.name.clone());
    }
    chosen
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{nets::unet::UNet, weights::Weights};

    const SDXL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/unet/config.json");

    fn load(bytes: u64) -> Load {
        Load { batch: 2, height: 7, width: 10, tokens: 77, bytes, fused: false }
    }

    #[test]
    fn parts_are_the_models_own() {
        for path in [SDXL, concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/unet/config.json")] {
            let config = UNetConfig::read(path.as_ref()).unwrap();
            let mut unet = UNet::new(config.clone(), Weights::shapes_only()).unwrap();
            let parts = parts(&config, load(4));
            let total: u64 = parts.iter().map(|part| part.num_parameters).sum();
            assert_eq!(total, unet.parameters.num_elements() as u64, "{path}");
            let mut sizes: BTreeMap<String, u64> = BTreeMap::new();
            unet.checkpoint_blocks(|name| {
                sizes.insert(name.to_owned(), 0);
                false
            });
            for (name, tensor) in unet.parameters.iter() {
                let block = sizes.iter_mut().find(|(block, _)| name.starts_with(&format!("{block}.")));
                block.into_iter().for_each(|(_, size)| *size += tensor.numel() as u64);
            }
            let counted: BTreeMap<String, u64> =
                parts.into_iter().filter(|part| part.is_block).map(|part| (part.name, part.num_parameters)).collect();
            assert_eq!(counted, sizes, "{path}");
        }
    }

    #[test]
    fn recomputing_all_keeps_less_and_half_the_bytes_are_half() {
        let config = UNetConfig::read(SDXL.as_ref()).unwrap();
        let (full, half) = (parts(&config, load(4)), parts(&config, load(2)));
        let peak = |parts: &[PartCost], on: bool| peak_bytes(parts, 0, |part| on && part.is_block);
        assert!(peak(&full, true) * 4 < peak(&full, false), "{} {}", peak(&full, true), peak(&full, false));
        assert!(peak(&half, false) * 2 >= peak(&full, false));
        assert!(peak_bytes(&full, 4, |_| false) >= 4 * 2_567_463_684, "the gradients alone");
    }
    #[test]
    fn blocks_are_chosen_by_what_an_operation_saves_until_it_fits() {
        let part = |name: &str, kept_bytes: u64, flops: u64| PartCost {
            name: name.into(),
            is_block: flops > 0,
            kept_bytes,
            input_bytes: 100,
            num_parameters: 0,
            flops,
        };
        // All is there when the last part is worked on, and that is the most.
        let parts = [part("a", 1100, 20), part("b", 600, 5), part("c", 2100, 20), part("rest", 10_000, 0)];
        let peak = |chosen: &BTreeSet<String>| peak_bytes(&parts, 0, |part| chosen.contains(&part.name));
        let names = |room| choose(&parts, |chosen| peak(chosen) <= room).into_iter().collect::<Vec<_>>();
        let all = peak(&BTreeSet::new());
        assert!(names(all).is_empty());
        // b and c save 100 bytes an operation, a half as many; of b and c the one that comes first.
        assert_eq!(names(all - 1), ["b"]);
        let with = |list: &[&str]| peak(&list.iter().map(|&name| name.to_owned()).collect());
        assert_eq!(names(with(&["b"]) - 1), ["b", "c"]);
        assert_eq!(names(with(&["b", "c"]) - 1), ["a", "b", "c"]);
        assert_eq!(names(0), ["a", "b", "c"], "all, where nothing is enough");
    }

    #[test]
    fn a_budget_between_off_and_full_takes_some_blocks_of_sdxl() {
        let config = UNetConfig::read(SDXL.as_ref()).unwrap();
        let parts = parts(&config, Load { batch: 4, height: 128, width: 128, tokens: 231, bytes: 2, fused: false });
        let peak = |chosen: &BTreeSet<String>| peak_bytes(&parts, 4, |part| chosen.contains(&part.name));
        let (off, full) = (peak(&BTreeSet::new()), peak(&choose(&parts, |_| false)));
        let mut last = 0;
        for tenths in (0..=10).rev() {
            let room = full + (off - full) * tenths / 10;
            let chosen = choose(&parts, |chosen| peak(chosen) <= room);
            assert!(peak(&chosen) <= room);
            assert!(chosen.len() >= last, "less room, no fewer blocks");
            last = chosen.len();
        }
        assert!(last > 20, "{last}");
    }
}
