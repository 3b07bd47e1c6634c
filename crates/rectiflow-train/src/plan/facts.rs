//! The facts that a plan is based on: the sizes of the model and of the data, read where they exist
//! and assumed where they do not.
//!
//! Of a model only the `config.json` files are read, of a data set only the manifest and the block
//! table.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use rectiflow_data::{
    amplification::amplification,
    batch::Source,
    block_table::BLOCK_ROWS,
    dataset::{Dataset, MEMORY_BYTES},
    loader::Loader,
    manifest::Split,
    order::{Amount, BucketRows, DataShape, Mode, Order, OrderSettings, RankOf, Stream},
    token::CHUNK_LEN,
};
use rectiflow_sdxl::{
    bundle::sdxl_configs,
    clip::ClipText,
    config::{ClipConfig, UNetConfig, VaeConfig},
    cost::{Load, parts},
    model::{Component, config_of},
    unet::UNet,
    vae::Vae,
    weights::Weights,
};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::{
    checkpoint::components::Components,
    error::Result,
    plan::{estimate::RecomputedBlocks, gpu_memory::Parameters, setup::Setup},
    recipe::Checked,
    step::step_flops::Configs,
};

/// Facts about a run.
#[derive(Debug)]
pub struct Facts {
    /// Configuration of the UNet.
    pub unet: UNetConfig,
    /// Numbers of parameters, by their use.
    pub parameters: Parameters,
    /// Which samples make up a step; without a data set, only the lanes and micro-batches are
    /// meaningful.
    pub order: Order,
    /// Height and width of latents, each with its share of the samples, 0 to 1.
    pub latents: Vec<([i64; 2], f64)>,
    /// Facts about the data sets.
    pub data: DataFacts,
    /// Bytes that a rank reads ahead by default.
    pub read_ahead_bytes: u64,
    /// Assumptions in place of what could not be read, one sentence each.
    pub assumptions: Vec<String>,
    sample_flops: f64,
    /// FLOPs of a forward pass over one sample, on average over all buckets, of each block that can
    /// be recomputed.
    block_flops: BTreeMap<String, f64>,
}

/// Facts about all data sets together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DataFacts {
    /// Number of training samples; `None` if a data set does not exist.
    pub num_train: Option<u64>,
    /// Mean bytes of latents and text per sample.
    pub sample_bytes: f64,
    /// How often each byte is read per epoch, on average.
    pub amplification: f64,
    /// Where the data comes from.
    pub from: ReadFrom,
}

/// Where data comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadFrom {
    /// A local or mounted disk.
    Disk,
    /// The network, once: the data is kept in memory or on a disk.
    NetworkOnce,
    /// The network, in every epoch.
    Network,
}

/// Reads from storage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Storage {
    /// Where the data comes from.
    pub from: ReadFrom,
    /// Bytes per second while reading, all ranks together.
    pub bytes_per_sec: f64,
    /// Requests per second at most, all ranks together: a request is for 32 samples or more.
    pub requests_per_sec: f64,
    /// Passes over the data; `None` if a data set does not exist.
    pub epochs: Option<f64>,
    /// Bytes read during the run; `None` if that depends on data that does not exist.
    pub run_bytes: Option<f64>,
}

/// Bytes of text per sample if there is no data set.
const ASSUMED_TEXT_BYTES: f64 = 1000.0;
/// Width and height of the only bucket if there is no data set.
const ASSUMED_PX: u32 = 1024;

