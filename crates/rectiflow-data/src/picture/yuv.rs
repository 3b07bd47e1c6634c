//! Luma and chroma of any depth and subsampling to red, green and blue, by the formulas of ITU-T
//! H.273, in floating point and rounded once.
//!
//! Chroma of 4:2:0 and 4:2:2 is interpolated between the centres of its samples, as libavif's own
//! conversion does; where the file says that it lies elsewhere is ignored, as libavif ignores it.

use crate::{
    picture::{avif_items::Coding, colour::Samples},
    reject::{Fault, Reason},
};

/// How much smaller chroma is than luma.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Luma alone.
    Gray,
    /// Half the width and height.
    Half,
    /// Half the width.
    HalfWidth,
    /// The same.
    Full,
}

/// A picture in planes: luma is 0, chroma 1 and 2.
pub(crate) trait Planes {
    /// Width and height in pixels.
    fn size(&self) -> (usize, usize);

    /// Bits of a sample: 8, 10 or 12.
    fn bits(&self) -> u32;

    fn layout(&self) -> Layout;

    /// Puts a row of a plane into `row`.
    fn read_row(&self, plane: usize, y: usize, row: &mut Vec<u16>);
}

/// The opacity of a picture.
pub(crate) struct Alpha<P> {
    pub(crate) planes: P,
    pub(crate) is_full_range: bool,
    /// Whether the colours are multiplied by it.
    pub(crate) is_multiplied: bool,
}

/// How luma and chroma become colours.
#[derive(Debug, Clone, Copy)]
enum Matrix {
    /// Green, blue and red themselves.
    Identity,
    /// Luma, green and orange.
    GreenOrange,
    /// By the parts of red and blue in luma.
    Luma { red: f32, blue: f32 },
}

impl Matrix {
    /// The matrix of a picture.
    ///
    /// # Errors
    /// A fault that names what is not supported.
    fn of(coding: Coding, layout: Layout) -> Result<Self, Fault> {
        let (red, blue) = match coding.matrix {
            0 if matches!(layout, Layout::Full | Layout::Gray) => return Ok(Self::Identity),
            8 => return Ok(Self::GreenOrange),
            1 => (0.2126, 0.0722),
            4 => (0.30, 0.11),
            // BT.601, and pictures that do not say.
            2 | 5 | 6 => (0.299, 0.114),
            7 => (0.212, 0.087),
            9 => (0.2627, 0.0593),
            other => {
                let detail = format!(
                    "AVIF with the colour matrix {other} is not supported: convert it to PNG"
                );
                return Err(Fault::new(Reason::UnsupportedFormat, detail));
            }
        };
        Ok(Self::Luma { red, blue })
    }

    /// The colour of a pixel.
    fn rgb(self, y: f32, u: f32, v: f32) -> [f32; 3] {
        match self {
            Self::Identity => [v, y, u],
            Self::GreenOrange => [y - u + v, y + u, y - u - v],
            Self::Luma { red, blue } => {
                let green = 1.0 - red - blue;
                let from_u = 2.0 * (1.0 - blue) * u;
                let from_v = 2.0 * (1.0 - red) * v;
                [
                    y + from_v,
                    y - (blue * from_u + red * from_v) / green,
                    y + from_u,
                ]
            }
        }
    }
}

/// What samples are worth: value = (sample - zero) / span.
#[derive(Debug, Clone, Copy)]
struct Scale {
    zero: f32,
    span: f32,
}

impl Scale {
    fn luma(bits: u32, is_full_range: bool) -> Self {
        if is_full_range {
            let span = ((1 << bits) - 1) as f32;
            return Self { zero: 0.0, span };
        }
        let step = (1u32 << (bits - 8)) as f32;
        Self {
            zero: 16.0 * step,
            span: 219.0 * step,
        }
    }

    fn chroma(bits: u32, is_full_range: bool) -> Self {
        let span = match is_full_range {
            true => ((1 << bits) - 1) as f32,
            false => 224.0 * (1u32 << (bits - 8)) as f32,
        };
        let zero = (1u32 << (bits - 1)) as f32;
        Self { zero, span }
    }

    fn of(self, sample: f32) -> f32 {
        (sample - self.zero) / self.span
    }
}

/// Samples of 8 bits, into `memory`, for a picture of 8 bits, and of 16 bits for others.
///
/// # Errors
/// A fault that names what is not supported.
pub(crate) fn samples<P: Planes>(
    planes: &P,
    alpha: Option<&Alpha<P>>,
    coding: Coding,
    memory: Vec<u8>,
) -> Result<Samples, Fault> {
    let mut rows = Rows::new(planes, alpha, coding)?;
    let (width, height) = planes.size();
    let num_samples = width * height * rows.channels;
    if planes.bits() == 8 {
        let mut values = memory;
        values.clear();
        values.reserve_exact(num_samples);
        for y in 0..height {
            let row = rows.next(y);
            values.extend(row.iter().map(|&value| (value * 255.0 + 0.5) as u8));
        }
        return Ok(Samples::eight(rows.channels, values));
    }
    let mut values = Vec::with_capacity(num_samples);
    for y in 0..height {
        let row = rows.next(y);
        values.extend(row.iter().map(|&value| (value * 65535.0 + 0.5) as u16));
    }
    Ok(Samples::sixteen(rows.channels, values))
}

