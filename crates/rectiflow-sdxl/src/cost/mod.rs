//! The memory that training a UNet holds between its forward and backward pass, from the
//! configuration alone.
//!
//! Counts what autograd saves for each operation of `unet_blocks` and `layers`: the inputs of
//! norms, activations, convolutions and linear layers. Statistics of norms and masks are too small
//! to count. A recomputed block keeps its input; its intermediate results exist for one block at a
//! time.

pub mod flops;
pub mod walk;

use std::{cmp::Ordering, collections::BTreeSet};

pub use crate::torch::kernels::keeps_less;
use crate::{
    config::{
        clip::ClipConfig,
        unet::{LevelConfig, UNetConfig},
    },
    cost::{
        flops::unet_block,
        walk::{Block, BlockKind},
    },
};

/// The sizes of one micro-batch.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Number of samples.
    pub batch: u64,
    /// Height of the latents.
    pub height: u64,
    /// Width of the latents.
    pub width: u64,
    /// Context tokens per sample.
    pub tokens: u64,
    /// Bytes per activation: 4 in fp32, 2 in bf16.
    pub bytes: u64,
    /// Whether chains of elementwise operations are fused ([`keeps_less`]), so that they keep only
    /// their input.
    pub fused: bool,
}

/// The cost of a part of the UNet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartCost {
    /// Prefix of its tensors' names, e.g. `down_blocks.0.resnets.1`.
    pub name: String,
    /// Whether it is a block, which can be recomputed.
    pub is_block: bool,
    /// Bytes kept until its backward pass ends.
    pub kept_bytes: u64,
    /// Bytes kept if it is recomputed.
    pub input_bytes: u64,
    /// Number of parameters.
    pub num_parameters: u64,
    /// Floating-point operations of recomputing it; 0 for parts that cannot be recomputed.
    pub flops: u64,
}

impl PartCost {
    /// Bytes saved by recomputing it.
    fn saved_bytes(&self) -> u64 {
        self.kept_bytes.saturating_sub(self.input_bytes)
    }
}

/// Returns all parts of a UNet, in the order of computation.
pub fn parts(config: &UNetConfig, load: Load) -> Vec<PartCost> {
    let mut walk = PartWalk::new(config, load);
    walk.entrance();
    for index in 0..config.down.len() {
        walk.down_level(index);
    }
    walk.middle();
    for index in 0..config.up.len() {
        walk.up_level(index);
    }
    walk.exit();
    walk.parts
}

/// Returns the bytes that a text encoder keeps for its backward pass over `tokens` tokens: in each
/// layer the inputs and outputs of both norms, queries, keys, values and attention's output, and
/// three times the MLP's width.
pub fn text_encoder_bytes(config: &ClipConfig, tokens: u64, bytes: u64) -> u64 {
    let layer = 8 * config.hidden_size as u64 + 3 * config.intermediate_size as u64;
    config.num_hidden_layers as u64 * layer * tokens * bytes
}

/// Returns the number of parameters of a convolution.
fn conv(inputs: u64, outputs: u64, kernel: u64) -> u64 {
    (inputs * kernel * kernel + 1) * outputs
}

/// Returns the number of parameters of an embedding's two linear layers.
fn embedding(inputs: u64, width: u64) -> u64 {
    inputs * width + width * width + 2 * width
}

/// Returns the number of parameters of a residual block, without those of its time embedding.
fn resnet_parameters(inputs: u64, outputs: u64) -> u64 {
    let shortcut = if inputs == outputs {
        0
    } else {
        conv(inputs, outputs, 1)
    };
    2 * (inputs + outputs) + conv(inputs, outputs, 3) + conv(outputs, outputs, 3) + shortcut
}

/// Returns the number of parameters of attention from `dim` channels to `context` channels.
fn attention(dim: u64, context: u64) -> u64 {
    2 * dim * dim + 2 * context * dim + dim
}

/// The state of a walk through the UNet in the order of computation.
struct PartWalk<'a> {
    config: &'a UNetConfig,
    load: Load,
    /// Height and width at the current level.
    side: [u64; 2],
    /// Input channels of the next part.
    channels: u64,
    /// Outputs of the down path that the up path still needs.
    skips: Vec<Skip>,
    parts: Vec<PartCost>,
}

