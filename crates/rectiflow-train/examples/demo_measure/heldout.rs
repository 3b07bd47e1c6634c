//! Pictures that no model was trained on, what they are called, and what the older schedule tells of them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use rectiflow_data::{
    SampleId,
    bucket::{Bucket, ResizeSpace, aspect_error, place},
    decode::{decode, fit},
    picture::Picture,
};
use rectiflow_sdxl::{discrete, vae::Vae};
use rectiflow_train::{
    Error, Result,
    findings::{Finding, Table},
};
use tch::{Kind, Tensor, no_grad};

use crate::{
    BATCH, SIDE_PX,
    measure::{border, brightness},
};

/// Width over height may differ from 1 by this much, in the logarithm; other shapes are left out.
const MAX_ASPECT_ERROR: f64 = 0.2;

/// The pictures and what belongs to each.
pub(crate) struct HeldOut {
    pub(crate) captions: Vec<String>,
    /// The background that each caption names.
    pub(crate) backgrounds: Vec<String>,
    pub(crate) pictures: Vec<Picture>,
    /// Their [`Vae::features`].
    pub(crate) features: Tensor,
    /// The colour of each background, as the pictures have it.
    pub(crate) palette: BTreeMap<String, [f64; 3]>,
}

/// A line of `metadata.jsonl`.
#[derive(serde::Deserialize)]
struct Line {
    file_name: PathBuf,
    captions: Vec<String>,
}

impl HeldOut {
    pub(crate) fn read(folder: &Path, vae: &Vae) -> Result<Self> {
        let path = folder.join("metadata.jsonl");
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let (mut captions, mut backgrounds, mut pictures) = (Vec::new(), Vec::new(), Vec::new());
        for line in text.lines() {
            let line: Line = serde_json::from_str(line).map_err(|error| Error::io(&path)(error.into()))?;
            let Some((caption, background)) = line.captions.first().and_then(|c| Some((c, background_of(c)?))) else {
                continue;
            };
            if let Some(picture) = read_picture(&folder.join(&line.file_name))? {
                captions.push(caption.clone());
                backgrounds.push(background.to_owned());
                pictures.push(picture);
            }
        }
        if pictures.len() < 2 {
            let reason = format!("expected pictures to compare with, found {} of a square shape", pictures.len());
            return Err(Error::io(&path)(std::io::Error::other(reason)));
        }
        let features = features(vae, &pictures)?;
        let palette = palette(&backgrounds, &pictures);
        Ok(Self { captions, backgrounds, pictures, features, palette })
    }

    /// The background whose colour is nearest.
    pub(crate) fn nearest_background(&self, colour: [f64; 3]) -> &str {
        let distance = |other: &[f64; 3]| colour.iter().zip(other).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        let nearest = self.palette.iter().min_by(|(_, a), (_, b)| distance(a).total_cmp(&distance(b)));
        nearest.expect("there are pictures, so there are backgrounds").0
    }

    /// Mean brightness of the pictures on one background.
    pub(crate) fn brightness_on(&self, background: &str) -> f64 {
        let on: Vec<f64> = self.on(background).map(brightness).collect();
        on.iter().sum::<f64>() / on.len().max(1) as f64
    }

    fn on(&self, background: &str) -> impl Iterator<Item = &Picture> {
        self.pictures.iter().zip(&self.backgrounds).filter(move |(_, name)| *name == background).map(|(p, _)| p)
    }

