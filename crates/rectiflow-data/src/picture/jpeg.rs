//! JPEG, decoded with zune-jpeg directly instead of through `image`, which converts CMYK to RGB
//! before a profile can be applied, and silently fills the missing part of a truncated file with
//! gray.
//!
//! zune-jpeg 0.5.15 decodes two rare kinds wrongly, without an error: baseline files with one scan
//! per component, and files whose first component is sampled more coarsely than another (found with
//! libjxl's test images, mean error 66 to 140 of 255). jpeg-decoder decodes those; it is slower and
//! correct.

use image::metadata::Orientation;
use jpeg_decoder::PixelFormat;
use zune_jpeg::{
    JpegDecoder,
    errors::DecodeErrors,
    zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions},
};

use crate::{
    picture::colour::Samples,
    reject::{Fault, Reason},
};

type Decoder<'a> = JpegDecoder<ZCursor<&'a [u8]>>;

/// Size as stored, and the EXIF orientation.
pub(crate) fn header(bytes: &[u8]) -> Result<((u32, u32), Orientation), Fault> {
    let decoder = open(bytes, false)?;
    let (width, height) = decoder.dimensions().expect("the headers were decoded");
    let orientation = decoder
        .exif()
        .and_then(|exif| Orientation::from_exif_chunk(exif));
    // A side has 16 bits in JPEG.
    Ok((
        (width as u32, height as u32),
        orientation.unwrap_or(Orientation::NoTransforms),
    ))
}

/// The samples, in `memory`, and the profile, if any.
pub(crate) fn decode(
    bytes: &[u8],
    mut memory: Vec<u8>,
) -> Result<(Samples, Option<Vec<u8>>), Fault> {
    if !has_end(bytes) {
        return Err(Fault::new(
            Reason::Broken,
            "truncated: the end-of-image marker is missing",
        ));
    }
    if is_rare(bytes) {
        return decode_rare(bytes);
    }
    // Strict, so that damage is an error and not a gray area; but stray bytes between headers do no
    // harm.
    let mut decoded = decode_with(bytes, true, &mut memory);
    if let Err(fault) = &decoded
        && fault.detail.contains("Extra bytes between headers")
    {
        decoded = decode_with(bytes, false, &mut memory);
    }
    let (stored, profile) = decoded?;
    let samples = match stored {
        ColorSpace::Luma => Samples::eight(1, memory),
        ColorSpace::CMYK => Samples::Cmyk(ink_of_cmyk(memory)),
        ColorSpace::YCCK => Samples::Cmyk(ink_of_ycck(memory)),
        _ => Samples::eight(3, memory),
    };
    Ok((samples, profile))
}

/// Decodes into `memory`. Returns what the samples are, and the profile.
fn decode_with(
    bytes: &[u8],
    strict: bool,
    memory: &mut Vec<u8>,
) -> Result<(ColorSpace, Option<Vec<u8>>), Fault> {
    let mut decoder = open(bytes, strict)?;
    let stored = decoder.input_colorspace();
    let wanted = match stored.expect("the headers were decoded") {
        stored @ (ColorSpace::Luma | ColorSpace::CMYK | ColorSpace::YCCK) => stored,
        _ => ColorSpace::RGB,
    };
    decoder.set_options(options(strict).jpeg_set_out_colorspace(wanted));
    let num_bytes = decoder.output_buffer_size();
    // Zeros: what a damaged file leaves unwritten must not be an earlier picture.
    memory.clear();
    memory.resize(num_bytes.expect("the headers were decoded"), 0);
    decoder.decode_into(memory).map_err(broken)?;
    Ok((wanted, decoder.icc_profile()))
}

fn decode_rare(bytes: &[u8]) -> Result<(Samples, Option<Vec<u8>>), Fault> {
    let mut decoder = jpeg_decoder::Decoder::new(bytes);
    let values = decoder
        .decode()
        .map_err(|error| Fault::new(Reason::Broken, error.to_string()))?;
    let format = decoder.info().map(|info| info.pixel_format);
    let samples = match format {
        Some(PixelFormat::L8) => Samples::eight(1, values),
        Some(PixelFormat::RGB24) => Samples::eight(3, values),
        // jpeg-decoder does not invert these, whether stored as CMYK or YCCK.
        Some(PixelFormat::CMYK32) => Samples::Cmyk(ink_of_cmyk(values)),
        other => {
            let detail = format!("a JPEG of {other:?} samples");
            return Err(Fault::new(Reason::UnsupportedFormat, detail));
        }
    };
    Ok((samples, decoder.icc_profile()))
}

