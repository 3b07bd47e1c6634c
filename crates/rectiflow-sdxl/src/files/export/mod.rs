//! Exports a model for other tools: as a diffusers folder or a single-file SDXL checkpoint. Both
//! are self-contained.
//!
//! - The diffusers folder samples with the stock `StableDiffusionXLPipeline` without downloads: it
//!   includes both tokenizers, and for a flow model the scheduler is `DPMSolverMultistepScheduler`
//!   of order 1 on flow sigmas, which is Euler's method. (diffusers' own flow-matching Euler lacks
//!   two members that the SDXL pipeline uses.) It differs from `rectiflow sample` in two ways: it
//!   starts just below sigma 1, and truncates timesteps to integers.
//! - The single file says in its header what it is (`model_spec`) and holds the four
//!   configurations, so that a tiny model can be read back. A v model has the marker tensors by
//!   which ComfyUI, Forge and reForge know one. No tool detects "flow" from a file yet: in ComfyUI
//!   the model needs a ModelSamplingSD3 node.
//!
//! Every tensor is loaded, checked, converted, written and dropped before the next, so memory holds
//! one tensor, however large the model is. A folder or file appears under its final name only when
//! it is complete.

mod configs;
mod folder;
pub mod model_spec;
mod options;
mod single_file;
mod staging;
mod tensors;

