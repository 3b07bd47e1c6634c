//! AVIF: still pictures of 8, 10 or 12 bits, also of tiles, by the AV1 decoder `re_rav1d` and the
//! container in `avif_items`.
//!
//! `re_rav1d` is rav1d, the port of dav1d to Rust, with an interface for Rust, which rav1d itself
//! has taken over and not released yet. It is built without assembler. Turned and mirrored pictures
//! are returned as stored, with their orientation; EXIF does not count in AVIF. Pictures with the
//! curves of HDR, PQ and HLG, are refused: without a choice of brightness they would be dull.

use image::metadata::Orientation;
use moxcms::{
    CicpColorPrimaries, CicpProfile, ColorProfile, MatrixCoefficients, TransferCharacteristics,
};
use re_rav1d::dav1d::{
    Decoder, Error, Picture, PixelLayout, PlanarImageComponent, Plane, Settings, pixel::YUVRange,
};

use crate::{
    picture::{
        avif_items::{Coding, Items, Properties},
        colour::Samples,
        yuv::{self, Alpha, Layout, Planes},
    },
    reject::{Fault, Reason},
};

/// Most layers of a picture.
const MOST_FRAMES: usize = 64;

/// An AVIF file whose header is read.
pub(crate) struct Opened<'a> {
    items: Items<'a>,
    properties: Properties,
    /// Width and height in pixels, as stored.
    pub(crate) size: (u32, u32),
    pub(crate) orientation: Orientation,
}

/// The picture, as stored.
pub(crate) struct Avif {
    pub(crate) samples: Samples,
    pub(crate) profile: Option<Vec<u8>>,
}

impl<'a> Opened<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// The file's fault.
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self, Fault> {
        let items = Items::new(bytes)?;
        let properties = items.properties_of(items.primary())?;
        let size = match &items.kind(items.primary()) {
            b"av01" => properties.size,
            b"grid" => items.grid(items.primary())?.size,
            other => {
                let name = String::from_utf8_lossy(other);
                return Err(unsupported(&format!("of the kind {name:?}")));
            }
        };
        Ok(Self {
            orientation: properties.orientation(),
            items,
            properties,
            size,
        })
    }

    /// Decodes the picture. Samples of 8 bits are decoded into `memory`. Frames of more than
    /// `max_pixels`, and grids whose tiles have more, are refused.
    ///
    /// # Errors
    /// The file's fault.
    pub(crate) fn decode(mut self, memory: Vec<u8>, max_pixels: u64) -> Result<Avif, Fault> {
        let limit = u32::try_from(max_pixels).unwrap_or(u32::MAX);
        let primary = self.items.primary();
        let tiles = Tiles::decode(&self.items, primary, self.size, limit)?;
        let coding = self.properties.coding.unwrap_or_else(|| tiles.coding());
        let alpha = match self.items.alpha_of(primary)? {
            Some((item, is_multiplied)) => {
                let planes = Tiles::decode(&self.items, item, self.size, limit)?;
                Some(Alpha {
                    is_full_range: planes.is_full_range(),
                    planes,
                    is_multiplied,
                })
            }
            None => None,
        };
        let profile = match self.properties.profile.take() {
            Some(profile) => Some(profile),
            None => profile_of(coding)?,
        };
        Ok(Avif {
            samples: yuv::samples(&tiles, alpha.as_ref(), coding, memory)?,
            profile,
        })
    }
}

/// The profile of colours that are described by numbers. None for those of sRGB.
fn profile_of(coding: Coding) -> Result<Option<Vec<u8>>, Fault> {
    match coding.transfer {
        16 => return Err(unsupported("with the curve PQ (HDR)")),
        18 => return Err(unsupported("with the curve HLG (HDR)")),
        _ => {}
    }
    // The curves of television are meant for the screens that sRGB is made for.
    let is_usual = matches!(coding.transfer, 0..=2 | 6 | 13..=15);
    if is_usual && matches!(coding.primaries, 0..=2 | 5 | 6) {
        return Ok(None);
    }
    let number = |number: u16| u8::try_from(number).ok();
    let transfer = match is_usual {
        true => Some(TransferCharacteristics::Srgb),
        false => number(coding.transfer).and_then(|it| TransferCharacteristics::try_from(it).ok()),
    };
    let primaries = number(coding.primaries).and_then(|it| CicpColorPrimaries::try_from(it).ok());
    let (Some(color_primaries), Some(transfer_characteristics)) = (primaries, transfer) else {
        return Ok(None);
    };
    let profile = ColorProfile::new_from_cicp(CicpProfile {
        color_primaries,
        transfer_characteristics,
        matrix_coefficients: MatrixCoefficients::Identity,
        full_range: true,
    });
    Ok(profile.encode().ok())
}

