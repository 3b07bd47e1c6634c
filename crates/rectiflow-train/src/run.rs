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
    batch::{Source, Step},
    cache::DiskCache,
    dataset::Dataset,
    loader::Loader,
    manifest::Split,
    order::RankOf,
};
use rectiflow_sdxl::model::{Component, Model};

use crate::{
    blackbox::Recorder,
    checkpoint::{self, Checkpoints, Components, Frozen, Saved, Trained},
    config::{Checked, DataConfig},
    error::{Error, Result},
    guard::{Acts, GuardConfig, GuardState, Observation, Verdict},
    memory,
    metrics::{Event, GuardEvent, Lossless, Start, StepMetrics, TestMetrics, Writer},
    model,
    optim::Optimizer,
    origin::{Origin, epochs_at, step_at},
    precision,
    preview::Previewer,
    snapshots::{self, Ring},
    state::{Position, TrainState},
    step::{Passes, Stepper, pass},
    stopped,
    testloss::{Losses, Tables},
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

/// What may be asked of a run besides its recipe.
#[derive(Default)]
pub struct Options<'a> {
    /// Begin a new run from this checkpoint instead of `model.base`.
    pub branch_from: Option<PathBuf>,
    /// Go on although the guard has stopped the run.
    pub acknowledge_stop: bool,
    /// Sees each step before it is worked on, and may spoil it: how tests show what the guard does.
    pub before_step: Option<&'a mut dyn FnMut(&mut Step)>,
}

impl std::fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { branch_from, acknowledge_stop, .. } = self;
        write!(f, "Options {{ branch_from: {branch_from:?}, acknowledge_stop: {acknowledge_stop} }}")
    }
}

/// Trains as the recipe says until it is done or `stop` is set; a run found in the run folder is resumed. Every event
/// is written to `metrics.jsonl` and shown to `observe`.
///
/// # Errors
/// Everything in [`Error`]; the last checkpoint is whole whatever happens.
pub fn train(
    checked: &Checked,
    options: Options<'_>,
    stop: &AtomicBool,
    observe: &mut dyn FnMut(&Event),
) -> Result<Outcome> {
    let run_dir = &checked.recipe.run.dir;
    fs::create_dir_all(run_dir).map_err(Error::io(run_dir))?;
    let _lock = lock(run_dir)?;
    let acknowledged = stopped::check(run_dir, options.acknowledge_stop)?;
    let checkpoints = Checkpoints::open(run_dir, &checked.recipe.checkpoint)?;
    let origin = Origin::find(checked, &checkpoints, options.branch_from.as_deref())?;
    let sources = open_sources(checked)?;
    let components = origin.components(checked)?;
    check_vae(checked, &components, &sources)?;
    memory::announce(checked, &components, &sources)?;
    // Where a run goes on, no component is random any more.
    let random = if matches!(origin, Origin::Base) { &checked.random[..] } else { &[] };
    let open = model::base_options(checked.device, random, checked.recipe.run.seed);
    let mut model = model::open_components(origin.model(checked), &components, &open)?;
    checked.recipe.memory.apply(&mut model);
    let configs = component_configs(checked, &components)?;
    let parts = Parts {
        checked,
        checkpoints: &checkpoints,
        origin: &origin,
        sources: &sources,
        components: &components,
        model: &model,
        configs: &configs,
    };
    let before_step = options.before_step.map(|before_step| before_step as &mut dyn FnMut(&mut Step));
    let mut run = Run::new(parts, before_step, observe)?;
    run.start(acknowledged)?;
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
    origin: &'a Origin,
    sources: &'a [Source],
    components: &'a Components,
    model: &'a Model,
    /// The configuration files of the trained components.
    configs: &'a [(Component, Vec<u8>)],
}

/// One process's work on a run.
struct Run<'a> {
    parts: Parts<'a>,
    state: TrainState,
    loader: Loader,
    stepper: Stepper<'a>,
    guard: GuardState,
    ring: Ring,
    recorder: Recorder,
    tables: Tables,
    previewer: Previewer,
    template: Saved,
    writer: Writer,
    /// Whether the last event could not be written.
    mute: bool,
    observe: &'a mut dyn FnMut(&Event),
    before_step: Option<&'a mut dyn FnMut(&mut Step)>,
    began: Instant,
    /// What earlier processes worked, as far as it was saved.
    secs_before: f64,
    last_saved: Option<(u64, PathBuf)>,
}

