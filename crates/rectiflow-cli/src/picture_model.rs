//! The arguments that say how a model in an ONNX file looks at pictures, and the model opened by
//! them.

use std::{
    env,
    path::{Path, PathBuf},
    thread,
};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use rectiflow_annotate::{
    error::Error,
    onnx::{
        input::{Layout, Said},
        model::{Choices, Device, Model},
        preparation::{Channels, Filter, Fit, Preparation, Preset},
        runtime::{Places, VARIABLE},
    },
};

use crate::terminal::{answer::Misuse, cache_folder::cache_folder};

/// How a model looks at pictures.
#[derive(Debug, clap::Args)]
pub(crate) struct LookArgs {
    /// How pictures become the model's input: `wd` pads to a white square, blue first, 0 to 255;
    /// `imagenet` and `clip` crop and normalise with these sets' mean and deviation; `siglip`
    /// stretches, -1 to 1; `unit` stretches, 0 to 1. The options below change parts of it. Default:
    /// `wd` for taggers, `siglip` for scores.
    #[arg(long, value_parser = named(&Preset::ALL))]
    preset: Option<Preset>,
    /// What happens to pictures of another shape than the input.
    #[arg(long, value_parser = named(&Fit::ALL))]
    fit: Option<Fit>,
    /// Part of a side that a crop leaves: 0.875 resizes to 256 for an input of 224.
    #[arg(long, value_name = "SHARE")]
    crop_share: Option<f64>,
    /// Filter of the resize, as Pillow computes it.
    #[arg(long, value_parser = named(&Filter::ALL))]
    filter: Option<Filter>,
    /// Order of the channels.
    #[arg(long, value_parser = named(&Channels::ALL))]
    channels: Option<Channels>,
    /// Factor of the values, which are 0 to 255.
    #[arg(long, allow_negative_numbers = true)]
    scale: Option<f32>,
    /// Subtracted after that: one number, or one for each of the model's channels, as 0.4,0.5,0.5.
    #[arg(long, value_name = "NUMBERS", value_parser = three, allow_hyphen_values = true)]
    mean: Option<[f32; 3]>,
    /// Divisor after that: one number, or one for each channel.
    #[arg(long, value_name = "NUMBERS", value_parser = three)]
    std: Option<[f32; 3]>,
    /// Size of the input in pixels, WIDTHxHEIGHT, where the model leaves it open.
    #[arg(long, value_parser = size)]
    size: Option<(u32, u32)>,
    /// Where the channels are, if the model leaves it open.
    #[arg(long, value_parser = named(&Layout::ALL))]
    layout: Option<Layout>,
    /// Name of the output that is read. Default: the first.
    #[arg(long, value_name = "NAME")]
    output: Option<String>,
    /// Pictures at a time, if the model takes any number.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// What computes: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Device,
}

impl LookArgs {
    /// The preparation, from this preset on if no other is named.
    ///
    /// # Errors
    /// [`Misuse`] for one that cannot work.
    pub(crate) fn preparation(&self, default: Preset) -> anyhow::Result<Preparation> {
        let usual = self.preset.unwrap_or(default).preparation();
        let preparation = Preparation {
            fit: self.fit.unwrap_or(usual.fit),
            crop_share: self.crop_share.unwrap_or(usual.crop_share),
            filter: self.filter.unwrap_or(usual.filter),
            channels: self.channels.unwrap_or(usual.channels),
            scale: self.scale.unwrap_or(usual.scale),
            mean: self.mean.unwrap_or(usual.mean),
            std: self.std.unwrap_or(usual.std),
        };
        match preparation.problem() {
            Some(problem) => Err(Misuse(problem).into()),
            None => Ok(preparation),
        }
    }

    /// Opens a model.
    ///
    /// # Errors
    /// Those of [`Model::open`].
    pub(crate) fn open(&self, path: &Path) -> Result<Model, Error> {
        let choices = Choices {
            input: Said {
                size: self.size,
                layout: self.layout,
                batch: self.batch as usize,
            },
            output: self.output.clone(),
            device: self.device,
            threads: thread::available_parallelism().map_or(1, usize::from),
        };
        Model::open(path, &choices, &places())
    }

    /// What decides the model's input and output, besides the preparation.
    pub(crate) fn settings(&self) -> String {
        let Self {
            size,
            layout,
            output,
            ..
        } = self;
        format!("size {size:?}, layout {layout:?}, output {output:?}")
    }
}

/// Where ONNX Runtime is looked for.
fn places() -> Places {
    let program = env::current_exe().ok();
    Places {
        named: env::var_os(VARIABLE)
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
        beside: program.and_then(|program| program.parent().map(Path::to_owned)),
        cache: cache_folder(),
    }
}

/// Values with names, as the help lists them.
pub(crate) fn named<T: Copy + Send + Sync + 'static>(
    all: &'static [(&'static str, T)],
) -> impl TypedValueParser<Value = T> {
    let names: Vec<&'static str> = all.iter().map(|&(name, _)| name).collect();
    PossibleValuesParser::new(names).map(|name| {
        let found = all.iter().find(|&&(other, _)| other == name);
        found
            .expect("the parser lets only names of the list pass")
            .1
    })
}

/// One number for all channels, or one for each.
fn three(text: &str) -> Result<[f32; 3], String> {
    let mut numbers = Vec::new();
    for part in text.split(',') {
        let number = part.trim().parse();
        numbers.push(number.map_err(|_| format!("{part:?} is no number"))?);
    }
    match numbers[..] {
        [number] => Ok([number; 3]),
        [first, second, third] => Ok([first, second, third]),
        _ => Err(format!(
            "expected one number or three, found {}",
            numbers.len()
        )),
    }
}

/// WIDTHxHEIGHT.
fn size(text: &str) -> Result<(u32, u32), String> {
    let sides = text.split_once('x').and_then(|(width, height)| {
        let side = |side: &str| side.parse().ok().filter(|&side: &u32| side > 0);
        Some((side(width)?, side(height)?))
    });
    sides.ok_or_else(|| "expected WIDTHxHEIGHT in pixels, such as 448x448".to_owned())
}

/// cpu, cuda or cuda:N.
fn device(text: &str) -> Result<Device, String> {
    match text {
        "cpu" => Ok(Device::Cpu),
        "cuda" => Ok(Device::Cuda(0)),
        _ => match text.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(number)) => Ok(Device::Cuda(number)),
            _ => Err("expected cpu, cuda or cuda:N".to_owned()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_options_are_read() {
        assert_eq!(three("0.5"), Ok([0.5; 3]));
        assert_eq!(three("1, 2,-3"), Ok([1.0, 2.0, -3.0]));
        assert_eq!(
            three("1,2"),
            Err("expected one number or three, found 2".to_owned())
        );
        assert!(three("1,x,2").is_err() && three("").is_err());
        assert_eq!(size("448x320"), Ok((448, 320)));
        assert!(size("448").is_err() && size("0x3").is_err() && size("1x-3").is_err());
        assert_eq!(device("cuda:3"), Ok(Device::Cuda(3)));
        assert_eq!(device("cuda"), Ok(Device::Cuda(0)));
        assert!(device("gpu").is_err() && device("cuda:x").is_err());
    }
}
