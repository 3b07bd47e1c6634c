//! The course of a run, from top to bottom: open, resume, loop, save.
//!
//! All ranks execute the same operations in the same order. Rank 0 does what only one process may
//! do.

mod alerts;
pub mod blackbox;
pub mod eval;
mod in_backward;
mod last_save;
mod measurer;
mod mirroring;
mod opening;
mod options;
pub(crate) mod origin;
mod rate_jump;
pub mod replay;
mod saver;
pub(crate) mod setup;
mod spare_save;
mod step_record;
pub(crate) mod stop_file;
mod verdict;
mod watchers;

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use rectiflow_data::{
    batch::{Source, Step},
    loader::Loader,
};

pub use crate::run::options::{BeforeStep, Options, Outcome};
use crate::{
    checkpoint::{
        Checkpoints, Saved,
        bases::Bases,
        restore,
        snapshots::{self, Ring},
    },
    error::{Error, Result},
    guard::{Acts, GuardState},
    measure::{
        bins::Bins,
        metrics::{Event, RankMetrics, StepMetrics, Writer},
    },
    plan::estimate,
    ranks::{
        comm::Comm,
        exchange::{Exchange, Passes, RankReport, Summed},
        straggler::MicroBatchTimes,
    },
    recipe::{Checked, Recipe},
    run::{
        blackbox::Recorder,
        measurer::Measurer,
        mirroring::Afterwards,
        opening::{open_model, open_run},
        origin::{Origin, epochs_at, step_at},
        saver::{Moment, Saver},
        setup::{Parts, check_same_data, check_vae, find_trained, fresh_state, open_sources},
        step_record::{Seen, StepSecs},
        watchers::Watchers,
    },
    state::{Position, TrainState},
    step::{Stepper, step_flops::Configs},
};

/// Trains until all samples of the recipe are used or `stop` is set; a run found in the run folder
/// is resumed. Every event is appended to `metrics.jsonl` (of ranks other than 0, to a file of
/// their own) and passed to `observe`.
///
/// # Errors
/// Any [`Error`]; the last checkpoint stays intact in every case. [`Error::Interrupted`] if `stop`
/// is set while this rank waits for the others to start.
pub fn train(
    checked: &Checked,
    options: Options<'_>,
    stop: &AtomicBool,
    observe: &mut dyn FnMut(&Event),
) -> Result<Outcome> {
    let checked = setup::for_rank(checked, options.launch.as_ref())?;
    let comm = match &options.launch {
        Some(launch) => Comm::open(launch, checked.device, &checked.recipe.ranks, stop)?,
        None => Comm::alone(),
    };
    let mut afterwards = Afterwards::new(&checked);
    let outcome = train_together(&checked, &comm, options, stop, observe, &mut afterwards);
    let left = match &outcome {
        // No rank leaves before all are done: rank 0 may still serve data that the others need.
        Ok(_) => {
            let _doing = comm.long("leaving the run");
            comm.barrier()
        }
        Err(error) => {
            comm.abandon(error);
            Ok(())
        }
    };
    afterwards.leave();
    left?;
    outcome
}

/// Opens, resumes and repeats steps, together with the other ranks.
fn train_together(
    checked: &Checked,
    comm: &Comm,
    options: Options<'_>,
    stop: &AtomicBool,
    observe: &mut dyn FnMut(&Event),
    afterwards: &mut Afterwards,
) -> Result<Outcome> {
    // Open the folder, and find where the run begins.
    let checkpoints = Checkpoints::at(&checked.recipe.run.dir, &checked.recipe.checkpoint);
    let acknowledged = open_run(checked, comm, &checkpoints, &options, afterwards)?;
    let branch_from = options.branch_from.as_deref();
    let origin = Origin::find_together(checked, &checkpoints, branch_from, comm)?;
    if !options.accept_rate_jump {
        rate_jump::check(checked, &origin)?;
    }

    // Open the data and the model.
    let sources = open_sources(checked)?;
    let bases = Bases::new(Some(&checked.recipe.model.base), options.base.as_deref());
    let components = origin.components(checked, &bases, comm)?;
    check_vae(checked, &components, &sources)?;
    let recomputed = estimate::announce(checked, comm, &components, &sources)?;
    let mut model = open_model(checked, &origin, &components)?;
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
        mirror: afterwards.mirror.as_ref(),
    };

    // Train.
    let before_step: Option<&mut BeforeStep<'_>> =
        options.before_step.map(|before_step| before_step as _);
    let mut run = Run::new(parts, before_step, observe)?;
    run.start(acknowledged)?;
    match run.go(stop) {
        Ok(reason) => run.leave(reason),
        Err(error) => {
            run.keep_what_is_written(&error);
            run.tell_watchers_of(&error);
            Err(error)
        }
    }
}

