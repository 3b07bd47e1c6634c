//! Held-out pictures, their captions, and how much of them the older schedule reveals.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use rectiflow_data::{
    SampleId,
    bucket::{Bucket, ResizeSpace, aspect_error},
    crop::place,
    decode::decode,
    picture::Picture,
    resize::fit,
};
use rectiflow_sdxl::{discrete, vae::Vae};
use rectiflow_train::{
    Error, Result,
    findings::{Finding, Table},
};
use tch::{Kind, Tensor, no_grad};

use crate::{
    BATCH, SIDE_PX,
    brightness::{border, brightness, brightness_of},
};

/// The largest aspect error of a picture that is used, in the logarithm of width over height.
const MAX_ASPECT_ERROR: f64 = 0.2;
/// Limit for decoding a picture.
const MAX_PIXELS: u64 = 1 << 24;

/// The pictures that no model was trained on; captions, backgrounds and pictures share an index.
pub(crate) struct HeldOut {
    pub(crate) captions: Vec<String>,
    /// The background that each caption names.
    pub(crate) backgrounds: Vec<String>,
    pub(crate) pictures: Vec<Picture>,
    /// Their [`Vae::features`].
    pub(crate) features: Tensor,
    /// The mean border colour of each background's pictures.
    palette: BTreeMap<String, [f64; 3]>,
}

/// A line of `metadata.jsonl`.
#[derive(serde::Deserialize)]
struct Line {
    file_name: PathBuf,
    captions: Vec<String>,
}

impl HeldOut {
    /// Reads the pictures that are nearly square and whose first caption names a background.
    pub(crate) fn read(folder: &Path, vae: &Vae) -> Result<Self> {
        let path = folder.join("metadata.jsonl");
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let (mut captions, mut backgrounds, mut pictures) = (Vec::new(), Vec::new(), Vec::new());
        for line in text.lines() {
            let line: Line =
                serde_json::from_str(line).map_err(|error| Error::io(&path)(error.into()))?;
            let Some(caption) = line.captions.first() else {
                continue;
            };
            let Some(background) = background_of(caption) else {
                continue;
            };
            let Some(picture) = read_picture(&folder.join(&line.file_name))? else {
                continue;
            };
            captions.push(caption.clone());
            backgrounds.push(background.to_owned());
            pictures.push(picture);
        }
        if pictures.len() < 2 {
            let reason = format!(
                "expected at least 2 square pictures, found {}",
                pictures.len()
            );
            return Err(Error::io(&path)(std::io::Error::other(reason)));
        }
        let features = features(vae, &pictures)?;
        let palette = palette(&backgrounds, &pictures);
        Ok(Self {
            captions,
            backgrounds,
            pictures,
            features,
            palette,
        })
    }

    /// The background whose colour is nearest.
    pub(crate) fn nearest_background(&self, colour: [f64; 3]) -> &str {
        let nearest = self.palette.iter().min_by(|(_, a), (_, b)| {
            squared_distance(colour, **a).total_cmp(&squared_distance(colour, **b))
        });
        nearest
            .expect("there are pictures, so there are backgrounds")
            .0
    }

    /// Mean brightness of the pictures on one background; 0 without any.
    pub(crate) fn brightness_on(&self, background: &str) -> f64 {
        let on: Vec<f64> = self.on(background).map(brightness).collect();
        on.iter().sum::<f64>() / on.len().max(1) as f64
    }

    /// Mean brightness of the borders on one background; 0 without any.
    pub(crate) fn border_brightness_on(&self, background: &str) -> f64 {
        self.palette
            .get(background)
            .map_or(0.0, |colour| brightness_of(*colour))
    }

    fn on(&self, background: &str) -> impl Iterator<Item = &Picture> {
        let named = self.pictures.iter().zip(&self.backgrounds);
        named
            .filter(move |(_, name)| *name == background)
            .map(|(picture, _)| picture)
    }

    /// The mean scaled latent of the pictures on one background.
    fn mean_latent(&self, background: &str, vae: &Vae) -> Result<Tensor> {
        let pictures: Vec<Picture> = self.on(background).cloned().collect();
        let latents = by_batches(&pictures, |pixels| Ok(vae.encode(pixels)?.0))?;
        let latents = latents * vae.config.scaling_factor; // [n, 4, h/8, w/8]
        Ok(latents.mean_dim(&[0i64, 2, 3][..], false, Kind::Double)) // [4]
    }

