//! Samples of any depth and number of channels, with or without an ICC profile, to 8-bit sRGB with
//! alpha.
//!
//! A profile is used if it describes the samples. One that is broken or describes something else is
//! ignored, with a note: most such files are sRGB with a wrong profile. Without a profile RGB and
//! gray are taken as sRGB, and CMYK is converted as (1 - c)(1 - k).

use moxcms::{ColorProfile, DataColorSpace, Layout, TransformOptions};

use crate::reject::{Fault, Reason};

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
        let mut opaque = Vec::with_capacity(self.values.len() / 4 * 3);
        for pixel in self.values.chunks_exact(4) {
            let alpha = u32::from(pixel[3]);
            for (&over, &under) in pixel.iter().zip(&background) {
                // On encoded values, as in browsers and image editors.
                opaque.push(
                    ((u32::from(over) * alpha + u32::from(under) * (255 - alpha) + 127) / 255)
                        as u8,
                );
            }
        }
        opaque
    }
}

/// Converts samples to sRGB, by their profile if it is usable. The note says why it is not.
pub(crate) fn to_srgb(samples: Samples, profile: Option<&[u8]>) -> (Srgb, Option<Fault>) {
    let Some(profile) = profile else {
        return (plain(samples), None);
    };
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
        Samples::Eight {
            channels: 1,
            values,
        } => spread(values, |v| [v; 3]),
        Samples::Eight {
            channels: 2,
            values,
        } => {
            let values = values
                .chunks_exact(2)
                .flat_map(|p| [p[0], p[0], p[0], p[1]])
                .collect();
            Srgb {
                alpha: true,
                values,
            }
        }
        Samples::Eight { channels, values } => Srgb {
            alpha: channels == 4,
            values,
        },
        Samples::Sixteen { channels, values } => plain(Samples::Eight {
            channels,
            values: eight_bits(&values),
        }),
        Samples::Cmyk(ink) => {
            let light = |ink: u8, black: u8| {
                ((255 - u32::from(ink)) * (255 - u32::from(black)) + 127) / 255
            };
            let values = ink
                .chunks_exact(4)
                .flat_map(|p| [p[0], p[1], p[2]].map(|ink| light(ink, p[3]) as u8));
            Srgb {
                alpha: false,
                values: values.collect(),
            }
        }
    }
}

fn spread(values: Vec<u8>, to_rgb: impl Fn(u8) -> [u8; 3]) -> Srgb {
    Srgb {
        alpha: false,
        values: values.into_iter().flat_map(to_rgb).collect(),
    }
}

/// Rounds 16-bit values to 8 bits: 65535 / 255 = 257.
fn eight_bits(values: &[u16]) -> Vec<u8> {
    values
        .iter()
        .map(|&v| ((u32::from(v) + 128) / 257) as u8)
        .collect()
}

fn by_profile(samples: &Samples, profile: &ColorProfile) -> Result<Srgb, String> {
    let (space, srgb, options) = (
        profile.color_space,
        ColorProfile::new_srgb(),
        TransformOptions::default(),
    );
    let mismatch = |what: &str| format!("it describes {space:?}, the image is {what}");
    let layouts = |channels: usize| match (channels, space) {
        (1, DataColorSpace::Gray) => Ok((Layout::Gray, Layout::Rgb)),
        (2, DataColorSpace::Gray) => Ok((Layout::GrayAlpha, Layout::Rgba)),
        // Gray pixels with an RGB profile are equal parts of its red, green and blue.
        (1 | 3, DataColorSpace::Rgb) => Ok((Layout::Rgb, Layout::Rgb)),
        (2 | 4, DataColorSpace::Rgb) => Ok((Layout::Rgba, Layout::Rgba)),
        (1 | 2, _) => Err(mismatch("gray")),
        _ => Err(mismatch("RGB")),
    };
    match samples {
        Samples::Eight { channels, values } => {
            let (from, to) = layouts(*channels)?;
            let transform = profile
                .create_transform_8bit(from, &srgb, to, options)
                .map_err(|e| e.to_string())?;
            let source = widened(values, *channels, from);
            let mut out = vec![0; source.len() / num_channels(from) * num_channels(to)];
            transform
                .transform(&source, &mut out)
                .map_err(|e| e.to_string())?;
            Ok(Srgb {
                alpha: to == Layout::Rgba,
                values: out,
            })
        }
        Samples::Sixteen { channels, values } => {
            let (from, to) = layouts(*channels)?;
            let transform = profile
                .create_transform_16bit(from, &srgb, to, options)
                .map_err(|e| e.to_string())?;
            let source = widened(values, *channels, from);
            let mut out = vec![0; source.len() / num_channels(from) * num_channels(to)];
            transform
                .transform(&source, &mut out)
                .map_err(|e| e.to_string())?;
            Ok(Srgb {
                alpha: to == Layout::Rgba,
                values: eight_bits(&out),
            })
        }
        Samples::Cmyk(_) if space != DataColorSpace::Cmyk => Err(mismatch("CMYK")),
        Samples::Cmyk(ink) => {
            // The four inks use the layout of four channels.
            let transform =
                profile.create_transform_8bit(Layout::Rgba, &srgb, Layout::Rgb, options);
            let mut out = vec![0; ink.len() / 4 * 3];
            transform
                .and_then(|t| t.transform(ink, &mut out))
                .map_err(|e| e.to_string())?;
            Ok(Srgb {
                alpha: false,
                values: out,
            })
        }
    }
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
fn widened<T: Copy>(values: &[T], channels: usize, layout: Layout) -> Vec<T> {
    match (channels, layout) {
        (1, Layout::Rgb) => values.iter().flat_map(|&v| [v; 3]).collect(),
        (2, Layout::Rgba) => values
            .chunks_exact(2)
            .flat_map(|p| [p[0], p[0], p[0], p[1]])
            .collect(),
        _ => values.to_vec(),
    }
}
