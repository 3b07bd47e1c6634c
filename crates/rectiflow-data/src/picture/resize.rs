//! Pictures to the size of their bucket: Lanczos resize and crop, as `crop` computes them.

use fast_image_resize::{
    FilterType, IntoImageView, PixelType, ResizeAlg, ResizeOptions, Resizer, create_srgb_mapper,
    images::{Image, ImageRef},
};

use crate::{
    format::{
        bucket::{Bucket, ResizeSpace},
        crop::Placement,
    },
    picture::Picture,
};

/// Resizes with Lanczos3 (a = 3, antialiased) and crops to the bucket. Returns `[h, w, 3]`.
///
/// # Panics
/// If `placement` was not made for this picture and bucket.
pub fn fit(
    picture: &Picture,
    placement: &Placement,
    bucket: Bucket,
    space: ResizeSpace,
) -> Vec<u8> {
    let size = (placement.resized_width_px, placement.resized_height_px);
    let resized = resize(picture, size, space);
    let row_bytes = bucket.width_px as usize * 3;
    let num_rows = bucket.height_px as usize;
    let left = placement.crop_left_px as usize * 3;
    let top = placement.crop_top_px as usize;
    let mut cropped = Vec::with_capacity(num_rows * row_bytes);
    for row in resized
        .chunks_exact(size.0 as usize * 3)
        .skip(top)
        .take(num_rows)
    {
        cropped.extend_from_slice(&row[left..left + row_bytes]);
    }
    assert_eq!(
        cropped.len(),
        num_rows * row_bytes,
        "the crop is inside the resized image"
    );
    cropped
}

fn resize(picture: &Picture, (width, height): (u32, u32), space: ResizeSpace) -> Vec<u8> {
    let (from_width, from_height) = (picture.width_px(), picture.height_px());
    if (width, height) == (from_width, from_height) {
        return picture.pixels().to_vec();
    }
    let source = ImageRef::new(from_width, from_height, picture.pixels(), PixelType::U8x3);
    let source = source.expect(BUFFERS_FIT);
    let mut target = Image::new(width, height, PixelType::U8x3);
    match space {
        ResizeSpace::Gamma => resample(&source, &mut target),
        ResizeSpace::Linear => {
            // 16 bits in between: 8 linear bits would lose most of the shadows.
            let mapper = create_srgb_mapper();
            let mut light = Image::new(from_width, from_height, PixelType::U16x3);
            mapper.forward_map(&source, &mut light).expect(BUFFERS_FIT);
            let mut resized = Image::new(width, height, PixelType::U16x3);
            resample(&light, &mut resized);
            mapper
                .backward_map(&resized, &mut target)
                .expect(BUFFERS_FIT);
        }
    }
    target.into_vec()
}

const BUFFERS_FIT: &str = "the buffers have matching sizes and pixel types";

fn resample(source: &impl IntoImageView, target: &mut Image<'_>) {
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3));
    Resizer::new()
        .resize(source, target, &options)
        .expect(BUFFERS_FIT);
}

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
