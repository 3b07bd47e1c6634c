//! What the ranks of a run exchange for an update: gradients on the way in, new values on the way out, and the numbers
//! from which all of them reach the same verdict.
//!
//! ```text
//! micro-batches -> sum of gradients -> reduce -> loss, norms -> guard -> clip, update of this rank's part -> publish
//!                   `each`: reduced after each micro-batch
//! ```
//!
//! The sum's part of this rank holds the gradient of the whole step, whatever the sharding. Norms are made from equal
//! parts of the vector, one a rank, and added up in the order of the ranks, so that they are the same bits everywhere.
//! A rank alone goes the same way, and nothing moves.

use std::ops::Range;

use rectiflow_data::order::Order;
use tch::{Tensor, no_grad};

use crate::{
    comm::Comm,
    ema,
    error::Result,
    flat::{FlatParameters, part},
    launch::Sharding,
    one_pass::square_norm,
    partition::Partition,
    state::TrainState,
    step::{Passes, Summed},
    workers::Workers,
};

/// How the ranks of a run share its updates.
#[derive(Debug)]
pub(crate) struct Exchange<'a> {
    pub(crate) comm: &'a Comm,
    sharding: Sharding,
    partition: Partition,
    /// With [`Sharding::Each`]: how often a step's gradients are reduced, on every rank.
    calls: usize,
}

/// The gradients of a step, as far as this rank keeps their sum.
#[derive(Debug)]
pub(crate) struct StepGradients {
    /// With [`Sharding::Each`] this rank's part, fp32; else `[n]`, once all micro-batches are done.
    vector: Option<Tensor>,
    calls: usize,
}

/// What all ranks know of each other after a step's passes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Together {
    /// Whether any of them has been asked to stop.
    pub(crate) stop: bool,
    /// Seconds that each spent on data and passes, by micro-batch.
    pub(crate) busy: Vec<f64>,
}

impl<'a> Exchange<'a> {
    /// For `num_parameters` trained parameters.
    pub(crate) fn new(comm: &'a Comm, sharding: Sharding, num_parameters: i64) -> Self {
        // Alone there is nothing to split.
        let sharding = if comm.rank().ranks == 1 { Sharding::Once } else { sharding };
        Self { comm, sharding, partition: Partition::new(num_parameters, comm.rank().ranks), calls: 0 }
    }

    /// The same, for the steps of an order.
    pub(crate) fn with_order(mut self, order: &Order) -> Self {
        let lanes = order.lanes();
        let busiest = lanes.div_ceil(self.comm.rank().ranks);
        self.calls = busiest * (order.settings().micro_batches / lanes);
        self
    }

    /// The elements that this rank updates and has the optimiser's memory of.
    pub(crate) fn own(&self) -> Range<i64> {
        if self.sharding == Sharding::None { self.partition.whole() } else { self.partition.own(self.comm.rank()) }
    }

    /// Elements of the largest such part of any rank.
    pub(crate) fn most_owned(&self) -> i64 {
        if self.sharding == Sharding::None { self.partition.whole().end } else { self.partition.part_len() }
    }

    /// Ranks that have a part of the optimiser's memory of their own to save.
    pub(crate) fn shards(&self) -> usize {
        if self.sharding == Sharding::None { 1 } else { self.comm.rank().ranks }
    }

    /// An empty sum.
    pub(crate) fn begin(&self, parameters: &FlatParameters) -> StepGradients {
        let own = || part(&parameters.values, &self.own()).zeros_like();
        if !self.reduces_each() {
            parameters.gradients.begin(&parameters.values);
        }
        StepGradients { vector: self.reduces_each().then(own), calls: 0 }
    }

    /// How many micro-batches are worked on at a time: one, where each is reduced on its own.
    pub(crate) fn width(&self, workers: &Workers) -> usize {
        if self.reduces_each() { 1 } else { workers.width() }
    }

    /// Before some micro-batches are worked on.
    pub(crate) fn prepare(&self, parameters: &FlatParameters) {
        if self.reduces_each() {
            parameters.gradients.begin(&parameters.values);
        }
    }

    fn reduces_each(&self) -> bool {
        self.sharding == Sharding::Each && self.comm.rank().ranks > 1
    }

    /// After they have been worked on.
    pub(crate) fn add(&self, sum: &mut StepGradients, parameters: &FlatParameters) -> Result<()> {
        if self.reduces_each() {
            let one = parameters.gradients.finish();
            self.reduce_one(sum, parameters, Some(&one))?;
        }
        Ok(())
    }

    /// After the last one.
    pub(crate) fn end(&self, sum: &mut StepGradients, parameters: &FlatParameters) {
        if !self.reduces_each() {
            sum.vector = Some(parameters.gradients.finish());
        }
    }

    /// The number of a micro-batch in the sum that it is added to.
    pub(crate) fn place(&self, index: usize) -> usize {
        if self.reduces_each() { 0 } else { index }
    }

