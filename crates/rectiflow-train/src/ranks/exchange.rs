//! What the ranks of a run exchange for an update: gradients before it, new values after it, and
//! the numbers from which all of them reach the same verdict.
//!
//! ```text
//! micro-batches -> sum of gradients -> loss, norms -> guard -> clip, update own part -> publish
//!                  |                                                                   |
//!                  reduced bucket by bucket (`reduce`),                      wait_gathers before
//!                  with `each` once per round                        the model is used again
//! ```
//!
//! A rank's part of the sum is the gradient of the whole step, regardless of the sharding. Each
//! rank computes the norms of its own part, and they are added in the order of the ranks, so the
//! totals have the same bits everywhere. With a single rank every call follows the same path and
//! exchanges nothing.

use std::{cell::RefCell, panic::resume_unwind, sync::mpsc, thread, time::Instant};

use rectiflow_data::order::{Order, RankOf};
use tch::Tensor;

use crate::{
    error::Result,
    ranks::{
        comm::{Comm, Pending},
        launch::Sharding,
        reduce::{Reduced, Reducer},
        traffic::Collective,
    },
    state::{
        TrainState, ema, flat::FlatParameters, gradient_vector::GradientVector, layout::Group,
        workers::Workers,
    },
};

/// The exchange of gradients, new values and numbers between the ranks of a run.
#[derive(Debug)]
pub(crate) struct Exchange<'a> {
    pub(crate) comm: &'a Comm,
    sharding: Sharding,
    /// Number of this rank's micro-batches that are summed before each reduction.
    round: usize,
    /// Number of reductions in a step, the same on every rank.
    rounds: usize,
    /// The order in which buckets are reduced, once it has been recorded.
    order: RefCell<Option<Vec<usize>>>,
    /// All-gathers of new values in progress.
    gathers: RefCell<Vec<Pending>>,
}

/// The gradients of a step that this rank keeps.
#[derive(Debug)]
pub(crate) struct StepGradients {
    /// If ranks split the sum, the part that this rank owns, `[k]` fp32.
    own: Option<Tensor>,
    /// Otherwise, the whole sum, once all micro-batches are done.
    whole: Option<GradientVector>,
    rounds: usize,
    /// The buckets in the order of their completion, in the last round that had micro-batches.
    order: Vec<usize>,
}

/// The result of one rank's forward and backward passes of a step.
#[derive(Debug)]
pub(crate) struct Summed {
    /// The rank's contribution to the step's loss.
    pub(crate) loss: f64,
    /// Diffusion time and loss of each sample, in the order of the rank's micro-batches.
    pub(crate) samples: Vec<(f64, f32)>,
    pub(crate) gradients: StepGradients,
}

/// The result of the forward and backward passes of a step over all ranks: everything but the
/// update.
#[derive(Debug)]
pub(crate) struct Passes {
    pub(crate) loss: f64,
    pub(crate) gradient_norm: f64,
    /// Norm of each group's gradient; empty if there is only one group.
    pub(crate) norm_by_group: Vec<f64>,
    /// Diffusion time and loss of each of this rank's samples, in the order of its micro-batches.
    pub(crate) samples: Vec<(f64, f32)>,
    /// The gradient of the parameters that this rank updates.
    pub(crate) gradients: GradientVector,
}

/// What a rank reports to the others in every step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RankReport {
    /// Whether the rank has been asked to stop.
    pub(crate) stop: bool,
    /// Whether the rank has written all its files of a checkpoint.
    pub(crate) is_written: bool,
    /// Seconds of data and passes for each micro-batch.
    pub(crate) busy: f64,
}

/// What all ranks know about each other after a step's passes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StepConsensus {
    /// Whether any rank has been asked to stop.
    pub(crate) stop: bool,
    /// Whether all ranks have written all their files.
    pub(crate) is_written: bool,
    /// Each rank's seconds of data and passes for each micro-batch.
    pub(crate) busy: Vec<f64>,
}

/// The numbers that a rank sends after a step's passes: its report and its measurements.
#[derive(Debug, Clone, PartialEq)]
struct StepNumbers {
    report: RankReport,
    /// The rank's contribution to the step's loss.
    loss: f64,
    /// For each group, the squared norm of the rank's own part of the gradient.
    square_norms: Vec<f64>,
}

impl StepNumbers {
    fn to_numbers(&self) -> Vec<f64> {
        let RankReport {
            stop,
            is_written,
            busy,
        } = self.report;
        let flag = |is_set: bool| f64::from(u8::from(is_set));
        let mut numbers = vec![flag(stop), flag(is_written), busy, self.loss];
        numbers.extend(&self.square_norms);
        numbers
    }

    fn from_numbers(numbers: &[f64]) -> Self {
        let [stop, is_written, busy, loss, square_norms @ ..] = numbers else {
            unreachable!("all ranks run the same program, which exchanges at least four numbers");
        };
        let report = RankReport {
            stop: *stop > 0.0,
            is_written: *is_written > 0.0,
            busy: *busy,
        };
        Self {
            report,
            loss: *loss,
            square_norms: square_norms.to_vec(),
        }
    }
}

