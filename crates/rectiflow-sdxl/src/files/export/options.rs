//! How to export: for both writers, and for what a single file says about itself.

use std::path::PathBuf;

use tch::Kind;

use crate::sample::SampleSettings;

/// How to export.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// Dtype on disk; `None` keeps each tensor's own.
    pub kind: Option<Kind>,
    /// Shift of the noise levels that the diffusers scheduler samples a flow model with.
    pub sampling_shift: f64,
    /// Name of the model in the single file's header.
    pub title: String,
    /// What the model is and comes from, in the single file's header; nothing if empty.
    pub description: String,
    /// More files for the diffusers folder: both tokenizers', a model card.
    pub attachments: Vec<Attachment>,
    /// More entries for the headers of weight files.
    pub metadata: Vec<(String, String)>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            kind: None,
            sampling_shift: SampleSettings::default().shift,
            title: "rectiflow SDXL".into(),
            description: String::new(),
            attachments: Vec::new(),
            metadata: Vec::new(),
        }
    }
}

/// A file of an exported folder that holds no weights.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// Its place in the folder, e.g. `tokenizer/vocab.json`.
    pub path: PathBuf,
    /// Its contents.
    pub bytes: Vec<u8>,
}
