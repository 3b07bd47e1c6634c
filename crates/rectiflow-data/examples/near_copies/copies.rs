//! Planted copies: what happens to a picture on its way through the web.

use fast_image_resize::{
    FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer,
    images::{Image, ImageRef},
};
use image::{ExtendedColorType, ImageEncoder, ImageFormat, codecs::jpeg::JpegEncoder};

use crate::canvas::{Canvas, Dice};

/// The kinds of copies. Those that begin with `crop` have a target of their own.
pub(crate) const COPIES: [&str; 9] = [
    "resize 50%",
    "JPEG 50",
    "mirror",
    "border 5-10%",
    "resize+JPEG+mirror",
    "border+resize+JPEG",
    "crop 90% middle",
    "crop 90% side",
    "crop 90% area+JPEG",
];

/// A copy of a picture.
pub(crate) fn copy(source: &Canvas, kind: &str, dice: &mut Dice) -> Canvas {
    match kind {
        "resize 50%" => resized(source, 0.5),
        "JPEG 50" => jpeg(source, 50),
        "mirror" => source.mirrored(),
        "border 5-10%" => bordered(source, dice),
        "resize+JPEG+mirror" => {
            let share = dice.real(0.4, 0.9);
            jpeg(&resized(source, share), 50).mirrored()
        }
        "border+resize+JPEG" => {
            let share = dice.real(0.5, 0.9);
            jpeg(&resized(&bordered(source, dice), share), 50)
        }
        "crop 90% middle" => {
            let (w, h) = (source.width, source.height);
            source.crop(w / 20, h / 20, w * 9 / 10, h * 9 / 10)
        }
        "crop 90% side" => cropped(source, 0.9, dice),
        _ => jpeg(&cropped(source, 0.9f32.sqrt(), dice), 50),
    }
}

/// A picture with sides of `share` times its own.
pub(crate) fn resized(source: &Canvas, share: f32) -> Canvas {
    let side = |length: usize| ((length as f32 * share).round() as u32).max(1);
    let (width, height) = (side(source.width), side(source.height));
    let (from_w, from_h) = (source.width as u32, source.height as u32);
    let from = ImageRef::new(from_w, from_h, &source.pixels, PixelType::U8x3).unwrap();
    let mut to = Image::new(width, height, PixelType::U8x3);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3));
    Resizer::new().resize(&from, &mut to, &options).unwrap();
    Canvas {
        width: width as usize,
        height: height as usize,
        pixels: to.into_vec(),
    }
}

fn jpeg(source: &Canvas, quality: u8) -> Canvas {
    let mut bytes = Vec::new();
    let (width, height) = (source.width as u32, source.height as u32);
    JpegEncoder::new_with_quality(&mut bytes, quality)
        .write_image(&source.pixels, width, height, ExtendedColorType::Rgb8)
        .unwrap();
    let image = image::load_from_memory_with_format(&bytes, ImageFormat::Jpeg).unwrap();
    Canvas {
        width: source.width,
        height: source.height,
        pixels: image.into_rgb8().into_raw(),
    }
}

fn bordered(source: &Canvas, dice: &mut Dice) -> Canvas {
    let colour = match dice.whole(0, 3) {
        0 => [0; 3],
        1 => [255; 3],
        _ => dice.colour(),
    };
    let mut side = |length: usize| (length as f32 * dice.real(0.05, 0.1)).round() as usize;
    let (x, y) = (side(source.width), side(source.height));
    let mut out = Canvas::filled(source.width + 2 * x, source.height + 2 * y, colour);
    out.paste(source, x, y);
    out
}

fn cropped(source: &Canvas, share: f32, dice: &mut Dice) -> Canvas {
    let width = (source.width as f32 * share).round() as usize;
    let height = (source.height as f32 * share).round() as usize;
    let left = dice.whole(0, source.width - width + 1);
    source.crop(
        left,
        dice.whole(0, source.height - height + 1),
        width,
        height,
    )
}
