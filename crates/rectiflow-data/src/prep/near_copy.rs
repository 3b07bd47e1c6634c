//! What the search for near-copies finds: pictures in clusters, and their ranks.

use std::cmp::Reverse;

use serde::Serialize;

use crate::{
    dedupe::signature::Signature,
    format::{manifest::Split, record::SampleId},
    picture::Picture,
};

/// A picture of a cluster.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NearCopy {
    /// Its hash.
    pub id: SampleId,
    /// Its address in the source.
    pub address: String,
    /// Its split; none for a picture of a source that is not prepared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
    /// Width of the picture.
    pub width_px: u32,
    /// Height of the picture.
    pub height_px: u32,
    /// Its rank among all scores, or its score, where a table of annotations has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// Bytes of its captions and tags.
    pub text_bytes: u64,
    /// Its thumbnail.
    #[serde(skip)]
    pub signature: Signature,
}

impl NearCopy {
    /// The thumbnail that was compared, its longer side `side_px` long. It is blurred, since it has
    /// 64 x 64 cells of light and 16 x 16 of colour.
    pub fn thumbnail(&self, side_px: u32) -> Picture {
        let longer = self.width_px.max(self.height_px).max(1);
        let side = |px: u32| (px * side_px / longer).max(1);
        let (width, height) = (side(self.width_px), side(self.height_px));
        let mut pixels = Vec::with_capacity(3 * width as usize * height as usize);
        for y in 0..height {
            for x in 0..width {
                let at = [(x, width), (y, height)];
                let at = at.map(|(at, of)| (at as f32 + 0.5) / of as f32);
                pixels.extend_from_slice(&self.signature.colour_at(at[0], at[1]));
            }
        }
        Picture::new(width, height, pixels)
    }
}

/// Copies of one picture, the best first: the one that stays.
pub type NearCopyCluster = Vec<NearCopy>;

/// The near-copies of a data set or a source.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NearCopies {
    /// Pictures that were compared.
    pub num_pictures: u64,
    /// Pictures without a signature: another version prepared them, or their signatures are lost.
    pub num_unsigned: u64,
    /// Clusters in which pictures of both splits are.
    pub num_across_splits: u64,
    /// The clusters, by the rank of the picture that stays.
    pub clusters: Vec<NearCopyCluster>,
    /// Duration.
    pub secs: f64,
}

/// Progress of the search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum NearCopyEvent {
    /// Pictures are read and signed.
    Signing {
        /// Pictures so far.
        done: u64,
        /// Pictures of the source.
        num_pictures: u64,
        /// Pictures that cannot be read, so far.
        num_faulty: u64,
    },
    /// Texts and signatures are read.
    Reading {
        /// Objects so far.
        done: u64,
        /// Objects of the data set.
        num_objects: u64,
    },
    /// The keys of all pictures are compared.
    Comparing {
        /// Pictures.
        num_pictures: u64,
    },
    /// The thumbnails of candidates are compared.
    Confirming {
        /// Pairs of pictures.
        num_pairs: u64,
    },
}

/// What decides which picture of a cluster stays: the greatest. Scores are in millionths.
pub(crate) type Rank = (u64, Option<i64>, u64, Reverse<u64>);

/// The rank of a picture.
pub(crate) fn rank(pixels: u64, score: Option<f64>, text_bytes: u64, id: SampleId) -> Rank {
    let score = score.map(|score| (score * 1e6).round() as i64);
    (pixels, score, text_bytes, Reverse(id.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_the_largest_then_the_best_scored_then_the_best_described() {
        let id = SampleId;
        let ascending = [
            rank(10, None, 900, id(0)),
            rank(10, Some(-3.0), 5, id(1)),
            rank(10, Some(0.0), 5, id(3)),
            rank(10, Some(0.0), 5, id(2)),
            rank(10, Some(0.0), 9, id(4)),
            rank(10, Some(0.25), 0, id(5)),
            rank(20, None, 0, id(6)),
        ];
        assert!(ascending.is_sorted());
    }
}
