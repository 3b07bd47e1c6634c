//! Strangers' image files to sRGB pixels: any kind, orientation, depth, profile; a bad file gives a reason.
//!
//! Content decides what a file is, not its name. The number of pixels is checked in the header, before memory is
//! reserved for them. Order: decode, colour profile to sRGB, 8 bits, alpha composed on a colour, orientation; then the
//! resize and the crop that `bucket` worked out. PNG's gAMA and cICP chunks are not honoured (browsers and training
//! sets disagree about them); of a GIF or an animated WebP the first frame counts.
//!
//! AVIF is not read. What could do it in pure Rust today (November 2026): rav1d 1.1 has a C interface and expects an
//! assembler for its speed, re_rav1d is a 0.1 release of a fork, rav1d-safe and zenavif are AGPL. Such files are named
//! in `rejected.jsonl` as `unsupported_format`; convert them to WebP or PNG.

use std::{
    io::Cursor,
    panic::{AssertUnwindSafe, catch_unwind},
};

use fast_image_resize::{
    FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer, create_srgb_mapper,
    images::{Image, ImageRef},
};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, metadata::Orientation};

use crate::{
    bucket::{Placement, ResizeSpace},
    colour::{self, Samples},
    jpeg,
    manifest::Bucket,
    picture::Picture,
    reject::{Fault, Reason},
};

/// What a header tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Width after the EXIF orientation has been applied.
    pub width_px: u32,
    /// Height after the EXIF orientation has been applied.
    pub height_px: u32,
}

/// A decoded image, upright, opaque, sRGB.
#[derive(Debug)]
pub struct Decoded {
    /// The pixels.
    pub picture: Picture,
    /// The profile could not be used, and why.
    pub note: Option<Fault>,
}

/// Reads what the header tells without decoding a pixel.
///
/// # Errors
/// The file's fault. A decoder's panic is one.
pub fn inspect(bytes: &[u8], max_pixels: u64) -> Result<Header, Fault> {
    contained(|| {
        let (size, orientation) = match sniff(bytes)? {
            ImageFormat::Jpeg => jpeg::header(bytes)?,
            format => {
                let mut decoder = reader(bytes, format, max_pixels)?;
                let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
                (decoder.dimensions(), orientation)
            }
        };
        check_size(size, max_pixels)?;
        let (width_px, height_px) = if swaps_sides(orientation) { (size.1, size.0) } else { size };
        Ok(Header { width_px, height_px })
    })
}

/// Decodes an image completely. Transparent pixels are composed on `background`.
///
/// # Errors
/// The file's fault. A decoder's panic is one.
pub fn decode(bytes: &[u8], max_pixels: u64, background: [u8; 3]) -> Result<Decoded, Fault> {
    contained(|| {
        let format = sniff(bytes)?;
        let (samples, size, profile, orientation) = match format {
            ImageFormat::Jpeg => {
                let (size, orientation) = jpeg::header(bytes)?;
                check_size(size, max_pixels)?;
                let (samples, profile) = jpeg::decode(bytes)?;
                (samples, size, profile, orientation)
            }
            format => {
                let mut decoder = reader(bytes, format, max_pixels)?;
                let size = decoder.dimensions();
                check_size(size, max_pixels)?;
                // A profile or orientation that cannot be read is as good as none: the pixels may still be.
                let profile = decoder.icc_profile().ok().flatten();
                let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
                let decoded = DynamicImage::from_decoder(decoder).map_err(broken)?;
                (samples_of(decoded), size, profile, orientation)
            }
        };
        let (rgba, note) = colour::to_srgb(samples, profile.as_deref());
        let opaque = rgba.compose(background);
        Ok(Decoded { picture: upright(opaque, size, orientation), note })
    })
}

/// Resizes with Lanczos3 (a = 3, antialiased) and crops to the bucket.
///
/// # Panics
/// If `placement` was not made for this picture and bucket.
pub fn fit(picture: &Picture, placement: &Placement, bucket: Bucket, space: ResizeSpace) -> Vec<u8> {
    let size = (placement.resized_width_px, placement.resized_height_px);
    let resized = resize(picture, size, space);
    let (width, left) = (bucket.width_px as usize, placement.crop_left_px as usize);
    let rows = resized.chunks_exact(size.0 as usize * 3);
    let rows = rows.skip(placement.crop_top_px as usize).take(bucket.height_px as usize);
    let cropped: Vec<u8> = rows.flat_map(|row| &row[left * 3..(left + width) * 3]).copied().collect();
    assert_eq!(cropped.len(), width * bucket.height_px as usize * 3, "the crop is inside the resized image");
    cropped
}