impl<'a> Run<'a> {
    fn new(
        parts: Parts<'a>,
        before_step: Option<&'a mut dyn FnMut(&mut Step)>,
        observe: &'a mut dyn FnMut(&Event),
    ) -> Result<Self> {
        let Parts { checked, sources, model, .. } = parts;
        let recipe = &checked.recipe;
        let mut loader = Loader::new(sources.to_vec(), checked.order.clone(), RankOf::ONLY)?;
        if let Some(mebibytes) = recipe.run.read_ahead_mib {
            loader = loader.read_ahead(mebibytes.saturating_mul(1 << 20))?;
        }
        let state = fresh_state(checked, model);
        let distances = snapshot_distances(&recipe.guard, &state);
        Ok(Self {
            tables: Tables::new(checked, sources)?,
            previewer: Previewer::new(&recipe.preview, &recipe.run.dir),
            template: parts.template(&loader, &state)?,
            writer: Writer::open(&recipe.run.dir)?,
            guard: GuardState::default(),
            ring: Ring::new(distances),
            recorder: Recorder::new(&recipe.run.dir),
            stepper: Stepper::new(checked, model),
            mute: false,
            began: Instant::now(),
            secs_before: 0.0,
            last_saved: None,
            parts,
            state,
            loader,
            observe,
            before_step,
        })
    }

    /// Goes to where the run begins, and measures where it stands before its first step.
    fn start(&mut self, acknowledged: Option<String>) -> Result<()> {
        match self.parts.origin {
            Origin::Base => {}
            Origin::Resume(found, _) => {
                checkpoint::restore(&found.path, &found.saved, &mut self.state)?;
                self.check_same_order(&found.path, &found.saved)?;
                self.guard = found.saved.guard.clone();
                self.secs_before = found.saved.secs;
                self.last_saved = Some((found.saved.position.cursor, found.path.clone()));
            }
            Origin::Branch(found, _) => {
                checkpoint::inherit(&found.path, &found.saved, &mut self.state)?;
                let same_data = found.saved.data == self.template.data;
                let epochs = if same_data { found.saved.epochs } else { 0.0 };
                self.state.position.cursor = step_at(self.loader.order(), epochs);
            }
        }
        self.loader.seek(self.state.position.cursor);
        let start = self.start_event();
        self.emit(Event::Start(start));
        if let Some(reason) = acknowledged {
            self.guard.acts = Acts::default();
            self.emit_guard("acknowledged", reason, None);
        }
        self.ring.keep(&self.state, &self.guard.normal);
        if self.last_saved.is_none() {
            self.measure()?;
            self.preview()?;
        }
        Ok(())
    }

    fn start_event(&self) -> Start {
        let (branched_from, changes) = match self.parts.origin {
            Origin::Base => (None, Vec::new()),
            Origin::Resume(_, changes) => (None, changes.clone()),
            Origin::Branch(_, ancestor) => (Some(ancestor.checkpoint.clone()), ancestor.changed.clone()),
        };
        let num_parameters = self.state.parameters.num_parameters() as u64;
        Start {
            step: self.state.position.cursor,
            unix_secs: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            order_hash: self.loader.order_hash(),
            num_parameters,
            num_train: count(self.parts.sources, Split::Train),
            num_test: self.tables.test.len() as u64,
            buckets: bucket_counts(self.parts.sources),
            threads: tch::get_num_threads() as u32,
            branched_from,
            changes,
            snapshot_bytes: self.ring.capacity() as u64 * snapshots::bytes(&self.state),
        }
    }

    fn check_same_order(&self, newest: &Path, saved: &Saved) -> Result<()> {
        let found = self.loader.order_hash();
        if saved.order_hash == found {
            return Ok(());
        }
        let reason = format!(
            "it was trained in the order {}, and this recipe and data set give {found}: the data, its prompts, the seed, \
             the batch or the mode (`auto` goes by where the data is) have changed; change them back, or start a new run \
             with another run.dir and --branch-from {}",
            saved.order_hash,
            newest.display()
        );
        Err(Error::Checkpoint { path: newest.to_owned(), reason })
    }

