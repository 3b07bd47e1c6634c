//! Image files from unknown sources to sRGB pixels: any kind, orientation, depth and profile. A bad
//! file is a [`Fault`].
//!
//! The content decides what a file is, not its name. The number of pixels is checked in the header,
//! before memory is reserved for them. Order: decode, convert the colour profile to sRGB, round to
//! 8 bits, compose alpha on a colour, apply the orientation; [`resize`](super::resize) follows.
//! PNG's gAMA and cICP chunks are ignored (browsers and training sets disagree about them). Only
//! the first frame of a GIF or an animated WebP is read.
//!
//! HEIC, TIFF and others are listed in `rejected.jsonl` as `unsupported_format`.

use std::{
    io::Cursor,
    panic::{AssertUnwindSafe, catch_unwind},
};

use image::{
    ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader, ImageResult, Limits,
    metadata::Orientation,
};

use crate::{
    picture::{
        Picture,
        avif::{self, Avif},
        avif_items::is_avif,
        colour::{self, Samples},
        jpeg,
        jpeg_xl::{JpegXl, Opened, is_jpeg_xl},
        srgb_profile::ComparedProfiles,
    },
    reject::{Fault, Reason},
};

/// The size of an image, from its header.
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
    /// Why the profile could not be used.
    pub note: Option<Fault>,
}

/// Reads the header without decoding a pixel.
///
/// # Errors
/// The file's fault, which can be a decoder's panic.
pub fn inspect(bytes: &[u8], max_pixels: u64) -> Result<Header, Fault> {
    contained(|| {
        let (size, orientation) = size_and_orientation(bytes, max_pixels)?;
        check_size(size, max_pixels)?;
        let (width_px, height_px) = if swaps_sides(orientation) {
            (size.1, size.0)
        } else {
            size
        };
        Ok(Header {
            width_px,
            height_px,
        })
    })
}

/// Whether an image is upright as it is stored, with no EXIF orientation. False if its header
/// cannot be read.
pub fn is_upright(bytes: &[u8], max_pixels: u64) -> bool {
    let read = contained(|| size_and_orientation(bytes, max_pixels));
    read.is_ok_and(|(_, orientation)| orientation == Orientation::NoTransforms)
}

fn size_and_orientation(bytes: &[u8], max_pixels: u64) -> Result<((u32, u32), Orientation), Fault> {
    if is_jpeg_xl(bytes) {
        let size = Opened::new(bytes, max_pixels)?.size;
        return Ok((size, Orientation::NoTransforms));
    }
    if is_avif(bytes) {
        let opened = avif::Opened::new(bytes)?;
        return Ok((opened.size, opened.orientation));
    }
    match sniff(bytes)? {
        ImageFormat::Jpeg => jpeg::header(bytes),
        format => {
            let mut decoder = reader(bytes, format, max_pixels)?;
            let orientation = orientation(&mut decoder, bytes, format);
            Ok((decoder.dimensions(), orientation))
        }
    }
}

/// Decodes an image completely. Transparent pixels are composed on `background`.
///
/// # Errors
/// The file's fault, which can be a decoder's panic.
pub fn decode(bytes: &[u8], max_pixels: u64, background: [u8; 3]) -> Result<Decoded, Fault> {
    let stored = Stored::decode(bytes, max_pixels, Vec::new())?;
    let opaque = stored.opaque(background, &mut ComparedProfiles::default())?;
    Ok(opaque.upright())
}

/// What a file holds, before colours and orientation are applied.
pub(crate) struct Stored {
    samples: Samples,
    /// Width and height in pixels.
    size: (u32, u32),
    profile: Option<Vec<u8>>,
    orientation: Orientation,
}

/// Opaque sRGB pixels, before the orientation is applied.
pub(crate) struct Opaque {
    pixels: Vec<u8>, // [h, w, 3]
    /// Width and height in pixels.
    size: (u32, u32),
    orientation: Orientation,
    /// Why the profile could not be used.
    note: Option<Fault>,
}