/// A frame of AV1 and its planes.
struct Frame {
    picture: Picture,
    planes: Vec<Plane>,
}

/// A picture of one frame, or of several beside and below each other.
struct Tiles {
    frames: Vec<Frame>,
    columns: usize,
    /// Width and height in pixels of a frame.
    tile_size: (usize, usize),
    /// Width and height in pixels of the picture.
    size: (usize, usize),
    bits: u32,
    layout: Layout,
}

impl Tiles {
    /// Decodes an item that is `size` pixels wide and high.
    fn decode(items: &Items<'_>, item: u32, size: (u32, u32), limit: u32) -> Result<Self, Fault> {
        if &items.kind(item) != b"grid" {
            let frame = Frame::decode(items, item, limit)?;
            return Self::of(vec![frame], 1, size);
        }
        // The tiles cover the picture, each needed and all of one size.
        let grid = items.grid(item)?;
        let declared = items.properties_of(item)?.size;
        if declared != grid.size {
            return Err(broken(format!(
                "its header says {}x{} px, and its grid {}x{} px",
                declared.0, declared.1, grid.size.0, grid.size.1
            )));
        }
        let tiles = items.tiles(item);
        if tiles.len() != grid.rows * grid.columns || tiles.is_empty() {
            let (rows, columns) = (grid.rows, grid.columns);
            let found = tiles.len();
            return Err(broken(format!("its {rows} x {columns} tiles are {found}")));
        }
        let tile_size = items.properties_of(tiles[0])?.size;
        let pixels = u64::from(tile_size.0) * u64::from(tile_size.1) * tiles.len() as u64;
        if pixels > u64::from(limit) {
            let detail = format!("its tiles have {pixels} pixels; max_pixels is {limit}");
            return Err(Fault::new(Reason::TooManyPixels, detail));
        }
        let mut frames = Vec::new();
        for tile in tiles {
            let frame = Frame::decode(items, tile, limit)?;
            let (width, height) = items.properties_of(tile)?.size;
            if frame.size() != (width as usize, height as usize) {
                return Err(broken(format!(
                    "its header says {width}x{height} px of a tile, and the frame has {}x{} px",
                    frame.size().0,
                    frame.size().1
                )));
            }
            frames.push(frame);
        }
        Self::of(frames, grid.columns, size)
    }

    fn of(frames: Vec<Frame>, columns: usize, size: (u32, u32)) -> Result<Self, Fault> {
        let first = &frames[0];
        let tiles = Self {
            columns,
            tile_size: first.size(),
            size: (size.0 as usize, size.1 as usize),
            bits: first.bits()?,
            layout: first.layout(),
            frames,
        };
        let (width, height) = tiles.tile_size;
        let rows = tiles.frames.len() / columns;
        for frame in &tiles.frames {
            let is_alike = frame.size() == tiles.tile_size
                && frame.layout() == tiles.layout
                && frame.bits()? == tiles.bits;
            if !is_alike {
                return Err(broken("its tiles are of different kinds".to_owned()));
            }
        }
        let is_covered = match tiles.frames.len() {
            1 => tiles.tile_size == tiles.size,
            _ => covers(width, columns, tiles.size.0) && covers(height, rows, tiles.size.1),
        };
        if !is_covered {
            let (all_width, all_height) = tiles.size;
            return Err(broken(format!(
                "its header says {all_width}x{all_height} px, and it has {columns} x {rows} \
                 frames of {width}x{height} px"
            )));
        }
        let is_split = tiles.frames.len() > 1 && tiles.layout != Layout::Full;
        if is_split && !(width.is_multiple_of(2) && height.is_multiple_of(2)) {
            return Err(broken("its tiles have odd sides".to_owned()));
        }
        Ok(tiles)
    }

    /// How the decoder says that samples become colours.
    fn coding(&self) -> Coding {
        let picture = &self.frames[0].picture;
        Coding {
            primaries: picture.color_primaries() as u16,
            transfer: picture.transfer_characteristic() as u16,
            matrix: picture.matrix_coefficients() as u16,
            is_full_range: self.is_full_range(),
        }
    }

    /// Whether the decoder says that samples use all values.
    fn is_full_range(&self) -> bool {
        self.frames[0].picture.color_range() == YUVRange::Full
    }

    /// A length of luma as that of a plane.
    fn side(&self, plane: usize, luma: usize, is_height: bool) -> usize {
        let is_half = match self.layout {
            Layout::Half => plane > 0,
            Layout::HalfWidth => plane > 0 && !is_height,
            Layout::Full | Layout::Gray => false,
        };
        if is_half { luma.div_ceil(2) } else { luma }
    }
}