    /// Reduces the gradient `[n]` of one micro-batch, or nothing where this rank has fewer of them than others.
    fn reduce_one(
        &self,
        sum: &mut StepGradients,
        parameters: &FlatParameters,
        gradient: Option<&Tensor>,
    ) -> Result<()> {
        sum.calls += 1;
        let own = self.own();
        let target = sum.vector.as_ref().expect("each micro-batch is reduced into this rank's part");
        let fill = |range: &Range<i64>, place: Tensor| {
            let len = range.end - range.start;
            let there = gradient.map_or(0, |gradient| (gradient.numel() as i64 - range.start).clamp(0, len));
            if let Some(gradient) = gradient.filter(|_| there > 0) {
                no_grad(|| part(&place, &(0..there)).copy_(&part(gradient, &(range.start..range.start + there))));
            }
            // Where there is no gradient, there is whatever was there before.
            let _ = part(&place, &(there..len)).zero_();
        };
        let take = |range: &Range<i64>, found: &Tensor| {
            let mut place = part(target, &(range.start - own.start..range.end - own.start));
            place += found;
        };
        let values = &parameters.values;
        self.comm.reduce_scatter_from((values.kind(), values.device()), &self.partition, &fill, &take)
    }

    /// Makes the sum that of all ranks, and measures it: loss, norms, and what the ranks know of each other. `stop` is
    /// whether this one has been asked to, `busy` the seconds a micro-batch took it.
    pub(crate) fn reduce(
        &self,
        summed: Summed,
        parameters: &FlatParameters,
        stop: bool,
        busy: f64,
    ) -> Result<(Passes, Together)> {
        let Summed { loss, samples, mut gradients } = summed;
        while self.reduces_each() && gradients.calls < self.calls {
            self.reduce_one(&mut gradients, parameters, None)?;
        }
        let own = self.partition.own(self.comm.rank());
        let vector = gradients.vector.expect("all micro-batches are done");
        let (measured, gradients) = match self.sharding {
            _ if self.reduces_each() => (vector.shallow_clone(), vector),
            Sharding::None => {
                self.comm.all_reduce(&vector)?;
                (part(&vector, &own), vector)
            }
            Sharding::Once | Sharding::Each => {
                self.comm.reduce_scatter(&vector, &self.partition)?;
                (part(&vector, &own), part(&vector, &own))
            }
        };
        let groups = if parameters.groups.len() > 1 { &parameters.groups[..] } else { &[] };
        let mut numbers = vec![loss, square_norm(&measured)];
        for group in groups {
            let range = meet(&group.range, &own);
            numbers.push(square_norm(&part(&measured, &(range.start - own.start..range.end - own.start))));
        }
        numbers.extend([f64::from(u8::from(stop)), busy]);
        let all = self.comm.gather_numbers(&numbers)?;
        let total = |at: usize| all.iter().map(|numbers| numbers[at]).sum::<f64>();
        let (groups, last) = (groups.len(), numbers.len() - 1);
        let together =
            Together { stop: total(last - 1) > 0.0, busy: all.iter().map(|numbers| numbers[last]).collect() };
        let passes = Passes {
            loss: total(0),
            gradient_norm: total(1).sqrt(),
            norm_by_group: (2..2 + groups).map(|at| total(at).sqrt()).collect(),
            samples,
            gradients,
        };
        Ok((passes, together))
    }

    /// Numbers of which every rank has those of its part, made those of all. Where nothing is split all ranks have the
    /// same but for rounding, and rank 0's are taken.
    pub(crate) fn total(&self, own: &[f64]) -> Result<Vec<f64>> {
        match self.sharding {
            Sharding::None => Ok(self.comm.gather_numbers(own)?.swap_remove(0)),
            Sharding::Once | Sharding::Each => self.comm.sum_numbers(own),
        }
    }

    /// Gives all ranks the values that each has updated.
    pub(crate) fn publish(&self, parameters: &FlatParameters) -> Result<()> {
        if self.sharding != Sharding::None {
            self.comm.all_gather(&parameters.values, &self.partition)?;
        }
        parameters.refresh();
        Ok(())
    }

    /// Exchanges values and average, on all ranks; a second time, and both are what they were.
    pub(crate) fn swap_average(&self, state: &TrainState, workers: &Workers) -> Result<()> {
        let Some(average) = &state.average else { return Ok(()) };
        ema::swap(&part(&state.parameters.values, &state.own), average, workers);
        self.publish(&state.parameters)
    }
}

/// What two ranges have in common; empty, inside `b`, where that is nothing.
pub(crate) fn meet(a: &Range<i64>, b: &Range<i64>) -> Range<i64> {
    let start = a.start.clamp(b.start, b.end);
    start..a.end.clamp(start, b.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_meet_where_they_overlap() {
        assert_eq!(meet(&(2..8), &(4..10)), 4..8);
        assert_eq!(meet(&(2..8), &(3..5)), 3..5);
        assert_eq!(meet(&(0..2), &(4..10)), 4..4);
        assert_eq!(meet(&(20..30), &(4..10)), 10..10);
    }
}
