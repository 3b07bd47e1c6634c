//! `rectiflow inspect`: what is in a packed data set, and whether it is still what was written.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use half::f16;
use rectiflow_annotate::caption::statistics::Statistics;
use rectiflow_data::{
    Split,
    amplification::amplification,
    annotation::Status,
    batch::Source,
    contact_sheet::ContactSheet,
    dataset::Dataset,
    loader::Loader,
    order::{Amount, Mode, RankOf},
    overflow::Overflow,
    picture::Picture,
    prompt::{self, PromptSettings},
    rng::{Purpose, Rng},
    token::Cut,
};
use rectiflow_sdxl::{
    model::{Component, OpenOptions},
    sample::decode,
    vae::Vae,
};
use rectiflow_train::{
    components::Components,
    generate::pictures,
    recipe::{Checked, Recipe},
};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::terminal::{
    answer::Answer,
    base::BaseArg,
    captions::describe_modes,
    numbers::{bytes, grouped, short, table},
    progress::Progress,
};

/// Show what is in a packed data set: buckets, counts, prompts, pictures; check that no byte has
/// changed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder that `rectiflow prep` wrote, or the URL of a copy of it: s3://bucket/prefix,
    /// gs://, az://, http(s)://.
    dataset: PathBuf,
    /// Read everything and compare it with its checksums; exit with 1 if anything is damaged.
    #[arg(long)]
    verify: bool,
    /// Show N prompts as the model reads them, and where those that are too long are cut.
    #[arg(long, value_name = "N", default_value_t = 0)]
    prompts: usize,
    /// Count captions by where they come from: lengths in tokens and chunks, how many are cut, and
    /// how they begin.
    #[arg(long)]
    captions: bool,
    /// Draw prompts at the rates of this recipe's first data set, and show how well its batches
    /// separate long and short prompts and how often its order reads each byte.
    #[arg(long, value_name = "RECIPE")]
    recipe: Option<PathBuf>,
    /// Override a key of that recipe, e.g. --set data.prompt.dropped=0. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", requires = "recipe")]
    overrides: Vec<String>,
    /// Decode a few pictures of each bucket into this PNG file.
    #[arg(long, value_name = "FILE.png", requires = "vae")]
    sheet: Option<PathBuf>,
    /// The VAE for --sheet: its folder, a diffusers model folder, a single-file checkpoint or a
    /// training checkpoint.
    #[arg(long)]
    vae: Option<PathBuf>,
    #[command(flatten)]
    base: BaseArg,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let recipe = match &args.recipe {
        Some(path) => Some(Recipe::load(path, &args.overrides)?),
        None => None,
    };
    let dataset = Arc::new(Dataset::open(&args.dataset)?);
    let settings = match &recipe {
        Some(recipe) => recipe.recipe.data[0].prompt.clone(),
        None => PromptSettings::default(),
    };
    let drawn = draw_prompts(&dataset, &settings, args.prompts)?;
    let prompts = &drawn.prompts;

    let mut text = describe(&args.dataset, &dataset);
    if let Some(recipe) = &recipe {
        text += &describe_order(&dataset, &settings, recipe)?;
    }
    text += &listed(&drawn, settings.cut);
    let captions = match args.captions {
        true => Some(statistics(&dataset)?.modes()),
        false => None,
    };
    if let Some(captions) = &captions {
        text += &format!("\n\n{}", describe_modes(captions));
    }
    if let (Some(sheet), Some(vae)) = (&args.sheet, &args.vae) {
        draw_sheet(&dataset, vae, &args.base)?.write_png(sheet, &[])?;
        text += &format!("\n\npictures: {}", sheet.display());
    }

    let mut damage = Vec::new();
    if args.verify {
        damage = verify(&dataset);
        text += &format!("\n\n{}", verdict(&dataset, &damage));
    }
    let mut json = as_json(args, &dataset, prompts, &damage);
    json["overflows"] = json!(overflows(prompts, settings.cut));
    json["origins"] = json!(drawn.origins);
    json["captions"] = json!(captions);
    let answer = Answer::done(text, json);
    Ok(if damage.is_empty() {
        answer
    } else {
        answer.failed()
    })
}

/// The prompts of some rows, and where each comes from.
#[derive(Debug, Default)]
struct Drawn {
    prompts: Vec<String>,
    origins: Vec<String>,
}

/// The drawn prompts, a line each, with where it comes from; one that is too long is followed by
/// where it is cut.
fn listed(drawn: &Drawn, cut: Cut) -> String {
    let prompts = &drawn.prompts;
    if prompts.is_empty() {
        return String::new();
    }
    let mut text = "\n\nprompts, one draw each".to_owned();
    for (prompt, origin) in prompts.iter().zip(&drawn.origins) {
        text += &format!("\n[{origin}] ");
        text += if prompt.is_empty() {
            "(empty)"
        } else {
            prompt.as_str()
        };
        if let Some(overflow) = Overflow::of(prompt, cut) {
            text += &format!("\n  [{}]", overflow.describe(prompt));
        }
    }
    text
}

