//! Property: for all sizes and dtypes of a model, folder -> single file -> folder restores every
//! tensor, byte for byte, and folder -> single file -> folder -> single file produces the same
//! file.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{collections::BTreeMap, fs, path::Path};

use proptest::{prelude::*, test_runner::FileFailurePersistence};
use rectiflow_sdxl::{
    bundle::Bundle,
    clip::ClipText,
    config::{ClipConfig, UNetConfig, VaeConfig},
    export::{ExportOptions, export_diffusers, export_single_file},
    flow::Parameterization,
    init::Init,
    model::Component,
    tensor_file::{TensorFile, write_tensors},
    unet::UNet,
    vae::Vae,
    weights::{Parameters, Weights},
};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

/// The parameters of a case.
#[derive(Debug, Clone)]
struct Sizes {
    seed: u64,
    /// For each level of the UNet: whether it has attention, and its number of transformer layers.
    levels: Vec<(bool, usize)>,
    unet_blocks: usize,
    clip_layers: [usize; 2],
    projection: i64,
    vae_levels: usize,
    vae_blocks: usize,
    vae_attends: bool,
    quant_conv: bool,
}

fn sizes() -> impl Strategy<Value = Sizes> {
    let unet = (
        prop::collection::vec((any::<bool>(), 1..3usize), 1..4),
        1..3usize,
    );
    let clip = ([2..4usize, 2..4usize], 1..4i64);
    let vae = (1..4usize, 1..3usize, any::<bool>(), any::<bool>());
    (any::<u64>(), unet, clip, vae).prop_map(
        |(seed, (levels, unet_blocks), (clip_layers, projection), vae)| Sizes {
            seed,
            levels,
            unet_blocks,
            clip_layers,
            projection: 4 * projection,
            vae_levels: vae.0,
            vae_blocks: vae.1,
            vae_attends: vae.2,
            quant_conv: vae.3,
        },
    )
}

impl Sizes {
    fn config(&self, component: Component) -> Map<String, Value> {
        let widths = |n: usize| (1..=n).map(|i| 4 * i).collect::<Vec<_>>();
        let num_levels = self.levels.len();
        let block = |attends: bool, way: &str| {
            format!("{}{way}Block2D", if attends { "CrossAttn" } else { "" })
        };
        let clip = |layers: usize, width: i64| {
            json!({"hidden_size": width, "intermediate_size": 6, "num_attention_heads": 2,
                "num_hidden_layers": layers,
                "vocab_size": 11, "max_position_embeddings": 5, "projection_dim": self.projection})
        };
        let mut layers = Vec::new();
        let mut down = Vec::new();
        for &(attends, num_layers) in &self.levels {
            layers.push(num_layers);
            down.push(block(attends, "Down"));
        }
        let mut up = Vec::new();
        for level in self.levels.iter().rev() {
            up.push(block(level.0, "Up"));
        }
        let config = match component {
            Component::UNet => json!({
                "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
                "norm_num_groups": 2,
                "projection_class_embeddings_input_dim": 24 + self.projection,
                "cross_attention_dim": 6,
                "block_out_channels": widths(num_levels), "attention_head_dim": 2,
                "use_linear_projection": true,
                "layers_per_block": self.unet_blocks,
                "transformer_layers_per_block": layers,
                "down_block_types": down, "up_block_types": up
            }),
            Component::ClipL => clip(self.clip_layers[0], 4),
            Component::ClipG => clip(self.clip_layers[1], 8),
            Component::Vae => json!({
                "block_out_channels": widths(self.vae_levels), "norm_num_groups": 2,
                "layers_per_block": self.vae_blocks,
                "down_block_types": vec!["DownEncoderBlock2D"; self.vae_levels],
                "up_block_types": vec!["UpDecoderBlock2D"; self.vae_levels],
                "mid_block_add_attention": self.vae_attends, "use_quant_conv": self.quant_conv,
                "use_post_quant_conv": self.quant_conv
            }),
        };
        config.as_object().unwrap().clone()
    }

