//! JPEG XL by the crate `jxl` (0.8, by the authors of the format): still pictures, and the first
//! frame of others. The decoder applies the orientation and returns straight alpha.
//!
//! Pictures with more than 8 bits are decoded to 16. CMYK is refused.

use jxl::api::{
    AlphaMode, Event, ExtraChannel, JxlBasicInfo, JxlColorProfile, JxlColorType, JxlDataFormat,
    JxlDecoder, JxlDecoderOptions, JxlOutputBuffer, JxlPixelFormat,
};
use zerocopy::IntoBytes;

use crate::{
    picture::colour::Samples,
    reject::{Fault, Reason},
};

/// Samples a pixel may have: colours, alpha and a few extra channels.
const MAX_CHANNELS: u64 = 8;

/// Whether these are the first bytes of a JPEG XL file: a codestream or a container.
pub(crate) fn is_jpeg_xl(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xff, 0x0a]) || bytes.starts_with(b"\0\0\0\x0cJXL ")
}

/// The picture, upright.
pub(crate) struct JpegXl {
    pub(crate) samples: Samples,
    pub(crate) profile: Option<Vec<u8>>,
}

/// A file whose header is read.
pub(crate) struct Opened<'a> {
    decoder: JxlDecoder,
    rest: &'a [u8],
    /// Width and height in pixels, upright.
    pub(crate) size: (u32, u32),
}

impl<'a> Opened<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// The file's fault.
    pub(crate) fn new(bytes: &'a [u8], max_pixels: u64) -> Result<Self, Fault> {
        let mut options = JxlDecoderOptions::default();
        options.alpha_mode = AlphaMode::Unpremultiplied;
        // Pictures of more than max_pixels are refused by their header; this bounds the frames.
        let limit = usize::try_from(max_pixels.saturating_mul(MAX_CHANNELS));
        options.sample_limit = limit.ok();
        let mut opened = Self {
            decoder: JxlDecoder::new(options),
            rest: bytes,
            size: (0, 0),
        };
        opened.until(Event::BasicInfo, None)?;
        let (width, height) = opened.info()?.size;
        let side = |px: usize| u32::try_from(px).map_err(|error| broken(error.to_string()));
        opened.size = (side(width)?, side(height)?);
        Ok(opened)
    }

    /// Decodes the first frame. Samples of 8 bits are decoded into `memory`.
    ///
    /// # Errors
    /// The file's fault.
    pub(crate) fn decode(mut self, memory: Vec<u8>) -> Result<JpegXl, Fault> {
        let info = self.info()?;
        let is_deep = info.bit_depth.bits_per_sample() > 8;
        let color_type = color_type(info, self.decoder.embedded_color_profile())?;
        let format = JxlPixelFormat {
            color_type,
            color_data_format: Some(match is_deep {
                true => JxlPixelFormat::rgb16(0)
                    .color_data_format
                    .expect("it has one"),
                false => JxlDataFormat::U8 { bit_depth: 8 },
            }),
            extra_channel_format: vec![None; info.extra_channels.len()],
        };
        let format = self.decoder.set_pixel_format(format);
        format.map_err(|error| broken(error.to_string()))?;

        let channels = color_type.samples_per_pixel();
        let (width, height) = (self.size.0 as usize, self.size.1 as usize);
        let num_samples = width * height * channels;
        let samples = if is_deep {
            let mut values = vec![0u16; num_samples];
            self.frame(values.as_mut_bytes(), height, 2 * channels * width)?;
            Samples::sixteen(channels, values)
        } else {
            let mut values = memory;
            values.clear();
            values.resize(num_samples, 0);
            self.frame(&mut values, height, channels * width)?;
            Samples::eight(channels, values)
        };
        let profile = self.decoder.output_color_profile();
        let profile = profile.and_then(JxlColorProfile::try_as_icc);
        Ok(JpegXl {
            samples,
            profile: profile.map(|icc| icc.into_owned()),
        })
    }

    fn info(&self) -> Result<&JxlBasicInfo, Fault> {
        let info = self.decoder.basic_info();
        info.ok_or_else(|| broken("it has no header".to_owned()))
    }

    /// Decodes the first frame into `pixels`.
    fn frame(&mut self, pixels: &mut [u8], num_rows: usize, row_bytes: usize) -> Result<(), Fault> {
        self.until(Event::FrameHeader, None)?;
        let buffer = JxlOutputBuffer::new(pixels, num_rows, row_bytes);
        let complete = Event::FrameComplete {
            has_more_frames: false,
        };
        self.until(complete, Some(&mut [buffer]))
    }

    /// Reads on until an event, of a frame whether or not others follow.
    fn until(
        &mut self,
        wanted: Event,
        mut pixels: Option<&mut [JxlOutputBuffer<'_>]>,
    ) -> Result<(), Fault> {
        loop {
            let buffers = pixels.as_deref_mut();
            let event = self.decoder.process(&mut self.rest, buffers, None);
            match event.map_err(|error| broken(error.to_string()))? {
                event if event == wanted => return Ok(()),
                Event::FrameComplete { .. } if matches!(wanted, Event::FrameComplete { .. }) => {
                    return Ok(());
                }
                Event::NeedMoreInput { .. } => {
                    return Err(broken("it ends in the middle".to_owned()));
                }
                Event::Complete => return Err(broken("it has no frame".to_owned())),
                _ => {}
            }
        }
    }
}

