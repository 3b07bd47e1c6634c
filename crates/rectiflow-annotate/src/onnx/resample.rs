//! Pictures to the size of a model's input: padded, cropped or stretched. Pure.
//!
//! As Pillow does it, which the models were trained with (`convolution`).

use rectiflow_data::picture::Picture;
use serde::{Deserialize, Serialize};

use crate::onnx::convolution::{Kernel, Resizer, Size};

/// How a picture of another shape fits into an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fit {
    /// The whole picture in the middle of a white square, as WD taggers were trained.
    Pad,
    /// The middle of the picture: the shorter side fits.
    Crop,
    /// Width and height each to the input's.
    Stretch,
}

impl Fit {
    /// All, with the names that users write.
    pub const ALL: [(&'static str, Self); 3] = [
        ("pad", Self::Pad),
        ("crop", Self::Crop),
        ("stretch", Self::Stretch),
    ];
}

/// The filter of a resize.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// Pillow's BILINEAR.
    Bilinear,
    /// Pillow's BICUBIC, a = -0.5.
    Bicubic,
    /// Pillow's LANCZOS, a = 3.
    Lanczos,
}

impl Filter {
    /// All, with the names that users write.
    pub const ALL: [(&'static str, Self); 3] = [
        ("bilinear", Self::Bilinear),
        ("bicubic", Self::Bicubic),
        ("lanczos", Self::Lanczos),
    ];

    fn kernel(self) -> Kernel {
        match self {
            Self::Bilinear => Kernel::BILINEAR,
            Self::Bicubic => Kernel::BICUBIC,
            Self::Lanczos => Kernel::LANCZOS,
        }
    }
}

/// Fits one picture after the other, and keeps the memory that it needs.
#[derive(Debug, Default)]
pub(crate) struct Fitter {
    resizer: Resizer,
    /// A padded or a resized picture, and what is left of larger ones.
    between: Vec<u8>,
}

impl Fitter {
    /// The pixels of the input `[h, w, 3]`. Of a larger size to which the picture is resized
    /// before it is cropped, `crop_share` is the part of a side that stays.
    pub(crate) fn fit(
        &mut self,
        picture: &Picture,
        (width, height): Size,
        (fit, crop_share, filter): (Fit, f64, Filter),
    ) -> Vec<u8> {
        let from = (picture.width_px(), picture.height_px());
        match fit {
            Fit::Pad => self.pad(picture, (width, height), filter),
            Fit::Stretch => {
                let resized = (enlarged(width, crop_share), enlarged(height, crop_share));
                self.cropped(picture.pixels(), from, resized, (width, height), filter)
            }
            Fit::Crop => {
                let target = (enlarged(width, crop_share), enlarged(height, crop_share));
                let resized = covering(from, target);
                self.cropped(picture.pixels(), from, resized, (width, height), filter)
            }
        }
    }

    fn pad(&mut self, picture: &Picture, size: Size, filter: Filter) -> Vec<u8> {
        let (width, height) = (picture.width_px(), picture.height_px());
        // The square has the shape of the input, which is a square for most models.
        let side = width.max(height);
        if width == height {
            return self.cropped(picture.pixels(), (width, height), size, size, filter);
        }
        let mut square = std::mem::take(&mut self.between);
        square.clear();
        square.resize(num_bytes((side, side)), 255);
        let left = 3 * ((side - width) / 2) as usize;
        let top = ((side - height) / 2) as usize;
        let row_bytes = 3 * width as usize;
        let rows = square.chunks_exact_mut(3 * side as usize).skip(top);
        for (row, from) in rows.zip(picture.pixels().chunks_exact(row_bytes)) {
            row[left..left + row_bytes].copy_from_slice(from);
        }
        let pixels = self.resized(&square, (side, side), size, filter);
        self.between = square;
        pixels
    }

    /// Resizes, and crops the middle.
    fn cropped(
        &mut self,
        pixels: &[u8],
        from: Size,
        resized: Size,
        size: Size,
        filter: Filter,
    ) -> Vec<u8> {
        let larger = self.resized(pixels, from, resized, filter);
        if resized == size {
            return larger;
        }
        let left = 3 * middle(resized.0, size.0);
        let top = middle(resized.1, size.1);
        let row_bytes = 3 * size.0 as usize;
        let mut cropped = Vec::with_capacity(num_bytes(size));
        let rows = larger.chunks_exact(3 * resized.0 as usize);
        for row in rows.skip(top).take(size.1 as usize) {
            cropped.extend_from_slice(&row[left..left + row_bytes]);
        }
        cropped
    }

