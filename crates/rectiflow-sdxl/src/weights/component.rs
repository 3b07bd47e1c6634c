//! Names of SDXL's parts: in recipes and on the command line, in a diffusers folder, in messages.
//! Nothing here opens a file.

/// Key in the header of a UNet's weight file for its parameterization: "flow", "eps" or "v".
pub const PARAMETERIZATION_KEY: &str = "rectiflow.parameterization";

/// The key of a header that says with which shift a flow model is sampled.
pub const SHIFT_KEY: &str = "rectiflow.shift";

/// A part of SDXL with its own weights.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Component {
    /// The UNet.
    #[serde(rename = "unet")]
    UNet,
    /// The first text encoder, CLIP-L.
    ClipL,
    /// The second text encoder, OpenCLIP bigG.
    ClipG,
    /// The autoencoder.
    Vae,
}

impl Component {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::UNet, Self::ClipL, Self::ClipG, Self::Vae];

    /// Returns the name of its folder in a diffusers model.
    pub fn folder(self) -> &'static str {
        match self {
            Self::UNet => "unet",
            Self::ClipL => "text_encoder",
            Self::ClipG => "text_encoder_2",
            Self::Vae => "vae",
        }
    }

    /// Returns its name on the command line and in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::UNet => "unet",
            Self::ClipL => "clip-l",
            Self::ClipG => "clip-g",
            Self::Vae => "vae",
        }
    }

    /// Returns the name of its weight file, as in diffusers and transformers.
    pub fn weights_name(self) -> &'static str {
        match self {
            Self::UNet | Self::Vae => "diffusion_pytorch_model.safetensors",
            Self::ClipL | Self::ClipG => "model.safetensors",
        }
    }

    /// Returns the name of its configuration in messages, if it has no file of its own.
    pub(crate) fn config_name(self) -> String {
        format!("{}/config.json", self.folder())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_are_named_as_on_the_command_line() {
        for component in Component::ALL {
            let name = serde_json::Value::from(component.name());
            assert_eq!(
                serde_json::from_value::<Component>(name).unwrap(),
                component
            );
        }
    }
}