pub use folder::export_diffusers;
pub use options::{Attachment, ExportOptions};
pub use single_file::export_single_file;

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    use serde_json::{Map, Value, json};
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::{
        config::{clip::ClipConfig, unet::UNetConfig, vae::VaeConfig},
        files::{
            bundle::Bundle,
            folder,
            model::{Model, OpenOptions},
            single_file::{CONFIGS_KEY, HASH_KEY, sdxl_configs},
        },
        flow::Parameterization,
        nets::{clip::ClipText, unet::UNet, vae::Vae},
        weights::{
            Parameters, Weights,
            component::Component,
            tensor_file::{TensorFile, write_tensors},
        },
    };

    /// SDXL's configuration of a component with `changes` applied.
    fn tiny_config(component: Component, changes: Value) -> Map<String, Value> {
        let mut config = sdxl_configs().remove(&component).unwrap();
        config.extend(changes.as_object().unwrap().clone());
        config
    }

    /// Two levels instead of three, another number of blocks, and a projection that is not square.
    fn tiny_model(parameterization: Option<Parameterization>) -> Model {
        let unet = json!({"block_out_channels": [8, 16], "attention_head_dim": [2, 2],
            "norm_num_groups": 4,
            "layers_per_block": 1, "cross_attention_dim": 12,
            "transformer_layers_per_block": [1, 1],
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 54,
            "sample_size": 16,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]});
        let clip = json!({"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 50,
            "intermediate_size": 8});
        let mut clip_l = tiny_config(Component::ClipL, clip.clone());
        clip_l.extend([
            ("hidden_size".into(), json!(4)),
            ("projection_dim".into(), json!(4)),
        ]);
        let mut clip_g = tiny_config(Component::ClipG, clip);
        clip_g.extend([
            ("hidden_size".into(), json!(8)),
            ("projection_dim".into(), json!(6)),
        ]);
        let vae = json!({"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1,
            "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"]});
        let weights = |seed| Weights::random(seed, Kind::Float, Device::Cpu);
        let unet = UNetConfig::from_json(tiny_config(Component::UNet, unet), "unet").unwrap();
        let vae = VaeConfig::from_json(tiny_config(Component::Vae, vae), "vae").unwrap();
        Model {
            unet: UNet::new(unet, weights(1)).unwrap(),
            clip_l: ClipText::new(
                ClipConfig::from_json(clip_l, false, "l").unwrap(),
                weights(2),
            )
            .unwrap(),
            clip_g: ClipText::new(
                ClipConfig::from_json(clip_g, true, "g").unwrap(),
                weights(3),
            )
            .unwrap(),
            vae: Vae::new(vae, weights(4)).unwrap(),
            parameterization,
            scheduler: None,
        }
    }

    fn parameters(model: &Model, component: Component) -> &Parameters {
        match component {
            Component::UNet => &model.unet.parameters,
            Component::ClipL => &model.clip_l.parameters,
            Component::ClipG => &model.clip_g.parameters,
            Component::Vae => &model.vae.parameters,
        }
    }

    /// The bytes of this tensor in a file of dtype `kind`.
    fn bytes(tensor: &Tensor, kind: Kind) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        write_tensors(&path, [("x", tensor)], Some(kind), &[]).unwrap();
        TensorFile::open(&path)
            .unwrap()
            .bytes("x")
            .unwrap()
            .to_vec()
    }

    fn options(kind: Kind) -> ExportOptions {
        let file = |path: &str| Attachment {
            path: path.into(),
            bytes: b"{}".to_vec(),
        };
        ExportOptions {
            kind: Some(kind),
            attachments: vec![
                file("tokenizer/vocab.json"),
                file("tokenizer_2/vocab.json"),
                file("README.md"),
            ],
            metadata: vec![("run".into(), "demo".into())],
            ..ExportOptions::default()
        }
    }

    const KINDS: [Kind; 3] = [Kind::Float, Kind::Half, Kind::BFloat16];

    #[test]
    fn a_diffusers_folder_holds_the_models_bytes() {
        let model = tiny_model(Some(Parameterization::Flow));
        let folder = tempfile::tempdir().unwrap();
        for kind in KINDS {
            // The second and third export replace the one before.
            let out = folder.path().join("export");
            export_diffusers(&Bundle::of_model(&model).unwrap(), &out, &options(kind)).unwrap();
            for component in Component::ALL {
                let files =
                    folder::weight_files(component, &folder::find(component, &out).unwrap())
                        .unwrap();
                let file = TensorFile::open(&files[0]).unwrap();
                assert_eq!(file.names().count(), parameters(&model, component).len());
                for (name, tensor) in parameters(&model, component).iter() {
                    assert!(
                        file.bytes(name).unwrap() == bytes(tensor, kind),
                        "{name} in {kind:?}"
                    );
                    assert_eq!(file.kind(name), Some(kind), "{name}");
                }
                assert_eq!(file.metadata()["run"], "demo");
            }
            let opened = Model::open(&out, &OpenOptions::default()).unwrap();
            assert_eq!(opened.parameterization, Some(Parameterization::Flow));
            assert_eq!(opened.scheduler.unwrap().flow_shift, Some(6.0));
            assert!(
                out.join("tokenizer_2/vocab.json").is_file()
                    && out.join("README.md").is_file()
                    && out.join("model_index.json").is_file()
            );
            assert_eq!(
                fs::read_dir(folder.path()).unwrap().count(),
                1,
                "nothing remains but the export"
            );
        }
    }

    #[test]
    fn a_single_file_holds_the_models_bytes_in_its_own_forms() {
        let model = tiny_model(Some(Parameterization::Flow));
        let folder = tempfile::tempdir().unwrap();
        for kind in KINDS {
            let out = folder.path().join("model.safetensors");
            export_single_file(&Bundle::of_model(&model).unwrap(), &out, &options(kind)).unwrap();
            let file = TensorFile::open(&out).unwrap();
            let clip_g = |name: &str| model.clip_g.parameters.get(name).unwrap();
            let projection = clip_g("text_projection.weight");
            assert_eq!(projection.size(), [6, 8]);
            let stored = "conditioner.embedders.1.model.text_projection";
            assert!(
                file.bytes(stored).unwrap() == bytes(&projection.tr(), kind),
                "transposed"
            );
            let layer = "text_model.encoder.layers.1.self_attn";
            let [q, k, v] =
                ["q", "k", "v"].map(|part| clip_g(&format!("{layer}.{part}_proj.weight")));
            let stored =
                "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight";
            assert!(
                file.bytes(stored).unwrap() == bytes(&Tensor::cat(&[q, k, v], 0), kind),
                "query, key, value"
            );
            let query = model
                .vae
                .parameters
                .get("decoder.mid_block.attentions.0.to_q.weight")
                .unwrap();
            let stored = "first_stage_model.decoder.mid.attn_1.q.weight";
            assert_eq!(file.shape(stored), Some(&[16, 16, 1, 1][..]));
            assert!(file.bytes(stored).unwrap() == bytes(query, kind));
            // Every tensor, read back through the table of names.
            let back = Bundle::open_single_file(&out, None).unwrap();
            let expected = if kind == Kind::Half {
                vec![true]
            } else {
                vec![]
            };
            let about_fp16: Vec<bool> = back
                .notes
                .iter()
                .map(|note| note.contains("the VAE is stored in fp16"))
                .collect();
            assert_eq!(about_fp16, expected, "{:?}", back.notes);
            for component in Component::ALL {
                for (name, tensor) in parameters(&model, component).iter() {
                    let read = back.load(component, name).unwrap();
                    assert!(
                        bytes(&read, kind) == bytes(tensor, kind) && read.kind() == kind,
                        "{name} in {kind:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn importing_a_single_file_gives_the_diffusers_folder() {
        let model = tiny_model(Some(Parameterization::V));
        let folder = tempfile::tempdir().unwrap();
        let (direct, single) = (
            folder.path().join("direct"),
            folder.path().join("model.safetensors"),
        );
        let (imported, again) = (
            folder.path().join("imported"),
            folder.path().join("again.safetensors"),
        );
        let bundle = Bundle::of_model(&model).unwrap();
        export_diffusers(&bundle, &direct, &options(Kind::Half)).unwrap();
        export_single_file(&bundle, &single, &options(Kind::Half)).unwrap();
        let kept = ExportOptions {
            kind: None,
            ..options(Kind::Half)
        };
        export_diffusers(
            &Bundle::open_single_file(&single, None).unwrap(),
            &imported,
            &kept,
        )
        .unwrap();
        for component in Component::ALL {
            for name in ["config.json", component.weights_name()] {
                let read =
                    |root: &Path| fs::read(root.join(component.folder()).join(name)).unwrap();
                assert!(
                    read(&direct) == read(&imported),
                    "{}/{name}",
                    component.folder()
                );
            }
        }
        let index = fs::read_to_string(imported.join("scheduler/scheduler_config.json")).unwrap();
        assert!(index.contains("v_prediction"), "{index}");
        let bundle = Bundle::open_folders(
            |component| imported.join(component.folder()),
            Some(Parameterization::V),
        );
        export_single_file(&bundle.unwrap(), &again, &kept).unwrap();
        assert!(
            fs::read(&single).unwrap() == fs::read(&again).unwrap(),
            "a round trip reproduces the file"
        );
    }

    #[test]
    fn broken_weights_are_refused_by_name_and_leave_nothing() {
        let model = tiny_model(Some(Parameterization::Flow));
        let name = "mid_block.resnets.0.conv1.weight";
        let mut value = model.unet.parameters.get(name).unwrap().view(-1).get(7);
        for (wrong, kind, expected) in [
            (f64::NAN, Kind::Float, "not finite"),
            (1e5, Kind::Half, "fp16 ends at 65504"),
        ] {
            let _ = value.fill_(wrong);
            let folder = tempfile::tempdir().unwrap();
            let bundle = Bundle::of_model(&model).unwrap();
            let to_folder =
                export_diffusers(&bundle, &folder.path().join("x"), &options(kind)).unwrap_err();
            let to_file = export_single_file(
                &bundle,
                &folder.path().join("x.safetensors"),
                &options(kind),
            )
            .unwrap_err();
            for message in [to_folder.to_string(), to_file.to_string()] {
                assert!(
                    message.contains(name)
                        && message.contains("unet")
                        && message.contains(expected),
                    "{message}"
                );
            }
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }

    /// transformers 4 reads these names alone; transformers 5, which has shorter ones in memory,
    /// reads and writes them too (checked with 4.57.1 and 5.23.0).
    #[test]
    fn text_encoders_are_written_with_the_names_that_transformers_4_and_5_read() {
        let model = tiny_model(Some(Parameterization::Flow));
        let folder = tempfile::tempdir().unwrap();
        let (out, again) = (folder.path().join("export"), folder.path().join("again"));
        let bundle = Bundle::of_model(&model).unwrap();
        export_diffusers(&bundle, &out, &options(Kind::Float)).unwrap();
        // A folder with the short names.
        for component in [Component::ClipL, Component::ClipG] {
            let path = out.join(component.folder()).join(component.weights_name());
            let file = TensorFile::open(&path).unwrap();
            let mut short = Vec::new();
            for name in file.names() {
                let bare = name.strip_prefix("text_model.").unwrap_or(name);
                short.push((bare.to_owned(), file.tensor(name).unwrap()));
            }
            let tensors = short.iter().map(|(name, tensor)| (name.as_str(), tensor));
            write_tensors(&path, tensors, None, &[]).unwrap();
        }
        let flow = Some(Parameterization::Flow);
        let bundle = Bundle::open_folders(|component| out.join(component.folder()), flow).unwrap();
        export_diffusers(&bundle, &again, &options(Kind::Float)).unwrap();
        for component in [Component::ClipL, Component::ClipG] {
            let path = again
                .join(component.folder())
                .join(component.weights_name());
            let file = TensorFile::open(&path).unwrap();
            for name in file.names() {
                let is_projection =
                    component == Component::ClipG && name == "text_projection.weight";
                assert!(name.starts_with("text_model.") || is_projection, "{name}");
            }
            assert_eq!(file.names().count(), parameters(&model, component).len());
        }
    }

    #[test]
    fn foreign_folders_and_silent_models_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("pictures");
        fs::create_dir(&out).unwrap();
        fs::write(out.join("cat.png"), b"meow").unwrap();
        let model = tiny_model(Some(Parameterization::Eps));
        let message = export_diffusers(
            &Bundle::of_model(&model).unwrap(),
            &out,
            &ExportOptions::default(),
        );
        assert!(message.unwrap_err().to_string().contains("pictures"));
        assert_eq!(fs::read(out.join("cat.png")).unwrap(), b"meow");
        let silent = tiny_model(None);
        let message = export_diffusers(
            &Bundle::of_model(&silent).unwrap(),
            &folder.path().join("x"),
            &options(Kind::Half),
        );
        assert!(message.unwrap_err().to_string().contains("flow, eps or v"));
    }

    #[test]
    fn a_single_file_opens_as_the_model_that_it_is() {
        let model = tiny_model(Some(Parameterization::Eps));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        export_single_file(
            &Bundle::of_model(&model).unwrap(),
            &path,
            &options(Kind::Float),
        )
        .unwrap();
        let opened = Model::open(&path, &OpenOptions::default()).unwrap();
        assert_eq!(opened.parameterization, Some(Parameterization::Eps));
        for component in Component::ALL {
            let found = parameters(&opened, component);
            assert_eq!(found.len(), parameters(&model, component).len());
            for (name, tensor) in parameters(&model, component).iter() {
                assert!(
                    found.get(name).unwrap().equal(tensor),
                    "{}/{name}",
                    component.folder()
                );
            }
        }
        let half = OpenOptions {
            kind: Kind::Half,
            ..OpenOptions::default()
        };
        let opened = Model::open(&path, &half).unwrap();
        assert_eq!(
            (opened.unet.kind(), opened.vae.kind()),
            (Kind::Half, Kind::Float),
            "SDXL's VAE overflows in fp16"
        );
        let metadata = TensorFile::open(&path).unwrap().metadata().clone();
        assert_eq!(metadata["modelspec.prediction_type"], "epsilon");
        assert_eq!(
            metadata["modelspec.resolution"], "32x32",
            "16 latents of 2 pixels a side"
        );
        assert!(
            !metadata.contains_key("modelspec.usage_hint"),
            "eps models have no hint"
        );
    }

    #[test]
    fn parts_that_a_file_lacks_come_from_another_model() {
        let [model, other] =
            [Parameterization::Flow, Parameterization::Eps].map(|p| tiny_model(Some(p)));
        let folder = tempfile::tempdir().unwrap();
        let [whole, part] =
            ["whole.safetensors", "unet.safetensors"].map(|name| folder.path().join(name));
        let parts = folder.path().join("parts");
        let _ = other
            .clip_g
            .parameters
            .get("text_projection.weight")
            .unwrap()
            .shallow_clone()
            .fill_(0.25);
        export_single_file(
            &Bundle::of_model(&model).unwrap(),
            &whole,
            &options(Kind::Float),
        )
        .unwrap();
        export_diffusers(
            &Bundle::of_model(&other).unwrap(),
            &parts,
            &options(Kind::Float),
        )
        .unwrap();
        // A UNet alone, without its prefix, as such files usually are.
        let file = TensorFile::open(&whole).unwrap();
        let bare = |name: &str| {
            name.strip_prefix("model.diffusion_model.")
                .map(str::to_owned)
        };
        let tensors: Vec<_> = file
            .names()
            .filter_map(|name| Some((bare(name)?, file.tensor(name).unwrap())))
            .collect();
        let metadata: Vec<_> = file
            .metadata()
            .iter()
            // The tensors are other ones than those hashed.
            .filter(|(key, _)| *key != HASH_KEY)
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        write_tensors(
            &part,
            tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)),
            None,
            &metadata,
        )
        .unwrap();
        let message = Bundle::open_single_file(&part, None)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("clip-l") && message.contains("--missing-from"),
            "{message}"
        );
        let bundle = Bundle::open_single_file(&part, Some(&parts)).unwrap();
        assert_eq!(bundle.notes.len(), 3, "{:?}", bundle.notes);
        assert!(
            bundle.notes[1].starts_with("the clip-g is from"),
            "{:?}",
            bundle.notes
        );
        let projection = bundle
            .load(Component::ClipG, "text_projection.weight")
            .unwrap();
        assert!(projection.eq(0.25).all().int64_value(&[]) == 1);
        for (name, tensor) in model.unet.parameters.iter() {
            assert!(
                bundle.load(Component::UNet, name).unwrap().equal(tensor),
                "{name}"
            );
        }
    }

    #[test]
    fn unfit_single_files_are_answered_with_what_is_wrong() {
        let model = tiny_model(Some(Parameterization::Flow));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        export_single_file(
            &Bundle::of_model(&model).unwrap(),
            &path,
            &options(Kind::Float),
        )
        .unwrap();
        let file = TensorFile::open(&path).unwrap();
        // Writes a copy of the file with the tensors that `keep` accepts, an extra tensor, and
        // `metadata` as its header.
        let rewritten = |keep: &dyn Fn(&str) -> bool, metadata: &[(&str, &str)]| {
            let extra = Tensor::from_slice(&[1f32]);
            let tensors: Vec<_> = file
                .names()
                .filter(|name| keep(name))
                .map(|n| (n, file.tensor(n).unwrap()))
                .collect();
            let all = tensors
                .iter()
                .map(|(name, tensor)| (*name, tensor))
                .chain([("model_ema.decay", &extra)]);
            let path = folder.path().join("other.safetensors");
            write_tensors(&path, all, None, metadata).unwrap();
            path
        };
        let own: Vec<_> = file
            .metadata()
            .iter()
            // The tensors are other ones than those hashed.
            .filter(|(key, _)| *key != HASH_KEY)
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        let bundle = Bundle::open_single_file(&rewritten(&|_| true, &own), None).unwrap();
        assert!(
            bundle.notes[0].starts_with("1 tensor of averaged weights"),
            "only a note: {:?}",
            bundle.notes
        );
        let error = |path: PathBuf| {
            Bundle::open_single_file(&path, None)
                .unwrap_err()
                .to_string()
        };
        let message = error(rewritten(&|name| !name.contains("embedders.1"), &own));
        assert!(
            message.contains("clip-g") && message.contains("conditioner.embedders.1.model."),
            "{message}"
        );
        let message = error(rewritten(&|name| !name.ends_with("out.2.bias"), &own));
        assert!(
            message.ends_with("unet/conv_out.bias [4] is missing"),
            "{message}"
        );
        let message = error(rewritten(&|_| true, &[]));
        assert!(
            message.contains("unet/conv_in.weight: expected [320, 4, 3, 3], found [8, 4, 3, 3]"),
            "{message}"
        );
        let message = error(rewritten(&|_| true, &[(CONFIGS_KEY, "{\"unet\": 3}")]));
        assert!(message.contains(CONFIGS_KEY), "{message}");
    }
}