/// The channels to decode to.
fn color_type(
    info: &JxlBasicInfo,
    profile: Option<&JxlColorProfile>,
) -> Result<JxlColorType, Fault> {
    let mut extra = info.extra_channels.iter();
    if profile.is_some_and(JxlColorProfile::is_cmyk) {
        let detail = "JPEG XL in CMYK is not supported: convert it to RGB";
        return Err(Fault::new(Reason::UnsupportedFormat, detail));
    }
    let has_alpha = extra.any(|channel| channel.ec_type == ExtraChannel::Alpha);
    let is_gray = profile.is_some_and(|profile| profile.channels() == 1);
    Ok(match (is_gray, has_alpha) {
        (true, false) => JxlColorType::Grayscale,
        (true, true) => JxlColorType::GrayscaleAlpha,
        (false, false) => JxlColorType::Rgb,
        (false, true) => JxlColorType::Rgba,
    })
}

fn broken(reason: String) -> Fault {
    Fault::new(Reason::Broken, reason)
}

#[cfg(test)]
mod tests {
    use crate::{
        picture::decode::{decode, inspect},
        reject::Reason,
    };

    const MAX: u64 = 1 << 20;

    /// A file and its pixels as PNG (`scripts/golden/jpeg_xl.py`).
    macro_rules! golden {
        ($name:literal) => {
            (
                $name,
                include_bytes!(concat!("../../tests/golden/jxl/", $name, ".jxl")).as_slice(),
                include_bytes!(concat!("../../tests/golden/jxl/", $name, ".png")).as_slice(),
            )
        };
    }

    #[test]
    fn pictures_are_those_of_the_reference_decoder() {
        let all = [
            golden!("lossless"),
            golden!("alpha"),
            golden!("gray"),
            golden!("profile"),
            golden!("deep"),
            golden!("lossy"),
            golden!("turned"),
        ];
        for (name, bytes, png) in all {
            let background = [250, 128, 3];
            let found = decode(bytes, MAX, background).unwrap();
            let expected = decode(png, MAX, background).unwrap().picture;
            let header = inspect(bytes, MAX).unwrap();
            let size = (header.width_px, header.height_px);
            assert_eq!(size, (expected.width_px(), expected.height_px()), "{name}");
            assert_eq!(found.note, None, "{name}");
            let pairs = found.picture.pixels().iter().zip(expected.pixels());
            let differences: Vec<u8> = pairs.map(|(&a, &b)| a.abs_diff(b)).collect();
            let largest = differences.iter().copied().max().unwrap();
            // Two decoders round a lossy picture differently.
            let most = if matches!(name, "lossy" | "turned") {
                2
            } else {
                0
            };
            assert!(largest <= most, "{name}: {largest}");
            assert_eq!(found.picture.pixels().len(), expected.pixels().len());
        }
    }

    #[test]
    fn damaged_and_too_large_files_are_faults() {
        let (_, bytes, _) = golden!("lossy");
        for end in 0..bytes.len() {
            let fault = decode(&bytes[..end], MAX, [0; 3]).unwrap_err();
            let expected = match end {
                0 => Reason::Empty,
                1 => Reason::NotAnImage,
                _ => Reason::Broken,
            };
            assert_eq!(fault.reason, expected, "{end}: {fault:?}");
        }
        let fault = inspect(bytes, 40 * 24 - 1).unwrap_err();
        assert_eq!(fault.reason, Reason::TooManyPixels);
        for place in 2..bytes.len() {
            let mut damaged = bytes.to_vec();
            damaged[place] ^= 0x55;
            // Either is right; neither a crash nor an endless loop.
            let _ = decode(&damaged, MAX, [0; 3]);
        }
    }
}
