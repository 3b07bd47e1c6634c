//! The life of a run, top to bottom: open, resume, loop, save.

use std::{
    env,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use rectiflow_data::{
    batch::Source, cache::DiskCache, dataset::Dataset, loader::Loader, manifest::Split, order::RankOf,
};
use rectiflow_sdxl::model::{Component, Model};

use crate::{
    checkpoint::{self, Checkpoints, Components, Frozen, Saved, Trained},
    config::{Checked, TextEncoders},
    error::{Error, Result},
    flat::FlatParameters,
    metrics::{Event, Start, StepMetrics, TestMetrics, Writer},
    model,
    optim::AdamW,
    preview::Previewer,
    state::{Position, TrainState},
    step::Stepper,
    testloss::TestTable,
    workers::Workers,
};

/// How a run was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Whether all samples of the recipe have been trained on; if not, the run was asked to stop.
    pub finished: bool,
    /// How far it is.
    pub position: Position,
    /// The last checkpoint.
    pub checkpoint: Option<PathBuf>,
}

/// Trains as the recipe says until it is done or `stop` is set; a run found in the run folder is resumed. Every event
/// is written to `metrics.jsonl` and shown to `observe`.
///
/// # Errors
/// Everything in [`Error`]; the last checkpoint is whole whatever happens.
pub fn train(checked: &Checked, stop: &AtomicBool, observe: &mut dyn FnMut(&Event)) -> Result<Outcome> {
    let run_dir = &checked.recipe.run.dir;
    fs::create_dir_all(run_dir).map_err(Error::io(run_dir))?;
    let _lock = lock(run_dir)?;
    let checkpoints = Checkpoints::open(run_dir, checked.recipe.checkpoint.keep)?;
    let sources = open_sources(checked)?;
    let base = Components::find(&checked.recipe.model.base)?;
    check_vae(checked, &base, &sources)?;
    let options = model::base_options(checked.device, &checked.random, checked.recipe.run.seed);
    let model = model::open_components(&checked.recipe.model.base, &base, &options)?;
    let parts = Parts { checked, checkpoints: &checkpoints, sources: &sources, base: &base, model: &model };
    let mut run = Run::new(parts, observe)?;
    run.start()?;
    while run.state.position.samples < checked.recipe.train.samples {
        if stop.load(Ordering::Relaxed) {
            return run.leave("interrupted");
        }
        run.step()?;
    }
    run.leave("finished")
}

/// What a run works on and does not change.
#[derive(Clone, Copy)]
struct Parts<'a> {
    checked: &'a Checked,
    checkpoints: &'a Checkpoints,
    sources: &'a [Source],
    base: &'a Components,
    model: &'a Model,
}

/// One process's work on a run.
struct Run<'a> {
    parts: Parts<'a>,
    state: TrainState,
    loader: Loader,
    stepper: Stepper<'a>,
    test: TestTable,
    previewer: Previewer,
    template: Saved,
    writer: Writer,
    observe: &'a mut dyn FnMut(&Event),
    began: Instant,
    last_saved: Option<(u64, PathBuf)>,
}

impl<'a> Run<'a> {
    fn new(parts: Parts<'a>, observe: &'a mut dyn FnMut(&Event)) -> Result<Self> {
        let Parts { checked, sources, model, .. } = parts;
        let recipe = &checked.recipe;
        let mut loader = Loader::new(sources.to_vec(), checked.order.clone(), RankOf::ONLY)?;
        if let Some(mebibytes) = recipe.run.read_ahead_mib {
            loader = loader.read_ahead(mebibytes.saturating_mul(1 << 20))?;
        }
        let trained: Vec<_> =
            trained_components(checked).map(|part| (part.folder(), model::parameters(model, part))).collect();
        let parameters = FlatParameters::adopt(&trained);
        let optimizer = AdamW::new(recipe.optimizer.clone(), &parameters.values);
        let state = TrainState { position: Position::default(), parameters, optimizer };
        let stepper = Stepper {
            model,
            objective: &checked.objective,
            device: checked.device,
            seed: recipe.run.seed,
            train_text_encoders: recipe.train.text_encoders == TextEncoders::Trained,
            clip_norm: recipe.train.clip_norm,
            text_encoder_lr_ratio: recipe.train.text_encoder_lr_ratio,
            workers: Workers::new(checked.device, recipe.train.micro_batches),
        };
        Ok(Self {
            test: TestTable::new(sources, recipe.run.seed, recipe.train.micro_batch, recipe.test.bins)?,
            previewer: Previewer::new(&recipe.preview, &recipe.run.dir),
            template: parts.template(&loader, &state)?,
            writer: Writer::open(&recipe.run.dir)?,
            began: Instant::now(),
            last_saved: None,
            parts,
            state,
            loader,
            stepper,
            observe,
        })
    }

