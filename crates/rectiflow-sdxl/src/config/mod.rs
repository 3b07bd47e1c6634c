//! Model sizes, read from the `config.json` files of diffusers and transformers.
//!
//! Missing keys take upstream's defaults. A known key with an unsupported value is an error that
//! names the key, the supported values and the value found; all problems of a file are reported
//! together. Unknown keys are ignored, as upstream does: files carry additional keys
//! (`_name_or_path`, `torch_dtype`). Each configuration keeps its JSON, so that an export writes
//! back what was read.
//!
//! One source file per model, all on one reader. Not here: SDXL's own numbers. The real model and a
//! tiny one differ in their files only.

pub(crate) mod activation;
pub(crate) mod clip;
pub(crate) mod reader;
pub(crate) mod scheduler;
pub(crate) mod unet;
pub(crate) mod vae;

pub use activation::Activation;
pub use clip::ClipConfig;
pub use reader::read_object;
pub use scheduler::SchedulerConfig;
pub use unet::{LevelConfig, NUM_TIME_IDS, UNetConfig};
pub use vae::VaeConfig;

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::{
        unet::tests::{object, sdxl},
        *,
    };

    #[test]
    fn empty_and_absurd_lists_are_errors() {
        for widths in [
            serde_json::json!([]),
            serde_json::json!([0]),
            serde_json::json!("320"),
            serde_json::json!([4.5]),
        ] {
            let mut json = sdxl();
            json.insert("block_out_channels".into(), widths.clone());
            assert!(UNetConfig::from_json(json, "x").is_err(), "{widths}");
            let json = object(serde_json::json!({"block_out_channels": widths}));
            assert!(VaeConfig::from_json(json, "x").is_err(), "{widths}");
        }
        assert!(
            ClipConfig::from_json(
                object(serde_json::json!({"num_attention_heads": 0})),
                false,
                "x"
            )
            .is_err()
        );
    }

    #[test]
    fn a_few_bytes_cannot_describe_millions_of_layers() {
        let many = serde_json::json!(1 << 24);
        for (key, value) in [
            ("layers_per_block", many.clone()),
            ("layers_per_block", serde_json::json!([1 << 24, 2, 2])),
            ("transformer_layers_per_block", many.clone()),
            (
                "transformer_layers_per_block",
                serde_json::json!([1, 2, 1 << 24]),
            ),
        ] {
            let mut json = sdxl();
            json.insert(key.into(), value);
            let error = UNetConfig::from_json(json, "x").unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
        let clip = object(serde_json::json!({"num_hidden_layers": many}));
        assert!(
            ClipConfig::from_json(clip, false, "x")
                .unwrap_err()
                .to_string()
                .contains("num_hidden_layers")
        );
        let vae = object(serde_json::json!({"layers_per_block": many}));
        assert!(
            VaeConfig::from_json(vae, "x")
                .unwrap_err()
                .to_string()
                .contains("layers_per_block")
        );
    }

    #[test]
    fn clip_and_vae_take_upstreams_defaults() {
        let clip = ClipConfig::from_json(Map::new(), false, "x").unwrap();
        assert_eq!(
            (clip.hidden_size, clip.projection_dim, clip.eos_token_id),
            (512, None, 49407)
        );
        assert_eq!(clip.hidden_act, Activation::QuickGelu);
        let json = object(
            serde_json::json!({"architectures": ["CLIPTextModelWithProjection"],
                "projection_dim": 9}),
        );
        assert_eq!(
            ClipConfig::from_json(json, false, "x")
                .unwrap()
                .projection_dim,
            Some(9)
        );
        let vae = VaeConfig::from_json(object(serde_json::json!({"scaling_factor": 0.13025})), "x")
            .unwrap();
        assert_eq!(
            (vae.down_factor(), vae.layers_per_block, vae.scaling_factor),
            (1, 1, 0.13025)
        );
    }
}