/// Whether `num` tiles cover a side of the picture, and no fewer do.
fn covers(tile: usize, num: usize, side: usize) -> bool {
    tile * num >= side && tile * (num - 1) < side
}

impl Planes for Tiles {
    fn size(&self) -> (usize, usize) {
        self.size
    }

    fn bits(&self) -> u32 {
        self.bits
    }

    fn layout(&self) -> Layout {
        self.layout
    }

    fn read_row(&self, plane: usize, y: usize, row: &mut Vec<u16>) {
        row.clear();
        let tile_width = self.side(plane, self.tile_size.0, false);
        let tile_height = self.side(plane, self.tile_size.1, true);
        let mut left = self.side(plane, self.size.0, false);
        let first = y / tile_height * self.columns;
        for frame in &self.frames[first..first + self.columns] {
            let num = tile_width.min(left);
            frame.read_row(plane, y % tile_height, num, row);
            left -= num;
        }
    }
}

impl Frame {
    /// Decodes the frame of an item. One of more than `limit` pixels is refused.
    fn decode(items: &Items<'_>, item: u32, limit: u32) -> Result<Self, Fault> {
        let mut settings = Settings::new();
        // Pictures are decoded beside each other; threads of a decoder would only add to them.
        settings.set_n_threads(1);
        settings.set_max_frame_delay(1);
        settings.set_frame_size_limit(limit);
        settings.set_all_layers(false);
        settings.set_operating_point(items.properties_of(item)?.operating_point);
        let mut decoder = Decoder::with_settings(&settings).map_err(undecodable)?;
        let mut sent = decoder.send_data(items.bytes(item)?, None, None, None);
        // Of the layers of a picture the last is the best.
        let mut last = None;
        for _ in 0..MOST_FRAMES {
            match (decoder.get_picture(), sent) {
                (Ok(picture), _) => last = Some(picture),
                (Err(Error::Again), Err(Error::Again)) => sent = decoder.send_pending_data(),
                (Err(Error::Again), Ok(())) => break,
                (Err(Error::Again), Err(error)) | (Err(error), _) => {
                    return Err(undecodable(error));
                }
            }
        }
        let picture = last.ok_or_else(|| broken("it has no frame".to_owned()))?;
        let mut planes = vec![picture.plane(PlanarImageComponent::Y)];
        if picture.pixel_layout() != PixelLayout::I400 {
            planes.push(picture.plane(PlanarImageComponent::U));
            planes.push(picture.plane(PlanarImageComponent::V));
        }
        Ok(Self { picture, planes })
    }

    fn size(&self) -> (usize, usize) {
        (
            self.picture.width() as usize,
            self.picture.height() as usize,
        )
    }

    fn bits(&self) -> Result<u32, Fault> {
        let bits = self.picture.bits_per_component();
        let bits = bits.ok_or_else(|| broken("it does not say its depth".to_owned()))?;
        Ok(bits.0 as u32)
    }

    fn layout(&self) -> Layout {
        match self.picture.pixel_layout() {
            PixelLayout::I400 => Layout::Gray,
            PixelLayout::I420 => Layout::Half,
            PixelLayout::I422 => Layout::HalfWidth,
            PixelLayout::I444 => Layout::Full,
        }
    }

    /// Appends the first `num` samples of a row.
    fn read_row(&self, plane: usize, y: usize, num: usize, row: &mut Vec<u16>) {
        let component = PlanarImageComponent::from(plane);
        let start = y * self.picture.stride(component) as usize;
        let bytes: &[u8] = &self.planes[plane];
        if self.picture.bit_depth() == 8 {
            row.extend(
                bytes[start..start + num]
                    .iter()
                    .map(|&sample| u16::from(sample)),
            );
        } else {
            let samples = bytes[start..start + 2 * num].chunks_exact(2);
            row.extend(samples.map(|sample| u16::from_le_bytes([sample[0], sample[1]])));
        }
    }
}

fn unsupported(what: &str) -> Fault {
    let detail = format!("AVIF {what} is not supported: convert it to PNG, JPEG or WebP");
    Fault::new(Reason::UnsupportedFormat, detail)
}

fn undecodable(error: Error) -> Fault {
    broken(format!("the AV1 decoder says: {error}"))
}

fn broken(reason: String) -> Fault {
    Fault::new(Reason::Broken, reason)
}

#[cfg(test)]
mod tests {
    use checks::mutation::cases;

    use super::*;
    use crate::picture::decode::{decode, inspect};

    const MAX: u64 = 1 << 20;

    /// The bytes of a file.
    macro_rules! stored {
        ($name:literal) => {
            include_bytes!(concat!("../../tests/golden/avif/", $name, ".avif")).as_slice()
        };
    }