    /// One step, and what is due after it.
    fn step(&mut self) -> Result<()> {
        let recipe = &self.parts.checked.recipe;
        let began = Instant::now();
        let mut step = self.loader.next_step()?;
        let data_secs = began.elapsed().as_secs_f64();
        if let Some(before_step) = &mut self.before_step {
            before_step(&mut step);
        }
        let lr = recipe.lr.rate(self.state.position.samples, recipe.train.samples) * self.guard.acts.rate;
        let passes = self.stepper.passes(&self.state.parameters, &step)?;
        self.recorder.record(&step, &passes, lr);
        let (loss, gradient_norm) = (passes.loss, passes.gradient_norm);
        let groups = self.state.parameters.groups.iter().map(|group| group.component.clone());
        let norm_by_component = groups.zip(passes.norm_by_group.iter().copied().map(Lossless)).collect();
        let applied = self.act(&step, passes, lr)?;
        let Position { cursor, samples, .. } = self.state.position;
        self.emit(Event::Step(StepMetrics {
            step: cursor,
            samples,
            epoch: step.epoch,
            loss,
            gradient_norm,
            norm_by_component,
            lr,
            secs: began.elapsed().as_secs_f64(),
            data_secs,
            applied,
            spent: recipe.run.price_per_hour.map(|price| price * self.secs() / 3600.0),
        }));
        let last = samples >= recipe.train.samples;
        if last || cursor.is_multiple_of(recipe.test.every_steps) {
            self.measure()?;
        }
        if last || cursor.is_multiple_of(recipe.preview.every_steps) {
            self.preview()?;
        }
        if cursor.is_multiple_of(recipe.checkpoint.every_steps) {
            self.save_or_warn();
        }
        Ok(())
    }

    /// Asks the guard and does what it says. Gives whether the update was made.
    fn act(&mut self, step: &Step, passes: Passes, lr: f64) -> Result<bool> {
        let config = &self.parts.checked.recipe.guard;
        let seen = Observation { loss: passes.loss, gradient_norm: passes.gradient_norm };
        if !config.enabled {
            check_finite(step, seen)?;
            self.update(step, passes, f64::INFINITY, lr);
            return Ok(true);
        }
        match self.guard.judge(config, seen) {
            Verdict::Continue => self.update(step, passes, f64::INFINITY, lr),
            Verdict::Clip { norm, reason } => {
                self.update(step, passes, norm, lr);
                self.emit_guard("clip", reason, None);
            }
            Verdict::Skip { reason } => {
                let black_box = self.black_box("skip", &reason);
                pass(&mut self.state, step);
                self.state.pass_over(step.step..step.step + 1);
                self.emit_guard("skip", reason, black_box);
                return Ok(false);
            }
            Verdict::Rewind { reason, .. } if self.ring.capacity() == 0 => {
                let none = "guard.snapshot_gib leaves no room for a snapshot to go back to";
                return Err(self.stop(step, format!("{reason}; {none}")));
            }
            Verdict::Rewind { back, reason } => {
                let black_box = self.black_box("rewind", &reason);
                self.rewind(step, back);
                self.emit_guard("rewind", reason, black_box);
                return Ok(false);
            }
            Verdict::Stop { reason } => return Err(self.stop(step, reason)),
        }
        Ok(true)
    }

    fn update(&mut self, step: &Step, passes: Passes, norm: f64, lr: f64) {
        self.stepper.update(&mut self.state, step, passes, norm, lr);
        if !self.guard.is_suspicious() {
            self.ring.keep(&self.state, &self.guard.normal);
        }
    }

    /// Goes back to a snapshot and passes over everything since then, this step included.
    fn rewind(&mut self, step: &Step, back: u64) {
        let update = self.state.position.update;
        let snapshot = self.ring.back(update, back).expect("the first snapshot was taken before the first step");
        snapshot.restore(&mut self.state);
        self.guard.normal = snapshot.normal.clone();
        pass(&mut self.state, step);
        self.state.pass_over(snapshot.position.cursor..step.step + 1);
    }

    /// Leaves the evidence and the reason; the last checkpoint is as it was.
    fn stop(&mut self, step: &Step, reason: String) -> Error {
        let run_dir = self.parts.checked.recipe.run.dir.clone();
        let black_box = self.black_box("stop", &reason);
        pass(&mut self.state, step);
        self.emit_guard("stop", reason.clone(), black_box);
        let secs = self.began.elapsed().as_secs_f64();
        self.emit(Event::End { step: self.state.position.cursor, reason: "stopped".to_owned(), secs });
        match stopped::write(&run_dir, &reason) {
            Ok(()) => Error::Stopped { run_dir, reason },
            Err(error) => error,
        }
    }

