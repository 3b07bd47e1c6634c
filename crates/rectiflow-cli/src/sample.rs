//! `rectiflow sample`: prompts to pictures, each a PNG that carries its settings, and all of them
//! as a labelled grid.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use rectiflow_data::{
    contact_sheet::ContactSheet, overflow::Overflow, picture::Picture, text_file, token::Cut,
};
use rectiflow_sdxl::{
    cond::Cond,
    drawing::{Drawing, DrawnText},
    flow::Parameterization,
    model::OpenOptions,
    sample::{SampleSettings, SizeConditioning, Texts, decode, sample_latents},
    sampler::Sampler,
    schedule::Schedule,
    unet::UNetPart,
};
use rectiflow_train::{generate::pictures, recipe::parse_device, staged_model::StagedModel};
use serde_json::json;
use tch::Device;

use crate::{
    picture_texts::{
        Elsewhere, ModelNames, PngTexts, drawn, of_prompt, picture_texts, sheet_texts,
    },
    report::run_record::{SAMPLES_FILE, Sampled},
    terminal::{
        answer::{Answer, Misuse},
        base::BaseArg,
        dtype::ComputeDtype,
        progress::Progress,
    },
};

/// Draw pictures with a model: one PNG each, with its settings inside, and grid.png with all of
/// them.
///
/// A PNG carries AUTOMATIC1111's `parameters` and a ComfyUI workflow that draws it again: drop it
/// on ComfyUI's page. So does the grid, if there is one prompt. A warning says why ComfyUI would
/// draw another picture.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A diffusers model folder, a single-file checkpoint or a training checkpoint.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    base: BaseArg,
    /// The prompt. Repeat it for several rows of the grid.
    #[arg(long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// A text file with one prompt a line, drawn after those of --prompt.
    #[arg(long = "prompts", value_name = "FILE")]
    file: Option<PathBuf>,
    /// Negative prompt; it has an effect if --cfg is above 1.
    #[arg(long, default_value = "", hide_default_value = true)]
    negative: String,
    /// Steps of the sampler, 1 to 1000.
    #[arg(long, default_value_t = SampleSettings::default().steps)]
    steps: usize,
    /// The sampler: euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, uni_pc or ddim.
    #[arg(long, default_value_t = SampleSettings::default().sampler)]
    sampler: Sampler,
    /// The schedule, which sets the noise level of each step; `rectiflow schedule` shows it.
    #[arg(long, default_value_t = SampleSettings::default().schedule)]
    schedule: Schedule,
    /// How far the noise levels are shifted towards noise; 3 to 6 is the useful range. Flow models
    /// only. Default: the shift of the model's scheduler or header, if it has one, otherwise 6.
    #[arg(long, allow_negative_numbers = true)]
    shift: Option<f64>,
    /// Guidance scale (CFG); 1 turns guidance off.
    #[arg(long, default_value_t = SampleSettings::default().cfg, allow_negative_numbers = true)]
    cfg: f64,
    /// CFG rescale, 0 to 1: how far the contrast of the guided prediction is pulled back to that of
    /// the conditional one.
    #[arg(long, default_value_t = SampleSettings::default().cfg_rescale, allow_negative_numbers = true)]
    cfg_rescale: f64,
    /// Perturbed-attention guidance (PAG); 0 turns it off, 3 is usual together with --cfg 3. Costs
    /// one more UNet pass per step.
    #[arg(long, default_value_t = SampleSettings::default().pag_scale, allow_negative_numbers = true)]
    pag_scale: f64,
    /// The blocks whose attention PAG perturbs: mid, as in ComfyUI, or levels of the UNet such as
    /// down.2 or up.0.
    #[arg(
        long,
        default_value = "mid",
        value_delimiter = ',',
        value_name = "PARTS"
    )]
    pag_parts: Vec<UNetPart>,
    /// Seed of the noise; the same seed, settings and model draw the same pictures.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Width and height in pixels, multiples of 8.
    #[arg(long, default_value = "1024x1024", value_name = "WxH", value_parser = parse_size)]
    size: (u32, u32),
    /// Size conditioning: the picture's size before cropping, and the crop's left and top. Default:
    /// --size, uncropped.
    #[arg(long, value_name = "WxH[+LEFT+TOP]", value_parser = parse_original)]
    original_size: Option<Original>,
    /// Pictures per prompt, drawn as one batch.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// What the model predicts (flow, eps or v), if neither its metadata nor its scheduler says so.
    #[arg(long)]
    parameterization: Option<Parameterization>,
    /// Compute dtype, whatever the files hold; bf16 takes half the memory.
    #[arg(long, value_enum, default_value_t = ComputeDtype::Fp32)]
    dtype: ComputeDtype,
    /// Map weights from their files instead of copying them, if a CPU computes in the file's dtype:
    /// a little over half the memory, an eighth slower.
    #[arg(long)]
    low_memory: bool,
    /// Device: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: Device,
    /// The folder to write to; files of the same name are replaced.
    #[arg(long, default_value = "samples", value_name = "DIR")]
    out: PathBuf,
}

