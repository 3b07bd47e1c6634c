//! JPEG through zune-jpeg itself rather than through `image`, which turns CMYK into RGB before a profile can be
//! applied, and paints what is missing from a truncated file gray without a word.

use image::metadata::Orientation;
use zune_jpeg::{
    JpegDecoder,
    errors::DecodeErrors,
    zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions},
};

use crate::{
    colour::Samples,
    reject::{Fault, Reason},
};

type Decoder<'a> = JpegDecoder<ZCursor<&'a [u8]>>;

/// Size as stored, and the EXIF orientation.
pub(crate) fn header(bytes: &[u8]) -> Result<((u32, u32), Orientation), Fault> {
    let decoder = open(bytes, false)?;
    let (width, height) = decoder.dimensions().expect("the headers were decoded");
    let orientation = decoder.exif().and_then(|exif| Orientation::from_exif_chunk(exif));
    // JPEG has 16 bits for a side.
    Ok(((width as u32, height as u32), orientation.unwrap_or(Orientation::NoTransforms)))
}

/// The samples and the profile, if any.
pub(crate) fn decode(bytes: &[u8]) -> Result<(Samples, Option<Vec<u8>>), Fault> {
    if !has_end(bytes) {
        return Err(Fault::new(Reason::Broken, "truncated: the marker of its end is missing"));
    }
    // Strictly, so that damage is an error and not a gray area; but stray bytes between headers harm nobody.
    match decode_with(bytes, true) {
        Err(fault) if fault.detail.contains("Extra bytes between headers") => decode_with(bytes, false),
        result => result,
    }
}

fn decode_with(bytes: &[u8], strict: bool) -> Result<(Samples, Option<Vec<u8>>), Fault> {
    let mut decoder = open(bytes, strict)?;
    let stored = decoder.input_colorspace().expect("the headers were decoded");
    let wanted = match stored {
        ColorSpace::Luma | ColorSpace::CMYK | ColorSpace::YCCK => stored,
        _ => ColorSpace::RGB,
    };
    decoder.set_options(options(strict).jpeg_set_out_colorspace(wanted));
    let values = decoder.decode().map_err(broken)?;
    let samples = match wanted {
        ColorSpace::Luma => Samples::Eight { channels: 1, values },
        ColorSpace::CMYK => Samples::Cmyk(ink_of_cmyk(values)),
        ColorSpace::YCCK => Samples::Cmyk(ink_of_ycck(values)),
        _ => Samples::Eight { channels: 3, values },
    };
    Ok((samples, decoder.icc_profile()))
}

fn open(bytes: &[u8], strict: bool) -> Result<Decoder<'_>, Fault> {
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options(strict));
    decoder.decode_headers().map_err(broken)?;
    Ok(decoder)
}

/// No limit on the sides: `image` has checked the number of pixels.
fn options(strict: bool) -> DecoderOptions {
    DecoderOptions::default().set_strict_mode(strict).set_max_width(usize::MAX).set_max_height(usize::MAX)
}

fn broken(error: DecodeErrors) -> Fault {
    Fault::new(Reason::Broken, format!("{error:?}"))
}

/// Photoshop, and after it everybody, stores CMYK inverted: 255 is no ink.
fn ink_of_cmyk(mut values: Vec<u8>) -> Vec<u8> {
    values.iter_mut().for_each(|v| *v = 255 - *v);
    values
}

/// YCCK is the YCbCr of 255 minus what CMYK would store, beside a black that is stored as CMYK's is.
fn ink_of_ycck(mut values: Vec<u8>) -> Vec<u8> {
    for pixel in values.chunks_exact_mut(4) {
        let [y, cb, cr] = [pixel[0], pixel[1], pixel[2]].map(f32::from);
        let (cb, cr) = (cb - 128.0, cr - 128.0);
        let rgb = [y + 1.402 * cr, y - 0.344_136 * cb - 0.714_136 * cr, y + 1.772 * cb];
        for (out, value) in pixel.iter_mut().zip(rgb) {
            *out = value.round().clamp(0.0, 255.0) as u8;
        }
        pixel[3] = 255 - pixel[3];
    }
    values
}

/// Whether the end-of-image marker follows the first scan. Inside a scan FF D9 cannot occur: FF is followed by 00 there.
fn has_end(bytes: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xda;
    let mut at = 2;
    while let Some(&[0xff, marker]) = bytes.get(at..at + 2) {
        match marker {
            START_OF_SCAN => return bytes[at..].windows(2).any(|pair| pair == [0xff, 0xd9]),
            // A fill byte, or a marker without a length.
            0xff => at += 1,
            0x01 | 0xd0..=0xd9 => at += 2,
            _ => match bytes.get(at + 2..at + 4) {
                Some(&[high, low]) => at += 2 + usize::from(u16::from_be_bytes([high, low])),
                _ => return false,
            },
        }
    }
    // Stray bytes between the headers: the decoder will say whether it minds.
    bytes[at.min(bytes.len())..].windows(2).any(|pair| pair == [0xff, 0xd9])
}
