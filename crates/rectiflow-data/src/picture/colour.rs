//! Samples of any depth and number of channels, with or without an ICC profile, to 8-bit sRGB with
//! alpha.
//!
//! A profile is used if it describes the samples. One that is broken or describes something else is
//! ignored, with a note: most such files are sRGB with a wrong profile. Without a profile RGB and
//! gray are taken as sRGB, and CMYK is converted as (1 - c)(1 - k).

use std::borrow::Cow;

use moxcms::{CmsError, ColorProfile, DataColorSpace, Layout, TransformExecutor, TransformOptions};

use crate::{
    picture::srgb_profile::ComparedProfiles,
    reject::{Fault, Reason},
};

/// Decoded samples, channels interleaved: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha; or CMYK
/// ink.
pub(crate) enum Samples {
    /// 8 bits per sample.
    Eight {
        /// 1 to 4.
        channels: usize,
        /// `channels` values per pixel.
        values: Vec<u8>,
    },
    /// 16 bits per sample.
    Sixteen {
        /// 1 to 4.
        channels: usize,
        /// `channels` values per pixel.
        values: Vec<u16>,
    },
    /// Four amounts of ink per pixel: 0 is none, 255 is full.
    Cmyk(Vec<u8>),
}

impl Samples {
    /// 8-bit samples, `channels` per pixel.
    pub(crate) fn eight(channels: usize, values: Vec<u8>) -> Self {
        Self::Eight { channels, values }
    }

    /// 16-bit samples, `channels` per pixel.
    pub(crate) fn sixteen(channels: usize, values: Vec<u16>) -> Self {
        Self::Sixteen { channels, values }
    }
}

/// Pixels in sRGB, three or four bytes each.
pub(crate) struct Srgb {
    alpha: bool,
    values: Vec<u8>,
}

impl Srgb {
    /// The pixels `[h, w, 3]`, composed on a background colour.
    pub(crate) fn compose(self, background: [u8; 3]) -> Vec<u8> {
        if !self.alpha {
            return self.values;
        }
        // In place: a pixel is read before it is overwritten by one that comes earlier.
        let mut values = self.values;
        let num_pixels = values.len() / 4;
        for at in 0..num_pixels {
            let [red, green, blue, alpha] = [0, 1, 2, 3].map(|channel| values[4 * at + channel]);
            let mut pixel = [red, green, blue];
            if alpha < 255 {
                pixel = over(pixel, alpha, background);
            }
            values[3 * at..3 * at + 3].copy_from_slice(&pixel);
        }
        values.truncate(3 * num_pixels);
        values
    }
}

/// A pixel on a background, composed on encoded values as in browsers and image editors.
fn over(pixel: [u8; 3], alpha: u8, background: [u8; 3]) -> [u8; 3] {
    let alpha = u32::from(alpha);
    let mut composed = background;
    for (under, over) in composed.iter_mut().zip(pixel) {
        let sum = u32::from(over) * alpha + u32::from(*under) * (255 - alpha);
        *under = ((sum + 127) / 255) as u8;
    }
    composed
}

/// Converts samples to sRGB, by their profile if it is usable. The note says why it is not. A
/// profile that equals sRGB changes nothing, so the samples of one stay as they are.
pub(crate) fn to_srgb(
    samples: Samples,
    profile: Option<&[u8]>,
    compared: &mut ComparedProfiles,
) -> (Srgb, Option<Fault>) {
    let Some(profile) = profile else {
        return (plain(samples), None);
    };
    if !matches!(samples, Samples::Cmyk(_)) && compared.equals_srgb(profile) {
        return (plain(samples), None);
    }
    let note = match ColorProfile::new_from_slice(profile) {
        Err(error) => format!("its colour profile is broken ({error}): taken as sRGB"),
        Ok(profile) => match by_profile(&samples, &profile) {
            Ok(srgb) => return (srgb, None),
            Err(why) => format!("its colour profile cannot be used ({why}): taken as sRGB"),
        },
    };
    (
        plain(samples),
        Some(Fault::new(Reason::IgnoredProfile, note)),
    )
}

fn plain(samples: Samples) -> Srgb {
    match samples {
        Samples::Eight { channels, values } => Srgb {
            alpha: matches!(channels, 2 | 4),
            values: match channels {
                1 => gray_to_rgb(&values),
                2 => gray_to_rgba(&values),
                _ => values,
            },
        },
        Samples::Sixteen { channels, values } => plain(Samples::Eight {
            channels,
            values: eight_bits(&values),
        }),
        Samples::Cmyk(ink) => Srgb {
            alpha: false,
            values: rgb_of_ink(&ink),
        },
    }
}

/// The light that four inks per pixel leave: (1 - c)(1 - k).
fn rgb_of_ink(ink: &[u8]) -> Vec<u8> {
    let mut rgb = Vec::with_capacity(ink.len() / 4 * 3);
    for pixel in ink.chunks_exact(4) {
        let black = 255 - u32::from(pixel[3]);
        for &ink in &pixel[..3] {
            rgb.push((((255 - u32::from(ink)) * black + 127) / 255) as u8);
        }
    }
    rgb
}