    /// How well the last step of the older schedule shows whether a picture is on black or on white.
    pub(crate) fn leak(&self, vae: &Vae) -> Result<Finding> {
        let mean = |background: &str| -> Result<Tensor> {
            let pictures: Vec<Picture> = self.on(background).cloned().collect();
            let latents = by_batches(&pictures, |pixels| Ok(vae.encode(pixels)?.0))? * vae.config.scaling_factor;
            Ok(latents.mean_dim(&[0i64, 2, 3][..], false, Kind::Double)) // [4]
        };
        let apart = (mean("white")? - mean("black")?).norm().double_value(&[]);
        let alpha_bar = discrete::alpha_bar(discrete::NUM_STEPS - 1);
        let at = |side: f64| (alpha_bar / (1.0 - alpha_bar)).sqrt() * side * apart;
        let side = f64::from(SIDE_PX / vae.config.down_factor());
        let row = |name: &str, sigmas: f64| vec![name.to_owned(), format!("{sigmas:.1}")];
        Ok(Finding {
            title: "What the older schedule gives away".into(),
            text: vec![format!(
                "An eps model's noisiest training step still holds 7 % of the picture. Averaged over all latents, the \
                 noise shrinks and the picture's mean stays: pictures on white and on black are {apart:.2} apart in the \
                 mean of their latents, and this is how many standard deviations of the averaged noise that is. A model \
                 that can read its brightness off the noise does not learn to take it from the text, and a sampler that \
                 starts from pure noise tells it \"medium\"."
            )],
            picture: None,
            table: Some(Table {
                columns: vec!["at the last step".into(), "black from white, in sigmas".into()],
                rows: vec![
                    row(&format!("the base: {side}x{side} latents"), at(side)),
                    row("SDXL: 128x128 latents", at(128.0)),
                    row(
                        &format!("the shifted base: {side}x{side} latents, {} times as large", 128.0 / side),
                        at(128.0),
                    ),
                    row("flow matching, any size", 0.0),
                ],
            }),
        })
    }
}

/// "... on a black background" names black.
fn background_of(caption: &str) -> Option<&str> {
    caption.rsplit_once(" on a ")?.1.strip_suffix(" background")
}

/// A picture in the size that models draw, cropped as in preparation; `None` for one of another shape.
fn read_picture(path: &Path) -> Result<Option<Picture>> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let unreadable = |fault| Error::io(path)(std::io::Error::other(format!("{fault:?}")));
    let picture = decode(&bytes, 1 << 24, [255; 3]).map_err(unreadable)?.picture;
    let bucket = Bucket { width_px: SIDE_PX, height_px: SIDE_PX };
    let (width_px, height_px) = (picture.width_px(), picture.height_px());
    if aspect_error(bucket, width_px, height_px) > MAX_ASPECT_ERROR {
        return Ok(None);
    }
    let placement = place(bucket, width_px, height_px, 0, SampleId::of(&bytes));
    Ok(Some(Picture::new(SIDE_PX, SIDE_PX, fit(&picture, &placement, bucket, ResizeSpace::default()))))
}

fn palette(backgrounds: &[String], pictures: &[Picture]) -> BTreeMap<String, [f64; 3]> {
    let mut sums = BTreeMap::<String, ([f64; 3], f64)>::new();
    for (name, picture) in backgrounds.iter().zip(pictures) {
        let (sum, count) = sums.entry(name.clone()).or_default();
        sum.iter_mut().zip(border(picture)).for_each(|(sum, value)| *sum += value);
        *count += 1.0;
    }
    sums.into_iter().map(|(name, (sum, count))| (name, sum.map(|value| value / count))).collect()
}

/// The features of pictures, one row each.
pub(crate) fn features(vae: &Vae, pictures: &[Picture]) -> Result<Tensor> {
    by_batches(pictures, |pixels| Ok(vae.features(pixels)?))
}

/// `calculate` on batches of pixels `[b, 3, h, w]` in -1 to 1; what it gives, one after the other.
fn by_batches(pictures: &[Picture], calculate: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let side = i64::from(SIDE_PX);
    let batch = |pictures: &[Picture]| {
        let bytes: Vec<u8> = pictures.iter().flat_map(|picture| picture.pixels().iter().copied()).collect();
        let pixels = Tensor::from_slice(&bytes).view([pictures.len() as i64, side, side, 3]).permute([0, 3, 1, 2]);
        calculate(&(pixels.to_kind(Kind::Float) / 127.5 - 1.0))
    };
    let parts = no_grad(|| pictures.chunks(BATCH).map(batch).collect::<Result<Vec<_>>>())?;
    Ok(Tensor::cat(&parts, 0))
}