/// Returns the share of the parameters that this rank owns.
pub(crate) fn share(comm: &Comm, sharding: Sharding) -> RankOf {
    if sharding == Sharding::None {
        RankOf::ONLY
    } else {
        comm.rank()
    }
}

impl<'a> Exchange<'a> {
    /// Returns the exchange for steps whose gradients are reduced once.
    pub(crate) fn new(comm: &'a Comm, sharding: Sharding) -> Self {
        Self {
            comm,
            sharding,
            round: usize::MAX,
            rounds: 1,
            order: RefCell::default(),
            gathers: RefCell::default(),
        }
    }

    /// Adapts the exchange to the steps of an order; this rank processes `width` micro-batches
    /// concurrently.
    ///
    /// # Errors
    /// [`crate::error::Error::Collective`].
    pub(crate) fn with_order(mut self, order: &Order, width: usize) -> Result<Self> {
        if self.sharding == Sharding::Each && self.splits() {
            // All ranks must reduce equally often, so the narrowest decides.
            let widths = self.comm.gather_number(width as f64)?;
            self.round = widths
                .into_iter()
                .map(|width| width as usize)
                .min()
                .unwrap_or(1);
            let lanes = order.lanes();
            let most =
                lanes.div_ceil(self.comm.rank().ranks) * (order.settings().micro_batches / lanes);
            self.rounds = most.div_ceil(self.round);
        }
        Ok(self)
    }

    /// Returns whether each rank owns a part of the parameters.
    fn splits(&self) -> bool {
        share(self.comm, self.sharding).ranks > 1
    }

    /// Returns the number of this rank's micro-batches that are summed before each reduction. With
    /// [`Sharding::Each`] that is one on a GPU, and those that run concurrently on a CPU.
    pub(crate) fn round(&self) -> usize {
        self.round
    }

    /// Returns an empty sum.
    pub(crate) fn begin(&self, parameters: &FlatParameters) -> StepGradients {
        let own = self.splits().then(|| parameters.masters.zeros());
        StepGradients {
            own,
            whole: None,
            rounds: 0,
            order: Vec::new(),
        }
    }

    /// Calls `work`, which processes `micro_batches`, and sums their gradients over all ranks. Each
    /// bucket is sent as soon as its last gradient is complete.
    pub(crate) fn reduce_round(
        &self,
        sum: &mut StepGradients,
        parameters: &FlatParameters,
        micro_batches: usize,
        work: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        sum.rounds += 1;
        if self.comm.rank().ranks == 1 {
            parameters.gradients.begin(micro_batches, None);
            work()?;
            sum.whole = Some(parameters.gradients.finish());
            return Ok(());
        }
        let (listener, complete) = mpsc::channel();
        parameters.gradients.begin(micro_batches, Some(listener));
        let reducer = Reducer {
            comm: self.comm,
            partition: &parameters.partition,
            share: parameters.share,
            buckets: parameters.gradients.complete_buckets(),
            order: self.order_of(parameters),
            complete,
            own: sum.own.as_ref().map(Tensor::shallow_clone),
        };
        let reduced = self.beside(reducer, parameters, work)?;
        if micro_batches > 0 {
            sum.order = reduced.order;
        }
        if !self.splits() {
            sum.whole = Some(parameters.gradients.finish());
        }
        Ok(())
    }