/// Opens the loader of this rank's samples.
fn open_loader(checked: &Checked, comm: &Comm, sources: &[Source]) -> Result<Loader> {
    let order = checked.order.clone();
    let mut loader =
        Loader::new(sources.to_vec(), order, comm.rank())?.on_machine_with(comm.machine());
    if let Some(mebibytes) = checked.recipe.run.read_ahead_mib {
        loader = loader.read_ahead(mebibytes.saturating_mul(1 << 20))?;
    }
    loader.check_cache()?;
    Ok(loader)
}

/// Returns the bytes of one of the guard's snapshots of this state.
fn snapshot_bytes(state: &TrainState) -> u64 {
    let num_owned = state.parameters.partition.most_owned();
    let moments = state.optimizer.moments_kind();
    snapshots::bytes(num_owned, moments, state.average.is_some())
}

/// What a rank has computed of a step before the ranks combine their measurements.
struct Computed {
    step: Step,
    summed: Summed,
    /// Learning rate of the step's update.
    lr: f64,
    data_secs: f64,
    /// Seconds of the passes, without those of the network.
    passes_secs: f64,
}

/// A run in one process.
struct Run<'a> {
    parts: Parts<'a>,
    state: TrainState,
    loader: Loader,
    stepper: Stepper<'a>,
    exchange: Exchange<'a>,
    guard: GuardState,
    ring: Ring,
    recorder: Recorder,
    /// Losses of the samples trained on since the vital signs were last measured.
    losses: Bins,
    measurer: Measurer<'a>,
    saver: Saver<'a>,
    writer: Writer,
    watchers: Watchers,
    times: MicroBatchTimes,
    /// Whether writing the last event failed.
    mute: bool,
    observe: &'a mut dyn FnMut(&Event),
    before_step: Option<&'a mut BeforeStep<'a>>,
    began: Instant,
    /// Whether any rank was asked to stop.
    told_to_stop: bool,
}

impl<'a> Run<'a> {
    fn new(
        parts: Parts<'a>,
        before_step: Option<&'a mut BeforeStep<'a>>,
        observe: &'a mut dyn FnMut(&Event),
    ) -> Result<Self> {
        let Parts {
            checked,
            comm,
            sources,
            model,
            ..
        } = parts;
        let recipe = &checked.recipe;
        let loader = open_loader(checked, comm, sources)?;
        check_same_data(comm, sources, &loader.order_hash())?;
        comm.first(|| snapshots::clean(&recipe.run.dir))?;

        // The state before the first step, and what changes it.
        let state = fresh_state(checked, model, comm);
        let stepper = Stepper::new(checked, model);
        let exchange = Exchange::new(comm, recipe.ranks.sharding)
            .with_order(loader.order(), stepper.workers.width())?;
        let distances = snapshots::snapshot_distances(&recipe.guard, snapshot_bytes(&state));
        Ok(Self {
            measurer: Measurer::new(parts)?,
            saver: Saver::new(parts, parts.template(&loader, &state)?),
            writer: Writer::open(&recipe.run.dir, comm.rank().rank)?,
            watchers: Watchers::start(checked, comm.rank().rank),
            guard: GuardState::default(),
            ring: Ring::new(distances, &recipe.run.dir),
            recorder: Recorder::new(&recipe.run.dir),
            losses: Bins::new(recipe.test.bins),
            stepper,
            times: MicroBatchTimes::default(),
            mute: false,
            began: Instant::now(),
            told_to_stop: false,
            parts,
            state,
            exchange,
            loader,
            observe,
            before_step,
        })
    }

    /// Moves to where the run begins, and measures the model before the first step of a new run.
    fn start(&mut self, acknowledged: Option<String>) -> Result<()> {
        self.go_to_origin()?;
        self.loader.seek(self.state.position.cursor);

        // Record the beginning.
        let guard = &self.parts.checked.recipe.guard;
        let snapshot_bytes = snapshots::total_bytes(guard, snapshot_bytes(&self.state));
        let num_test = self.measurer.num_test();
        let start = self
            .parts
            .start_event(&self.state, &self.loader, num_test, snapshot_bytes);
        self.emit(Event::Start(start));
        if let Some(reason) = acknowledged {
            self.guard.acts = Acts::default();
            self.emit_guard("acknowledged", reason, None);
        }
        self.ring
            .keep(&self.state, &self.guard.normal, self.parts.comm)?;
        if self.saver.last().is_none() {
            self.measure()?;
            self.preview()?;
        }
        Ok(())
    }