/// What the model at `path` predicts: as the argument says, or else as the model itself says. What
/// a single file is taken for is logged in one line.
pub(crate) fn parameterization_of(
    argument: Option<Parameterization>,
    model: &StagedModel,
    path: &Path,
) -> anyhow::Result<Parameterization> {
    if let Some(known) = model.prediction.settled(argument)? {
        if argument.is_none()
            && path.is_file()
            && let Some(line) = model.prediction.line()
        {
            tracing::info!("{}: {line}", path.display());
        }
        return Ok(known);
    }
    let path = path.display();
    Err(Misuse(format!(
        "{path} does not say what it predicts: add --parameterization flow, eps or v"
    ))
    .into())
}

pub(crate) fn parse_size(text: &str) -> Result<(u32, u32), String> {
    let expected =
        || format!("expected width x height in pixels, such as 1024x1024, found \"{text}\"");
    let (width, height) = text.split_once('x').ok_or_else(expected)?;
    Ok((
        width.parse().map_err(|_| expected())?,
        height.parse().map_err(|_| expected())?,
    ))
}

/// The size of a picture before cropping, and its crop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Original {
    size: (u32, u32),
    crop_left_px: u32,
    crop_top_px: u32,
}

fn parse_original(text: &str) -> Result<Original, String> {
    let expected = || {
        format!("expected width x height + left + top, such as 1536x1024+128+0, found \"{text}\"")
    };
    let mut parts = text.split('+');
    let size = parse_size(parts.next().unwrap_or_default()).map_err(|_| expected())?;
    let crops: Vec<u32> = parts
        .map(|part| part.parse().map_err(|_| expected()))
        .collect::<Result<_, _>>()?;
    let [crop_left_px, crop_top_px] = match crops[..] {
        [] => [0, 0],
        [left, top] => [left, top],
        _ => return Err(expected()),
    };
    Ok(Original {
        size,
        crop_left_px,
        crop_top_px,
    })
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    // Everything that can be refused is refused before a weight is read.
    let prompts = args.all_prompts()?;
    let mut settings = args.settings();
    settings.check()?;
    let model = StagedModel::find(&args.model, &args.base.bases(), &args.open_options())?;
    settings.shift = args.shift.or(model.flow_shift).unwrap_or(settings.shift);
    let parameterization = parameterization_of(args.parameterization, &model, &args.model)?;
    settings.latent_shape(model.vae_config())?;
    settings.sigmas(parameterization)?;
    fs::create_dir_all(&args.out)
        .with_context(|| format!("creating the folder {}", args.out.display()))?;

    let names = ModelNames::of(&args.model);
    let template = args.drawing(&settings, parameterization, &names);
    let elsewhere = Elsewhere::of(&template, &prompts);
    elsewhere.log();
    let total = (prompts.len() * settings.steps) as u64;
    let mut progress = Progress::new("sample", "steps", 0, total);
    let encoded = args.encode(&model, &prompts, &mut progress)?;
    let drawn = args.draw(&model, &encoded, &prompts, &template, &mut progress)?;
    progress.finish();

    // The grid and the list of pictures.
    let grid = args.out.join("grid.png");
    let sheet = draw_grid(&prompts, args.batch, &drawn.pictures);
    write_png(&sheet, &grid, &sheet_texts(&template, &prompts))?;
    let list = args.out.join(SAMPLES_FILE);
    let samples = drawn.samples;
    fs::write(&list, serde_json::to_string_pretty(&samples)?)
        .with_context(|| format!("{}", list.display()))?;
    let mut json = json!({ "out": args.out, "grid": grid, "samples": samples, "settings": settings,
        "differences": elsewhere.differences, "remarks": elsewhere.remarks });
    let mut text = format!(
        "pictures: {}, with {}",
        drawn.pictures.len(),
        grid.display()
    );
    let mut overflows = Vec::new();
    for prompt in prompts.iter().chain([&args.negative]) {
        if let Some(overflow) = Overflow::of(prompt, Cut::Plain) {
            text += &format!("\na prompt of {}", overflow.describe(prompt));
            overflows.push(json!({ "prompt": prompt, "cut": overflow }));
        }
    }
    json["overflows"] = overflows.into();
    Ok(Answer::done(text, json))
}

