//! One training record: everything known about a sample but its latents.
//!
//! A record is what preparation learnt from the image file and its caption sources, before any prompt is drawn: the
//! prompt is made anew in each pass. Its bytes (Parquet) are the business of `text_shard`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Names a sample for ever: the first 8 bytes (little-endian) of BLAKE3 over the source image's bytes.
///
/// The same picture has the same id in every preparation and every data set, whatever its path or captions, so that
/// crops, splits and prompts keyed by it do not change when a folder grows. Two different pictures share an id with
/// probability 5e-6 among 13 million; the second is then rejected as a duplicate.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SampleId(pub u64);

impl SampleId {
    /// The id of an image file with these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let hash = blake3::hash(bytes);
        Self(u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a BLAKE3 hash has 32 bytes")))
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
    /// Captions to choose from; may be empty where `tags` are not, or where captionless images are kept.
    pub captions: Vec<String>,
    /// Tags, as the source writes them.
    pub tags: Vec<String>,
    /// The tags that every prompt made of tags must keep.
    pub important_tags: Vec<String>,
    /// Words about the picture's quality, to be put before its tags.
    pub quality: Vec<String>,
    /// A caption already holds quality words or is an alt-text: nothing may be added to the captions.
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
    /// Path of the source image relative to the prepared folder, with `/` between its parts.
    pub source: String,
}