    /// How well the last step of the older schedule shows whether a picture is on black or on
    /// white.
    pub(crate) fn leak(&self, vae: &Vae) -> Result<Finding> {
        let difference = self.mean_latent("white", vae)? - self.mean_latent("black", vae)?;
        let apart = difference.norm().double_value(&[]);
        let alpha_bar = discrete::sdxl().alpha_bar(discrete::NUM_STEPS - 1);
        let signal_to_noise = (alpha_bar / (1.0 - alpha_bar)).sqrt();

        // Averaging side² latents divides the noise by side.
        let side = f64::from(SIDE_PX / vae.config.down_factor());
        let sdxl_side = 128.0;
        let (own_sigmas, sdxl_sigmas) = (
            signal_to_noise * side * apart,
            signal_to_noise * sdxl_side * apart,
        );
        let shifted = format!(
            "the shifted base: {side}x{side} latents, {} times as large",
            sdxl_side / side
        );
        let rows = vec![
            leak_row(&format!("the base: {side}x{side} latents"), own_sigmas),
            leak_row("SDXL: 128x128 latents", sdxl_sigmas),
            leak_row(&shifted, sdxl_sigmas),
            leak_row("flow matching, any size", 0.0),
        ];

        let text = format!(
            "An eps model's noisiest training step still contains 7 % of the picture. Averaged over \
             all latents, the noise shrinks and the picture's mean stays. Pictures on white and on \
             black are {apart:.2} apart in the mean of their latents; the table has this distance in \
             standard deviations of the averaged noise. A model that can read the brightness from \
             the noise does not learn to take it from the text, and a sampler that starts from pure \
             noise tells it \"medium\"."
        );
        let columns = vec![
            "at the last step".into(),
            "black from white, in sigmas".into(),
        ];
        Ok(Finding {
            title: "What the older schedule reveals".into(),
            text: vec![text],
            picture: None,
            table: Some(Table { columns, rows }),
        })
    }
}

fn leak_row(name: &str, sigmas: f64) -> Vec<String> {
    vec![name.to_owned(), format!("{sigmas:.1}")]
}

fn squared_distance(a: [f64; 3], b: [f64; 3]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum()
}

/// The background that a caption names: "... on a black background".
fn background_of(caption: &str) -> Option<&str> {
    caption.rsplit_once(" on a ")?.1.strip_suffix(" background")
}

/// A picture in the size that models draw, cropped as in preparation; `None` for one of another
/// shape.
fn read_picture(path: &Path) -> Result<Option<Picture>> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let unreadable = |fault| Error::io(path)(std::io::Error::other(format!("{fault:?}")));
    let picture = decode(&bytes, MAX_PIXELS, [255; 3])
        .map_err(unreadable)?
        .picture;
    let bucket = Bucket {
        width_px: SIDE_PX,
        height_px: SIDE_PX,
    };
    let (width_px, height_px) = (picture.width_px(), picture.height_px());
    if aspect_error(bucket, width_px, height_px) > MAX_ASPECT_ERROR {
        return Ok(None);
    }
    let placement = place(bucket, width_px, height_px, 0, SampleId::of(&bytes));
    let pixels = fit(&picture, &placement, bucket, ResizeSpace::default());
    Ok(Some(Picture::new(SIDE_PX, SIDE_PX, pixels)))
}

/// The mean border colour of each background's pictures.
fn palette(backgrounds: &[String], pictures: &[Picture]) -> BTreeMap<String, [f64; 3]> {
    let mut sums = BTreeMap::<String, ([f64; 3], f64)>::new();
    for (name, picture) in backgrounds.iter().zip(pictures) {
        let (sum, count) = sums.entry(name.clone()).or_default();
        for (sum, value) in sum.iter_mut().zip(border(picture)) {
            *sum += value;
        }
        *count += 1.0;
    }
    let mut palette = BTreeMap::new();
    for (name, (sum, count)) in sums {
        palette.insert(name, sum.map(|value| value / count));
    }
    palette
}

/// The features of pictures, one row each.
pub(crate) fn features(vae: &Vae, pictures: &[Picture]) -> Result<Tensor> {
    by_batches(pictures, |pixels| Ok(vae.features(pixels)?))
}

/// Applies `calculate` to batches of pixels, `[b, 3, h, w]` in -1 to 1; returns the concatenated
/// results.
fn by_batches(
    pictures: &[Picture],
    calculate: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut parts = Vec::new();
    for batch in pictures.chunks(BATCH) {
        parts.push(no_grad(|| calculate(&pixels_of(batch)))?);
    }
    Ok(Tensor::cat(&parts, 0))
}

/// The pixels of pictures of one size, `[b, 3, h, w]` in -1 to 1.
fn pixels_of(pictures: &[Picture]) -> Tensor {
    let side = i64::from(SIDE_PX);
    let bytes: Vec<u8> = pictures
        .iter()
        .flat_map(|picture| picture.pixels().iter().copied())
        .collect();
    let pixels = Tensor::from_slice(&bytes).view([pictures.len() as i64, side, side, 3]);
    pixels.permute([0, 3, 1, 2]).to_kind(Kind::Float) / 127.5 - 1.0
}