/// The conditioning of all prompts, and of the negative prompt.
struct Encoded {
    conds: Vec<Cond>,
    uncond: Cond,
}

/// All pictures in the order of the prompts, and the files of each prompt.
#[derive(Default)]
struct Drawn {
    pictures: Vec<Picture>,
    samples: Vec<Sampled>,
}

impl Args {
    fn all_prompts(&self) -> anyhow::Result<Vec<String>> {
        let mut prompts = self.prompts.clone();
        if let Some(path) = &self.file {
            let text = text_file::read(path)?;
            prompts.extend(
                text.lines()
                    .map(str::trim)
                    .filter(|line| !line.is_empty())
                    .map(str::to_owned),
            );
        }
        if prompts.is_empty() {
            return Err(Misuse(
                "no prompt: pass --prompt TEXT, or --prompts FILE with one prompt per line".into(),
            )
            .into());
        }
        Ok(prompts)
    }

    fn settings(&self) -> SampleSettings {
        SampleSettings {
            steps: self.steps,
            sampler: self.sampler,
            schedule: self.schedule,
            cfg: self.cfg,
            cfg_rescale: self.cfg_rescale,
            pag_scale: self.pag_scale,
            pag_parts: self.pag_parts.clone(),
            seed: self.seed,
            width_px: self.size.0,
            height_px: self.size.1,
            batch: self.batch,
            size: self.original_size.map(|original| SizeConditioning {
                original_width_px: original.size.0,
                original_height_px: original.size.1,
                crop_left_px: original.crop_left_px,
                crop_top_px: original.crop_top_px,
                target_width_px: self.size.0,
                target_height_px: self.size.1,
            }),
            ..SampleSettings::default()
        }
    }

    /// The drawing of no prompt.
    fn drawing<'a>(
        &'a self,
        settings: &'a SampleSettings,
        parameterization: Parameterization,
        names: &'a ModelNames,
    ) -> Drawing<'a> {
        Drawing {
            settings,
            parameterization,
            prompt: DrawnText::default(),
            negative: drawn(&self.negative),
            model: &names.name,
            file: names.file.as_deref(),
            computed_in: self.dtype.into(),
        }
    }

    fn open_options(&self) -> OpenOptions {
        OpenOptions {
            kind: self.dtype.into(),
            device: self.device,
            map: self.low_memory,
            ..OpenOptions::default()
        }
    }

    /// The conditioning of each prompt and of the negative prompt. The text encoders are in memory
    /// only during this call.
    fn encode(
        &self,
        model: &StagedModel,
        prompts: &[String],
        progress: &mut Progress,
    ) -> anyhow::Result<Encoded> {
        progress.set(0, "loading the text encoders");
        let encoders = model.text_encoders()?;
        progress.set(0, "reading the prompts");
        let mut conds = Vec::new();
        for prompt in prompts {
            conds.push(encoders.encode(std::slice::from_ref(prompt))?);
        }
        let uncond = encoders.encode(std::slice::from_ref(&self.negative))?;
        Ok(Encoded { conds, uncond })
    }

    /// Draws the pictures of all prompts and writes each to its file. `template` is the drawing of
    /// no prompt.
    fn draw(
        &self,
        model: &StagedModel,
        encoded: &Encoded,
        prompts: &[String],
        template: &Drawing<'_>,
        progress: &mut Progress,
    ) -> anyhow::Result<Drawn> {
        progress.set(0, "loading the UNet and the autoencoder");
        let unet = model.unet()?;
        let vae = model.vae()?;
        let mut drawn = Drawn::default();
        let mut done = 0;
        for (prompt, cond) in prompts.iter().zip(&encoded.conds) {
            let uncond = &encoded.uncond;
            let texts = Texts { cond, uncond };
            let Drawing {
                settings,
                parameterization,
                ..
            } = *template;
            let config = &vae.config;
            let latents = sample_latents(
                &unet,
                config,
                parameterization,
                texts,
                settings,
                &mut |_| {
                    done += 1;
                    progress.set(done, prompt);
                },
            )?;
            let drawing = of_prompt(template, prompt);
            let mut images = Vec::new();
            for (position, picture) in pictures(&decode(&vae, &latents)?).into_iter().enumerate() {
                let number = drawn.pictures.len() + 1;
                images.push(self.write(&drawing, position, number, &picture)?);
                drawn.pictures.push(picture);
            }
            let prompt = prompt.clone();
            drawn.samples.push(Sampled { prompt, images });
        }
        Ok(drawn)
    }

    /// Writes picture `number`, counted from 1, and returns its file name.
    fn write(
        &self,
        drawing: &Drawing<'_>,
        position: usize,
        number: usize,
        picture: &Picture,
    ) -> anyhow::Result<PathBuf> {
        let name = PathBuf::from(format!("{number:03}-{}.png", slug(drawing.prompt.text)));
        write_png(
            picture,
            &self.out.join(&name),
            &picture_texts(drawing, position),
        )?;
        Ok(name)
    }
}

