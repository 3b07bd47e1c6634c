//! Export options of both writers and of the single file's header.

use std::path::PathBuf;

use tch::Kind;

use crate::sample::SampleSettings;

/// Options of an export.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// Dtype on disk; `None` keeps each tensor's dtype.
    pub kind: Option<Kind>,
    /// Shift of a flow model's noise levels, written to the diffusers scheduler and the usage hint.
    pub sampling_shift: f64,
    /// The model's name in the single file's header.
    pub title: String,
    /// What the model is and where it comes from, in the single file's header; omitted if empty.
    pub description: String,
    /// Additional files of the diffusers folder: both tokenizers, a model card.
    pub attachments: Vec<Attachment>,
    /// Additional entries in the headers of weight files.
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

/// A file of an exported folder besides the components.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// Path relative to the folder, e.g. `tokenizer/vocab.json`.
    pub path: PathBuf,
    /// The file's contents.
    pub bytes: Vec<u8>,
}