    /// Resumes where there is a checkpoint, and measures where the run stands before its first step.
    fn start(&mut self) -> Result<()> {
        if let Some(newest) = self.parts.checkpoints.list()?.pop() {
            let saved = checkpoint::restore(&newest, &self.parts.trained(), &mut self.state)?;
            self.check_same_order(&newest, &saved)?;
            self.loader.seek(self.state.position.cursor);
            self.last_saved = Some((saved.position.cursor, newest));
        }
        let start = Start {
            step: self.state.position.cursor,
            unix_secs: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            order_hash: self.loader.order_hash(),
            num_parameters: self.state.parameters.num_parameters() as u64,
            num_train: count(self.parts.sources, Split::Train),
            num_test: self.test.len() as u64,
            buckets: bucket_counts(self.parts.sources),
            threads: tch::get_num_threads() as u32,
        };
        self.emit(Event::Start(start))?;
        if self.last_saved.is_none() {
            self.measure()?;
            self.preview()?;
        }
        Ok(())
    }

    fn check_same_order(&self, newest: &Path, saved: &Saved) -> Result<()> {
        let found = self.loader.order_hash();
        if saved.order_hash == found {
            return Ok(());
        }
        let reason = format!(
            "it was trained in the order {}, and this recipe and data set give {found}: the data, its prompts, the seed, \
             the batch or the mode (`auto` goes by where the data is) have changed; change them back, or start a new run \
             with another run.dir",
            saved.order_hash
        );
        Err(Error::Checkpoint { path: newest.to_owned(), reason })
    }

    /// One update and what is due after it.
    fn step(&mut self) -> Result<()> {
        let recipe = &self.parts.checked.recipe;
        let began = Instant::now();
        let step = self.loader.next_step()?;
        let data_secs = began.elapsed().as_secs_f64();
        let lr = recipe.lr.rate(self.state.position.samples, recipe.train.samples);
        let measured = self.stepper.step(&mut self.state, &step, lr)?;
        let Position { cursor, samples, .. } = self.state.position;
        self.emit(Event::Step(StepMetrics {
            step: cursor,
            samples,
            epoch: step.epoch,
            loss: measured.loss,
            gradient_norm: measured.gradient_norm,
            lr,
            secs: began.elapsed().as_secs_f64(),
            data_secs,
        }))?;
        let last = samples >= recipe.train.samples;
        if last || cursor.is_multiple_of(recipe.test.every_steps) {
            self.measure()?;
        }
        if last || cursor.is_multiple_of(recipe.preview.every_steps) {
            self.preview()?;
        }
        if cursor.is_multiple_of(recipe.checkpoint.every_steps) {
            self.save()?;
        }
        Ok(())
    }

    fn measure(&mut self) -> Result<()> {
        let began = Instant::now();
        if let Some((loss, bins)) = self.test.measure(&self.stepper, self.parts.sources)? {
            let Position { cursor: step, samples, .. } = self.state.position;
            let secs = began.elapsed().as_secs_f64();
            self.emit(Event::Test(TestMetrics { step, samples, loss, bins, secs }))?;
        }
        Ok(())
    }

    fn preview(&mut self) -> Result<()> {
        let began = Instant::now();
        let step = self.state.position.cursor;
        if let Some(name) = self.previewer.draw(self.parts.model, self.parts.checked, step)? {
            self.emit(Event::Preview { step, name, secs: began.elapsed().as_secs_f64() })?;
        }
        Ok(())
    }

    /// Writes a checkpoint unless this step has one.
    fn save(&mut self) -> Result<()> {
        let step = self.state.position.cursor;
        if self.last_saved.as_ref().is_some_and(|(saved, _)| *saved == step) {
            return Ok(());
        }
        let began = Instant::now();
        let saved = Saved { position: self.state.position, ..self.template.clone() };
        let Parts { checked, checkpoints, .. } = self.parts;
        let place = checkpoints.save(&saved, &checked.recipe.to_toml(), &self.parts.trained(), &self.state)?;
        let name = place.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        self.last_saved = Some((step, place));
        self.emit(Event::Checkpoint { step, name, secs: began.elapsed().as_secs_f64() })
    }

    fn leave(mut self, reason: &str) -> Result<Outcome> {
        self.save()?;
        let position = self.state.position;
        let secs = self.began.elapsed().as_secs_f64();
        self.emit(Event::End { step: position.cursor, reason: reason.to_owned(), secs })?;
        let checkpoint = self.last_saved.map(|(_, place)| place);
        Ok(Outcome { finished: reason == "finished", position, checkpoint })
    }

    fn emit(&mut self, event: Event) -> Result<()> {
        self.writer.write(&event)?;
        (self.observe)(&event);
        Ok(())
    }
}

