//! The life of a run, top to bottom: open, resume, loop, save.
//!
//! All ranks of a run tell the same story at the same time. What only one of them may do is done by rank 0.

pub mod blackbox;
pub mod eval;
pub(crate) mod origin;
pub mod replay;
pub(crate) mod setup;
pub(crate) mod stop_file;
mod verdict;

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use rectiflow_data::{batch::Step, loader::Loader};

use crate::{
    checkpoint::{
        Checkpoints, Saved, model, restore,
        saving::{Pending, Save},
        snapshots::{self, Ring},
    },
    error::{Error, Result},
    guard::{Acts, GuardState},
    measure::{
        bins::Bins,
        metrics::{Event, Lossless, RankMetrics, StepMetrics, TestMetrics, Writer},
        testloss::{Losses, Tables},
    },
    pictures::preview::Previewer,
    plan::estimate,
    ranks::{
        comm::Comm,
        exchange::{Exchange, RankReport},
        launch::Launch,
        straggler::MicroBatchTimes,
    },
    recipe::Checked,
    run::{
        blackbox::Recorder,
        origin::{Origin, epochs_at, step_at},
        setup::{Parts, check_same_data, check_same_start, check_vae, find_trained, fresh_state, open_sources},
    },
    state::{Position, TrainState},
    step::{Stepper, step_flops::Configs},
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

/// Has a step and the state it begins with in its hands.
pub type BeforeStep<'a> = dyn FnMut(&mut Step, &mut TrainState) + 'a;

/// What may be asked of a run besides its recipe.
#[derive(Default)]
pub struct Options<'a> {
    /// Begin a new run from this checkpoint instead of `model.base`.
    pub branch_from: Option<PathBuf>,
    /// Go on although the guard has stopped the run.
    pub acknowledge_stop: bool,
    /// Which of the processes of the run this one is; none: the only one.
    pub launch: Option<Launch>,
    /// Sees each step before it is worked on, and may spoil it: how tests show what the guard does.
    pub before_step: Option<&'a mut BeforeStep<'a>>,
}

impl std::fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { branch_from, acknowledge_stop, launch, .. } = self;
        write!(
            f,
            "Options {{ branch_from: {branch_from:?}, acknowledge_stop: {acknowledge_stop}, launch: {launch:?} }}"
        )
    }
}

/// Trains as the recipe says until it is done or `stop` is set; a run found in the run folder is resumed. Every event
/// is written to `metrics.jsonl` (of other ranks than 0, their own events to a file of their own) and shown to `observe`.
///
/// # Errors
/// Everything in [`Error`]; the last checkpoint is whole whatever happens.
pub fn train(
    checked: &Checked,
    options: Options<'_>,
    stop: &AtomicBool,
    observe: &mut dyn FnMut(&Event),
) -> Result<Outcome> {
    let checked = setup::for_rank(checked, options.launch.as_ref())?;
    let comm = match &options.launch {
        Some(launch) => Comm::open(launch, checked.device, &checked.recipe.ranks)?,
        None => Comm::alone(),
    };
    let outcome = train_together(&checked, &comm, options, stop, observe);
    match &outcome {
        // Nobody leaves before all are done: rank 0 may serve what the others still need.
        Ok(_) => comm.barrier()?,
        Err(error) => comm.abandon(error),
    }
    outcome
}

fn train_together(
    checked: &Checked,
    comm: &Comm,
    options: Options<'_>,
    stop: &AtomicBool,
    observe: &mut dyn FnMut(&Event),
) -> Result<Outcome> {
    let run_dir = &checked.recipe.run.dir;
    let (_lock, acknowledged) = setup::open_folder(run_dir, comm, options.acknowledge_stop)?;
    check_same_start(comm, &checked.recipe)?;
    let checkpoints = Checkpoints::at(run_dir, &checked.recipe.checkpoint);
    comm.first(|| checkpoints.clean())?;
    let origin = Origin::find_together(checked, &checkpoints, options.branch_from.as_deref(), comm)?;
    let sources = open_sources(checked)?;
    let components = origin.components(checked, comm)?;
    check_vae(checked, &components, &sources)?;
    let recomputed = estimate::announce(checked, comm, &components, &sources)?;
    // Where a run goes on, no component is random any more.
    let random = if matches!(origin, Origin::Base) { &checked.random[..] } else { &[] };
    let open = model::base_options(checked.device, random, checked.recipe.run.seed);
    let mut model = model::open_components(origin.model(checked), &components, &open)?;
    recomputed.apply(&mut model.unet);
    let trained = find_trained(checked, &components)?;
    let parts = Parts {
        checked,
        comm,
        checkpoints: &checkpoints,
        origin: &origin,
        sources: &sources,
        components: &components,
        model: &model,
        trained: &trained,
    };
    let before_step: Option<&mut BeforeStep<'_>> = options.before_step.map(|before_step| before_step as _);
    let mut run = Run::new(parts, before_step, observe)?;
    run.start(acknowledged)?;
    match run.go(stop) {
        Ok(reason) => run.leave(reason),
        Err(error) => {
            run.keep_what_is_written(&error);
            Err(error)
        }
    }
}