fn resize(picture: &Picture, (width, height): (u32, u32), space: ResizeSpace) -> Vec<u8> {
    if (width, height) == (picture.width_px(), picture.height_px()) {
        return picture.pixels().to_vec();
    }
    let fits = "buffers are made for the sizes and pixel types that they are used with";
    let source = ImageRef::new(picture.width_px(), picture.height_px(), picture.pixels(), PixelType::U8x3).expect(fits);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3));
    let mut resizer = Resizer::new();
    let mut target = Image::new(width, height, PixelType::U8x3);
    match space {
        ResizeSpace::Gamma => resizer.resize(&source, &mut target, &options).expect(fits),
        ResizeSpace::Linear => {
            // 16 bits in between: 8 linear bits would lose most of the shadows.
            let mapper = create_srgb_mapper();
            let mut light = Image::new(picture.width_px(), picture.height_px(), PixelType::U16x3);
            mapper.forward_map(&source, &mut light).expect(fits);
            let mut resized = Image::new(width, height, PixelType::U16x3);
            resizer.resize(&light, &mut resized, &options).expect(fits);
            mapper.backward_map(&resized, &mut target).expect(fits);
        }
    }
    target.into_vec()
}

/// What the first bytes say the file is.
fn sniff(bytes: &[u8]) -> Result<ImageFormat, Fault> {
    if bytes.is_empty() {
        return Err(Fault::new(Reason::Empty, "the file has no bytes"));
    }
    let unsupported = |name: &str| {
        let detail = format!("{name} is not read: convert it to PNG, JPEG or WebP");
        Err(Fault::new(Reason::UnsupportedFormat, detail))
    };
    match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Jpeg | ImageFormat::Png | ImageFormat::WebP | ImageFormat::Gif)) => Ok(format),
        Ok(other) => unsupported(&format!("{other:?}")),
        Err(_) if bytes.get(4..8) == Some(b"ftyp") => unsupported("HEIF or video"),
        Err(_) if bytes.starts_with(&[0xff, 0x0a]) || bytes.starts_with(b"\0\0\0\x0cJXL ") => unsupported("JPEG XL"),
        Err(_) => Err(Fault::new(Reason::NotAnImage, "its first bytes are not those of an image")),
    }
}

fn reader(bytes: &[u8], format: ImageFormat, max_pixels: u64) -> Result<impl ImageDecoder + '_, Fault> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    // The widest pixel has 8 bytes; twice that for what a decoder keeps beside its output, and some for profiles.
    limits.max_alloc = Some(max_pixels.saturating_mul(16).saturating_add(64 << 20));
    reader.limits(limits);
    reader.into_decoder().map_err(broken)
}

fn check_size((width, height): (u32, u32), max_pixels: u64) -> Result<(), Fault> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 {
        return Err(Fault::new(Reason::Broken, format!("its header says {width}x{height} px")));
    }
    if pixels > max_pixels {
        let detail = format!("its header says {width}x{height} px, {pixels} in all; max_pixels is {max_pixels}");
        return Err(Fault::new(Reason::TooManyPixels, detail));
    }
    Ok(())
}

/// A fault of the decoder's; one of its limits is the pixels' once more.
fn broken(error: image::ImageError) -> Fault {
    let reason = if matches!(error, image::ImageError::Limits(_)) { Reason::TooManyPixels } else { Reason::Broken };
    Fault::new(reason, error.to_string())
}

/// Runs a decoder; its panic is the file's fault.
fn contained<T>(decode: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(decode))
        .unwrap_or_else(|_| Err(Fault::new(Reason::Broken, "the decoder crashed on it")))
}

fn samples_of(image: DynamicImage) -> Samples {
    match image {
        DynamicImage::ImageLuma8(i) => Samples::Eight { channels: 1, values: i.into_raw() },
        DynamicImage::ImageLumaA8(i) => Samples::Eight { channels: 2, values: i.into_raw() },
        DynamicImage::ImageRgb8(i) => Samples::Eight { channels: 3, values: i.into_raw() },
        DynamicImage::ImageRgba8(i) => Samples::Eight { channels: 4, values: i.into_raw() },
        DynamicImage::ImageLuma16(i) => Samples::Sixteen { channels: 1, values: i.into_raw() },
        DynamicImage::ImageLumaA16(i) => Samples::Sixteen { channels: 2, values: i.into_raw() },
        DynamicImage::ImageRgb16(i) => Samples::Sixteen { channels: 3, values: i.into_raw() },
        DynamicImage::ImageRgba16(i) => Samples::Sixteen { channels: 4, values: i.into_raw() },
        // Floating-point kinds are not among the formats read; should one come, 16 bits lose nothing that shows.
        other => Samples::Sixteen { channels: 4, values: other.into_rgba16().into_raw() },
    }
}

fn swaps_sides(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
}

fn upright(pixels: Vec<u8>, (width, height): (u32, u32), orientation: Orientation) -> Picture {
    if orientation == Orientation::NoTransforms {
        return Picture::new(width, height, pixels);
    }
    let image = image::RgbImage::from_raw(width, height, pixels).expect("three bytes a pixel were composed");
    let mut image = DynamicImage::ImageRgb8(image);
    image.apply_orientation(orientation);
    let image = image.into_rgb8();
    Picture::new(image.width(), image.height(), image.into_raw())
}
