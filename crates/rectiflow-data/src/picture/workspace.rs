//! Memory that a thread keeps from picture to picture.
//!
//! A picture of 12 megapixels takes 36 MB. Fresh memory for each picture costs a page fault every 4
//! kB, a fifth of the time. What is computed does not depend on what the memory held before.

use std::sync::{Mutex, PoisonError};

use crate::{
    format::{
        bucket::{Bucket, ResizeSpace},
        crop::Placement,
    },
    picture::{
        Picture,
        decode::{Decoded, Opaque, Stored},
        resize::Fitter,
        srgb_profile::ComparedProfiles,
    },
    reject::Fault,
};

/// Pixels of more bytes are not kept: 32 megapixels.
const KEPT_BYTES: usize = 3 << 25;

/// The memory of one thread.
#[derive(Debug, Default)]
pub struct Workspace {
    /// Of the last picture.
    pixels: Vec<u8>,
    fitter: Fitter,
    compared: ComparedProfiles,
}

impl Workspace {
    /// As [`decode`](crate::picture::decode::decode).
    ///
    /// # Errors
    /// The file's fault, which can be a decoder's panic.
    pub fn decode(
        &mut self,
        bytes: &[u8],
        max_pixels: u64,
        background: [u8; 3],
    ) -> Result<Decoded, Fault> {
        let stored = self.stored(bytes, max_pixels)?;
        Ok(self.opaque(stored, background)?.upright())
    }

    /// The first stage of decoding.
    pub(crate) fn stored(&mut self, bytes: &[u8], max_pixels: u64) -> Result<Stored, Fault> {
        Stored::decode(bytes, max_pixels, std::mem::take(&mut self.pixels))
    }

    /// The second stage; the third is [`Opaque::upright`].
    pub(crate) fn opaque(&mut self, stored: Stored, background: [u8; 3]) -> Result<Opaque, Fault> {
        stored.opaque(background, &mut self.compared)
    }

    /// As [`fit`](crate::picture::resize::fit). Keeps the picture's memory for the next one.
    pub(crate) fn fit(
        &mut self,
        picture: Picture,
        placement: &Placement,
        bucket: Bucket,
        space: ResizeSpace,
    ) -> Vec<u8> {
        let fitted = self.fitter.fit(&picture, placement, bucket, space);
        self.keep(picture);
        fitted
    }

    /// Keeps a picture's memory for the next one.
    pub fn keep(&mut self, picture: Picture) {
        let memory = picture.into_pixels();
        if memory.capacity() <= KEPT_BYTES {
            self.pixels = memory;
        }
    }
}

/// The workspaces of all threads: one is taken for each picture and put back.
#[derive(Debug, Default)]
pub(crate) struct Workspaces(Mutex<Vec<Workspace>>);

impl Workspaces {
    /// Runs `work` with a workspace that no other thread uses.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut Workspace) -> T) -> T {
        let kept = self.lock().pop();
        let mut workspace = kept.unwrap_or_default();
        let result = work(&mut workspace);
        self.lock().push(workspace);
        result
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Workspace>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use image::{DynamicImage, ImageFormat, RgbaImage};
    use proptest::prelude::*;

    use super::*;
    use crate::picture::{decode::decode, resize::fit};

    const MAX: u64 = 1 << 24;
    const SIDES: [(u32, u32); 3] = [(40, 24), (97, 64), (16, 130)];

    /// A picture of each format and size, opaque or not.
    fn files() -> Vec<Vec<u8>> {
        let mut files = Vec::new();
        for (width, height) in SIDES {
            let image = RgbaImage::from_fn(width, height, |x, y| {
                image::Rgba([x * 6, y * 10, x * y, x + 200].map(|value| value as u8))
            });
            let image = DynamicImage::ImageRgba8(image);
            for image in [
                image.clone(),
                image.to_rgb8().into(),
                image.to_luma16().into(),
            ] {
                for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Jpeg] {
                    let mut bytes = Cursor::new(Vec::new());
                    if image.write_to(&mut bytes, format).is_ok() {
                        files.push(bytes.into_inner());
                    }
                }
            }
        }
        files
    }

    const BUCKET: Bucket = Bucket {
        width_px: 32,
        height_px: 16,
    };
    const PLACEMENT: Placement = Placement {
        resized_width_px: 32,
        resized_height_px: 21,
        crop_left_px: 0,
        crop_top_px: 3,
    };

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Pictures of all formats and damaged ones, in any order: what a workspace computes is
        /// what new memory would hold.
        #[test]
        fn used_memory_changes_nothing(
            order in prop::collection::vec((0usize..24, 0usize..4, any::<u16>()), 1..8),
        ) {
            let files = files();
            let mut workspace = Workspace::default();
            for (which, kind, at) in order {
                let mut bytes = files[which % files.len()].clone();
                let at = usize::from(at) % bytes.len();
                match kind {
                    0 => bytes[at] ^= 0x55,
                    1 => bytes.truncate(at),
                    2 => {
                        // A cut JPEG that ends as a whole one does.
                        bytes.truncate(at);
                        bytes.extend([0xff, 0xd9]);
                    }
                    _ => {}
                }
                let expected = decode(&bytes, MAX, [255; 3]);
                let found = workspace.decode(&bytes, MAX, [255; 3]);
                match (expected, found) {
                    (Ok(expected), Ok(found)) => {
                        prop_assert!(expected.picture == found.picture);
                        let space = ResizeSpace::Gamma;
                        let fitted = fit(&expected.picture, &PLACEMENT, BUCKET, space);
                        prop_assert!(
                            fitted == workspace.fit(found.picture, &PLACEMENT, BUCKET, space)
                        );
                    }
                    (expected, found) => prop_assert_eq!(
                        expected.err().map(|fault| fault.detail),
                        found.err().map(|fault| fault.detail)
                    ),
                }
            }
        }
    }

    #[test]
    fn a_large_picture_is_not_kept() {
        let mut workspace = Workspace::default();
        workspace.fit(
            Picture::filled(6000, 4000, [1; 3]),
            &PLACEMENT,
            BUCKET,
            ResizeSpace::Gamma,
        );
        assert_eq!(workspace.pixels.len(), 6000 * 4000 * 3);
        workspace.pixels = Vec::new();
        workspace.fit(
            Picture::filled(8000, 5000, [1; 3]),
            &PLACEMENT,
            BUCKET,
            ResizeSpace::Gamma,
        );
        assert_eq!(workspace.pixels.capacity(), 0);
    }

    #[test]
    fn workspaces_are_used_again() {
        let workspaces = Workspaces::default();
        let first = workspaces.with(|workspace| {
            workspace.pixels = vec![7; 5];
            workspaces.with(|other| other.pixels.len())
        });
        assert_eq!(first, 0, "two at a time are two");
        assert_eq!(workspaces.lock().len(), 2);
        assert_eq!(workspaces.with(|workspace| workspace.pixels.len()), 5);
    }
}