    /// Restores what the checkpoint of a resumed run or of a branch has.
    fn go_to_origin(&mut self) -> Result<()> {
        match self.parts.origin {
            Origin::Base => {}
            Origin::Resume(found, _) => {
                restore::restore(&found.path, &found.saved, &mut self.state)?;
                self.check_same_order(&found.path, &found.saved)?;
                self.guard = found.saved.guard.clone();
                self.saver.resume(found);
            }
            Origin::Branch(found, _) => {
                restore::inherit(&found.path, &found.saved, &mut self.state)?;
                let mut epochs = 0.0;
                if self.saver.is_same_data(&found.saved) {
                    epochs = found.saved.epochs;
                }
                self.state.position.cursor = step_at(self.loader.order(), epochs);
            }
        }
        Ok(())
    }

    fn check_same_order(&self, newest: &Path, saved: &Saved) -> Result<()> {
        let found = self.loader.order_hash();
        if saved.order_hash == found {
            return Ok(());
        }
        let reason = format!(
            "it was trained in the order {}, but this recipe and data set have the order {found}: \
             the data, its prompts, the seed, the batch or the mode (`auto` depends on where the \
             data is) has changed; change it back, or start a new run with another run.dir and \
             --branch-from {}",
            saved.order_hash,
            newest.display()
        );
        Err(Error::checkpoint(newest, reason))
    }