/// One process's work on a run.
struct Run<'a> {
    parts: Parts<'a>,
    state: TrainState,
    loader: Loader,
    stepper: Stepper<'a>,
    exchange: Exchange<'a>,
    guard: GuardState,
    ring: Ring,
    recorder: Recorder,
    /// Of the samples trained on since the vital signs were last taken.
    losses: Bins,
    tables: Tables,
    previewer: Previewer,
    template: Saved,
    writer: Writer,
    times: MicroBatchTimes,
    /// Whether the last event could not be written.
    mute: bool,
    observe: &'a mut dyn FnMut(&Event),
    before_step: Option<&'a mut BeforeStep<'a>>,
    began: Instant,
    /// What earlier processes worked, as far as it was saved.
    secs_before: f64,
    last_saved: Option<(u64, PathBuf)>,
    /// The checkpoint that is being written.
    pending: Option<Pending>,
    /// Whether any rank has been asked to stop.
    told_to_stop: bool,
}

impl<'a> Run<'a> {
    fn new(
        parts: Parts<'a>,
        before_step: Option<&'a mut BeforeStep<'a>>,
        observe: &'a mut dyn FnMut(&Event),
    ) -> Result<Self> {
        let Parts { checked, comm, sources, model, .. } = parts;
        let recipe = &checked.recipe;
        let mut loader =
            Loader::new(sources.to_vec(), checked.order.clone(), comm.rank())?.on_machine_with(comm.machine());
        if let Some(mebibytes) = recipe.run.read_ahead_mib {
            loader = loader.read_ahead(mebibytes.saturating_mul(1 << 20))?;
        }
        loader.check_cache()?;
        check_same_data(comm, sources, &loader.order_hash())?;
        comm.first(|| snapshots::clean(&recipe.run.dir))?;
        let state = fresh_state(checked, model, comm);
        let stepper = Stepper::new(checked, model);
        let exchange =
            Exchange::new(comm, recipe.ranks.sharding).with_order(loader.order(), stepper.workers.width())?;
        let snapshot_bytes = snapshots::bytes(state.parameters.partition.most_owned(), state.average.is_some());
        let distances = snapshots::snapshot_distances(&recipe.guard, snapshot_bytes);
        Ok(Self {
            tables: Tables::new(checked, sources)?,
            previewer: Previewer::new(&recipe.preview, &recipe.run.dir),
            template: parts.template(&loader, &state)?,
            writer: Writer::open(&recipe.run.dir, comm.rank().rank)?,
            guard: GuardState::default(),
            ring: Ring::new(distances, &recipe.run.dir),
            recorder: Recorder::new(&recipe.run.dir),
            losses: Bins::new(recipe.test.bins),
            stepper,
            times: MicroBatchTimes::default(),
            mute: false,
            began: Instant::now(),
            secs_before: 0.0,
            last_saved: None,
            pending: None,
            told_to_stop: false,
            parts,
            state,
            exchange,
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
                restore::restore(&found.path, &found.saved, &mut self.state)?;
                self.check_same_order(&found.path, &found.saved)?;
                self.guard = found.saved.guard.clone();
                self.secs_before = found.saved.secs;
                self.last_saved = Some((found.saved.position.cursor, found.path.clone()));
            }
            Origin::Branch(found, _) => {
                restore::inherit(&found.path, &found.saved, &mut self.state)?;
                let same_data = found.saved.data == self.template.data;
                let epochs = if same_data { found.saved.epochs } else { 0.0 };
                self.state.position.cursor = step_at(self.loader.order(), epochs);
            }
        }
        self.loader.seek(self.state.position.cursor);
        let snapshot_bytes =
            snapshots::bytes(self.state.parameters.partition.most_owned(), self.state.average.is_some());
        let snapshot_bytes = snapshots::total_bytes(&self.parts.checked.recipe.guard, snapshot_bytes);
        let num_test = self.tables.test.len() as u64;
        let start = self.parts.start_event(&self.state, &self.loader, num_test, snapshot_bytes);
        self.emit(Event::Start(start));
        if let Some(reason) = acknowledged {
            self.guard.acts = Acts::default();
            self.emit_guard("acknowledged", reason, None);
        }
        self.ring.keep(&self.state, &self.guard.normal, self.parts.comm)?;
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
             with another run.dir and --branch-from {}",
            saved.order_hash,
            newest.display()
        );
        Err(Error::Checkpoint { path: newest.to_owned(), reason })
    }

    /// Steps until the run is done or asked to stop; gives which.
    fn go(&mut self, stop: &AtomicBool) -> Result<&'static str> {
        let alone = self.parts.comm.rank().ranks == 1;
        while self.state.position.samples < self.parts.checked.recipe.train.samples {
            // Alone, a process looks by itself; several have to agree, which they do in every step.
            if self.told_to_stop || (alone && stop.load(Ordering::Relaxed)) {
                return Ok("interrupted");
            }
            self.step(stop)?;
        }
        Ok("finished")
    }

    /// One step, and what is due after it.
    fn step(&mut self, stop: &AtomicBool) -> Result<()> {
        let recipe = &self.parts.checked.recipe;
        let comm = self.parts.comm;
        let number = self.state.position.cursor + 1;
        let began = Instant::now();
        comm.take_traffic();
        comm.work(|| format!("reading the data of step {number}"));
        let mut step = self.loader.next_step()?;
        let data_secs = began.elapsed().as_secs_f64();
        if let Some(before_step) = &mut self.before_step {
            before_step(&mut step, &mut self.state);
        }
        let lr = recipe.lr.rate(self.state.position.samples, recipe.train.samples) * self.guard.acts.rate;
        comm.work(|| format!("in the forward and backward passes of step {number}"));
        let summed = self.stepper.passes(&self.state.parameters, &step, &self.exchange)?;
        let passes_secs = began.elapsed().as_secs_f64() - data_secs - comm.traffic_secs();
        comm.work(|| format!("in the update of step {number}"));
        let busy = (data_secs + passes_secs) / step.micro_batches.len() as f64;
        let (stop, is_written) = (stop.load(Ordering::Relaxed), self.pending.as_ref().is_none_or(Pending::is_written));
        let report = RankReport { stop, is_written, busy };
        let (passes, consensus) = self.exchange.reduce(summed, &self.state.parameters, report)?;
        self.told_to_stop |= consensus.stop;
        self.recorder.record(&step, &passes, lr);
        for &(time, loss) in passes.samples.iter().filter(|(_, loss)| loss.is_finite()) {
            self.losses.add(time, f64::from(loss), 1.0);
        }
        let (loss, gradient_norm) = (passes.loss, passes.gradient_norm);
        let groups = self.state.parameters.groups.iter().map(|group| group.component.clone());
        let norm_by_component = groups.zip(passes.norm_by_group.iter().copied().map(Lossless)).collect();
        let applied = self.act(&step, passes, lr)?;
        let Position { cursor, samples, .. } = self.state.position;
        let secs = began.elapsed().as_secs_f64();
        let traffic = comm.take_traffic();
        let slowest = self.times.observe(&consensus.busy);
        let ranks = (comm.rank().ranks > 1).then_some(RankMetrics {
            passes_secs,
            communication_secs: traffic.secs,
            hidden_secs: traffic.hidden_secs,
            update_secs: secs - data_secs - passes_secs - traffic.secs,
            bytes: traffic.bytes,
            slowest,
        });
        self.emit(Event::Step(StepMetrics {
            step: cursor,
            samples,
            epoch: step.epoch,
            loss,
            gradient_norm,
            norm_by_component,
            lr,
            secs,
            data_secs,
            flops: Configs::of(self.parts.model).step_flops(&recipe.train, &step),
            applied,
            spent: recipe.run.price_per_hour.map(|price| price * self.secs() / 3600.0),
            ranks,
        }));
        if consensus.is_written {
            self.finish_saving()?;
        }
        self.after_step()
    }

    /// Measures, draws and saves where it is due.
    fn after_step(&mut self) -> Result<()> {
        let recipe = &self.parts.checked.recipe;
        let Position { cursor, samples, .. } = self.state.position;
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
        let Parts { sources, comm, .. } = self.parts;
        comm.long_work("measuring the test loss");
        self.exchange.wait_gathers()?;
        let Losses { test: Some(test), training } = self.tables.measure(&self.stepper, sources, comm)? else {
            return Ok(());
        };
        let averaged = if self.state.average.is_none() {
            Losses { test: None, training: None }
        } else {
            self.exchange.swap_average(&self.state, &self.stepper.workers)?;
            let losses = self.tables.measure(&self.stepper, sources, comm);
            self.exchange.swap_average(&self.state, &self.stepper.workers)?;
            losses?
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
        let Parts { model, checked, comm, .. } = self.parts;
        comm.long_work("drawing the previews");
        self.exchange.wait_gathers()?;
        if let Some(name) = self.previewer.draw(model, checked, step, comm)? {
            self.emit(Event::Preview { step, name, secs: began.elapsed().as_secs_f64() });
        }
        Ok(())
    }

    /// Begins to write a checkpoint unless this step has one. `goes_on`: training does meanwhile.
    fn begin_saving(&mut self, goes_on: bool) -> Result<()> {
        let step = self.state.position.cursor;
        if self.last_saved.as_ref().is_some_and(|(saved, _)| *saved == step) {
            return Ok(());
        }
        self.parts.comm.long_work("saving a checkpoint");
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
        let Parts { checked, checkpoints, trained, comm, .. } = self.parts;
        let (recipe, state) = (&checked.recipe.to_toml(), &self.state);
        let pending = checkpoints.begin(&Save { saved: &saved, recipe, trained, state, comm, goes_on })?;
        self.pending = Some(pending);
        Ok(())
    }

    /// Waits for the checkpoint that is being written, if any, and gives it its name.
    fn end_saving(&mut self) -> Result<()> {
        let Some(pending) = self.pending.take() else { return Ok(()) };
        let Parts { checkpoints, comm, .. } = self.parts;
        comm.long_work("saving a checkpoint");
        let (step, began) = (pending.step, pending.began);
        let place = checkpoints.finish(pending, comm)?;
        let name = place.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        self.last_saved = Some((step, place));
        self.emit(Event::Checkpoint { step, name, secs: began.elapsed().as_secs_f64() });
        Ok(())
    }

    /// Begins the checkpoint that is due, after the one before.
    fn save(&mut self) -> Result<()> {
        self.finish_saving()?;
        let goes_on = self.parts.checked.recipe.checkpoint.in_background;
        let begun = self.begin_saving(goes_on);
        self.or_warn(self.state.position.cursor, begun)?;
        if goes_on { Ok(()) } else { self.finish_saving() }
    }

    /// As [`Self::end_saving`]; what cannot be written is a warning.
    fn finish_saving(&mut self) -> Result<()> {
        let step = self.pending.as_ref().map_or(0, |pending| pending.step);
        let ended = self.end_saving();
        self.or_warn(step, ended)
    }

    /// A full disk is no reason to stop training: room may be made before the next checkpoint is due.
    fn or_warn(&mut self, step: u64, saved: Result<()>) -> Result<()> {
        match saved {
            Err(error @ (Error::Collective { .. } | Error::Launch { .. })) => Err(error),
            Err(error) => {
                tracing::error!(
                    "the checkpoint of step {step} could NOT be written: {error}. Training goes on; if it is stopped now, \
                     all since the last checkpoint is lost"
                );
                self.emit(Event::SaveFailed { step, reason: error.to_string() });
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Where the run ends with an error that all ranks have, or that of its only one, a checkpoint that was begun is as
    /// good as any.
    fn keep_what_is_written(&mut self, error: &Error) {
        if self.parts.comm.rank().ranks == 1 || matches!(error, Error::NotFinite { .. }) {
            // The error that ended the run is the one to report; this one has had its warning.
            let _ = self.finish_saving();
        }
    }

    fn leave(mut self, reason: &str) -> Result<Outcome> {
        self.finish_saving()?;
        self.begin_saving(false)?;
        self.end_saving()?;
        self.exchange.wait_gathers()?;
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