    fn parameters(&self, component: Component) -> Parameters {
        let (config, weights) = (
            self.config(component),
            Weights::random(self.seed, Kind::Float, Device::Cpu),
        );
        match component {
            Component::UNet => {
                UNet::new(UNetConfig::from_json(config, "unet").unwrap(), weights)
                    .unwrap()
                    .parameters
            }
            Component::ClipL => {
                ClipText::new(ClipConfig::from_json(config, false, "l").unwrap(), weights)
                    .unwrap()
                    .parameters
            }
            Component::ClipG => {
                ClipText::new(ClipConfig::from_json(config, true, "g").unwrap(), weights)
                    .unwrap()
                    .parameters
            }
            Component::Vae => {
                Vae::new(VaeConfig::from_json(config, "vae").unwrap(), weights)
                    .unwrap()
                    .parameters
            }
        }
    }

    /// Returns a dtype for each tensor. Projections that a single file stacks share one.
    fn kind(&self, name: &str) -> Kind {
        let shared = ["q_proj", "k_proj", "v_proj"]
            .iter()
            .fold(name.to_owned(), |name, part| name.replace(part, "in"));
        let draw = Init::Uniform { bound: 1.0 }.values(self.seed, &shared, 1)[0];
        [Kind::Half, Kind::BFloat16, Kind::Float][((draw + 1.0) * 1.49) as usize]
    }

    fn write(&self, folder: &Path) {
        for component in Component::ALL {
            let folder = folder.join(component.folder());
            fs::create_dir_all(&folder).unwrap();
            fs::write(
                folder.join("config.json"),
                Value::Object(self.config(component)).to_string(),
            )
            .unwrap();
            let parameters = self.parameters(component);
            let tensors: Vec<(&str, Tensor)> = parameters
                .iter()
                .map(|(name, tensor)| (name, tensor.to_kind(self.kind(name))))
                .collect();
            let path = folder.join(component.weights_name());
            write_tensors(
                &path,
                tensors.iter().map(|(name, tensor)| (*name, tensor)),
                None,
                &[],
            )
            .unwrap();
        }
    }
}

type Tensors = BTreeMap<String, (Option<Kind>, Vec<i64>, Vec<u8>)>;

/// Returns every tensor of a folder.
fn tensors(folder: &Path) -> Tensors {
    let mut tensors = Tensors::new();
    for component in Component::ALL {
        let file = TensorFile::open(
            &folder
                .join(component.folder())
                .join(component.weights_name()),
        )
        .unwrap();
        for name in file.names() {
            let tensor = (
                file.kind(name),
                file.shape(name).unwrap().to_vec(),
                file.bytes(name).unwrap().to_vec(),
            );
            tensors.insert(format!("{}/{name}", component.folder()), tensor);
        }
    }
    tensors
}

fn open(folder: &Path) -> Bundle<'static> {
    Bundle::open_folders(
        |component| folder.join(component.folder()),
        Some(Parameterization::Flow),
    )
    .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 16,
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_tensor_comes_back(sizes in sizes()) {
        rectiflow_sdxl::test_threads::set();
        let folder = tempfile::tempdir().unwrap();
        let [first, back] = ["first", "back"].map(|name| folder.path().join(name));
        let single = folder.path().join("single.safetensors");
        let again = folder.path().join("again.safetensors");
        let options = ExportOptions::default();
        sizes.write(&first);
        export_single_file(&open(&first), &single, &options).unwrap();
        let bundle = Bundle::open_single_file(&single, None).unwrap();
        prop_assert_eq!(bundle.parameterization, Some(Parameterization::Flow));
        export_diffusers(&bundle, &back, &options).unwrap();
        let (expected, found) = (tensors(&first), tensors(&back));
        prop_assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
        for (name, tensor) in &expected {
            prop_assert!(tensor == &found[name], "{} differs", name);
        }
        export_single_file(&open(&back), &again, &options).unwrap();
        let single = TensorFile::open(&single).unwrap();
        let again = TensorFile::open(&again).unwrap();
        let data = |file: &TensorFile| file.metadata()["modelspec.hash_sha256"].clone();
        prop_assert_eq!(data(&single), data(&again));
    }
}