    /// Repeats steps until the run is finished or interrupted; returns which.
    fn go(&mut self, stop: &AtomicBool) -> Result<&'static str> {
        let alone = self.parts.comm.rank().ranks == 1;
        let _doing = self.parts.comm.long("between two steps");
        while self.state.position.samples < self.parts.checked.recipe.train.samples {
            // A single process checks `stop` here; several ranks have to agree, which every step
            // does.
            if self.told_to_stop || (alone && stop.load(Ordering::Relaxed)) {
                return Ok("interrupted");
            }
            if self.recipe().train.update_in_backward {
                self.step_in_backward(stop)?;
            } else {
                self.step(stop)?;
            }
        }
        Ok("finished")
    }

    /// One step, and the measurements and checkpoints that are due after it.
    fn step(&mut self, stop: &AtomicBool) -> Result<()> {
        let comm = self.parts.comm;
        let number = self.state.position.cursor + 1;
        let began = Instant::now();
        comm.take_traffic();

        let Computed {
            step,
            summed,
            lr,
            data_secs,
            passes_secs,
        } = self.compute(number, began)?;

        // Combine the measurements of all ranks, and apply the update as the guard decides.
        let _doing = comm.work(|| format!("in the update of step {number}"));
        let report = RankReport {
            stop: stop.load(Ordering::Relaxed),
            is_written: self.saver.is_written(),
            busy: (data_secs + passes_secs) / step.micro_batches.len() as f64,
        };
        let (passes, consensus) = self
            .exchange
            .reduce(summed, &self.state.parameters, report)?;
        self.told_to_stop |= consensus.stop;
        self.remember(&step, &passes, lr);
        let seen = Seen::of(&passes, &self.state, lr);
        let applied = self.act(&step, passes, lr)?;

        // Record the step, then do what is due after it.
        let secs = StepSecs {
            step: began.elapsed().as_secs_f64(),
            data: data_secs,
            passes: passes_secs,
        };
        let ranks = self.rank_metrics(secs, &consensus.busy);
        let metrics = seen.metrics(&step, self.state.position, secs);
        self.emit(Event::Step(StepMetrics {
            flops: Configs::of(self.parts.model).step_flops(&self.recipe().train, &step),
            applied,
            spent: self.spent(),
            ranks,
            ..metrics
        }));
        if consensus.is_written {
            self.finish_saving()?;
        }
        self.after_step()
    }

    /// Reads the samples of the next step, then runs this rank's forward and backward passes.
    fn compute(&mut self, number: u64, began: Instant) -> Result<Computed> {
        let comm = self.parts.comm;
        let mut step = self.read_step(number)?;
        let data_secs = began.elapsed().as_secs_f64();
        if let Some(before_step) = &mut self.before_step {
            before_step(&mut step, &mut self.state);
        }
        let lr = self.lr();
        let summed = self.passes(number, &step)?;
        Ok(Computed {
            step,
            summed,
            lr,
            data_secs,
            passes_secs: began.elapsed().as_secs_f64() - data_secs - comm.traffic_secs(),
        })
    }

    /// Returns the samples of the next step.
    fn read_step(&mut self, number: u64) -> Result<Step> {
        let comm = self.parts.comm;
        let _doing = comm.work(|| format!("reading the data of step {number}"));
        Ok(self.loader.next_step()?)
    }

    /// Returns the sums of this rank's forward and backward passes.
    fn passes(&self, number: u64, step: &Step) -> Result<Summed> {
        let comm = self.parts.comm;
        let _doing = comm.work(|| format!("in the forward and backward passes of step {number}"));
        self.stepper
            .passes(&self.state.parameters, step, &self.exchange)
    }

    /// Returns this rank's share of a step, where there are several ranks.
    fn rank_metrics(&mut self, secs: StepSecs, busy: &[f64]) -> Option<RankMetrics> {
        let comm = self.parts.comm;
        if comm.rank().ranks == 1 {
            return None;
        }
        let traffic = comm.take_traffic();
        Some(secs.rank_metrics(traffic, self.times.observe(busy)))
    }

    /// Returns the money spent on the run, if the recipe has a price.
    fn spent(&self) -> Option<f64> {
        let price = self.recipe().run.price_per_hour?;
        Some(price * self.secs() / 3600.0)
    }

    fn recipe(&self) -> &'a Recipe {
        &self.parts.checked.recipe
    }

    /// Returns the learning rate of the next update: the schedule's, times the factor of the guard.
    fn lr(&self) -> f64 {
        let recipe = &self.parts.checked.recipe;
        recipe
            .lr
            .rate(self.state.position.samples, recipe.train.samples)
            * self.guard.acts.rate
    }

    /// Records a step for the black box and the vital signs.
    fn remember(&mut self, step: &Step, passes: &Passes, lr: f64) {
        self.recorder.record(step, passes, lr);
        for &(time, loss) in &passes.samples {
            if loss.is_finite() {
                self.losses.add(time, f64::from(loss), 1.0);
            }
        }
    }

    /// Measures the test loss, samples previews and saves, each if it is due.
    fn after_step(&mut self) -> Result<()> {
        let recipe = &self.parts.checked.recipe;
        let Position {
            cursor, samples, ..
        } = self.state.position;
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
        let event = self
            .measurer
            .test_loss(&self.state, &self.stepper, &self.exchange)?;
        self.emit_if_any(event);
        Ok(())
    }

    fn preview(&mut self) -> Result<()> {
        let event = self
            .measurer
            .preview(self.state.position.cursor, &self.exchange)?;
        self.emit_if_any(event);
        Ok(())
    }

    /// Begins the checkpoint that is due, once the previous one is written.
    fn save(&mut self) -> Result<()> {
        self.finish_saving()?;
        let goes_on = self.parts.checked.recipe.checkpoint.in_background;
        let begun = self.begin_saving(goes_on);
        let failed = self
            .saver
            .or_warn(self.state.position.cursor, begun.map(|()| None))?;
        self.emit_if_any(failed);
        if goes_on {
            Ok(())
        } else {
            self.finish_saving()
        }
    }

    fn begin_saving(&mut self, goes_on: bool) -> Result<()> {
        self.begin_saving_in(self.parts.checkpoints, goes_on)
    }

    fn begin_saving_in(&mut self, checkpoints: &Checkpoints, goes_on: bool) -> Result<()> {
        let epochs = epochs_at(self.loader.order(), self.state.position.cursor);
        let secs = self.secs();
        let moment = Moment {
            state: &self.state,
            guard: &self.guard,
            epochs,
            secs,
        };
        self.saver.begin_in(checkpoints, &moment, goes_on)
    }

    /// Waits for the checkpoint that is being written, if any; a failed write is only a warning.
    fn finish_saving(&mut self) -> Result<()> {
        let event = self.saver.finish()?;
        self.emit_if_any(event);
        Ok(())
    }

    /// Returns the seconds spent on the run, those of earlier processes included.
    fn secs(&self) -> f64 {
        self.saver.secs_before() + self.began.elapsed().as_secs_f64()
    }

    /// Writes an event and passes it to `observe`. If writing fails, training continues without a
    /// log.
    fn emit(&mut self, event: Event) {
        let written = self.writer.write(&event);
        if let (Err(error), false) = (&written, self.mute) {
            tracing::error!(
                "an event could not be written: {error}. Training continues without a log"
            );
        }
        self.mute = written.is_err();
        self.watchers.offer(&event);
        if let Some(mirror) = self.parts.mirror
            && mirroring::is_news(&event)
        {
            mirror.look();
        }
        (self.observe)(&event);
    }

    fn emit_if_any(&mut self, event: Option<Event>) {
        if let Some(event) = event {
            self.emit(event);
        }
    }
}