/// Makes the rows of a picture, channels interleaved, 0 to 1.
struct Rows<'a, P> {
    planes: &'a P,
    alpha: Option<&'a Alpha<P>>,
    matrix: Matrix,
    luma: Scale,
    chroma: Scale,
    channels: usize,
    /// Of a plane, as stored.
    stored: Vec<u16>,
    /// Chroma rows as wide as luma.
    wide: [Vec<f32>; 2],
    /// Of a plane of chroma.
    narrow: Vec<f32>,
    made: Vec<f32>,
}

impl<'a, P: Planes> Rows<'a, P> {
    fn new(planes: &'a P, alpha: Option<&'a Alpha<P>>, coding: Coding) -> Result<Self, Fault> {
        let layout = planes.layout();
        let matrix = Matrix::of(coding, layout)?;
        let bits = planes.bits();
        let is_full_range = coding.is_full_range;
        let colours = if layout == Layout::Gray { 1 } else { 3 };
        let luma = Scale::luma(bits, is_full_range);
        Ok(Self {
            planes,
            alpha,
            matrix,
            luma,
            chroma: match matrix {
                Matrix::Identity => luma,
                _ => Scale::chroma(bits, is_full_range),
            },
            channels: colours + usize::from(alpha.is_some()),
            stored: Vec::new(),
            wide: [Vec::new(), Vec::new()],
            narrow: Vec::new(),
            made: Vec::new(),
        })
    }

    /// The row `y`.
    fn next(&mut self, y: usize) -> &[f32] {
        self.made.clear();
        let is_gray = self.planes.layout() == Layout::Gray;
        if !is_gray {
            self.widen(1, y);
            self.widen(2, y);
        }
        self.planes.read_row(0, y, &mut self.stored);
        for (x, &sample) in self.stored.iter().enumerate() {
            let luma = self.luma.of(f32::from(sample));
            if is_gray {
                self.made.push(luma.clamp(0.0, 1.0));
            } else {
                let [u, v] = [self.wide[0][x], self.wide[1][x]];
                let rgb = self.matrix.rgb(luma, u, v);
                self.made.extend(rgb.map(|value| value.clamp(0.0, 1.0)));
            }
            if self.alpha.is_some() {
                self.made.push(1.0);
            }
        }
        if let Some(alpha) = self.alpha {
            self.put_alpha(alpha, y);
        }
        &self.made
    }

    /// Puts the opacity of a row beside its colours.
    fn put_alpha(&mut self, alpha: &Alpha<P>, y: usize) {
        let scale = Scale::luma(alpha.planes.bits(), alpha.is_full_range);
        alpha.planes.read_row(0, y, &mut self.stored);
        let pixels = self.made.chunks_exact_mut(self.channels);
        for (pixel, &sample) in pixels.zip(&self.stored) {
            let opacity = scale.of(f32::from(sample)).clamp(0.0, 1.0);
            let (own, colours) = pixel.split_last_mut().expect("it has a channel");
            *own = opacity;
            if alpha.is_multiplied && opacity > 0.0 {
                for colour in colours {
                    *colour = (*colour / opacity).min(1.0);
                }
            }
        }
    }

    /// Makes a chroma row as wide as luma.
    fn widen(&mut self, plane: usize, y: usize) {
        let (width, height) = self.planes.size();
        self.read_chroma(plane, y, height);
        let wide = &mut self.wide[plane - 1];
        wide.clear();
        if self.planes.layout() == Layout::Full {
            wide.extend_from_slice(&self.narrow);
            return;
        }
        let last = self.narrow.len() - 1;
        for x in 0..width {
            let near = self.narrow[x / 2];
            let far = self.narrow[neighbour(x, last)];
            wide.push(0.75 * near + 0.25 * far);
        }
    }

    /// Reads a chroma row for the row `y` of luma.
    fn read_chroma(&mut self, plane: usize, y: usize, height: usize) {
        let scale = self.chroma;
        let is_half = self.planes.layout() == Layout::Half;
        let own = if is_half { y / 2 } else { y };
        self.planes.read_row(plane, own, &mut self.stored);
        self.narrow.clear();
        let values = self.stored.iter();
        self.narrow
            .extend(values.map(|&sample| scale.of(f32::from(sample))));
        if !is_half {
            return;
        }
        let far = neighbour(y, height.div_ceil(2) - 1);
        self.planes.read_row(plane, far, &mut self.stored);
        for (value, &sample) in self.narrow.iter_mut().zip(&self.stored) {
            *value = 0.75 * *value + 0.25 * scale.of(f32::from(sample));
        }
    }
}

/// The second nearest of the samples 0 to `last`, each of which stands for two pixels.
fn neighbour(pixel: usize, last: usize) -> usize {
    if pixel.is_multiple_of(2) {
        (pixel / 2).saturating_sub(1)
    } else {
        (pixel / 2 + 1).min(last)
    }
}