    /// Calls `work` while its buckets are reduced on another thread.
    fn beside(
        &self,
        reducer: Reducer<'_>,
        parameters: &FlatParameters,
        work: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Reduced> {
        let collective = if self.splits() {
            Collective::ReduceScatter
        } else {
            Collective::AllReduce
        };
        thread::scope(|scope| {
            let thread = scope.spawn(|| reducer.run());
            let worked = work();
            parameters.gradients.stop_notifying();
            let began = Instant::now();
            let reduced = self
                .comm
                .waiting(collective, || thread.join())
                .unwrap_or_else(|panic| resume_unwind(panic));
            worked?;
            let reduced = reduced?;
            self.comm
                .note_hidden((reduced.secs - began.elapsed().as_secs_f64()).max(0.0));
            Ok(reduced)
        })
    }

    /// Returns the order in which buckets are reduced: from the last to the first until an order
    /// has been recorded.
    fn order_of(&self, parameters: &FlatParameters) -> Vec<usize> {
        let backwards = || (0..parameters.partition.buckets().len()).rev().collect();
        self.order.borrow().clone().unwrap_or_else(backwards)
    }

    /// Adopts on all ranks the order in which buckets were completed on rank 0.
    fn learn_order(&self, seen: &[usize]) -> Result<()> {
        if self.order.borrow().is_none() && self.comm.rank().ranks > 1 {
            let seen: Vec<f64> = seen.iter().map(|&bucket| bucket as f64).collect();
            let first = self.comm.gather_numbers(&seen)?.swap_remove(0);
            *self.order.borrow_mut() =
                Some(first.into_iter().map(|bucket| bucket as usize).collect());
        }
        Ok(())
    }

    /// Completes the sum over all ranks and measures it. Returns the loss, the norms, and what the
    /// ranks know about each other.
    pub(crate) fn reduce(
        &self,
        summed: Summed,
        parameters: &FlatParameters,
        report: RankReport,
    ) -> Result<(Passes, StepConsensus)> {
        let Summed {
            loss,
            samples,
            mut gradients,
        } = summed;
        // A rank with fewer micro-batches than others has nothing to add, but must still take part
        // and sum its piece.
        while gradients.rounds < self.rounds {
            self.reduce_round(&mut gradients, parameters, 0, &mut || Ok(()))?;
        }
        self.learn_order(&gradients.order)?;
        let own = gradients.own.map(|own| GradientVector::new([own]));
        let gradients = own.or(gradients.whole).expect("all micro-batches are done");
        let groups = &parameters.groups;
        let square_norm = |group: &Group| gradients.square_norm(&parameters.own_part(&group.range));
        let own = StepNumbers {
            report,
            loss,
            square_norms: groups.iter().map(square_norm).collect(),
        };
        let all = self.comm.gather_numbers(&own.to_numbers())?;
        let all: Vec<StepNumbers> = all
            .iter()
            .map(|numbers| StepNumbers::from_numbers(numbers))
            .collect();

        let consensus = StepConsensus {
            stop: all.iter().any(|rank| rank.report.stop),
            is_written: all.iter().all(|rank| rank.report.is_written),
            busy: all.iter().map(|rank| rank.report.busy).collect(),
        };
        let square_norms = self.square_norms(&all);
        let passes = Passes {
            loss: all.iter().map(|rank| rank.loss).sum(),
            gradient_norm: square_norms.iter().sum::<f64>().sqrt(),
            norm_by_group: if groups.len() > 1 {
                square_norms.iter().map(|square| square.sqrt()).collect()
            } else {
                Vec::new()
            },
            samples,
            gradients,
        };
        Ok((passes, consensus))
    }

    /// Returns, for each group, the square of the gradient's norm over all ranks.
    fn square_norms(&self, all: &[StepNumbers]) -> Vec<f64> {
        let first = &all[0].square_norms;
        if !self.splits() {
            // All ranks have the same gradient.
            return first.clone();
        }
        let total = |group: usize| all.iter().map(|rank| rank.square_norms[group]).sum();
        (0..first.len()).map(total).collect()
    }

    /// Turns sums over this rank's part into sums over all ranks. If nothing is split, all ranks
    /// hold the same numbers up to rounding, and those of rank 0 are returned.
    pub(crate) fn total(&self, own: &[f64]) -> Result<Vec<f64>> {
        match self.sharding {
            Sharding::None => Ok(self.comm.gather_numbers(own)?.swap_remove(0)),
            Sharding::Once | Sharding::Each => self.comm.sum_numbers(own),
        }
    }

    /// Begins to update the model on all ranks from the masters that each has changed. The model
    /// must not be used before [`Self::wait_gathers`] returns.
    pub(crate) fn publish(&self, parameters: &FlatParameters) -> Result<()> {
        self.wait_gathers()?;
        if !self.splits() {
            return Ok(());
        }
        for (piece, all) in parameters.exchanged() {
            let pending = self.comm.begin_all_gather(all, piece)?;
            self.gathers.borrow_mut().push(pending);
        }
        Ok(())
    }

    /// Waits until all published values have arrived.
    pub(crate) fn wait_gathers(&self) -> Result<()> {
        let gathers = self.gathers.take();
        if gathers.is_empty() {
            return Ok(());
        }
        self.comm.waiting(Collective::AllGather, || {
            gathers
                .into_iter()
                .try_for_each(|pending| self.comm.end_all_gather(pending))
        })
    }

    /// Swaps masters and average on all ranks. Calling it twice restores both.
    pub(crate) fn swap_average(&self, state: &TrainState, workers: &Workers) -> Result<()> {
        let Some(average) = &state.average else {
            return Ok(());
        };
        self.wait_gathers()?;
        ema::swap(&state.parameters.masters, average, workers);
        self.publish(&state.parameters)?;
        self.wait_gathers()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ranks_exchange_comes_back_as_it_was() {
        for (stop, is_written) in [(true, false), (false, true)] {
            let report = RankReport {
                stop,
                is_written,
                busy: 0.1 + 0.2,
            };
            for square_norms in [vec![], vec![1e300, f64::INFINITY]] {
                let numbers = StepNumbers {
                    report,
                    loss: 0.5,
                    square_norms,
                };
                assert_eq!(StepNumbers::from_numbers(&numbers.to_numbers()), numbers);
            }
        }
    }
}