    /// Writes down what the last steps were; the run does not depend on it.
    fn black_box(&self, action: &str, reason: &str) -> Option<String> {
        let recipe = self.parts.checked.recipe.to_toml();
        let checkpoint = self.last_saved.as_ref().map(|(_, place)| place.canonicalize().unwrap_or(place.clone()));
        match self.recorder.write(action, reason, recipe, checkpoint) {
            Ok(name) => Some(name),
            Err(error) => {
                tracing::warn!("the black box of this act could not be written: {error}");
                None
            }
        }
    }

    fn emit_guard(&mut self, action: &str, reason: String, black_box: Option<String>) {
        let Position { cursor: step, update, .. } = self.state.position;
        self.emit(Event::Guard(GuardEvent { step, action: action.to_owned(), reason, update, black_box }));
    }

    fn measure(&mut self) -> Result<()> {
        let began = Instant::now();
        let sources = self.parts.sources;
        let Losses { test: Some(test), training } = self.tables.measure(&self.stepper, sources)? else {
            return Ok(());
        };
        let averaged = match &self.state.average {
            None => Losses { test: None, training: None },
            Some(average) => {
                let (parameters, workers) = (&self.state.parameters, &self.stepper.workers);
                parameters.exchange(average, workers);
                let losses = self.tables.measure(&self.stepper, sources);
                parameters.exchange(average, workers);
                losses?
            }
        };
        let Position { cursor: step, samples, .. } = self.state.position;
        self.emit(Event::Test(TestMetrics {
            step,
            samples,
            loss: test.loss,
            bins: test.bins,
            training,
            ema: averaged.test,
            ema_training: averaged.training,
            secs: began.elapsed().as_secs_f64(),
        }));
        Ok(())
    }

    fn preview(&mut self) -> Result<()> {
        let began = Instant::now();
        let step = self.state.position.cursor;
        if let Some(name) = self.previewer.draw(self.parts.model, self.parts.checked, step)? {
            self.emit(Event::Preview { step, name, secs: began.elapsed().as_secs_f64() });
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
        let groups = self.state.parameters.groups.iter().map(|group| group.component.clone());
        let saved = Saved {
            position: self.state.position,
            epochs: epochs_at(self.loader.order(), step),
            moments_from: groups.zip(self.state.moments_from.iter().copied()).collect(),
            passed_over: self.state.passed_over.iter().map(|steps| (steps.start, steps.end)).collect(),
            guard: self.guard.clone(),
            secs: self.secs(),
            ..self.template.clone()
        };
        let Parts { checked, checkpoints, .. } = self.parts;
        let place = checkpoints.save(&saved, &checked.recipe.to_toml(), &self.parts.trained(), &self.state)?;
        let name = place.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        self.last_saved = Some((step, place));
        self.emit(Event::Checkpoint { step, name, secs: began.elapsed().as_secs_f64() });
        Ok(())
    }

    /// A full disk is no reason to stop training: room may be made before the next checkpoint is due.
    fn save_or_warn(&mut self) {
        if let Err(error) = self.save() {
            let step = self.state.position.cursor;
            tracing::error!(
                "the checkpoint of step {step} could NOT be written: {error}. Training goes on; if it is stopped now, all \
                 since the last checkpoint is lost"
            );
            self.emit(Event::SaveFailed { step, reason: error.to_string() });
        }
    }

    fn leave(mut self, reason: &str) -> Result<Outcome> {
        self.save()?;
        let position = self.state.position;
        let secs = self.began.elapsed().as_secs_f64();
        self.emit(Event::End { step: position.cursor, reason: reason.to_owned(), secs });
        let checkpoint = self.last_saved.map(|(_, place)| place);
        Ok(Outcome { finished: reason == "finished", position, checkpoint })
    }

    /// Seconds that processes have worked on the run.
    fn secs(&self) -> f64 {
        self.secs_before + self.began.elapsed().as_secs_f64()
    }

    /// Writes an event down and shows it. Where it cannot be written, training goes on without a log.
    fn emit(&mut self, event: Event) {
        let written = self.writer.write(&event);
        if let (Err(error), false) = (&written, self.mute) {
            tracing::error!("events are not being written down: {error}. Training goes on");
        }
        self.mute = written.is_err();
        (self.observe)(&event);
    }
}

fn check_finite(step: &Step, seen: Observation) -> Result<()> {
    for (what, value) in [("loss", seen.loss), ("gradient norm", seen.gradient_norm)] {
        if !value.is_finite() {
            return Err(Error::NotFinite { step: step.step, what, value });
        }
    }
    Ok(())
}

/// How far back the guard's snapshots go, in the memory that they may take.
fn snapshot_distances<'a>(guard: &'a GuardConfig, state: &TrainState) -> &'a [u64] {
    if !guard.enabled {
        return &[];
    }
    let budget_bytes = (guard.snapshot_gib * f64::from(1 << 30)) as u64;
    let affordable = snapshots::affordable(&guard.snapshot_updates, snapshots::bytes(state), budget_bytes);
    if affordable.len() < guard.snapshot_updates.len() {
        tracing::warn!(
            "guard.snapshot_gib = {}: of guard.snapshot_updates = {:?} there is room for {affordable:?}; two snapshots of \
             {:.1} GiB are kept for each",
            guard.snapshot_gib,
            guard.snapshot_updates,
            snapshots::bytes(state) as f64 / f64::from(1 << 30)
        );
    }
    affordable
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