impl Facts {
    /// Reads the model's configurations and the data sets, as far as they exist. `num_chunks`:
    /// 75-token chunks per prompt.
    ///
    /// # Errors
    /// [`crate::error::Error::Model`] if the model's configurations cannot be used,
    /// [`crate::error::Error::Data`] if the recipe has no valid order.
    pub fn read(checked: &Checked, ranks: usize, num_chunks: u64) -> Result<Self> {
        let mut assumptions = Vec::new();
        let model = ModelFacts::read(&checked.recipe.model.base, &mut assumptions)?;
        let parameters = model.parameters(checked);
        let read = ReadData::read(checked, ranks, &model.vae, &mut assumptions)?;
        let configs = Configs {
            unet: &model.unet,
            clip_l: &model.clip_l,
            clip_g: &model.clip_g,
        };
        let text = num_chunks * configs.text_flops(&checked.recipe.train);
        let mut sample_flops = 0.0;
        for &(size, share) in &read.latents {
            sample_flops += (configs.unet_flops(size, num_chunks) + text) as f64 * share;
        }
        let block_flops = block_flops(&model.unet, &read.latents, num_chunks);
        assumptions.push(format!("prompts of {num_chunks} x 75 tokens (--chunks)"));
        Ok(Self {
            parameters,
            order: read.order,
            latents: read.latents,
            data: read.data,
            read_ahead_bytes: read.read_ahead_bytes,
            assumptions,
            sample_flops,
            block_flops,
            unet: model.unet,
        })
    }

    /// Returns the FLOPs of training on one sample, on average over all buckets.
    pub fn mean_sample_flops(&self) -> f64 {
        self.sample_flops
    }

    /// Returns the FLOPs of recomputing these blocks for one sample, on average over all buckets.
    pub fn mean_recomputed_flops(&self, recomputed: &RecomputedBlocks) -> f64 {
        let mut flops = 0.0;
        for (name, of_block) in &self.block_flops {
            if recomputed.contains(name) {
                flops += of_block;
            }
        }
        flops
    }

    /// Returns how many blocks are recomputed.
    pub fn num_recomputed(&self, recomputed: &RecomputedBlocks) -> usize {
        let names = self.block_flops.keys();
        names.filter(|name| recomputed.contains(name)).count()
    }

    /// Returns how many blocks can be recomputed.
    pub fn num_blocks(&self) -> usize {
        self.block_flops.len()
    }

    /// Returns an order with the micro-batches of a set-up, of which only the lanes are meaningful.
    ///
    /// # Errors
    /// [`crate::error::Error::Data`] if the recipe's lanes do not divide the micro-batches.
    pub(crate) fn order_of(checked: &Checked, setup: Setup) -> Result<Order> {
        let settings = OrderSettings {
            mode: Mode::Local,
            micro_batch: setup.micro_batch,
            micro_batches: setup.micro_batches,
            ..checked.order.clone()
        };
        Ok(Order::new(&[assumed_shape(checked)], settings)?)
    }

    /// Returns height and width of the largest latents.
    pub fn largest_latents(&self) -> [i64; 2] {
        let sizes = self.latents.iter().map(|(size, _)| *size);
        sizes
            .max_by_key(|size| size[0] * size[1])
            .expect("there is at least one bucket")
    }

    /// Returns the reads of a run over `samples` samples at a given speed.
    pub fn storage(&self, samples: u64, samples_per_sec: f64) -> Storage {
        let DataFacts {
            num_train,
            sample_bytes,
            amplification,
            from,
        } = self.data;
        let bytes = sample_bytes * amplification;
        let once = num_train.map(|rows| sample_bytes * rows.min(samples) as f64);
        Storage {
            from,
            bytes_per_sec: bytes * samples_per_sec,
            requests_per_sec: samples_per_sec / f64::from(BLOCK_ROWS),
            epochs: num_train.map(|rows| samples as f64 / rows as f64),
            run_bytes: if from == ReadFrom::NetworkOnce {
                once
            } else {
                Some(bytes * samples as f64)
            },
        }
    }
}

/// The `config.json` files of a base model, or SDXL's if it does not exist.
struct ConfigFiles {
    components: Option<Components>,
}

impl ConfigFiles {
    fn find(base: &Path) -> Result<Self> {
        let components = if base.exists() {
            Some(Components::find_configs(base)?)
        } else {
            None
        };
        Ok(Self { components })
    }

    /// Returns a configuration and its name in messages.
    fn read(&self, component: Component) -> rectiflow_sdxl::Result<(Map<String, Value>, String)> {
        let Some(components) = &self.components else {
            let config = sdxl_configs().remove(&component);
            let config = config.expect("there is one for every component");
            return Ok((config, format!("SDXL's {}", component.name())));
        };
        config_of(component, components.folder(component))
    }
}