impl Stored {
    /// Decodes the samples, into `memory` where they have 8 bits.
    pub(crate) fn decode(bytes: &[u8], max_pixels: u64, memory: Vec<u8>) -> Result<Self, Fault> {
        contained(|| {
            if is_jpeg_xl(bytes) {
                return decode_jpeg_xl(bytes, max_pixels, memory);
            }
            if is_avif(bytes) {
                return decode_avif(bytes, max_pixels, memory);
            }
            match sniff(bytes)? {
                ImageFormat::Jpeg => decode_jpeg(bytes, max_pixels, memory),
                format => decode_other(bytes, format, max_pixels, memory),
            }
        })
    }

    /// Converts the colours to sRGB and composes transparent pixels on `background`.
    pub(crate) fn opaque(
        self,
        background: [u8; 3],
        compared: &mut ComparedProfiles,
    ) -> Result<Opaque, Fault> {
        contained(|| {
            let (srgb, note) = colour::to_srgb(self.samples, self.profile.as_deref(), compared);
            Ok(Opaque {
                pixels: srgb.compose(background),
                size: self.size,
                orientation: self.orientation,
                note,
            })
        })
    }
}

impl Opaque {
    /// Applies the orientation.
    pub(crate) fn upright(self) -> Decoded {
        Decoded {
            picture: upright(self.pixels, self.size, self.orientation),
            note: self.note,
        }
    }
}

fn decode_jpeg(bytes: &[u8], max_pixels: u64, memory: Vec<u8>) -> Result<Stored, Fault> {
    let (size, orientation) = jpeg::header(bytes)?;
    check_size(size, max_pixels)?;
    let (samples, profile) = jpeg::decode(bytes, memory)?;
    Ok(Stored {
        samples,
        size,
        profile,
        orientation,
    })
}

fn decode_jpeg_xl(bytes: &[u8], max_pixels: u64, memory: Vec<u8>) -> Result<Stored, Fault> {
    let opened = Opened::new(bytes, max_pixels)?;
    let size = opened.size;
    check_size(size, max_pixels)?;
    let JpegXl { samples, profile } = opened.decode(memory)?;
    Ok(Stored {
        samples,
        size,
        profile,
        orientation: Orientation::NoTransforms,
    })
}

fn decode_avif(bytes: &[u8], max_pixels: u64, memory: Vec<u8>) -> Result<Stored, Fault> {
    let opened = avif::Opened::new(bytes)?;
    let (size, orientation) = (opened.size, opened.orientation);
    check_size(size, max_pixels)?;
    let Avif { samples, profile } = opened.decode(memory, max_pixels)?;
    Ok(Stored {
        samples,
        size,
        profile,
        orientation,
    })
}

fn decode_other(
    bytes: &[u8],
    format: ImageFormat,
    max_pixels: u64,
    memory: Vec<u8>,
) -> Result<Stored, Fault> {
    let mut decoder = reader(bytes, format, max_pixels)?;
    let size = decoder.dimensions();
    check_size(size, max_pixels)?;
    // A profile or orientation that cannot be read counts as missing: the pixels can still be good.
    let profile = decoder.icc_profile().ok().flatten();
    let orientation = orientation(&mut decoder, bytes, format);
    Ok(Stored {
        samples: samples_of(decoder, memory).map_err(broken)?,
        size,
        profile,
        orientation,
    })
}

/// The format, by the first bytes.
fn sniff(bytes: &[u8]) -> Result<ImageFormat, Fault> {
    use ImageFormat::{Gif, Jpeg, Png, WebP};
    if bytes.is_empty() {
        return Err(Fault::new(Reason::Empty, "the file has no bytes"));
    }
    match image::guess_format(bytes) {
        Ok(format @ (Jpeg | Png | WebP | Gif)) => Ok(format),
        Ok(other) => Err(unsupported(&format!("{other:?}"))),
        // Of fewer bytes the kind is not known.
        Err(_) if bytes.len() >= 12 && bytes[4..8] == *b"ftyp" => Err(unsupported("HEIF or video")),
        Err(_) => Err(Fault::new(
            Reason::NotAnImage,
            "its first bytes are not those of an image",
        )),
    }
}

fn unsupported(name: &str) -> Fault {
    let detail = format!("{name} is not supported: convert it to PNG, JPEG or WebP");
    Fault::new(Reason::UnsupportedFormat, detail)
}

fn reader(
    bytes: &[u8],
    format: ImageFormat,
    max_pixels: u64,
) -> Result<impl ImageDecoder + '_, Fault> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    // The widest pixel has 8 bytes; twice that for the decoder's other buffers, and 64 MiB for
    // profiles.
    limits.max_alloc = Some(max_pixels.saturating_mul(16).saturating_add(64 << 20));
    reader.limits(limits);
    reader.into_decoder().map_err(broken)
}

