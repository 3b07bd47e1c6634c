//! A picture's file to the numbers that a model takes.

use half::f16;
use rectiflow_data::{picture::workspace::Workspace, reject::Fault};
use serde::{Deserialize, Serialize};

pub use crate::onnx::resample::{Filter, Fit};
use crate::onnx::{
    input::{Element, Input, Layout},
    resample::Fitter,
};

/// The order of the channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Channels {
    /// Red first.
    Rgb,
    /// Blue first, as OpenCV reads pictures.
    Bgr,
}

impl Channels {
    /// Both, with the names that users write.
    pub const ALL: [(&'static str, Self); 2] = [("rgb", Self::Rgb), ("bgr", Self::Bgr)];
}

/// How a picture becomes the input of a model: fitted, and each value `(scale * v - mean) / std`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Preparation {
    /// What happens to pictures of another shape.
    pub fit: Fit,
    /// The part of a side that stays of a crop, above 0 to 1; 0.875 resizes to 256 for 224.
    pub crop_share: f64,
    /// The filter of the resize.
    pub filter: Filter,
    /// The order of the channels.
    pub channels: Channels,
    /// Factor of values, which are 0 to 255.
    pub scale: f32,
    /// Subtracted after that, in the order of the model's channels.
    pub mean: [f32; 3],
    /// Divisor after that, in the order of the model's channels.
    pub std: [f32; 3],
}

/// Usual preparations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// WD taggers: padded, bicubic, blue first, 0 to 255.
    Wd,
    /// ImageNet's mean and deviation; a crop, bicubic.
    Imagenet,
    /// CLIP's mean and deviation; a crop, bicubic.
    Clip,
    /// -1 to 1, stretched, bicubic: SigLIP.
    Siglip,
    /// 0 to 1, stretched, bicubic.
    Unit,
}

impl Preset {
    /// All, with the names that users write.
    pub const ALL: [(&'static str, Self); 5] = [
        ("wd", Self::Wd),
        ("imagenet", Self::Imagenet),
        ("clip", Self::Clip),
        ("siglip", Self::Siglip),
        ("unit", Self::Unit),
    ];

    /// The preparation.
    pub fn preparation(self) -> Preparation {
        let unit = Preparation {
            fit: Fit::Stretch,
            crop_share: 1.0,
            filter: Filter::Bicubic,
            channels: Channels::Rgb,
            scale: 1.0 / 255.0,
            mean: [0.0; 3],
            std: [1.0; 3],
        };
        match self {
            Self::Unit => unit,
            Self::Wd => Preparation {
                fit: Fit::Pad,
                channels: Channels::Bgr,
                scale: 1.0,
                ..unit
            },
            Self::Imagenet => Preparation {
                fit: Fit::Crop,
                mean: [0.485, 0.456, 0.406],
                std: [0.229, 0.224, 0.225],
                ..unit
            },
            Self::Clip => Preparation {
                fit: Fit::Crop,
                mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
                std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
                ..unit
            },
            Self::Siglip => Preparation {
                mean: [0.5; 3],
                std: [0.5; 3],
                ..unit
            },
        }
    }
}

impl Preparation {
    /// What cannot work. None if all can.
    pub fn problem(&self) -> Option<String> {
        let is_share = self.crop_share > 0.1 && self.crop_share <= 1.0;
        if !is_share {
            return Some(format!("crop share {}: must be 0.1 to 1", self.crop_share));
        }
        if self.fit == Fit::Pad && self.crop_share < 1.0 {
            return Some("a padded picture is not cropped: its crop share is 1".to_owned());
        }
        let numbers = self.mean.iter().chain(&self.std).chain([&self.scale]);
        let are_finite = numbers.into_iter().all(|number| number.is_finite());
        if !are_finite || self.scale == 0.0 || self.std.contains(&0.0) {
            return Some("scale and std must not be 0, and all numbers finite".to_owned());
        }
        None
    }

