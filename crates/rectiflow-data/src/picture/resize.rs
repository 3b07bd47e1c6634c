//! Pictures to the size of their bucket: Lanczos resize and crop, as `crop` computes them.

use fast_image_resize::{
    FilterType, ImageView, ImageViewMut, PixelTrait, PixelType, ResizeAlg, ResizeOptions, Resizer,
    create_srgb_mapper,
    images::{Image, ImageRef},
    pixels::{U8x3, U16x3},
};

use crate::{
    format::{
        bucket::{Bucket, ResizeSpace},
        crop::Placement,
    },
    picture::Picture,
};

/// Fits one picture after the other, and keeps the memory that a resize needs.
#[derive(Debug, Default)]
pub(crate) struct Fitter {
    resizer: Resizer,
    /// A resized picture, `[h, w, 3]`, and what is left of larger ones.
    resized: Vec<u8>,
}

impl Fitter {
    /// As [`fit`].
    pub(crate) fn fit(
        &mut self,
        picture: &Picture,
        placement: &Placement,
        bucket: Bucket,
        space: ResizeSpace,
    ) -> Vec<u8> {
        let (width, height) = (placement.resized_width_px, placement.resized_height_px);
        if (width, height) == (picture.width_px(), picture.height_px()) {
            return cropped(picture.pixels(), placement, bucket);
        }
        if (width, height) == (bucket.width_px, bucket.height_px) {
            let mut pixels = vec![0; num_bytes(width, height)];
            self.resize(picture, &mut target(width, height, &mut pixels), space);
            return pixels;
        }
        let mut resized = std::mem::take(&mut self.resized);
        let used = num_bytes(width, height);
        if resized.len() < used {
            resized.resize(used, 0);
        }
        self.resize(picture, &mut target(width, height, &mut resized), space);
        let pixels = cropped(&resized[..used], placement, bucket);
        self.resized = resized;
        pixels
    }

    fn resize(&mut self, picture: &Picture, target: &mut Image<'_>, space: ResizeSpace) {
        let (from_width, from_height) = (picture.width_px(), picture.height_px());
        let source = ImageRef::new(from_width, from_height, picture.pixels(), PixelType::U8x3);
        let source = source.expect(BUFFERS_FIT);
        match space {
            ResizeSpace::Gamma => {
                let source = source.typed_image::<U8x3>().expect(BUFFERS_FIT);
                let mut target = target.typed_image_mut::<U8x3>().expect(BUFFERS_FIT);
                self.resample(&source, &mut target);
            }
            ResizeSpace::Linear => {
                // 16 bits in between: 8 linear bits would lose most of the shadows.
                let mapper = create_srgb_mapper();
                let mut light = Image::new(from_width, from_height, PixelType::U16x3);
                mapper.forward_map(&source, &mut light).expect(BUFFERS_FIT);
                let mut resized = Image::new(target.width(), target.height(), PixelType::U16x3);
                let source = light.typed_image::<U16x3>().expect(BUFFERS_FIT);
                let mut smaller = resized.typed_image_mut::<U16x3>().expect(BUFFERS_FIT);
                self.resample(&source, &mut smaller);
                mapper.backward_map(&resized, target).expect(BUFFERS_FIT);
            }
        }
    }

    /// Resizes pixels of one type. `Resizer::resize` takes any, and so compiles the filters of 13
    /// types into this crate: half of its machine code.
    fn resample<P: PixelTrait>(
        &mut self,
        source: &impl ImageView<Pixel = P>,
        target: &mut impl ImageViewMut<Pixel = P>,
    ) {
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3));
        let resized = self.resizer.resize_typed(source, target, &options);
        resized.expect(BUFFERS_FIT);
    }
}

/// Resizes with Lanczos3 (a = 3, antialiased) and crops to the bucket. Returns `[h, w, 3]`.
///
/// The pixels that the crop drops are resized too: a resize of the crop alone rounds the weights of
/// the filter to other fractions, and other pixels would be another data set. They are a few
/// hundredths of a photograph.
///
/// # Panics
/// If `placement` was not made for this picture and bucket.
pub fn fit(
    picture: &Picture,
    placement: &Placement,
    bucket: Bucket,
    space: ResizeSpace,
) -> Vec<u8> {
    Fitter::default().fit(picture, placement, bucket, space)
}

fn num_bytes(width: u32, height: u32) -> usize {
    3 * width as usize * height as usize
}

fn target(width: u32, height: u32, pixels: &mut [u8]) -> Image<'_> {
    Image::from_slice_u8(width, height, pixels, PixelType::U8x3).expect(BUFFERS_FIT)
}

/// The crop of resized pixels, a row at a time.
fn cropped(resized: &[u8], placement: &Placement, bucket: Bucket) -> Vec<u8> {
    let row_bytes = bucket.width_px as usize * 3;
    let num_rows = bucket.height_px as usize;
    let left = placement.crop_left_px as usize * 3;
    let top = placement.crop_top_px as usize;
    let mut cropped = Vec::with_capacity(num_rows * row_bytes);
    let rows = resized.chunks_exact(placement.resized_width_px as usize * 3);
    for row in rows.skip(top).take(num_rows) {
        cropped.extend_from_slice(&row[left..left + row_bytes]);
    }
    assert_eq!(
        cropped.len(),
        num_rows * row_bytes,
        "the crop is inside the resized image"
    );
    cropped
}

const BUFFERS_FIT: &str = "the buffers have matching sizes and pixel types";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_resize_keeps_light_and_gamma_keeps_values() {
        let pixels = (0..64 * 64)
            .flat_map(|i| [if (i + i / 64) % 2 == 0 { 255 } else { 0 }; 3])
            .collect();
        let board = Picture::new(64, 64, pixels);
        let bucket = Bucket {
            width_px: 16,
            height_px: 16,
        };
        let placement = Placement {
            resized_width_px: 16,
            resized_height_px: 16,
            crop_left_px: 0,
            crop_top_px: 0,
        };
        let middle = |space| fit(&board, &placement, bucket, space)[(8 * 16 + 8) * 3];
        assert!(middle(ResizeSpace::Gamma).abs_diff(128) <= 2);
        // sRGB encodes half of the light as 188.
        assert!(middle(ResizeSpace::Linear).abs_diff(188) <= 2);
    }

    #[test]
    fn crop_takes_the_rectangle_that_was_placed() {
        let pixels = (0..20u8)
            .flat_map(|y| (0..30u8).flat_map(move |x| [x, y, 0]))
            .collect();
        let picture = Picture::new(30, 20, pixels);
        let placement = Placement {
            resized_width_px: 30,
            resized_height_px: 20,
            crop_left_px: 7,
            crop_top_px: 3,
        };
        let crop = fit(
            &picture,
            &placement,
            Bucket {
                width_px: 8,
                height_px: 16,
            },
            ResizeSpace::Gamma,
        );
        assert_eq!(crop.len(), 8 * 16 * 3);
        assert_eq!(
            (crop[..3].to_vec(), crop[crop.len() - 3..].to_vec()),
            (vec![7, 3, 0], vec![14, 18, 0])
        );
    }
}