fn write_png(picture: &Picture, path: &Path, texts: &PngTexts) -> anyhow::Result<()> {
    let mut chunks: Vec<(&str, &str)> = Vec::new();
    for (keyword, text) in texts {
        chunks.push((keyword, text));
    }
    Ok(picture.write_png(path, &chunks)?)
}

/// Rows are prompts, columns the pictures of a batch; a batch of one is laid out as a square of
/// captioned pictures.
fn draw_grid(prompts: &[String], batch: usize, pictures: &[Picture]) -> Picture {
    let columns: Vec<String> = if batch == 1 {
        Vec::new()
    } else {
        (1..=batch).map(|n| format!("picture {n}")).collect()
    };
    ContactSheet {
        row_labels: prompts,
        column_labels: &columns,
        columns: batch,
        pictures,
    }
    .draw()
}

/// The first words of a prompt, as part of a file name.
fn slug(prompt: &str) -> String {
    let words = prompt
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty());
    let mut slug = String::new();
    for word in words {
        if slug.len() + 1 + word.len() > 40 {
            break;
        }
        if !slug.is_empty() {
            slug.push('-');
        }
        slug += &word.to_ascii_lowercase();
    }
    if slug.is_empty() {
        "picture".to_owned()
    } else {
        slug
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_width_then_height() {
        assert_eq!(parse_size("96x128"), Ok((96, 128)));
        for wrong in ["96", "96x", "x128", "96x128x3", "-96x128", "96 x 128"] {
            assert!(parse_size(wrong).unwrap_err().contains(wrong));
        }
    }

    #[test]
    fn original_sizes_may_have_a_crop() {
        let parsed = parse_original("1536x1024+128+7").unwrap();
        assert_eq!(
            parsed,
            Original {
                size: (1536, 1024),
                crop_left_px: 128,
                crop_top_px: 7
            }
        );
        assert_eq!(
            parse_original("96x128").unwrap(),
            Original {
                size: (96, 128),
                crop_left_px: 0,
                crop_top_px: 0
            }
        );
        for wrong in [
            "1536",
            "1536x1024+1",
            "1536x1024+1+2+3",
            "1536x1024+-1+2",
            "",
        ] {
            assert!(
                parse_original(wrong)
                    .unwrap_err()
                    .contains(&format!("found \"{wrong}\""))
            );
        }
    }

    #[test]
    fn file_names_begin_like_the_prompt() {
        assert_eq!(
            slug("A Red, red apple/../etc on a white background and more"),
            "a-red-red-apple-etc-on-a-white"
        );
        assert_eq!(slug("猫"), "picture");
    }
}
