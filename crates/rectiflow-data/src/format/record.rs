//! One training record: everything known about a sample except its latents.
//!
//! A record holds what preparation learns from the image file and its caption sources. It contains
//! no prompt: the loader draws a new one in each pass. `text_shard` encodes it as Parquet.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The permanent id of a sample: the first 8 bytes (little-endian) of BLAKE3 over the source
/// image's bytes.
///
/// The same picture has the same id in every preparation and every data set, whatever its path or
/// captions, so that crops, splits and prompts keyed by it do not change when a folder grows. Two
/// different pictures share an id with probability 5e-6 among 13 million; the second is then
/// rejected as a duplicate.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SampleId(pub u64);

impl SampleId {
    /// The id of an image file with the contents `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let hash = blake3::hash(bytes);
        Self(u64::from_le_bytes(
            hash.as_bytes()[..8]
                .try_into()
                .expect("a BLAKE3 hash has 32 bytes"),
        ))
    }
}

impl fmt::Display for SampleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for SampleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SampleId({self})")
    }
}

/// A sample's text and geometry. Sizes are in pixels after the EXIF orientation has been applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The sample.
    pub id: SampleId,
    /// Captions to choose from; can be empty if `tags` are not, or if captionless images are kept.
    pub captions: Vec<String>,
    /// Where each caption comes from: "source" for what was prepared, or a mode and its model.
    /// Empty if no caption comes from a table of annotations.
    pub caption_sources: Vec<String>,
    /// Tags, as the source writes them.
    pub tags: Vec<String>,
    /// The tags that every prompt built from tags must keep.
    pub important_tags: Vec<String>,
    /// Words about the picture's quality, which go before its tags.
    pub quality: Vec<String>,
    /// Whether a caption already contains quality words or is an alt-text, so that nothing must be
    /// added to the captions.
    pub verbatim: bool,
    /// Width of the source image.
    pub original_width_px: u32,
    /// Height of the source image.
    pub original_height_px: u32,
    /// Columns cut off at the left of the resized image: SDXL's `crop_left`.
    pub crop_left_px: u32,
    /// Rows cut off at the top of the resized image: SDXL's `crop_top`.
    pub crop_top_px: u32,
    /// Width of the encoded image, which is its bucket's.
    pub target_width_px: u32,
    /// Height of the encoded image, which is its bucket's.
    pub target_height_px: u32,
    /// Path of the source image relative to the prepared folder, with `/` as the separator.
    pub source: String,
}