/// The prompts that are too long, by number from 0, with where they are cut.
fn overflows(prompts: &[String], cut: Cut) -> BTreeMap<usize, Overflow> {
    let mut overflows = BTreeMap::new();
    for (number, prompt) in prompts.iter().enumerate() {
        if let Some(overflow) = Overflow::of(prompt, cut) {
            overflows.insert(number, overflow);
        }
    }
    overflows
}

/// The result of `--verify` in words.
fn verdict(dataset: &Dataset, damage: &[String]) -> String {
    let objects = dataset.manifest().objects.len();
    if damage.is_empty() {
        return format!("verified: all {objects} objects are as they were written");
    }
    let lines = damage.join("\n");
    format!("damaged: {} of {objects} objects\n{lines}", damage.len())
}

/// A bucket with the rows of both splits.
struct Counts {
    size: (u32, u32),
    train: u64,
    test: u64,
}

impl Counts {
    fn as_json(&self) -> Value {
        let (width_px, height_px) = self.size;
        json!({
            "width_px": width_px,
            "height_px": height_px,
            "train": self.train,
            "test": self.test,
        })
    }
}

/// All buckets, the fullest first.
fn counts(dataset: &Dataset) -> Vec<Counts> {
    let mut counts = Vec::new();
    for size in &dataset.manifest().buckets {
        counts.push(Counts {
            size: (size.width_px, size.height_px),
            train: 0,
            test: 0,
        });
    }
    for shape in dataset.buckets(Split::Train) {
        counts[shape.bucket as usize].train = shape.num_rows;
    }
    for shape in dataset.buckets(Split::Test) {
        counts[shape.bucket as usize].test = shape.num_rows;
    }
    counts.sort_by_key(|counts| Reverse(counts.train + counts.test));
    counts
}

fn describe(path: &Path, dataset: &Dataset) -> String {
    let manifest = dataset.manifest();
    let codec = &manifest.codec;
    let counts = counts(dataset);
    let mut num_train = 0;
    let mut num_test = 0;
    let mut rows = vec![["bucket", "train", "test"].map(str::to_owned).to_vec()];
    for bucket in &counts {
        let (width, height) = bucket.size;
        num_train += bucket.train;
        num_test += bucket.test;
        rows.push(vec![
            format!("{width}x{height}"),
            grouped(bucket.train),
            grouped(bucket.test),
        ]);
    }
    let mut latents_bytes = 0;
    let mut text_bytes = 0;
    for object in &manifest.objects {
        latents_bytes += manifest.latents_bytes(object);
        text_bytes += object.text_bytes;
    }
    format!(
        "{}: {} training and {} test pictures in {} buckets, \
         {} objects, {} of latents, {} of text\n\
         VAE: {} (scaling factor {}, 1/{} of the size, {} channels, BLAKE3 {})\n\
         identity: {}\n\n{}",
        path.display(),
        grouped(num_train),
        grouped(num_test),
        counts.len(),
        manifest.objects.len(),
        bytes(latents_bytes),
        bytes(text_bytes),
        codec.vae,
        codec.scaling_factor,
        codec.down_factor,
        codec.channels,
        codec.hash.get(..16).unwrap_or(&codec.hash),
        dataset.identity(),
        table(&rows)
    )
}

fn as_json(args: &Args, dataset: &Dataset, prompts: &[String], damage: &[String]) -> Value {
    let counts = counts(dataset);
    let buckets: Vec<Value> = counts.iter().map(Counts::as_json).collect();
    json!({
        "dataset": args.dataset,
        "identity": dataset.identity(),
        "codec": dataset.manifest().codec,
        "num_train": counts.iter().map(|c| c.train).sum::<u64>(),
        "num_test": counts.iter().map(|c| c.test).sum::<u64>(),
        "num_objects": dataset.manifest().objects.len(),
        "buckets": buckets,
        "prompts": prompts,
        "verified": args.verify,
        "damage": damage,
    })
}

/// The damaged objects, a line each.
fn verify(dataset: &Dataset) -> Vec<String> {
    let objects = &dataset.manifest().objects;
    let mut progress = Progress::new("verify", "objects", 0, objects.len() as u64);
    let mut damage = Vec::new();
    for (index, object) in objects.iter().enumerate() {
        damage.extend(
            dataset
                .verify_object(index)
                .err()
                .map(|error| error.to_string()),
        );
        progress.set(index as u64 + 1, &object.latents);
    }
    progress.finish();
    damage
}

/// Prompts of the first rows of each bucket in turn; rows are in random order.
fn draw_prompts(
    dataset: &Dataset,
    settings: &PromptSettings,
    count: usize,
) -> anyhow::Result<Drawn> {
    let buckets = if count == 0 {
        Vec::new()
    } else {
        dataset.buckets(Split::Train)
    };
    let each = count.div_ceil(buckets.len().max(1));
    let mut drawn = Drawn::default();
    for shape in buckets {
        let records = dataset.records(Split::Train, shape.bucket)?;
        for record in records.iter().take(each) {
            let mut rng = Rng::keyed(0, Purpose::Prompt, &[record.id.0, 0]);
            let prompt = prompt::draw(record, settings, &mut rng);
            drawn
                .origins
                .push(prompt::origin(record, &prompt).to_owned());
            drawn.prompts.push(prompt);
        }
    }
    drawn.prompts.truncate(count);
    drawn.origins.truncate(count);
    Ok(drawn)
}

