//! Numbers of a model's pictures of the held-out captions.

use rectiflow_data::picture::Picture;
use rectiflow_sdxl::{kid::kernel_distance, sample::SampleSettings, vae::Vae};
use rectiflow_train::{
    Result,
    findings::{Finding, Table},
};
use serde::Serialize;

use crate::{
    Contender,
    arguments::Arguments,
    brightness::{border, brightness, brightness_of},
    heldout::{HeldOut, features},
    keep, settings,
};

/// Distance between seeds: each batch of a seed adds 1, so noise never repeats.
const SEED_STRIDE: u64 = 1000;

const COLUMNS: [&str; 7] = [
    "model",
    "correct background",
    "brightness, black requested",
    "white requested",
    "border, black requested",
    "white requested",
    "distance to real pictures",
];

/// A model's numbers, one entry per seed.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Measured {
    pub(crate) label: String,
    /// Share of pictures whose border is nearest to the requested colour.
    pub(crate) background_right: Vec<f64>,
    /// Mean brightness of pictures with black requested, 0 to 1.
    pub(crate) on_black: Vec<f64>,
    /// Mean brightness of pictures with white requested, 0 to 1.
    pub(crate) on_white: Vec<f64>,
    /// Mean brightness of the border with black requested.
    pub(crate) border_on_black: Vec<f64>,
    /// Mean brightness of the border with white requested.
    pub(crate) border_on_white: Vec<f64>,
    /// Kernel distance to the held-out pictures.
    pub(crate) distance: Vec<f64>,
}

impl Measured {
    /// Draws a model's pictures for each seed and measures them.
    pub(crate) fn of(
        contender: &Contender,
        heldout: &HeldOut,
        vae: &Vae,
        arguments: &Arguments,
    ) -> Result<Self> {
        let mut measured = Self {
            label: contender.label.clone(),
            ..Self::default()
        };
        let chosen = spread(heldout.captions.len(), arguments.num_pictures);
        let prompts: Vec<String> = chosen
            .iter()
            .map(|&index| heldout.captions[index].clone())
            .collect();
        let requested: Vec<&str> = chosen
            .iter()
            .map(|&index| heldout.backgrounds[index].as_str())
            .collect();
        for seed in 0..arguments.num_seeds {
            let settings = SampleSettings {
                seed: seed * SEED_STRIDE,
                ..settings()
            };
            let pictures = contender.draw(&prompts, &settings, &format!("seed {seed}"))?;
            measured.add(&pictures, &requested, heldout);
            if let Some(folder) = &arguments.keep {
                let folder = folder.join(&contender.label).join(format!("seed-{seed}"));
                keep(&folder, &pictures)?;
            }
            let distance = kernel_distance(&features(vae, &pictures)?, &heldout.features);
            measured.distance.push(distance);
        }
        Ok(measured)
    }

    /// Adds a seed's pictures; `requested` has the background that each prompt names.
    fn add(&mut self, pictures: &[Picture], requested: &[&str], heldout: &HeldOut) {
        let mut num_right = 0.0;
        let mut whole = Vec::new();
        let mut borders = Vec::new();
        for (picture, &requested) in pictures.iter().zip(requested) {
            let colour = border(picture);
            if heldout.nearest_background(colour) == requested {
                num_right += 1.0;
            }
            whole.push(brightness(picture));
            borders.push(brightness_of(colour));
        }
        self.background_right
            .push(num_right / pictures.len() as f64);
        self.on_black.push(mean_where("black", requested, &whole));
        self.on_white.push(mean_where("white", requested, &whole));
        self.border_on_black
            .push(mean_where("black", requested, &borders));
        self.border_on_white
            .push(mean_where("white", requested, &borders));
    }

    /// The model's row of the table.
    fn row(&self) -> Vec<String> {
        vec![
            self.label.clone(),
            percent(&self.background_right),
            mean_and_spread(&self.on_black, 2),
            mean_and_spread(&self.on_white, 2),
            mean_and_spread(&self.border_on_black, 2),
            mean_and_spread(&self.border_on_white, 2),
            mean_and_spread(&self.distance, 3),
        ]
    }
}

/// The mean of the values whose background is `name`; 0 without any.
fn mean_where(name: &str, backgrounds: &[&str], values: &[f64]) -> f64 {
    let mut sum = 0.0;
    let mut count = 0;
    for (background, value) in backgrounds.iter().zip(values) {
        if *background == name {
            sum += value;
            count += 1;
        }
    }
    sum / f64::from(count.max(1))
}

/// `count` indices below `len`, evenly spaced; repeated if `len` is smaller.
fn spread(len: usize, count: usize) -> Vec<usize> {
    let is_enough = count <= len;
    (0..count)
        .map(|index| {
            if is_enough {
                index * len / count
            } else {
                index % len
            }
        })
        .collect()
}

/// The numbers of all models as a table.
pub(crate) fn finding(measured: &[Measured], heldout: &HeldOut, arguments: &Arguments) -> Finding {
    let mut rows: Vec<Vec<String>> = measured.iter().map(Measured::row).collect();
    rows.push(vec![
        "the real pictures".into(),
        "100 %".into(),
        format!("{:.2}", heldout.brightness_on("black")),
        format!("{:.2}", heldout.brightness_on("white")),
        format!("{:.2}", heldout.border_brightness_on("black")),
        format!("{:.2}", heldout.border_brightness_on("white")),
        "0".into(),
    ]);
    let seeds = match arguments.num_seeds {
        1 => String::new(),
        seeds => format!(" Mean and standard deviation over {seeds} seeds."),
    };
    let text = format!(
        "{} pictures per model, of subjects that no model was trained on: the prompts are captions \
         of held-out pictures. Brightness is the mean of all pixel values, 0 black to 1 white. The \
         distance is the kernel distance (KID's estimator) between features of the drawn and of {} \
         real pictures; it compares only models in this table.{seeds}",
        arguments.num_pictures,
        heldout.pictures.len()
    );
    Finding {
        title: "Does it draw what the prompt says?".into(),
        text: vec![text],
        picture: None,
        table: Some(Table {
            columns: COLUMNS.map(str::to_owned).to_vec(),
            rows,
        }),
    }
}

fn percent(shares: &[f64]) -> String {
    let percents: Vec<f64> = shares.iter().map(|share| 100.0 * share).collect();
    format!("{} %", mean_and_spread(&percents, 0))
}

/// The mean, and for several numbers their standard deviation.
fn mean_and_spread(values: &[f64], digits: usize) -> String {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    if values.len() < 2 {
        return format!("{mean:.digits$}");
    }
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let deviation = (squares / (count - 1.0)).sqrt();
    format!("{mean:.digits$} ± {deviation:.digits$}")
}