    /// The value of each byte in each channel of the model.
    fn values(&self) -> [[f32; 256]; 3] {
        let mut values = [[0.0; 256]; 3];
        for (channel, values) in values.iter_mut().enumerate() {
            for (byte, value) in values.iter_mut().enumerate() {
                *value = (byte as f32 * self.scale - self.mean[channel]) / self.std[channel];
            }
        }
        values
    }
}

/// The elements of a batch, of the type that the model takes.
#[derive(Debug, Clone, PartialEq)]
pub enum Elements {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 16-bit floats.
    F16(Vec<f16>),
    /// Bytes.
    U8(Vec<u8>),
}

/// Opens files for one model.
#[derive(Debug)]
pub struct Preparer {
    preparation: Preparation,
    /// Width and height in pixels.
    size: (u32, u32),
    layout: Layout,
    values: [[f32; 256]; 3],
}

/// The memory that a thread keeps.
#[derive(Debug, Default)]
pub struct Memory {
    workspace: Workspace,
    fitter: Fitter,
}

/// Most pixels of a picture.
const MAX_PIXELS: u64 = 1 << 28;
/// Behind transparent pixels.
const BACKGROUND: [u8; 3] = [255; 3];

impl Preparer {
    /// For a model with this input.
    pub fn new(preparation: Preparation, input: &Input) -> Self {
        Self {
            preparation,
            size: (input.width_px, input.height_px),
            layout: input.layout,
            values: preparation.values(),
        }
    }

    /// The fitted pixels of a file, `[h, w, 3]`, red first.
    ///
    /// # Errors
    /// Why it is no picture.
    pub fn pixels(&self, bytes: &[u8], memory: &mut Memory) -> Result<Vec<u8>, Fault> {
        let decoded = memory.workspace.decode(bytes, MAX_PIXELS, BACKGROUND)?;
        let settings = &self.preparation;
        let settings = (settings.fit, settings.crop_share, settings.filter);
        let pixels = memory.fitter.fit(&decoded.picture, self.size, settings);
        memory.workspace.keep(decoded.picture);
        Ok(pixels)
    }

    /// Elements of one picture.
    fn elements(&self) -> usize {
        3 * self.size.0 as usize * self.size.1 as usize
    }

    /// Makes `elements` those of `num_slots` pictures, of which the first have these pixels and the
    /// others are zeros.
    pub fn fill(&self, pictures: &[Vec<u8>], num_slots: usize, elements: &mut Elements) {
        match elements {
            Elements::F32(out) => self.fill_with(pictures, num_slots, out, |value| value),
            Elements::F16(out) => self.fill_with(pictures, num_slots, out, f16::from_f32),
            // Bytes are what the model scales itself.
            Elements::U8(out) => self.fill_with(pictures, num_slots, out, |value| value as u8),
        }
    }

    fn fill_with<T: Copy + Default + Send + Sync>(
        &self,
        pictures: &[Vec<u8>],
        num_slots: usize,
        out: &mut Vec<T>,
        convert: fn(f32) -> T,
    ) {
        use rayon::prelude::*;
        let table = self.values.map(|values| values.map(convert));
        let length = self.elements();
        if out.len() != num_slots * length {
            out.clear();
            out.resize(num_slots * length, T::default());
        }
        let (used, unused) = out.split_at_mut(pictures.len() * length);
        unused.fill(T::default());
        used.par_chunks_exact_mut(length)
            .zip(pictures)
            .for_each(|(slot, pixels)| self.write(pixels, &table, slot));
    }

    /// Writes one picture in the model's layout and order of channels.
    fn write<T: Copy>(&self, pixels: &[u8], table: &[[T; 256]; 3], slot: &mut [T]) {
        let from = match self.preparation.channels {
            Channels::Rgb => [0, 1, 2],
            Channels::Bgr => [2, 1, 0],
        };
        match self.layout {
            Layout::Nhwc => {
                for (out, pixel) in slot.chunks_exact_mut(3).zip(pixels.chunks_exact(3)) {
                    for channel in 0..3 {
                        out[channel] = table[channel][usize::from(pixel[from[channel]])];
                    }
                }
            }
            Layout::Nchw => {
                let plane_length = pixels.len() / 3;
                let planes = slot.chunks_exact_mut(plane_length).enumerate();
                for (channel, plane) in planes {
                    let values = &table[channel];
                    let channel_bytes = pixels[from[channel]..].iter().step_by(3);
                    for (out, &byte) in plane.iter_mut().zip(channel_bytes) {
                        *out = values[usize::from(byte)];
                    }
                }
            }
        }
    }
}

impl Elements {
    /// Replaces them by `length` zeros.
    pub(crate) fn clear_to(&mut self, length: usize) {
        match self {
            Self::F32(values) => *values = vec![0.0; length],
            Self::F16(values) => *values = vec![f16::ZERO; length],
            Self::U8(values) => *values = vec![0; length],
        }
    }