/// The captions of both splits by their sources.
fn statistics(dataset: &Dataset) -> anyhow::Result<Statistics> {
    let mut counted = Statistics::default();
    for split in [Split::Train, Split::Test] {
        for shape in dataset.buckets(split) {
            for record in dataset.records(split, shape.bucket)? {
                for (number, caption) in record.captions.iter().enumerate() {
                    let source = record.caption_sources.get(number);
                    let source = source.map_or(prompt::OWN_SOURCE, String::as_str);
                    counted.add(source, Status::Ok, caption);
                }
            }
        }
    }
    Ok(counted)
}

/// Steps over which the shares of mixed and padded micro-batches are counted.
const SHARE_STEPS: u64 = 100;

/// The recipe's order on this data set: steps, mixed and padded shares, bytes read.
fn describe_order(
    dataset: &Arc<Dataset>,
    settings: &PromptSettings,
    recipe: &Checked,
) -> anyhow::Result<String> {
    let source = Source {
        dataset: dataset.clone(),
        prompt: settings.clone(),
        amount: Amount::Repeats(1.0),
    };
    let loader = Loader::new(vec![source], recipe.order.clone(), RankOf::ONLY)?;
    let shares = loader.chunk_shares(SHARE_STEPS)?;
    let percent = |share: f64| short(100.0 * share, 3);
    let mut text = format!(
        "\n\nbatches of this recipe: {}% mix prompts of different length, {}% of their chunks \
         are padding",
        percent(shares.mixed_share()),
        percent(shares.padded_share())
    );
    let mode = loader.order().settings().mode;
    if mode.has_windows() {
        let factor = |epochs: std::ops::Range<u64>| {
            let factors = epochs.map(|epoch| amplification(loader.order(), epoch));
            short(factors.fold(0.0, f64::max), 5)
        };
        text += &match mode {
            Mode::Owned => format!(
                "\nowned mode: the first epoch fetches {} times the bytes that it needs, later \
                 ones {} or less",
                factor(0..1),
                factor(1..3)
            ),
            _ => format!(
                "\nwindow mode: an epoch fetches {} times the bytes that it needs",
                factor(0..2)
            ),
        };
        text += &format!(
            "; one rank reads ahead {} of them",
            bytes(loader.read_ahead_bytes())
        );
    }
    Ok(text)
}

/// Number of buckets, and pictures of each, on a sheet.
const SHEET_BUCKETS: usize = 12;
const SHEET_PICTURES: u64 = 6;

/// The first pictures of the fullest buckets, decoded by the VAE.
fn draw_sheet(dataset: &Dataset, vae: &Path, base: &BaseArg) -> anyhow::Result<Picture> {
    let place = Components::find_one(Component::Vae, vae, &base.bases())?;
    let vae = Vae::open(&place, &OpenOptions::default())?;
    let mut shapes = dataset.buckets(Split::Train);
    shapes.sort_by_key(|shape| Reverse(shape.num_rows));
    let columns = shapes
        .first()
        .context("the data set has no training pictures")?
        .num_rows
        .min(SHEET_PICTURES);
    // Every row of the sheet is full; buckets with fewer pictures are left out.
    shapes.retain(|shape| shape.num_rows >= columns);
    shapes.truncate(SHEET_BUCKETS);
    let mut drawn = Vec::new();
    for shape in &shapes {
        let latents = first_latents(dataset, shape.bucket, columns)? * vae.config.scaling_factor;
        drawn.extend(pictures(&decode(&vae, &latents)?));
    }
    let labels: Vec<String> = shapes
        .iter()
        .map(|s| format!("{}x{} {} rows", s.width_px, s.height_px, s.num_rows))
        .collect();
    Ok(ContactSheet {
        row_labels: &labels,
        column_labels: &[],
        columns: columns as usize,
        pictures: &drawn,
    }
    .draw())
}

/// The latents of the first `rows` training rows of a bucket, unscaled. `[rows, C, h, w]`
fn first_latents(dataset: &Dataset, bucket: u32, rows: u64) -> anyhow::Result<Tensor> {
    let [channels, height, width] = dataset.latent_shape(bucket);
    let mut latents = vec![f16::ZERO; rows as usize * channels * height * width];
    let numbers: Vec<u64> = (0..rows).collect();
    dataset.read_latents(Split::Train, bucket, &numbers, &mut latents)?;
    let shape = [rows as i64, channels as i64, height as i64, width as i64];
    Ok(Tensor::from_slice(&latents)
        .view(shape)
        .to_kind(Kind::Float))
}