pub(crate) fn open_sources(checked: &Checked) -> Result<Vec<Source>> {
    let run = &checked.recipe.run;
    let cache = run.cache_dir.as_ref().zip(run.cache_gib);
    let cache = cache.map(|(dir, gib)| DiskCache::open(dir, gib.saturating_mul(1 << 30)).map(Arc::new)).transpose()?;
    let open = |(data, amount): (&DataConfig, _)| {
        let mut dataset = Dataset::open(&data.path)?;
        if let Some(cache) = &cache {
            dataset = dataset.with_cache(cache);
        }
        Ok(Source { dataset: Arc::new(dataset), prompt: data.prompt.clone(), amount })
    };
    checked.recipe.data.iter().zip(checked.amounts.iter().cloned()).map(open).collect()
}

/// Latents of another VAE would train without complaint and decode to noise.
pub(crate) fn check_vae(checked: &Checked, base: &Components, sources: &[Source]) -> Result<()> {
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
    Component::ALL.into_iter().filter(|&component| checked.recipe.train.trains(component))
}

/// The configuration files of the trained components. They are read once: the checkpoint that they are in may be
/// removed before the next one is written.
fn component_configs(checked: &Checked, components: &Components) -> Result<Vec<(Component, Vec<u8>)>> {
    let read = |component| {
        let path = components.folder(component).join("config.json");
        Ok((component, fs::read(&path).map_err(Error::io(&path))?))
    };
    trained_components(checked).map(read).collect()
}

/// The state before the first step from a model's weights.
pub(crate) fn fresh_state(checked: &Checked, model: &Model) -> TrainState {
    let parameters = precision::apply(checked, model);
    TrainState {
        position: Position::default(),
        optimizer: Optimizer::new(checked.recipe.optimizer.clone(), &parameters.values),
        moments_from: vec![0; parameters.groups.len()],
        average: checked.recipe.ema.half_life_samples.map(|_| parameters.values.copy()),
        passed_over: Vec::new(),
        parameters,
    }
}

impl<'a> Parts<'a> {
    fn trained(&self) -> Vec<Trained<'a>> {
        self.configs.iter().map(|(component, config)| Trained { component: *component, config }).collect()
    }

    /// What every checkpoint of this process says, but for the position.
    fn template(&self, loader: &Loader, state: &TrainState) -> Result<Saved> {
        let trained: Vec<_> = trained_components(self.checked).collect();
        let frozen = Component::ALL.into_iter().filter(|component| !trained.contains(component)).map(|component| {
            let folder = self.components.folder(component);
            let path = folder.canonicalize().map_err(Error::io(folder))?;
            Ok((component.folder().to_owned(), Frozen { blake3: self.components.blake3(component)?.to_owned(), path }))
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
            epochs: 0.0,
            moments_from: std::collections::BTreeMap::new(),
            passed_over: Vec::new(),
            guard: GuardState::default(),
            secs: 0.0,
            lineage: self.origin.lineage(),
        })
    }
}

fn program_identity() -> Result<String> {
    let path = env::current_exe().map_err(Error::io("the running program"))?;
    Ok(format!("rectiflow {} BLAKE3 {}", env!("CARGO_PKG_VERSION"), checkpoint::hash_file(&path)?))
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