/// Gray values as equal parts of red, green and blue.
fn gray_to_rgb<T: Copy>(values: &[T]) -> Vec<T> {
    values.iter().flat_map(|&v| [v; 3]).collect()
}

/// Pairs of gray and alpha as red, green, blue and alpha.
fn gray_to_rgba<T: Copy>(values: &[T]) -> Vec<T> {
    let mut rgba = Vec::with_capacity(values.len() * 2);
    for pixel in values.chunks_exact(2) {
        rgba.extend([pixel[0], pixel[0], pixel[0], pixel[1]]);
    }
    rgba
}

/// Rounds 16-bit values to 8 bits: 65535 / 255 = 257.
fn eight_bits(values: &[u16]) -> Vec<u8> {
    values
        .iter()
        .map(|&v| ((u32::from(v) + 128) / 257) as u8)
        .collect()
}

/// Converts samples by a profile. The error says why that is not possible.
fn by_profile(samples: &Samples, profile: &ColorProfile) -> Result<Srgb, String> {
    let srgb = ColorProfile::new_srgb();
    let options = TransformOptions::default();
    let layouts = Layouts::of(samples, profile.color_space)?;
    let values = match samples {
        Samples::Eight { values, .. } => {
            let transform = profile.create_transform_8bit(layouts.from, &srgb, layouts.to, options);
            layouts.run(&*transform.map_err(message)?, values)?
        }
        Samples::Sixteen { values, .. } => {
            let transform =
                profile.create_transform_16bit(layouts.from, &srgb, layouts.to, options);
            eight_bits(&layouts.run(&*transform.map_err(message)?, values)?)
        }
        Samples::Cmyk(ink) => {
            let transform = profile.create_transform_8bit(layouts.from, &srgb, layouts.to, options);
            layouts.run(&*transform.map_err(message)?, ink)?
        }
    };
    Ok(Srgb {
        alpha: layouts.to == Layout::Rgba,
        values,
    })
}

/// The channels of the samples, and of a transform's source and target.
struct Layouts {
    channels: usize,
    from: Layout,
    to: Layout,
}

impl Layouts {
    /// The layouts for samples and a profile of `space`.
    fn of(samples: &Samples, space: DataColorSpace) -> Result<Self, String> {
        let channels = match samples {
            Samples::Eight { channels, .. } | Samples::Sixteen { channels, .. } => *channels,
            // The four inks use the layout of four channels.
            Samples::Cmyk(_) if space == DataColorSpace::Cmyk => {
                return Ok(Self {
                    channels: 4,
                    from: Layout::Rgba,
                    to: Layout::Rgb,
                });
            }
            Samples::Cmyk(_) => return Err(mismatch(space, "CMYK")),
        };
        let (from, to) = match (channels, space) {
            (1, DataColorSpace::Gray) => (Layout::Gray, Layout::Rgb),
            (2, DataColorSpace::Gray) => (Layout::GrayAlpha, Layout::Rgba),
            // Gray pixels with an RGB profile are equal parts of its red, green and blue.
            (1 | 3, DataColorSpace::Rgb) => (Layout::Rgb, Layout::Rgb),
            (2 | 4, DataColorSpace::Rgb) => (Layout::Rgba, Layout::Rgba),
            (1 | 2, _) => return Err(mismatch(space, "gray")),
            _ => return Err(mismatch(space, "RGB")),
        };
        Ok(Self { channels, from, to })
    }

    /// Transforms samples of these channels.
    fn run<T: Copy + Default>(
        &self,
        transform: &dyn TransformExecutor<T>,
        samples: &[T],
    ) -> Result<Vec<T>, String> {
        let source = widened(samples, self.channels, self.from);
        let num_pixels = source.len() / num_channels(self.from);
        let mut out = vec![T::default(); num_pixels * num_channels(self.to)];
        transform.transform(&source, &mut out).map_err(message)?;
        Ok(out)
    }
}

fn mismatch(space: DataColorSpace, what: &str) -> String {
    format!("it describes {space:?}, the image is {what}")
}

fn message(error: CmsError) -> String {
    error.to_string()
}

fn num_channels(layout: Layout) -> usize {
    match layout {
        Layout::Gray => 1,
        Layout::GrayAlpha => 2,
        Layout::Rgb => 3,
        _ => 4,
    }
}

/// The samples; gray ones as RGB if the profile describes RGB.
fn widened<T: Copy>(values: &[T], channels: usize, layout: Layout) -> Cow<'_, [T]> {
    match (channels, layout) {
        (1, Layout::Rgb) => gray_to_rgb(values).into(),
        (2, Layout::Rgba) => gray_to_rgba(values).into(),
        _ => values.into(),
    }
}