/// The EXIF orientation. The PNG decoder does not see EXIF after the pixels, where PNG allows it
/// too.
fn orientation(decoder: &mut impl ImageDecoder, bytes: &[u8], format: ImageFormat) -> Orientation {
    let exif = if format == ImageFormat::Png {
        png_exif(bytes)
    } else {
        None
    };
    let orientation = match exif {
        Some(exif) => Orientation::from_exif_chunk(exif),
        None => decoder.orientation().ok(),
    };
    orientation.unwrap_or(Orientation::NoTransforms)
}

/// The payload of a PNG's eXIf chunk. A chunk is: length, type, payload, checksum; the first begins
/// at byte 8.
fn png_exif(bytes: &[u8]) -> Option<&[u8]> {
    let mut at = 8;
    loop {
        let length: [u8; 4] = bytes
            .get(at..at + 4)?
            .try_into()
            .expect("four bytes were sliced");
        let end = (at + 8).checked_add(u32::from_be_bytes(length) as usize)?;
        if bytes.get(at + 4..at + 8)? == b"eXIf" {
            return bytes.get(at + 8..end);
        }
        at = end.checked_add(4)?;
    }
}

fn check_size((width, height): (u32, u32), max_pixels: u64) -> Result<(), Fault> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 {
        return Err(Fault::new(
            Reason::Broken,
            format!("its header says {width}x{height} px"),
        ));
    }
    if pixels > max_pixels {
        let detail = format!(
            "its header says {width}x{height} px, {pixels} in all; max_pixels is {max_pixels}"
        );
        return Err(Fault::new(Reason::TooManyPixels, detail));
    }
    Ok(())
}

/// The fault of a decoder's error. A limit of the decoder means too many pixels.
fn broken(error: image::ImageError) -> Fault {
    let reason = if matches!(error, image::ImageError::Limits(_)) {
        Reason::TooManyPixels
    } else {
        Reason::Broken
    };
    Fault::new(reason, error.to_string())
}

/// Runs a decoder. Its panic is a fault of the file.
fn contained<T>(decode: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(decode))
        .unwrap_or_else(|_| Err(Fault::new(Reason::Broken, "the decoder crashed on it")))
}

/// Decodes the samples, into `memory` where they have 8 bits.
fn samples_of(decoder: impl ImageDecoder, mut memory: Vec<u8>) -> ImageResult<Samples> {
    let channels = match decoder.color_type() {
        ColorType::L8 => 1,
        ColorType::La8 => 2,
        ColorType::Rgb8 => 3,
        ColorType::Rgba8 => 4,
        _ => return Ok(deep_samples(DynamicImage::from_decoder(decoder)?)),
    };
    let num_bytes = usize::try_from(decoder.total_bytes());
    // Zeros, as a new buffer has: a decoder may leave out what a file leaves out.
    memory.clear();
    memory.resize(num_bytes.expect("the number of pixels was checked"), 0);
    decoder.read_image(&mut memory)?;
    Ok(Samples::eight(channels, memory))
}

/// The samples of a picture with more than 8 bits.
fn deep_samples(image: DynamicImage) -> Samples {
    match image {
        DynamicImage::ImageLuma16(i) => Samples::sixteen(1, i.into_raw()),
        DynamicImage::ImageLumaA16(i) => Samples::sixteen(2, i.into_raw()),
        DynamicImage::ImageRgb16(i) => Samples::sixteen(3, i.into_raw()),
        DynamicImage::ImageRgba16(i) => Samples::sixteen(4, i.into_raw()),
        // No supported format decodes to floating point; if one did, 16 bits would lose nothing
        // visible.
        other => Samples::sixteen(4, other.into_rgba16().into_raw()),
    }
}

fn swaps_sides(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(
        orientation,
        Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH
    )
}

fn upright(pixels: Vec<u8>, (width, height): (u32, u32), orientation: Orientation) -> Picture {
    if orientation == Orientation::NoTransforms {
        return Picture::new(width, height, pixels);
    }
    let image = image::RgbImage::from_raw(width, height, pixels)
        .expect("three bytes a pixel were composed");
    let mut image = DynamicImage::ImageRgb8(image);
    image.apply_orientation(orientation);
    let image = image.into_rgb8();
    Picture::new(image.width(), image.height(), image.into_raw())
}

