//! What a picture was drawn from, as input of every text about it.

use tch::Kind;

use crate::{flow::Parameterization, sample::SampleSettings};

/// The origin of a picture.
#[derive(Debug, Clone, Copy)]
pub struct Drawing<'a> {
    /// The sampling settings.
    pub settings: &'a SampleSettings,
    /// The model's parameterization.
    pub parameterization: Parameterization,
    /// The prompt.
    pub prompt: DrawnText<'a>,
    /// The negative prompt; empty for none.
    pub negative: DrawnText<'a>,
    /// The model's name: its file without extension, or its folder.
    pub model: &'a str,
    /// The model's single file; `None` if the model is a folder.
    pub file: Option<&'a str>,
    /// The dtype in which the networks computed.
    pub computed_in: Kind,
}

/// A text, and how much of it was read.
#[derive(Debug, Clone, Copy, Default)]
pub struct DrawnText<'a> {
    /// The whole text.
    pub text: &'a str,
    /// Whether it is longer than three chunks, so that its end was not read.
    pub is_cut: bool,
}

impl<'a> DrawnText<'a> {
    /// A text that was read to its end.
    pub fn whole(text: &'a str) -> Self {
        Self {
            text,
            is_cut: false,
        }
    }
}

impl<'a> Drawing<'a> {
    /// Returns the name of the single file by which other programs know the model. A folder's is
    /// the one that an export would have.
    pub fn file_name(&self) -> String {
        let unwritten = || format!("{}.safetensors", self.model);
        self.file.map_or_else(unwritten, str::to_owned)
    }

    /// Returns the texts that shape the picture: the negative prompt does so under guidance only.
    pub fn read_texts(&self) -> impl Iterator<Item = DrawnText<'a>> + use<'a> {
        let negative = self
            .settings
            .guidance()
            .is_guided()
            .then_some(self.negative);
        [self.prompt].into_iter().chain(negative)
    }
}
