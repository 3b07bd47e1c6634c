//! Reading in `local` mode: groups of steps, planned and assembled by all threads.
//!
//! While the micro-batches of one group are assembled, the samples of the next are found. A step
//! with few micro-batches would leave threads idle, so a group has several such steps; the first
//! group has one, so that the first step starts early.

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

use crossbeam_channel::Sender;
use rayon::prelude::*;

use crate::{
    error::Result,
    load::{
        batch::{Members, MicroBatch, Step},
        setup::LoaderSetup,
    },
    order::{
        Stream,
        epoch::{StepPlan, Steps},
        window::{RowRef, Windows},
    },
};

/// Micro-batches in a group for each thread: enough that threads rarely wait for the last one.
const MICRO_BATCHES_A_THREAD: usize = 2;
/// Largest number of steps in a group, which limits memory on machines with many cores.
const MOST_STEPS: usize = 8;

/// Number of steps that are read together, at least 1. In `window` and `owned` mode steps are read
/// one by one.
pub(crate) fn group_len(setup: &LoaderSetup) -> usize {
    if setup.order.settings().mode.has_windows() {
        return 1;
    }
    let wanted = MICRO_BATCHES_A_THREAD * rayon::current_num_threads();
    wanted.div_ceil(setup.slots.len()).clamp(1, MOST_STEPS)
}

/// Reads the steps of one rank in `local` mode.
pub(crate) struct LocalReader<'a> {
    setup: &'a LoaderSetup,
    /// Set when the steps are no longer wanted.
    stop: &'a AtomicBool,
    planner: Planner<'a>,
    /// The next step to plan.
    next: u64,
}

/// A step whose samples are known.
struct PlannedStep {
    plan: StepPlan,
    members: Vec<Members>,
}

impl<'a> LocalReader<'a> {
    /// The steps from `from` on.
    pub(crate) fn new(setup: &'a LoaderSetup, from: u64, stop: &'a AtomicBool) -> Self {
        let planner = Planner {
            setup,
            stop,
            steps: Steps::new(setup.order.clone()),
            windows: Windows::new(setup.order.clone()),
        };
        Self {
            setup,
            stop,
            planner,
            next: from,
        }
    }

    /// Sends the steps in order, until one fails, the steps are no longer wanted, or no receiver is
    /// left.
    pub(crate) fn send(mut self, sender: &Sender<Result<Step>>) {
        let mut planned = self.plan(1);
        while let Some(group) = planned {
            let (setup, stop) = (self.setup, self.stop);
            // Nothing is read beyond a step that has failed.
            let has_failed = group.last().is_some_and(Result::is_err);
            let num_steps = if has_failed { 0 } else { group_len(setup) };
            let (read, following) = rayon::join(
                || assemble_group(setup, stop, group),
                || self.plan(num_steps),
            );
            for step in read.into_iter().flatten() {
                let has_failed = step.is_err();
                if sender.send(step).is_err() || has_failed {
                    return;
                }
            }
            planned = following;
        }
    }

    /// Plans the next `num_steps` steps, up to the first that fails. Returns `None` once `stop` is
    /// set.
    fn plan(&mut self, num_steps: usize) -> Option<Vec<Result<PlannedStep>>> {
        let steps: Range<u64> = self.next..self.next + num_steps as u64;
        self.next = steps.end;
        let mut planned = Vec::with_capacity(num_steps);
        for step in steps {
            let step = self.planner.plan(step)?;
            let has_failed = step.is_err();
            planned.push(step);
            if has_failed {
                break;
            }
        }
        Some(planned)
    }
}

/// Finds the samples of steps.
struct Planner<'a> {
    setup: &'a LoaderSetup,
    stop: &'a AtomicBool,
    steps: Steps,
    windows: Windows,
}

impl Planner<'_> {
    /// The samples of one step. Returns `None` once `stop` is set.
    fn plan(&mut self, step: u64) -> Option<Result<PlannedStep>> {
        let setup = self.setup;
        let plan = self.steps.plan(step);
        let mut members = Vec::with_capacity(setup.slots.len());
        for slot in setup.slots_of(&plan) {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let count = |stream: &Stream, row_refs: &[RowRef]| setup.count(stream, row_refs);
            match self.windows.samples(&slot, count) {
                Ok(row_refs) => members.push(setup.members(&slot, row_refs)),
                Err(error) => return Some(Err(error)),
            }
        }
        Some(Ok(PlannedStep { plan, members }))
    }
}

/// Reads the steps of a group. Returns `None` once `stop` is set.
fn assemble_group(
    setup: &LoaderSetup,
    stop: &AtomicBool,
    group: Vec<Result<PlannedStep>>,
) -> Option<Vec<Result<Step>>> {
    group
        .into_par_iter()
        .map(|planned| match planned {
            Ok(planned) => assemble(setup, stop, planned),
            Err(error) => Some(Err(error)),
        })
        .collect()
}

/// Reads one step. Returns `None` once `stop` is set.
fn assemble(setup: &LoaderSetup, stop: &AtomicBool, planned: PlannedStep) -> Option<Result<Step>> {
    let PlannedStep { plan, members } = planned;
    let read: Vec<Result<MicroBatch>> = members
        .par_iter()
        .map(|members| {
            let is_stopped = stop.load(Ordering::Relaxed);
            (!is_stopped).then(|| setup.batcher.assemble(members))
        })
        .collect::<Option<_>>()?;
    let micro_batches: Result<Vec<MicroBatch>> = read.into_iter().collect();
    Some(micro_batches.map(|micro_batches| Step {
        step: plan.step,
        epoch: plan.epoch,
        num_samples: plan.num_samples,
        micro_batches,
    }))
}