/// An output of the down path.
struct Skip {
    channels: u64,
    side: [u64; 2],
}

impl<'a> PartWalk<'a> {
    fn new(config: &'a UNetConfig, load: Load) -> Self {
        let channels = config.down[0].channels as u64;
        Self {
            config,
            load,
            side: [load.height, load.width],
            channels,
            skips: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Adds the embeddings of time and size, and the first convolution.
    fn entrance(&mut self) {
        let config = self.config;
        let added = config.added_dim() as u64;
        self.plain(
            "time_embedding",
            0,
            embedding(self.channels, self.time_dim()),
        );
        self.plain("add_embedding", 0, embedding(added, self.time_dim()));
        let inputs = config.in_channels as u64;
        self.plain(
            "conv_in",
            self.latents(inputs),
            conv(inputs, self.channels, 3),
        );
        self.keep_skip();
    }

    fn down_level(&mut self, index: usize) {
        let level = &self.config.down[index];
        let name = format!("down_blocks.{index}");
        for i in 0..level.num_resnets {
            self.resnet(&format!("{name}.resnets.{i}"), 0, level.channels as u64);
            self.transformer(
                &format!("{name}.attentions.{i}"),
                level,
                level.transformer_layers.get(i),
            );
            self.keep_skip();
        }
        if index + 1 < self.config.down.len() {
            self.resampling(&format!("{name}.downsamplers.0"));
            self.side = self.side.map(|side| side.div_ceil(2));
            self.keep_skip();
        }
    }

    fn middle(&mut self) {
        let level = &self.config.mid;
        self.resnet("mid_block.resnets.0", 0, self.channels);
        self.transformer(
            "mid_block.attentions.0",
            level,
            level.transformer_layers.first(),
        );
        self.resnet("mid_block.resnets.1", 0, self.channels);
    }

    fn up_level(&mut self, index: usize) {
        let level = &self.config.up[index];
        let name = format!("up_blocks.{index}");
        for i in 0..level.num_resnets {
            let skip = self
                .skips
                .pop()
                .expect("the down path keeps one output for each residual block of the up path");
            self.resnet(
                &format!("{name}.resnets.{i}"),
                skip.channels,
                level.channels as u64,
            );
            self.transformer(
                &format!("{name}.attentions.{i}"),
                level,
                level.transformer_layers.get(i),
            );
        }
        let next = self.skips.last().map(|skip| skip.side);
        if let Some(side) = next.filter(|_| index + 1 < self.config.up.len()) {
            self.side = side;
            self.resampling(&format!("{name}.upsamplers.0"));
        }
    }

    /// Adds the last norm and the last convolution.
    fn exit(&mut self) {
        // The norm's input and output, and the fp32 input of the last convolution.
        let in_own_dtype = if self.load.fused { 1 } else { 2 };
        let kept = self.pixels() * self.channels * (self.load.bytes * in_own_dtype + 4);
        self.plain("conv_norm_out", kept, 2 * self.channels);
        self.plain(
            "conv_out",
            0,
            conv(self.channels, self.config.out_channels as u64, 3),
        );
    }

    fn keep_skip(&mut self) {
        self.skips.push(Skip {
            channels: self.channels,
            side: self.side,
        });
    }

    /// Adds the convolution where the size changes, which keeps its input.
    fn resampling(&mut self, name: &str) {
        let kept = self.latents(self.channels);
        self.plain(name, kept, conv(self.channels, self.channels, 3));
    }

    fn time_dim(&self) -> u64 {
        self.config.time_embed_dim as u64
    }

    /// Returns the number of latent pixels of the micro-batch at this level.
    fn pixels(&self) -> u64 {
        self.load.batch * self.side[0] * self.side[1]
    }

    fn latents(&self, channels: u64) -> u64 {
        self.pixels() * channels * self.load.bytes
    }

    fn plain(&mut self, name: &str, kept_bytes: u64, num_parameters: u64) {
        let name = name.to_owned();
        let input_bytes = kept_bytes;
        self.parts.push(PartCost {
            name,
            is_block: false,
            kept_bytes,
            input_bytes,
            num_parameters,
            flops: 0,
        });
    }

    /// Returns the FLOPs of a block's forward pass at this level.
    fn flops(&self, kind: BlockKind) -> u64 {
        let block = Block {
            kind,
            size: self.side.map(|side| side as i64),
            repeats: 1,
        };
        self.load.batch * unet_block(self.config, &block, self.load.tokens as i64).total()
    }

    /// Adds a residual block; on the up path, `skipped` channels are concatenated to its input.
    fn resnet(&mut self, name: &str, skipped: u64, outputs: u64) {
        let inputs = self.channels;
        let both = inputs + skipped;
        // Both norms: the input, the output, and the output of the activation.
        let each = if self.load.fused { 2 } else { 3 };
        let kept = self.latents(each * (both + outputs));
        let time = (self.time_dim() + 1) * outputs;
        self.parts.push(PartCost {
            name: name.to_owned(),
            is_block: true,
            kept_bytes: kept,
            // Outputs of the down path are counted there.
            input_bytes: self.latents(inputs),
            num_parameters: resnet_parameters(both, outputs) + time,
            flops: self.flops(BlockKind::Resnet {
                channels: [both as i64, outputs as i64],
            }),
        });
        self.channels = outputs;
    }

    /// Adds a transformer: its projections and its blocks. Does nothing if `num_blocks` is `None`.
    fn transformer(&mut self, name: &str, level: &LevelConfig, num_blocks: Option<&usize>) {
        let Some(&num_blocks) = num_blocks else {
            return;
        };
        let dim = level.channels as u64;
        let entrance = self.latents(2 * dim);
        self.plain(&format!("{name}.norm"), entrance, 2 * dim + (dim + 1) * dim);
        let layer = self.layer(level);
        for block in 0..num_blocks {
            self.parts.push(PartCost {
                name: format!("{name}.transformer_blocks.{block}"),
                ..layer.clone()
            });
        }
        let exit = self.latents(dim);
        self.plain(&format!("{name}.proj_out"), exit, (dim + 1) * dim);
    }

    /// Returns the cost of each of a transformer's blocks, without its name.
    fn layer(&self, level: &LevelConfig) -> PartCost {
        let dim = level.channels as u64;
        let context = level.context_dim as u64;
        let tokens = self.load.batch * self.load.tokens;
        // Twelve for the three norms, queries, keys and values; in the MLP eight for values and
        // gates, four for the gates' GELU if it is a separate operation, four for the products.
        let widths = 12 + if self.load.fused { 12 } else { 16 };
        let mlp = (dim + 1) * 8 * dim + (4 * dim + 1) * dim;
        PartCost {
            name: String::new(),
            is_block: true,
            kept_bytes: self.latents(widths * dim) + 2 * tokens * dim * self.load.bytes,
            input_bytes: self.latents(dim),
            num_parameters: 6 * dim + attention(dim, dim) + attention(dim, context) + mlp,
            flops: self.flops(BlockKind::Layer {
                channels: level.channels,
                context_dim: level.context_dim,
            }),
        }
    }
}

/// Returns the peak memory of activations and gradients during a backward pass, in bytes.
/// `is_recomputed` says which parts are recomputed; `gradient_bytes` is the size of one parameter's
/// gradient. `widening` is the size of a temporary number over that of a kept one: 2 where bf16
/// numbers are multiplied in fp32, else 1.
pub fn peak_bytes(
    parts: &[PartCost],
    gradient_bytes: u64,
    widening: u64,
    is_recomputed: impl Fn(&PartCost) -> bool,
) -> u64 {
    let waiting = |part: &PartCost| {
        if is_recomputed(part) {
            part.input_bytes
        } else {
            part.kept_bytes
        }
    };
    let mut held: u64 = parts.iter().map(waiting).sum();
    let mut peak = held;
    for part in parts.iter().rev() {
        let own = waiting(part);
        let room = if is_recomputed(part) {
            part.kept_bytes
        } else {
            0
        };
        // Gradients of a part's activations are temporary: about a quarter of them exist at once.
        let temporary = widening * part.kept_bytes / 4;
        peak = peak.max(held + room + temporary + gradient_bytes * part.num_parameters);
        held += gradient_bytes * part.num_parameters;
        held -= own;
    }
    peak
}

/// Returns the names of the blocks to recompute so that the rest `fits`, in order of bytes saved
/// per operation; all blocks if that is not enough.
pub fn choose(parts: &[PartCost], fits: impl Fn(&BTreeSet<String>) -> bool) -> BTreeSet<String> {
    let mut blocks = Vec::new();
    for part in parts {
        if part.is_block && part.saved_bytes() > 0 {
            blocks.push(part);
        }
    }
    // Equal blocks stay in the order of computation.
    blocks.sort_by(most_saved_first);
    let mut chosen = BTreeSet::new();
    for block in blocks {
        if fits(&chosen) {
            break;
        }
        chosen.insert(block.name.clone());
    }
    chosen
}

/// Compares the bytes saved per operation, by cross-multiplication.
fn most_saved_first(a: &&PartCost, b: &&PartCost) -> Ordering {
    let of_a = u128::from(a.saved_bytes()) * u128::from(b.flops.max(1));
    let of_b = u128::from(b.saved_bytes()) * u128::from(a.flops.max(1));
    of_b.cmp(&of_a)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{nets::unet::UNet, weights::Weights};

    const SDXL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/unet/config.json");

    fn load(bytes: u64) -> Load {
        Load {
            batch: 2,
            height: 7,
            width: 10,
            tokens: 77,
            bytes,
            fused: false,
        }
    }

    #[test]
    fn parts_are_the_models_own() {
        for path in [
            SDXL,
            concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/unet/config.json"),
        ] {
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
                let block = sizes
                    .iter_mut()
                    .find(|(block, _)| name.starts_with(&format!("{block}.")));
                block
                    .into_iter()
                    .for_each(|(_, size)| *size += tensor.numel() as u64);
            }
            let counted: BTreeMap<String, u64> = parts
                .into_iter()
                .filter(|part| part.is_block)
                .map(|part| (part.name, part.num_parameters))
                .collect();
            assert_eq!(counted, sizes, "{path}");
        }
    }

    #[test]
    fn recomputing_all_keeps_less_and_half_the_bytes_are_half() {
        let config = UNetConfig::read(SDXL.as_ref()).unwrap();
        let (full, half) = (parts(&config, load(4)), parts(&config, load(2)));
        let peak =
            |parts: &[PartCost], on: bool| peak_bytes(parts, 0, 1, |part| on && part.is_block);
        assert!(
            peak(&full, true) * 4 < peak(&full, false),
            "{} {}",
            peak(&full, true),
            peak(&full, false)
        );
        assert!(peak(&half, false) * 2 >= peak(&full, false));
        assert!(
            peak_bytes(&full, 4, 1, |_| false) >= 4 * 2_567_463_684,
            "the gradients alone"
        );
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
        // The peak is at the last part, when all activations exist.
        let parts = [
            part("a", 1100, 20),
            part("b", 600, 5),
            part("c", 2100, 20),
            part("rest", 10_000, 0),
        ];
        let peak = |chosen: &BTreeSet<String>| {
            peak_bytes(&parts, 0, 1, |part| chosen.contains(&part.name))
        };
        let names = |room| {
            choose(&parts, |chosen| peak(chosen) <= room)
                .into_iter()
                .collect::<Vec<_>>()
        };
        let all = peak(&BTreeSet::new());
        assert!(names(all).is_empty());
        // b and c save 100 bytes per operation, a half of that; of b and c, the first is chosen.
        assert_eq!(names(all - 1), ["b"]);
        let with = |list: &[&str]| peak(&list.iter().map(|&name| name.to_owned()).collect());
        assert_eq!(names(with(&["b"]) - 1), ["b", "c"]);
        assert_eq!(names(with(&["b", "c"]) - 1), ["a", "b", "c"]);
        assert_eq!(
            names(0),
            ["a", "b", "c"],
            "all blocks, since nothing is enough"
        );
    }

    #[test]
    fn a_budget_between_off_and_full_takes_some_blocks_of_sdxl() {
        let config = UNetConfig::read(SDXL.as_ref()).unwrap();
        let parts = parts(
            &config,
            Load {
                batch: 4,
                height: 128,
                width: 128,
                tokens: 231,
                bytes: 2,
                fused: false,
            },
        );
        let peak = |chosen: &BTreeSet<String>| {
            peak_bytes(&parts, 4, 1, |part| chosen.contains(&part.name))
        };
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