    /// A file and its pixels as PNG (`scripts/golden/avif.py`).
    macro_rules! golden {
        ($name:literal) => {
            (
                $name,
                stored!($name),
                include_bytes!(concat!("../../tests/golden/avif/", $name, ".png")).as_slice(),
            )
        };
    }

    #[test]
    fn pictures_are_those_of_libavif() {
        let all = [
            golden!("420"),
            golden!("422"),
            golden!("444"),
            golden!("gray"),
            golden!("lossless"),
            golden!("limited"),
            golden!("bt2020"),
            golden!("ten"),
            golden!("twelve"),
            golden!("alpha"),
            golden!("multiplied"),
            golden!("alpha-ten"),
            golden!("turned"),
            golden!("turned-mirrored"),
            golden!("mirrored"),
            golden!("tiles"),
            golden!("tiles-alpha"),
            golden!("grain"),
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
            let largest = pairs.map(|(&a, &b)| a.abs_diff(b)).max();
            assert!(largest <= Some(1), "{name}: {largest:?}");
            assert_eq!(found.picture.pixels().len(), expected.pixels().len());
        }
    }

    #[test]
    fn a_profile_is_returned_beside_the_stored_pixels() {
        let (_, bytes, png) = golden!("profile");
        let opened = Opened::new(bytes).unwrap();
        let Avif { samples, profile } = opened.decode(Vec::new(), MAX).unwrap();
        let adobe = include_bytes!("../../tests/golden/adobe-rgb-free.icc");
        assert_eq!(profile.as_deref(), Some(adobe.as_slice()));
        let Samples::Eight { channels, values } = samples else {
            panic!("8 bits are stored");
        };
        assert_eq!(channels, 3);
        let expected = decode(png, MAX, [0; 3]).unwrap().picture;
        assert_eq!(values.len(), expected.pixels().len());
        let mut pairs = values.iter().zip(expected.pixels());
        assert!(pairs.all(|(&a, &b)| a.abs_diff(b) <= 1));
    }

    #[test]
    fn colours_that_numbers_describe_are_converted() {
        let found = decode(stored!("p3"), MAX, [0; 3]).unwrap();
        // What was encoded is sRGB's green in Display P3.
        let pixel = found.picture.at(20, 12);
        for (value, expected) in pixel.into_iter().zip([0, 255, 0]) {
            assert!(value.abs_diff(expected) <= 4, "{pixel:?}");
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (bytes, words) in [(stored!("hdr"), "PQ"), (stored!("cut"), "clap")] {
            let fault = decode(bytes, MAX, [0; 3]).unwrap_err();
            assert_eq!(fault.reason, Reason::UnsupportedFormat, "{fault:?}");
            assert!(fault.detail.contains(words), "{fault:?}");
            assert!(fault.detail.contains("convert it to PNG"), "{fault:?}");
        }
    }

    #[test]
    fn frames_are_as_large_as_the_header_says_and_no_larger_than_allowed() {
        for bytes in [stored!("420"), stored!("tiles")] {
            let header = inspect(bytes, MAX).unwrap();
            let pixels = u64::from(header.width_px) * u64::from(header.height_px);
            let fault = inspect(bytes, pixels - 1).unwrap_err();
            assert_eq!(fault.reason, Reason::TooManyPixels);
            // A header with another width.
            let mut other = bytes.to_vec();
            let places = other.windows(4).enumerate();
            let places = places.filter(|(_, name)| name == b"ispe");
            let places: Vec<usize> = places.map(|(at, _)| at).collect();
            for at in places {
                other[at + 11] ^= 1;
            }
            let fault = decode(&other, MAX, [0; 3]).unwrap_err();
            assert_eq!(fault.reason, Reason::Broken, "{fault:?}");
        }
    }

    #[test]
    fn cut_files_are_faults() {
        let bytes = stored!("alpha");
        for end in 1..bytes.len() {
            let fault = decode(&bytes[..end], MAX, [0; 3]).unwrap_err();
            let expected = match end {
                0..12 => Reason::NotAnImage,
                _ => Reason::Broken,
            };
            assert_eq!(fault.reason, expected, "{end}: {fault:?}");
        }
    }

    #[test]
    fn mutated_files_are_read_or_refused() {
        let files = [stored!("420"), stored!("tiles-alpha"), stored!("ten")];
        for case in cases() {
            let mut random = case.random();
            let good = random.of(&files);
            let bad = case.mutation.of(good, &mut random);
            case.run("an AVIF file", || {
                let _ = inspect(&bad, MAX);
                let _ = decode(&bad, MAX, [0; 3]);
            });
        }
    }
}
