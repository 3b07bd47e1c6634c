//! The UNet's blocks in the order in which they run, with their sizes, from the configuration
//! alone. Pure.
//!
//! Shared by the estimates of FLOPs (`flops`) and of memory (`cost`), which need no weights.

use crate::config::unet::{LevelConfig, UNetConfig};

/// A block and its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Kind of the block.
    pub kind: BlockKind,
    /// Height and width of its output.
    pub size: [i64; 2],
    /// Number of consecutive blocks of this kind.
    pub repeats: u64,
}

/// A kind of block, with its channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockKind {
    /// A 3x3 convolution between blocks: at both ends, and where the size changes.
    Conv {
        /// Channels of its input and output.
        channels: [i64; 2],
    },
    /// Two convolutions around a skip.
    Resnet {
        /// Channels of its input and output.
        channels: [i64; 2],
    },
    /// The input and output projections of a transformer.
    Projections {
        /// Channels of the pixels, and of the tokens.
        channels: i64,
    },
    /// A transformer layer: self-attention, attention to the text, MLP.
    Layer {
        /// Channels of a token.
        channels: i64,
        /// Channels of a token of the text.
        context_dim: i64,
    },
}

/// Returns the blocks that a forward pass over latents of `size` (height, width) runs.
pub fn unet_blocks(config: &UNetConfig, size: [i64; 2]) -> Vec<Block> {
    let finest = config.down[0].channels;
    let mut walk = Walk {
        config,
        sizes: level_sizes(config, size),
        blocks: Vec::new(),
    };
    walk.conv([config.in_channels, finest], size);
    for i in 0..config.down.len() {
        walk.down_level(i);
    }
    walk.mid();
    for i in 0..config.up.len() {
        walk.up_level(i);
    }
    walk.conv([finest, config.out_channels], size);
    walk.blocks
}

/// Returns height and width at each level, the finest first; the same on the up path.
fn level_sizes(config: &UNetConfig, size: [i64; 2]) -> Vec<[i64; 2]> {
    // Padding 0 pads one pixel at the right and the bottom only; see `layers::Downsample`.
    let padding = if config.downsample_padding == 0 {
        1
    } else {
        2 * config.downsample_padding
    };
    let half = |n: i64| (n + padding - 3) / 2 + 1;
    let mut sizes = vec![size];
    while sizes.len() < config.down.len() {
        sizes.push(sizes[sizes.len() - 1].map(half));
    }
    sizes
}

struct Walk<'a> {
    config: &'a UNetConfig,
    /// Height and width at each level, the finest first.
    sizes: Vec<[i64; 2]>,
    blocks: Vec<Block>,
}

impl Walk<'_> {
    fn down_level(&mut self, i: usize) {
        let level = &self.config.down[i];
        let above = self.config.down[i.saturating_sub(1)].channels;
        self.level(level, self.sizes[i], |j| {
            if j == 0 { above } else { level.channels }
        });
        if let Some(&smaller) = self.sizes.get(i + 1) {
            self.conv([level.channels; 2], smaller);
        }
    }

    fn mid(&mut self) {
        let level = &self.config.mid;
        let size = self.sizes[self.sizes.len() - 1];
        let resnet = BlockKind::Resnet {
            channels: [level.channels; 2],
        };
        self.push(resnet, size);
        self.transformer(level, level.transformer_layers[0], size);
        self.push(resnet, size);
    }

    fn up_level(&mut self, i: usize) {
        let levels = &self.config.up;
        let level = &levels[i];
        let below = levels[i.saturating_sub(1)].channels;
        let above = levels[(i + 1).min(levels.len() - 1)].channels;
        let inputs = |j| if j == 0 { below } else { level.channels };
        let skipped = |j| {
            if j + 1 == level.num_resnets {
                above
            } else {
                level.channels
            }
        };
        let depth = self.sizes.len() - 1 - i;
        self.level(level, self.sizes[depth], |j| inputs(j) + skipped(j));
        if depth > 0 {
            self.conv([level.channels; 2], self.sizes[depth - 1]);
        }
    }

    fn push(&mut self, kind: BlockKind, size: [i64; 2]) {
        self.blocks.push(Block {
            kind,
            size,
            repeats: 1,
        });
    }

    fn conv(&mut self, channels: [i64; 2], size: [i64; 2]) {
        self.push(BlockKind::Conv { channels }, size);
    }

    /// Adds the residual blocks of a level, each with its transformer; `inputs` returns the input
    /// channels of each.
    fn level(&mut self, level: &LevelConfig, size: [i64; 2], inputs: impl Fn(usize) -> i64) {
        for i in 0..level.num_resnets {
            self.push(
                BlockKind::Resnet {
                    channels: [inputs(i), level.channels],
                },
                size,
            );
            if let Some(&num_layers) = level.transformer_layers.get(i) {
                self.transformer(level, num_layers, size);
            }
        }
    }

    fn transformer(&mut self, level: &LevelConfig, num_layers: usize, size: [i64; 2]) {
        self.push(
            BlockKind::Projections {
                channels: level.channels,
            },
            size,
        );
        let kind = BlockKind::Layer {
            channels: level.channels,
            context_dim: level.context_dim,
        };
        self.blocks.push(Block {
            kind,
            size,
            repeats: num_layers as u64,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{files::single_file::sdxl_configs, weights::component::Component};

    #[test]
    fn sdxl_has_the_blocks_that_its_paper_draws() {
        let json = sdxl_configs()
            .remove(&Component::UNet)
            .expect("there is one for every component");
        let config = UNetConfig::from_json(json, "SDXL").expect("it is valid");
        let blocks = unet_blocks(&config, [128, 96]);
        let resnets = blocks
            .iter()
            .filter(|block| matches!(block.kind, BlockKind::Resnet { .. }))
            .count();
        assert_eq!(resnets, 6 + 2 + 9);
        let layers = |size| -> u64 {
            let at = blocks
                .iter()
                .filter(|b| matches!(b.kind, BlockKind::Layer { .. }) && b.size == size);
            at.map(|block| block.repeats).sum()
        };
        assert_eq!(
            [layers([128, 96]), layers([64, 48]), layers([32, 24])],
            [0, 4 + 6, 20 + 10 + 30]
        );
        assert_eq!(
            blocks.last().map(|block| block.kind),
            Some(BlockKind::Conv { channels: [320, 4] })
        );
    }

    #[test]
    fn odd_sizes_are_rounded_up_on_the_way_down_and_come_back() {
        let json = sdxl_configs()
            .remove(&Component::UNet)
            .expect("there is one for every component");
        let config = UNetConfig::from_json(json, "SDXL").expect("it is valid");
        assert_eq!(level_sizes(&config, [13, 18]), [[13, 18], [7, 9], [4, 5]]);
        let sizes: Vec<_> = unet_blocks(&config, [13, 18])
            .iter()
            .map(|block| block.size)
            .collect();
        assert_eq!(sizes.last(), Some(&[13, 18]));
    }
}