    /// No elements of a type.
    pub(crate) fn empty(element: Element) -> Self {
        match element {
            Element::F32 => Self::F32(Vec::new()),
            Element::F16 => Self::F16(Vec::new()),
            Element::U8 => Self::U8(Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(layout: Layout) -> Input {
        Input {
            name: "x".to_owned(),
            layout,
            element: Element::F32,
            width_px: 2,
            height_px: 1,
            batch: 2,
            is_fixed: false,
        }
    }

    fn filled(preparation: Preparation, layout: Layout, num_slots: usize) -> Vec<f32> {
        let preparer = Preparer::new(preparation, &input(layout));
        let mut elements = Elements::F32(vec![7.0; 100]);
        preparer.fill(&[vec![10, 20, 30, 40, 50, 60]], num_slots, &mut elements);
        match elements {
            Elements::F32(values) => values,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn values_go_where_the_model_looks() {
        let raw = Preparation {
            scale: 1.0,
            ..Preset::Unit.preparation()
        };
        let expected = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0];
        assert_eq!(filled(raw, Layout::Nhwc, 1), expected);
        let expected = [10.0, 40.0, 20.0, 50.0, 30.0, 60.0];
        assert_eq!(filled(raw, Layout::Nchw, 1), expected);
        let expected = [
            30.0, 20.0, 10.0, 60.0, 50.0, 40.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
        ];
        assert_eq!(filled(Preset::Wd.preparation(), Layout::Nhwc, 2), expected);
        let shifted = Preparation {
            mean: [10.0, 0.0, 20.0],
            std: [1.0, 2.0, 0.5],
            channels: Channels::Bgr,
            ..raw
        };
        let expected = [20.0, 50.0, 10.0, 25.0, -20.0, 40.0];
        assert_eq!(filled(shifted, Layout::Nchw, 1), expected);
    }

    #[test]
    fn other_types_have_the_same_values() {
        let preparer = Preparer::new(Preset::Wd.preparation(), &input(Layout::Nhwc));
        let pixels = [vec![1, 2, 255, 4, 5, 6]];
        let mut bytes = Elements::empty(Element::U8);
        preparer.fill(&pixels, 1, &mut bytes);
        assert_eq!(bytes, Elements::U8(vec![255, 2, 1, 6, 5, 4]));
        let mut halves = Elements::empty(Element::F16);
        preparer.fill(&pixels, 1, &mut halves);
        let expected = [255.0, 2.0, 1.0, 6.0, 5.0, 4.0].map(f16::from_f32);
        assert_eq!(halves, Elements::F16(expected.to_vec()));
    }

    #[test]
    fn impossible_preparations_are_named() {
        let good = Preset::Imagenet.preparation();
        assert_eq!(good.problem(), None);
        for (bad, expected) in [
            (
                Preparation {
                    crop_share: 0.0,
                    ..good
                },
                "crop share 0",
            ),
            (
                Preparation {
                    crop_share: f64::NAN,
                    ..good
                },
                "crop share NaN",
            ),
            (
                Preparation {
                    fit: Fit::Pad,
                    crop_share: 0.9,
                    ..good
                },
                "not cropped",
            ),
            (
                Preparation {
                    std: [1.0, 0.0, 1.0],
                    ..good
                },
                "must not be 0",
            ),
            (
                Preparation {
                    mean: [f32::INFINITY; 3],
                    ..good
                },
                "finite",
            ),
        ] {
            let problem = bad.problem().unwrap();
            assert!(problem.contains(expected), "{problem}");
        }
    }
}