#[cfg(test)]
mod tests {
    use image::{ImageEncoder, RgbaImage, codecs::png::PngEncoder};
    use moxcms::ColorProfile;
    use proptest::prelude::*;

    use super::*;

    const MAX: u64 = 1 << 24;

    fn png(image: &DynamicImage, profile: Option<Vec<u8>>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = PngEncoder::new(&mut bytes);
        if let Some(profile) = profile {
            encoder.set_icc_profile(profile).unwrap();
        }
        let (width, height) = (image.width(), image.height());
        encoder
            .write_image(image.as_bytes(), width, height, image.color().into())
            .unwrap();
        bytes
    }

    fn flat(colour: [u8; 4]) -> DynamicImage {
        DynamicImage::ImageRgba8(RgbaImage::from_pixel(8, 8, image::Rgba(colour)))
    }

    fn pixel(bytes: &[u8]) -> ([u8; 3], Option<Fault>) {
        let decoded = decode(bytes, MAX, [255; 3]).unwrap();
        (decoded.picture.at(4, 4), decoded.note)
    }

    fn assert_near(found: [u8; 3], expected: [u8; 3], tolerance: u8) {
        let near = found
            .iter()
            .zip(expected)
            .all(|(&a, b)| a.abs_diff(b) <= tolerance);
        assert!(near, "found {found:?}, expected {expected:?}");
    }

    #[test]
    fn profiles_are_converted_to_srgb() {
        let p3 = ColorProfile::new_display_p3().encode().unwrap();
        // sRGB's green has these coordinates in Display P3 (CSS Color 4: color(display-p3 0.4584
        // 0.9853 0.2983)).
        let green = flat([117, 251, 76, 255]);
        let (found, note) = pixel(&png(&green, Some(p3.clone())));
        assert_near(found, [0, 255, 0], 4);
        assert_eq!(note, None);
        assert_eq!(pixel(&png(&green, None)).0, [117, 251, 76]);
        let sixteen = DynamicImage::ImageRgba16(green.to_rgba16());
        assert_near(pixel(&png(&sixteen, Some(p3.clone()))).0, [0, 255, 0], 4);
        // Gray is gray in every RGB space with this white point; the curve is sRGB's too.
        let gray = DynamicImage::ImageLuma8(flat([90, 90, 90, 255]).to_luma8());
        assert_near(pixel(&png(&gray, Some(p3))).0, [90; 3], 1);
    }

    #[test]
    fn gray_profile_is_used_on_gray_and_noted_elsewhere() {
        let linear = ColorProfile::new_gray_with_gamma(1.0).encode().unwrap();
        let gray = DynamicImage::ImageLuma8(flat([55, 55, 55, 255]).to_luma8());
        // 55 / 255 of the light is 0.2157, which sRGB encodes as 128.
        assert_near(pixel(&png(&gray, Some(linear.clone()))).0, [128; 3], 2);
        let (found, note) = pixel(&png(&flat([10, 20, 30, 255]), Some(linear)));
        assert_eq!(
            (found, note.map(|note| note.reason)),
            ([10, 20, 30], Some(Reason::IgnoredProfile))
        );
    }

    #[test]
    fn broken_profile_is_srgb_with_a_note() {
        let (found, note) = pixel(&png(&flat([10, 20, 30, 255]), Some(vec![7; 200])));
        assert_eq!(found, [10, 20, 30]);
        assert!(note.unwrap().detail.contains("taken as sRGB"));
    }

    #[test]
    fn transparent_pixels_show_the_background() {
        for (alpha, expected) in [(0, [0, 0, 255]), (255, [200, 100, 0]), (51, [40, 20, 204])] {
            let decoded =
                decode(&png(&flat([200, 100, 0, alpha]), None), MAX, [0, 0, 255]).unwrap();
            assert_eq!(decoded.picture.at(0, 0), expected);
        }
    }