fn open(bytes: &[u8], strict: bool) -> Result<Decoder<'_>, Fault> {
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options(strict));
    decoder.decode_headers().map_err(broken)?;
    Ok(decoder)
}

/// No limit on the sides: `decode` has checked the number of pixels.
fn options(strict: bool) -> DecoderOptions {
    DecoderOptions::default()
        .set_strict_mode(strict)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX)
}

fn broken(error: DecodeErrors) -> Fault {
    Fault::new(Reason::Broken, format!("{error:?}"))
}

/// CMYK is stored inverted, as Photoshop does: 255 is no ink.
fn ink_of_cmyk(mut values: Vec<u8>) -> Vec<u8> {
    for value in &mut values {
        *value = 255 - *value;
    }
    values
}

/// YCCK is the YCbCr of 255 minus the values that CMYK would store, with black stored as in CMYK.
fn ink_of_ycck(mut values: Vec<u8>) -> Vec<u8> {
    for pixel in values.chunks_exact_mut(4) {
        let [y, cb, cr] = [pixel[0], pixel[1], pixel[2]].map(f32::from);
        let (cb, cr) = (cb - 128.0, cr - 128.0);
        let rgb = [
            y + 1.402 * cr,
            y - 0.344_136 * cb - 0.714_136 * cr,
            y + 1.772 * cb,
        ];
        for (out, value) in pixel.iter_mut().zip(rgb) {
            *out = value.round().clamp(0.0, 255.0) as u8;
        }
        pixel[3] = 255 - pixel[3];
    }
    values
}

const START_OF_SCAN: u8 = 0xda;

/// The segments up to the header of the first scan: marker, payload, and the offset after it.
fn segments(bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8], usize)> {
    let mut at = Some(2);
    std::iter::from_fn(move || {
        loop {
            let start = at?;
            match bytes.get(start..start + 2) {
                // A fill byte, or a marker without a length.
                Some([0xff, 0xff]) => at = Some(start + 1),
                Some([0xff, 0x01 | 0xd0..=0xd9]) => at = Some(start + 2),
                Some(&[0xff, marker]) => {
                    let &[high, low] = bytes.get(start + 2..start + 4)? else {
                        return None;
                    };
                    let end = start + 2 + usize::from(u16::from_be_bytes([high, low]));
                    at = (marker != START_OF_SCAN).then_some(end);
                    return Some((marker, bytes.get(start + 4..end)?, end));
                }
                _ => return None,
            }
        }
    })
}

/// Whether the end-of-image marker follows the headers. FF D9 cannot occur inside a scan, where 00
/// follows FF. The search is from the back, where the marker is in nearly every file.
fn has_end(bytes: &[u8]) -> bool {
    let behind = segments(bytes).last().map_or(0, |(_, _, end)| end);
    let mut pairs = bytes[behind..].windows(2).rev();
    pairs.any(|pair| pair == [0xff, 0xd9])
}

/// Whether the file is of a kind that zune-jpeg decodes wrongly.
fn is_rare(bytes: &[u8]) -> bool {
    let mut num_components = 0;
    let mut sequential = false;
    let mut coarse_first = false;
    for (marker, payload, _) in segments(bytes) {
        match marker {
            // Start of frame: precision, height, width, number of components, then three bytes for
            // each.
            0xc0..=0xc2 => {
                let factors: Vec<u8> = payload.iter().skip(7).step_by(3).copied().collect();
                num_components = factors.len();
                sequential = marker != 0xc2;
                coarse_first = is_first_coarser(&factors);
            }
            START_OF_SCAN => {
                let in_scan = payload.first().copied().unwrap_or(0);
                return coarse_first || (sequential && usize::from(in_scan) < num_components);
            }
            _ => {}
        }
    }
    false
}

/// Whether the first component is sampled more coarsely than another, in either direction. Each
/// factor has four bits per direction.
fn is_first_coarser(factors: &[u8]) -> bool {
    for &other in factors {
        if factors[0] >> 4 < other >> 4 || factors[0] & 15 < other & 15 {
            return true;
        }
    }
    false
}