/// Keeps a second trainer out of the run folder for as long as the file is open; the system frees it at any death.
fn lock(run_dir: &Path) -> Result<File> {
    let path = run_dir.join("lock");
    let file = File::create(&path).map_err(Error::io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { path: run_dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(Error::Io { path, source }),
    }
}

fn open_sources(checked: &Checked) -> Result<Vec<Source>> {
    let run = &checked.recipe.run;
    let cache = run.cache_dir.as_ref().zip(run.cache_gib);
    let cache = cache.map(|(dir, gib)| DiskCache::open(dir, gib.saturating_mul(1 << 30)).map(Arc::new)).transpose()?;
    let open = |(data, amount): (&crate::config::DataConfig, _)| {
        let mut dataset = Dataset::open(&data.path)?;
        if let Some(cache) = &cache {
            dataset = dataset.with_cache(cache);
        }
        Ok(Source { dataset: Arc::new(dataset), prompt: data.prompt.clone(), amount })
    };
    checked.recipe.data.iter().zip(checked.amounts.iter().cloned()).map(open).collect()
}

/// Latents of another VAE would train without complaint and decode to noise.
fn check_vae(checked: &Checked, base: &Components, sources: &[Source]) -> Result<()> {
    let found = base.blake3(Component::Vae)?;
    for (data, source) in checked.recipe.data.iter().zip(sources) {
        let codec = &source.dataset.manifest().codec;
        if codec.hash != found {
            let reason = format!(
                "its latents were made by the VAE {} (BLAKE3 {}), but the model's VAE {} has BLAKE3 {found}; prepare \
                 the data set with this VAE or choose the other model",
                codec.vae,
                codec.hash,
                base.folder(Component::Vae).display()
            );
            return Err(Error::Checkpoint { path: data.path.clone(), reason });
        }
    }
    Ok(())
}

fn trained_components(checked: &Checked) -> impl Iterator<Item = Component> {
    let encoders = checked.recipe.train.text_encoders == TextEncoders::Trained;
    Component::ALL.into_iter().filter(move |&component| match component {
        Component::UNet => true,
        Component::ClipL | Component::ClipG => encoders,
        Component::Vae => false,
    })
}

impl<'a> Parts<'a> {
    fn trained(&self) -> Vec<Trained<'a>> {
        let part = |component| Trained {
            component,
            source: self.base.folder(component).to_owned(),
            parameters: model::parameters(self.model, component),
        };
        trained_components(self.checked).map(part).collect()
    }

    /// What every checkpoint of this process says, but for the position.
    fn template(&self, loader: &Loader, state: &TrainState) -> Result<Saved> {
        let trained: Vec<_> = trained_components(self.checked).collect();
        let frozen = Component::ALL.into_iter().filter(|component| !trained.contains(component)).map(|component| {
            let folder = self.base.folder(component);
            let path = folder.canonicalize().map_err(Error::io(folder))?;
            Ok((component.folder().to_owned(), Frozen { blake3: self.base.blake3(component)?.to_owned(), path }))
        });
        Ok(Saved {
            format: Saved::format(),
            position: Position::default(),
            order_hash: loader.order_hash(),
            objective: self.checked.recipe.objective.clone(),
            frozen: frozen.collect::<Result<_>>()?,
            data: self.sources.iter().map(|source| source.dataset.identity()).collect(),
            program: program_identity()?,
            layout: Saved::layout(&state.parameters.slices),
        })
    }
}

fn program_identity() -> Result<String> {
    let path = env::current_exe().map_err(Error::io("the running program"))?;
    let mut file = File::open(&path).map_err(Error::io(&path))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&mut file).map_err(Error::io(&path))?;
    Ok(format!("rectiflow {} BLAKE3 {}", env!("CARGO_PKG_VERSION"), hasher.finalize().to_hex()))
}

fn count(sources: &[Source], split: Split) -> u64 {
    sources.iter().flat_map(|source| source.dataset.buckets(split)).map(|bucket| bucket.num_rows).sum()
}

fn bucket_counts(sources: &[Source]) -> Vec<(u32, u32, u64, u64)> {
    let mut counts = std::collections::BTreeMap::<(u32, u32), (u64, u64)>::new();
    for source in sources {
        for bucket in source.dataset.buckets(Split::Train) {
            counts.entry((bucket.width_px, bucket.height_px)).or_default().0 += bucket.num_rows;
        }
        for bucket in source.dataset.buckets(Split::Test) {
            counts.entry((bucket.width_px, bucket.height_px)).or_default().1 += bucket.num_rows;
        }
    }
    let mut rows: Vec<_> = counts.into_iter().map(|((w, h), (train, test))| (w, h, train, test)).collect();
    rows.sort_by_key(|&(w, h, train, test)| (std::cmp::Reverse(train + test), w, h));
    rows
}