/// Configurations of the model.
struct ModelFacts {
    unet: UNetConfig,
    clip_l: ClipConfig,
    clip_g: ClipConfig,
    vae: VaeConfig,
}

impl ModelFacts {
    /// Reads those of the base model, or takes SDXL's if it does not exist.
    fn read(base: &Path, assumptions: &mut Vec<String>) -> Result<Self> {
        let configs = ConfigFiles::find(base)?;
        if configs.components.is_none() {
            assumptions.push(format!(
                "{} does not exist: the sizes are SDXL 1.0's",
                base.display()
            ));
        }
        let (unet, unet_name) = configs.read(Component::UNet)?;
        let (clip_l, clip_l_name) = configs.read(Component::ClipL)?;
        let (clip_g, clip_g_name) = configs.read(Component::ClipG)?;
        let (vae, vae_name) = configs.read(Component::Vae)?;
        Ok(Self {
            unet: UNetConfig::from_json(unet, &unet_name)?,
            clip_l: ClipConfig::from_json(clip_l, false, &clip_l_name)?,
            clip_g: ClipConfig::from_json(clip_g, true, &clip_g_name)?,
            vae: VaeConfig::from_json(vae, &vae_name)?,
        })
    }

    fn parameters(&self, checked: &Checked) -> Parameters {
        let mut found = Parameters {
            trained: 0,
            frozen: 0,
            vae: 0,
        };
        for component in Component::ALL {
            let number = self.count(component);
            match component {
                Component::Vae => found.vae += number,
                component if checked.recipe.train.trains(component) => found.trained += number,
                _ => found.frozen += number,
            }
        }
        found
    }

    fn count(&self, component: Component) -> u64 {
        let weights = Weights::shapes_only();
        let parameters = match component {
            Component::UNet => UNet::new(self.unet.clone(), weights).map(|model| model.parameters),
            Component::ClipL => {
                ClipText::new(self.clip_l.clone(), weights).map(|model| model.parameters)
            }
            Component::ClipG => {
                ClipText::new(self.clip_g.clone(), weights).map(|model| model.parameters)
            }
            Component::Vae => Vae::new(self.vae.clone(), weights).map(|model| model.parameters),
        };
        parameters
            .expect("shapes fit any configuration")
            .num_elements() as u64
    }
}

/// Facts about the data sets.
struct ReadData {
    order: Order,
    latents: Vec<([i64; 2], f64)>,
    data: DataFacts,
    read_ahead_bytes: u64,
}

impl ReadData {
    /// Reads the data sets, or assumes one bucket of 1024 x 1024 if one of them cannot be read.
    fn read(
        checked: &Checked,
        ranks: usize,
        vae: &VaeConfig,
        assumptions: &mut Vec<String>,
    ) -> Result<Self> {
        let mut sources = Vec::new();
        for (data, amount) in checked.recipe.data.iter().zip(&checked.amounts) {
            match Dataset::open(&data.path) {
                Ok(dataset) => {
                    sources.push(Source {
                        dataset: Arc::new(dataset),
                        prompt: data.prompt.clone(),
                        amount: *amount,
                    });
                }
                Err(error) => {
                    assumptions.push(format!(
                        "{} cannot be read ({error}): one bucket of {ASSUMED_PX}x{ASSUMED_PX}, \
                         {ASSUMED_TEXT_BYTES} bytes of text per sample",
                        data.path.display()
                    ));
                    return Self::assumed(checked, vae);
                }
            }
        }
        Self::of_sources(checked, sources, ranks)
    }

    fn assumed(checked: &Checked, vae: &VaeConfig) -> Result<Self> {
        let settings = OrderSettings {
            mode: Mode::Local,
            ..checked.order.clone()
        };
        let order = Order::new(&[assumed_shape(checked)], settings)?;
        let side = i64::from(ASSUMED_PX / vae.down_factor());
        let sample_bytes = (2 * vae.latent_channels * side * side) as f64 + ASSUMED_TEXT_BYTES;
        let is_remote = checked.recipe.data.iter().any(|data| is_url(&data.path));
        Ok(Self {
            order,
            latents: vec![([side; 2], 1.0)],
            data: DataFacts {
                num_train: None,
                sample_bytes,
                amplification: 1.0,
                from: if is_remote {
                    ReadFrom::Network
                } else {
                    ReadFrom::Disk
                },
            },
            read_ahead_bytes: 0,
        })
    }

