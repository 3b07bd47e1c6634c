//! Pictures of a source by their addresses, at the size of a page's figures.

use std::{collections::HashMap, path::Path};

use crate::{
    error::Result,
    format::{
        bucket::{Bucket, Geometry, ResizeSpace},
        crop::place,
        record::SampleId,
    },
    picture::{Picture, decode::decode, resize::fit},
    source::{Source, choice::SourceKind},
    text::caption::Reading,
};

/// Most pixels of a picture that is shown.
const MAX_PIXELS: u64 = 1 << 28;

/// The pictures of a source.
#[derive(Debug)]
pub struct SmallPictures {
    source: Source,
    /// Index of a sample by its address.
    by_address: HashMap<String, usize>,
    background: [u8; 3],
}

impl SmallPictures {
    /// Lists the source from which the data set in the folder `dataset` was prepared.
    ///
    /// # Errors
    /// Those of [`Source::list`].
    pub fn open(source: &Path, dataset: &Path, geometry: &Geometry) -> Result<Self> {
        let source = Source::list(source, dataset, SourceKind::Auto, Reading::default())?;
        let mut by_address = HashMap::new();
        for (number, sample) in source.samples().iter().enumerate() {
            by_address.insert(sample.address().to_owned(), number);
        }
        Ok(Self {
            source,
            by_address,
            background: geometry.background,
        })
    }

    /// The picture at an address, its longer side `side_px` long. None if it cannot be opened.
    pub fn picture(&self, address: &str, side_px: u32) -> Option<Picture> {
        let sample = &self.source.samples()[*self.by_address.get(address)?];
        let bytes = self.source.open(sample).ok()?;
        small(&bytes, side_px, self.background)
    }
}

/// The picture of a file, its longer side `side_px` long. None if it cannot be decoded.
pub fn small(bytes: &[u8], side_px: u32, background: [u8; 3]) -> Option<Picture> {
    let picture = decode(bytes, MAX_PIXELS, background).ok()?.picture;
    let (width, height) = (picture.width_px(), picture.height_px());
    let longer = u64::from(width.max(height));
    let side = |px: u32| (u64::from(px) * u64::from(side_px) / longer).max(1) as u32;
    let bucket = Bucket {
        width_px: side(width),
        height_px: side(height),
    };
    let placement = place(bucket, width, height, 0, SampleId(0));
    let pixels = fit(&picture, &placement, bucket, ResizeSpace::Gamma);
    Some(Picture::new(bucket.width_px, bucket.height_px, pixels))
}
