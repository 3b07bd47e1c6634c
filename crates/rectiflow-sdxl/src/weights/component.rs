//! The parts of SDXL by name: in recipes and on the command line, in a diffusers folder, in messages. Names only: no file
//! is opened here.

/// Key in the header of a UNet's weight file that says what it predicts: "flow", "eps" or "v".
pub const PARAMETERIZATION_KEY: &str = "rectiflow.parameterization";

/// A part of SDXL with weights of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
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

    /// Its folder in a diffusers model.
    pub fn folder(self) -> &'static str {
        match self {
            Self::UNet => "unet",
            Self::ClipL => "text_encoder",
            Self::ClipG => "text_encoder_2",
            Self::Vae => "vae",
        }
    }

    /// Its name on the command line and in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::UNet => "unet",
            Self::ClipL => "clip-l",
            Self::ClipG => "clip-g",
            Self::Vae => "vae",
        }
    }

    /// The name of its weight file, as upstream saves it.
    pub fn weights_name(self) -> &'static str {
        match self {
            Self::UNet | Self::Vae => "diffusion_pytorch_model.safetensors",
            Self::ClipL | Self::ClipG => "model.safetensors",
        }
    }

    /// How its configuration is called in messages, where it is in no file of its own.
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
            assert_eq!(serde_json::from_value::<Component>(name).unwrap(), component);
        }
    }
}