    fn of_sources(checked: &Checked, sources: Vec<Source>, ranks: usize) -> Result<Self> {
        let rank = RankOf { rank: 0, ranks };
        let loader = Loader::new(sources.clone(), checked.order.clone(), rank)?;
        let order = loader.order().clone();
        Ok(Self {
            latents: latents(&order, &sources),
            data: DataFacts::of(checked, &order, &sources),
            read_ahead_bytes: loader.read_ahead_bytes(),
            order,
        })
    }
}

impl DataFacts {
    fn of(checked: &Checked, order: &Order, sources: &[Source]) -> Self {
        let mut num_bytes: u64 = 0;
        let mut num_train: u64 = 0;
        for source in sources {
            num_bytes += source.dataset.num_bytes(Split::Train);
            for bucket in source.dataset.buckets(Split::Train) {
                num_train += bucket.num_rows;
            }
        }
        Self {
            num_train: Some(num_train),
            sample_bytes: num_bytes as f64 / (num_train as f64).max(1.0),
            amplification: if order.settings().mode == Mode::Window {
                amplification(order, 0)
            } else {
                1.0
            },
            from: from(checked, sources, num_bytes),
        }
    }
}

/// Returns the FLOPs of a forward pass of each block over one sample with a context of
/// `num_chunks` chunks, on average over the sizes of latents.
fn block_flops(
    unet: &UNetConfig,
    latents: &[([i64; 2], f64)],
    num_chunks: u64,
) -> BTreeMap<String, f64> {
    let mut found = BTreeMap::new();
    for &([height, width], share) in latents {
        let load = Load {
            batch: 1,
            height: height as u64,
            width: width as u64,
            tokens: num_chunks * CHUNK_LEN as u64,
            bytes: 1, // does not matter to FLOPs
            fused: false,
        };
        for part in parts(unet, load) {
            if part.is_block {
                *found.entry(part.name).or_insert(0.0) += share * part.flops as f64;
            }
        }
    }
    found
}

/// Returns the sizes of latents with their shares. A bucket's share of the work is its share of an
/// epoch's samples, repeats and shares of the data sets included.
fn latents(order: &Order, sources: &[Source]) -> Vec<([i64; 2], f64)> {
    let all: f64 = order.streams().iter().map(epoch_samples).sum();
    let mut found = Vec::new();
    for stream in order.streams() {
        let manifest = sources[stream.data as usize].dataset.manifest();
        let [_, height, width] = manifest.latent_shape(stream.bucket);
        let share = epoch_samples(stream) / all.max(1.0);
        found.push(([height as i64, width as i64], share));
    }
    found
}

/// Returns the number of samples that an epoch takes of a stream.
fn epoch_samples(stream: &Stream) -> f64 {
    (stream.before_epoch(1) * u64::from(stream.size)) as f64
}

/// Returns a data set of one bucket that holds all samples of the run.
fn assumed_shape(checked: &Checked) -> DataShape {
    let bucket = BucketRows {
        bucket: 0,
        rows: checked.recipe.train.samples,
        run_ends: Vec::new(),
    };
    DataShape {
        identity: String::new(),
        text: String::new(),
        amount: Amount::Repeats(1.0),
        buckets: vec![bucket],
    }
}

fn from(checked: &Checked, sources: &[Source], num_bytes: u64) -> ReadFrom {
    let run = &checked.recipe.run;
    let kept_bytes = run
        .cache_dir
        .as_ref()
        .and(run.cache_gib)
        .map_or(0, |gib| gib.saturating_mul(1 << 30));
    if !sources.iter().any(|source| source.dataset.is_remote()) {
        ReadFrom::Disk
    } else if num_bytes <= MEMORY_BYTES.max(kept_bytes) {
        ReadFrom::NetworkOnce
    } else {
        ReadFrom::Network
    }
}

fn is_url(path: &Path) -> bool {
    path.to_string_lossy().contains("://")
}
