//! Pictures as JPEGs of a limited size, for models behind a server.

use image::{ExtendedColorType, codecs::jpeg::JpegEncoder};
use rectiflow_data::{
    SampleId,
    bucket::{Bucket, ResizeSpace},
    crop::place,
    decode,
    picture::Picture,
    reject::{Fault, Reason},
    resize::fit,
};

/// How pictures are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JpegSettings {
    /// Longest side in pixels.
    pub max_side_px: u32,
    /// JPEG quality, 1 to 100.
    pub quality: u8,
    /// Most pixels of a file.
    pub max_pixels: u64,
    /// Colour behind transparent pixels.
    pub background: [u8; 3],
}

/// The JPEG of a file of any format. A JPEG that is upright and small enough stays as it is.
///
/// # Errors
/// The file's fault.
pub fn jpeg_of(bytes: Vec<u8>, settings: &JpegSettings) -> Result<Vec<u8>, Fault> {
    let header = decode::inspect(&bytes, settings.max_pixels)?;
    let longest = header.width_px.max(header.height_px);
    let is_jpeg = bytes.starts_with(&[0xff, 0xd8, 0xff]);
    if is_jpeg && longest <= settings.max_side_px && decode::is_upright(&bytes, settings.max_pixels)
    {
        return Ok(bytes);
    }
    let picture = decode::decode(&bytes, settings.max_pixels, settings.background)?.picture;
    encoded(&limited(picture, settings.max_side_px), settings.quality)
}

/// The picture, made smaller if its longer side is above `max_side_px`.
fn limited(picture: Picture, max_side_px: u32) -> Picture {
    let (width, height) = (picture.width_px(), picture.height_px());
    let longest = u64::from(width.max(height));
    if longest <= u64::from(max_side_px) {
        return picture;
    }
    let side = |px: u32| {
        let scaled = (u64::from(px) * u64::from(max_side_px) + longest / 2) / longest;
        scaled.max(1) as u32
    };
    let bucket = Bucket {
        width_px: side(width),
        height_px: side(height),
    };
    let placement = place(bucket, width, height, 0, SampleId(0));
    let pixels = fit(&picture, &placement, bucket, ResizeSpace::Gamma);
    Picture::new(bucket.width_px, bucket.height_px, pixels)
}

/// A picture as JPEG.
///
/// # Errors
/// A picture that no JPEG can hold: a side above 65535.
pub fn encoded(picture: &Picture, quality: u8) -> Result<Vec<u8>, Fault> {
    let mut jpeg = Vec::with_capacity(1 << 17);
    JpegEncoder::new_with_quality(&mut jpeg, quality)
        .encode(
            picture.pixels(),
            picture.width_px(),
            picture.height_px(),
            ExtendedColorType::Rgb8,
        )
        .map_err(|error| Fault::new(Reason::Broken, format!("no JPEG can be made: {error}")))?;
    Ok(jpeg)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: JpegSettings = JpegSettings {
        max_side_px: 64,
        quality: 90,
        max_pixels: 1 << 20,
        background: [255; 3],
    };

    fn size(jpeg: &[u8]) -> (u32, u32) {
        let header = decode::inspect(jpeg, 1 << 20).unwrap();
        (header.width_px, header.height_px)
    }

    #[test]
    fn large_pictures_shrink_and_small_jpegs_stay() {
        for (width, height, sent) in [
            (64, 32, (64, 32)),
            (128, 64, (64, 32)),
            (65, 65, (64, 64)),
            (30, 300, (6, 64)),
            (1, 640, (1, 64)),
        ] {
            let picture = Picture::filled(width, height, [200, 30, 40]);
            let jpeg = jpeg_of(picture.to_png(), &SETTINGS).unwrap();
            assert_eq!(size(&jpeg), sent, "{width}x{height}");
            let seen = decode::decode(&jpeg, 1 << 20, [0; 3])
                .unwrap()
                .picture
                .at(0, 0);
            let is_near = |(seen, drawn): (u8, u8)| seen.abs_diff(drawn) < 4;
            assert!(seen.into_iter().zip([200, 30, 40]).all(is_near), "{seen:?}");
        }
        let small = encoded(&Picture::filled(64, 64, [9; 3]), 50).unwrap();
        assert_eq!(jpeg_of(small.clone(), &SETTINGS).unwrap(), small);
        let fault = jpeg_of(b"no picture".to_vec(), &SETTINGS).unwrap_err();
        assert_eq!(fault.reason, Reason::NotAnImage);
    }
}