    #[test]
    fn exif_behind_the_pixels_counts() {
        let mut exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0".to_vec();
        exif.extend([0; 4]);
        let chunk = [b"eXIf".as_slice(), &exif].concat();
        let mut crc = flate2::Crc::new();
        crc.update(&chunk);
        let mut bytes = png(&DynamicImage::new_rgb8(9, 5), None);
        let end = bytes.len() - 12;
        let length = (exif.len() as u32).to_be_bytes();
        bytes.splice(
            end..end,
            [&length[..], &chunk, &crc.sum().to_be_bytes()].concat(),
        );
        assert_eq!(
            inspect(&bytes, MAX).unwrap(),
            Header {
                width_px: 5,
                height_px: 9
            }
        );
        let picture = decode(&bytes, MAX, [0; 3]).unwrap().picture;
        assert_eq!((picture.width_px(), picture.height_px()), (5, 9));
    }

    /// Written by libjpeg-turbo's cjpeg from the formula below, with `-sample 2x2 -scans` and one
    /// component per scan, and with `-sample 1x1,2x1,2x1`.
    #[test]
    fn rare_jpegs_are_decoded_right() {
        for bytes in [
            include_bytes!("../../tests/golden/scans-apart.jpg").as_slice(),
            include_bytes!("../../tests/golden/coarse-luma.jpg"),
        ] {
            let picture = decode(bytes, MAX, [0; 3]).unwrap().picture;
            assert_eq!((picture.width_px(), picture.height_px()), (64, 48));
            for (x, y) in (4..60).flat_map(|x| (4..44).map(move |y| (x, y))) {
                let expected = [x * 4, y * 5, 255 - x * 2 - y * 2].map(|v| v as u8);
                assert_near(picture.at(x, y), expected, 12);
            }
        }
    }

    /// Four pixels of four inks each; PIL and libjpeg decode the same values.
    #[test]
    fn cmyk_without_profile_is_the_product_of_inks() {
        let ink = Samples::Cmyk(vec![
            0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 255, 0, 128, 255, 51,
        ]);
        let compared = &mut ComparedProfiles::default();
        let pixels = colour::to_srgb(ink, None, compared).0.compose([9; 3]);
        assert_eq!(pixels, [255, 255, 255, 0, 255, 255, 0, 0, 0, 204, 102, 0]);
    }

    #[test]
    fn pixels_are_counted_before_memory_is_reserved() {
        let bytes = png(&DynamicImage::new_rgb8(100, 50), None);
        assert!(inspect(&bytes, 5000).is_ok() && decode(&bytes, 5000, [0; 3]).is_ok());
        for fault in [
            inspect(&bytes, 4999).unwrap_err(),
            decode(&bytes, 4999, [0; 3]).unwrap_err(),
        ] {
            assert_eq!(fault.reason, Reason::TooManyPixels);
        }
    }

    #[test]
    fn crash_of_a_decoder_is_the_files_fault() {
        let fault =
            contained(|| -> Result<(), Fault> { panic!("out of bounds, say") }).unwrap_err();
        assert_eq!(fault.reason, Reason::Broken);
    }

    fn samples() -> Vec<Vec<u8>> {
        let image = DynamicImage::ImageRgb8(image::RgbImage::from_fn(40, 24, |x, y| {
            image::Rgb([x as u8 * 6, y as u8 * 10, (x * y) as u8])
        }));
        let encode = |format| {
            let mut bytes = Cursor::new(Vec::new());
            image.write_to(&mut bytes, format).unwrap();
            bytes.into_inner()
        };
        let formats = [
            ImageFormat::Jpeg,
            ImageFormat::Png,
            ImageFormat::WebP,
            ImageFormat::Gif,
        ];
        let mut all: Vec<Vec<u8>> = formats.map(encode).to_vec();
        all.push(include_bytes!("../../tests/golden/scans-apart.jpg").to_vec());
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Damaged files decode to a picture or a fault, and never panic.
        #[test]
        fn damaged_bytes_are_survived(
            which in 0usize..5,
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            keep in any::<prop::sample::Index>(),
            cut: bool,
        ) {
            let mut bytes = samples().swap_remove(which);
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if cut {
                bytes.truncate(keep.index(bytes.len()));
            }
            let header = inspect(&bytes, MAX);
            if let Ok(decoded) = decode(&bytes, MAX, [0; 3]) {
                let header = header.unwrap();
                prop_assert_eq!(header.width_px, decoded.picture.width_px());
                prop_assert_eq!(header.height_px, decoded.picture.height_px());
            }
        }
    }
}
