//! An RGB picture in memory, and as a PNG file with text chunks.
//!
//! The sampler returns pictures, and contact sheets are composed of them. The text chunks keep a
//! picture's settings: `parameters` is the keyword that image viewers and web interfaces of Stable
//! Diffusion look for. Decoding, colour profiles and everything else for image files from unknown
//! sources is in `decode`.

pub(crate) mod avif;
pub(crate) mod avif_items;
pub(crate) mod colour;
pub mod contact_sheet;
pub mod decode;
pub(crate) mod jpeg;
pub(crate) mod jpeg_xl;
pub mod resize;
pub(crate) mod srgb_profile;
pub mod workspace;
pub(crate) mod yuv;

use std::{io::Write, path::Path};

use crate::{
    durable::DurableFile,
    error::{Error, Result},
};

/// 8-bit sRGB pixels, row by row from the top left, three bytes each.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    width_px: u32,
    height_px: u32,
    pixels: Vec<u8>, // [h, w, 3]
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture({}x{} px)", self.width_px, self.height_px)
    }
}

impl Picture {
    /// A picture of `pixels`, `[h, w, 3]`.
    ///
    /// # Panics
    /// If the number of bytes is not `3 * width_px * height_px`, or a side is 0.
    pub fn new(width_px: u32, height_px: u32, pixels: Vec<u8>) -> Self {
        assert!(
            width_px > 0 && height_px > 0,
            "a picture has at least one pixel, found {width_px}x{height_px}"
        );
        assert_eq!(
            pixels.len(),
            3 * width_px as usize * height_px as usize,
            "bytes of {width_px}x{height_px} RGB"
        );
        Self {
            width_px,
            height_px,
            pixels,
        }
    }

    /// A picture of one colour.
    pub fn filled(width_px: u32, height_px: u32, colour: [u8; 3]) -> Self {
        Self::new(
            width_px,
            height_px,
            colour.repeat(width_px as usize * height_px as usize),
        )
    }

    /// Width in pixels.
    pub fn width_px(&self) -> u32 {
        self.width_px
    }

    /// Height in pixels.
    pub fn height_px(&self) -> u32 {
        self.height_px
    }

    /// The sRGB bytes, `[h, w, 3]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The sRGB bytes, `[h, w, 3]`.
    pub(crate) fn into_pixels(self) -> Vec<u8> {
        self.pixels
    }

    /// The colour of a pixel; `x` and `y` count from the top left.
    pub fn at(&self, x: u32, y: u32) -> [u8; 3] {
        let start = self.index(x, y);
        [
            self.pixels[start],
            self.pixels[start + 1],
            self.pixels[start + 2],
        ]
    }

    /// Fills a rectangle; the part outside the picture is ignored.
    pub(crate) fn fill(&mut self, x: u32, y: u32, width_px: u32, height_px: u32, colour: [u8; 3]) {
        let right = (x + width_px).min(self.width_px);
        for row in y..(y + height_px).min(self.height_px) {
            for column in x..right {
                let start = self.index(column, row);
                self.pixels[start..start + 3].copy_from_slice(&colour);
            }
        }
    }

    /// Copies `other` into this picture with its top left at (x, y). It must fit.
    pub(crate) fn paste(&mut self, other: &Self, x: u32, y: u32) {
        assert!(
            x + other.width_px <= self.width_px && y + other.height_px <= self.height_px,
            "{other:?} must fit"
        );
        let row_bytes = 3 * other.width_px as usize;
        for (row, bytes) in other.pixels.chunks_exact(row_bytes).enumerate() {
            let start = self.index(x, y + row as u32);
            self.pixels[start..start + row_bytes].copy_from_slice(bytes);
        }
    }

    fn index(&self, x: u32, y: u32) -> usize {
        3 * (y as usize * self.width_px as usize + x as usize)
    }

    /// Writes a PNG with text chunks, (keyword, text) each. The file appears under its name when it
    /// is complete.
    ///
    /// Latin-1 text becomes a `tEXt` chunk, which every reader knows; other text is UTF-8 in an
    /// `iTXt` chunk.
    ///
    /// # Errors
    /// [`Error::Io`], also for a keyword that PNG does not allow: it must have 1 to 79 Latin-1
    /// characters.
    pub fn write_png(&self, path: &Path, texts: &[(&str, &str)]) -> Result<()> {
        let mut file = DurableFile::create(path)?;
        self.encode_png(&mut file, texts)
            .map_err(|error| Error::io(path)(error.into()))?;
        file.commit()
    }

    /// The bytes of a PNG without texts.
    ///
    /// # Panics
    /// If a side is 0.
    pub fn to_png(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.encode_png(&mut bytes, &[])
            .expect("a picture with pixels is a PNG, and memory takes all bytes");
        bytes
    }

    fn encode_png(
        &self,
        writer: impl Write,
        texts: &[(&str, &str)],
    ) -> std::result::Result<(), png::EncodingError> {
        let mut encoder = png::Encoder::new(writer, self.width_px, self.height_px);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_source_srgb(png::SrgbRenderingIntent::Perceptual);
        for &(keyword, text) in texts {
            let (keyword, text) = (keyword.to_owned(), text.to_owned());
            if text.chars().all(is_latin1_text) {
                encoder.add_text_chunk(keyword, text)?;
            } else {
                encoder.add_itxt_chunk(keyword, text)?;
            }
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        writer.finish()
    }
}

/// Whether a `tEXt` chunk can hold a character: Latin-1 without control characters except newline.
fn is_latin1_text(c: char) -> bool {
    c == '\n' || matches!(u32::from(c), 0x20..=0x7e | 0xa0..=0xff)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::BufReader,
    };

    use super::*;

    #[test]
    fn a_png_holds_the_pixels_and_the_texts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        let picture = Picture::new(2, 1, vec![1, 2, 3, 250, 251, 252]);
        let texts = [
            ("parameters", "a cat\nSteps: 28"),
            ("prompt", "une forêt"),
            ("other", "猫 🐈"),
        ];
        picture.write_png(&path, &texts).unwrap();

        // Another decoder reads the same pixels and texts.
        let mut reader = png::Decoder::new(BufReader::new(File::open(&path).unwrap()))
            .read_info()
            .unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!(pixels, picture.pixels());
        let info = reader.info();
        let latin: Vec<_> = info
            .uncompressed_latin1_text
            .iter()
            .map(|t| (t.keyword.as_str(), t.text.as_str()))
            .collect();
        assert_eq!(latin, texts[..2]);
        assert_eq!(info.utf8_text[0].get_text().unwrap(), "猫 🐈");
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no temporary file stays"
        );
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = Picture::filled(1, 1, [0; 3])
            .write_png(Path::new("/nowhere/at/all.png"), &[])
            .unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all.png"), "{error}");
    }

    #[test]
    #[should_panic(expected = "bytes of 2x2 RGB")]
    fn pixels_must_fill_the_picture() {
        Picture::new(2, 2, vec![0; 11]);
    }
}
