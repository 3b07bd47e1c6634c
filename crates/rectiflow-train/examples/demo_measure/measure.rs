//! What a model's pictures of the held-out captions are like, in numbers.

use rectiflow_data::picture::Picture;
use rectiflow_sdxl::{kid::kernel_distance, vae::Vae};
use rectiflow_train::{
    Result,
    findings::{Finding, Table},
};
use serde::Serialize;

use crate::{
    Contender,
    arguments::Arguments,
    heldout::{HeldOut, features},
    keep, settings,
};

/// Width of the border that is taken for background.
const BORDER_PX: u32 = 4;
/// Noise of different seeds shares nothing: each batch of a seed counts up from here.
const SEED_STRIDE: u64 = 1000;

/// A model's numbers, one entry a seed.
#[derive(Debug, Serialize)]
pub(crate) struct Measured {
    pub(crate) label: String,
    /// Share of pictures whose border is nearest to the colour that was asked for.
    pub(crate) background_right: Vec<f64>,
    /// Mean brightness of pictures asked for on black, 0 to 1.
    pub(crate) on_black: Vec<f64>,
    /// Mean brightness of pictures asked for on white, 0 to 1.
    pub(crate) on_white: Vec<f64>,
    /// Mean brightness of the border, asked for on black.
    pub(crate) border_on_black: Vec<f64>,
    /// Mean brightness of the border, asked for on white.
    pub(crate) border_on_white: Vec<f64>,
    /// Kernel distance to the held-out pictures.
    pub(crate) distance: Vec<f64>,
}

impl Measured {
    pub(crate) fn of(contender: &Contender, heldout: &HeldOut, vae: &Vae, arguments: &Arguments) -> Result<Self> {
        let mut measured = Self {
            label: contender.label.clone(),
            background_right: vec![],
            on_black: vec![],
            on_white: vec![],
            border_on_black: vec![],
            border_on_white: vec![],
            distance: vec![],
        };
        let chosen = spread(heldout.captions.len(), arguments.num_pictures);
        let prompts: Vec<String> = chosen.iter().map(|&index| heldout.captions[index].clone()).collect();
        let asked: Vec<&str> = chosen.iter().map(|&index| heldout.backgrounds[index].as_str()).collect();
        for seed in 0..arguments.num_seeds {
            let settings = rectiflow_sdxl::sample::SampleSettings { seed: seed * SEED_STRIDE, ..settings() };
            let pictures = contender.draw(&prompts, &settings, &format!("seed {seed}"))?;
            measured.add(&pictures, &asked, heldout);
            if let Some(folder) = &arguments.keep {
                keep(&folder.join(&contender.label).join(format!("seed-{seed}")), &pictures)?;
            }
            measured.distance.push(kernel_distance(&features(vae, &pictures)?, &heldout.features));
        }
        Ok(measured)
    }

    fn add(&mut self, pictures: &[Picture], asked: &[&str], heldout: &HeldOut) {
        let right = pictures.iter().zip(asked).filter(|(p, asked)| heldout.nearest_background(border(p)) == **asked);
        self.background_right.push(right.count() as f64 / pictures.len() as f64);
        let mean = |name: &str, value: &dyn Fn(&Picture) -> f64| {
            let on: Vec<f64> = pictures.iter().zip(asked).filter(|(_, a)| **a == name).map(|(p, _)| value(p)).collect();
            on.iter().sum::<f64>() / on.len().max(1) as f64
        };
        let border = |picture: &Picture| border(picture).iter().sum::<f64>() / (3.0 * 255.0);
        self.on_black.push(mean("black", &brightness));
        self.on_white.push(mean("white", &brightness));
        self.border_on_black.push(mean("black", &border));
        self.border_on_white.push(mean("white", &border));
    }
}

/// `count` numbers below `len`, evenly apart; repeated where there are not so many.
fn spread(len: usize, count: usize) -> Vec<usize> {
    (0..count).map(|index| if count <= len { index * len / count } else { index % len }).collect()
}

/// Mean of all pixels' three values, 0 to 1.
pub(crate) fn brightness(picture: &Picture) -> f64 {
    let sum: f64 = picture.pixels().iter().map(|&value| f64::from(value)).sum();
    sum / (255.0 * picture.pixels().len() as f64)
}

/// Mean colour of the outermost pixels, 0 to 255.
pub(crate) fn border(picture: &Picture) -> [f64; 3] {
    let (width, height) = (picture.width_px(), picture.height_px());
    let is_border = |x: u32, y: u32| x.min(width - 1 - x) < BORDER_PX || y.min(height - 1 - y) < BORDER_PX;
    let (mut sum, mut count) = ([0.0; 3], 0.0);
    for (x, y) in (0..height).flat_map(|y| (0..width).map(move |x| (x, y))).filter(|&(x, y)| is_border(x, y)) {
        sum.iter_mut().zip(picture.at(x, y)).for_each(|(sum, value)| *sum += f64::from(value));
        count += 1.0;
    }
    sum.map(|value| value / count)
}

/// The numbers of all models as a table.
pub(crate) fn finding(measured: &[Measured], heldout: &HeldOut, arguments: &Arguments) -> Finding {
    let columns = [
        "model",
        "background as asked",
        "brightness, asked on black",
        "asked on white",
        "border, asked on black",
        "asked on white",
        "distance to real pictures",
    ];
    let mut rows: Vec<Vec<String>> = measured
        .iter()
        .map(|model| {
            vec![
                model.label.clone(),
                percent(&model.background_right),
                mean_and_spread(&model.on_black, 2),
                mean_and_spread(&model.on_white, 2),
                mean_and_spread(&model.border_on_black, 2),
                mean_and_spread(&model.border_on_white, 2),
                mean_and_spread(&model.distance, 3),
            ]
        })
        .collect();
    let [black, white] = ["black", "white"].map(|name| format!("{:.2}", heldout.brightness_on(name)));
    let border = |name: &str| heldout.palette.get(name).map_or(0.0, |colour| colour.iter().sum::<f64>() / 765.0);
    let [border_black, border_white] = ["black", "white"].map(|name| format!("{:.2}", border(name)));
    rows.push(vec!["the real pictures".into(), "100 %".into(), black, white, border_black, border_white, "0".into()]);
    let seeds = match arguments.num_seeds {
        1 => String::new(),
        seeds => format!(" Mean and standard deviation over {seeds} seeds."),
    };
    Finding {
        title: "Does it draw what it is told?".into(),
        text: vec![format!(
            "{} pictures a model, of subjects that none of them was trained on: the captions of held-out pictures. \
             Brightness is the mean of all pixel values, 0 black to 1 white. The distance is the kernel distance (KID's \
             estimator) between features of the drawn and of {} real pictures; it compares models here and nothing \
             else.{seeds}",
            arguments.num_pictures,
            heldout.pictures.len()
        )],
        picture: None,
        table: Some(Table { columns: columns.map(str::to_owned).to_vec(), rows }),
    }
}

fn percent(shares: &[f64]) -> String {
    let percents: Vec<f64> = shares.iter().map(|share| 100.0 * share).collect();
    format!("{} %", mean_and_spread(&percents, 0))
}

/// The mean, and where there are several numbers their standard deviation.
fn mean_and_spread(values: &[f64], digits: usize) -> String {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    if values.len() < 2 {
        return format!("{mean:.digits$}");
    }
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
    format!("{mean:.digits$} ± {:.digits$}", variance.sqrt())
}