    fn resized(&mut self, pixels: &[u8], from: Size, to: Size, filter: Filter) -> Vec<u8> {
        self.resizer.resize(pixels, from, to, filter.kernel())
    }
}

fn num_bytes((width, height): Size) -> usize {
    3 * width as usize * height as usize
}

/// The side before a crop that leaves `share` of it.
fn enlarged(side: u32, share: f64) -> u32 {
    // As timm: floor(size / crop_pct).
    ((f64::from(side) / share).floor() as u32).max(side)
}

/// The smallest size of the shape of `from` that covers `target`; as torchvision's Resize, the
/// longer side is rounded down.
fn covering(from: Size, target: Size) -> Size {
    let (width, height) = (u64::from(from.0), u64::from(from.1));
    let (wanted_width, wanted_height) = (u64::from(target.0), u64::from(target.1));
    if width * wanted_height <= height * wanted_width {
        let high = (height * wanted_width / width).max(wanted_height);
        return (target.0, u32::try_from(high).unwrap_or(u32::MAX));
    }
    let wide = (width * wanted_height / height).max(wanted_width);
    (u32::try_from(wide).unwrap_or(u32::MAX), target.1)
}

/// Where the middle begins; as torchvision's CenterCrop, half is rounded to even.
fn middle(side: u32, cropped: u32) -> usize {
    (f64::from(side - cropped) / 2.0).round_ties_even() as usize
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs};

    use rectiflow_data::decode::decode;

    use super::*;

    fn gradient(width: u32, height: u32) -> Picture {
        let mut pixels = Vec::new();
        for y in 0..height {
            for x in 0..width {
                pixels.extend([x as u8, y as u8, 9]);
            }
        }
        Picture::new(width, height, pixels)
    }

    #[test]
    fn a_padded_picture_is_in_the_middle_of_white() {
        let settings = (Fit::Pad, 1.0, Filter::Bicubic);
        let fitted = Fitter::default().fit(&gradient(8, 3), (8, 8), settings);
        let rows: Vec<&[u8]> = fitted.chunks_exact(24).collect();
        for (number, row) in rows.iter().enumerate() {
            let expected = (2..5).contains(&number);
            assert_eq!(row.contains(&9), expected, "{number}");
            assert!(expected || row.iter().all(|&value| value == 255));
        }
        assert_eq!(&rows[3][..6], [0, 1, 9, 1, 1, 9]);
        let fitted = Fitter::default().fit(&gradient(3, 8), (8, 8), settings);
        assert_eq!(
            &fitted[..12],
            [255, 255, 255, 255, 255, 255, 0, 0, 9, 1, 0, 9]
        );
    }

    #[test]
    fn a_crop_is_the_middle() {
        let settings = (Fit::Crop, 1.0, Filter::Bilinear);
        let fitted = Fitter::default().fit(&gradient(13, 8), (8, 8), settings);
        assert_eq!(&fitted[..3], [2, 0, 9], "half of 5 is rounded to even");
        let settings = (Fit::Stretch, 0.5, Filter::Bilinear);
        let fitted = Fitter::default().fit(&gradient(16, 16), (8, 8), settings);
        assert_eq!(
            (&fitted[..3], &fitted[fitted.len() - 3..]),
            (&[4, 4, 9][..], &[11, 11, 9][..])
        );
    }

    #[test]
    fn a_covering_size_has_the_picture_s_shape() {
        assert_eq!(covering((100, 50), (20, 20)), (40, 20));
        assert_eq!(covering((50, 101), (20, 20)), (20, 40));
        assert_eq!(covering((7, 7), (20, 20)), (20, 20));
        assert_eq!(covering((1, 1000), (4, 2)), (4, 4000));
        assert_eq!(enlarged(224, 0.875), 256);
    }

    /// Pillow's own resizes of the pictures in tests/golden, of many sizes and with each filter.
    #[test]
    fn every_pixel_is_pillow_s() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
        let sums = fs::read(format!("{golden}/resized.json")).unwrap();
        let sums: BTreeMap<String, u32> = serde_json::from_slice(&sums).unwrap();
        assert!(sums.len() > 50);
        let mut fitter = Fitter::default();
        for (case, sum) in sums {
            let [file, filter, size] = *case.split(' ').collect::<Vec<_>>() else {
                panic!("{case}");
            };
            let bytes = fs::read(format!("{golden}/{file}")).unwrap();
            let picture = decode(&bytes, 1 << 20, [255; 3]).unwrap();
            let (width, height) = size.split_once('x').unwrap();
            let size = (width.parse().unwrap(), height.parse().unwrap());
            let (_, filter) = Filter::ALL
                .into_iter()
                .find(|(name, _)| *name == filter)
                .unwrap();
            let fitted = fitter.fit(&picture.picture, size, (Fit::Stretch, 1.0, filter));
            assert_eq!(crc32fast::hash(&fitted), sum, "{case}");
        }
    }
}
