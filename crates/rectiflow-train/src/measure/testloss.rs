//! The test loss: the same (sample, prompt, time, noise) tuples at every measurement; and the loss
//! of some fixed training samples, whose distance to the test loss shows how much the model has
//! memorised.
//!
//! Times are uniform, with one quantile cell per test sample, so that every noise level is covered;
//! cells and noise are keyed by the sample's id, so that neither the batch size nor the number of
//! ranks changes a tuple.

use std::collections::HashMap;

use rectiflow_data::{
    batch::{MicroBatch, Source},
    order::RankOf,
    record::SampleId,
    rng::{Purpose, Rng, key_u64},
    test_batches::{TestBatches, test_batches, training_batches},
};
use rectiflow_sdxl::sample::initial_noise;
use serde::Serialize;
use tch::{Tensor, no_grad};

use crate::{
    error::Result,
    measure::{bins::Bins, metrics::TableLoss},
    ranks::comm::Comm,
    recipe::Checked,
    step::{Stepper, latent_size, to_vec},
};

/// The two fixed tables of a run.
#[derive(Debug)]
pub(crate) struct Tables {
    /// All test samples.
    pub(crate) test: Table,
    /// Some training samples.
    pub(crate) training: Table,
}

/// The losses of a model on both tables.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Losses {
    /// Loss on the test samples; `None` if there is no test split.
    pub test: Option<TableLoss>,
    /// Loss on the fixed training samples; `None` if the recipe asks for none.
    pub training: Option<TableLoss>,
}

impl Tables {
    /// Creates the tables of a run.
    pub(crate) fn new(checked: &Checked, sources: &[Source]) -> Result<Self> {
        let recipe = &checked.recipe;
        let training = Samples::Training(recipe.test.training_samples);
        Ok(Self {
            test: Table::new(Samples::Test, checked, sources)?,
            training: Table::new(training, checked, sources)?,
        })
    }

    /// Measures a model on both tables, with the micro-batches divided over the ranks.
    pub(crate) fn measure(
        &self,
        stepper: &Stepper,
        sources: &[Source],
        comm: &Comm,
    ) -> Result<Losses> {
        let test = self.test.measure(stepper, sources, comm)?;
        Ok(Losses {
            test,
            training: self.training.measure(stepper, sources, comm)?,
        })
    }
}

/// Which samples a table consists of.
#[derive(Debug, Clone, Copy)]
enum Samples {
    Test,
    Training(usize),
}

/// A fixed table of samples and times.
#[derive(Debug)]
pub(crate) struct Table {
    samples: Samples,
    seed: u64,
    micro_batch: usize,
    bins: usize,
    times: HashMap<SampleId, f64>,
}

impl Table {
    fn new(samples: Samples, checked: &Checked, sources: &[Source]) -> Result<Self> {
        let recipe = &checked.recipe;
        let mut table = Self {
            samples,
            seed: recipe.run.seed,
            micro_batch: recipe.train.micro_batch,
            bins: recipe.test.bins,
            times: HashMap::new(),
        };
        let ids = table.batches(sources, RankOf::ONLY)?.ids()?;
        table.times = times(ids, table.seed);
        Ok(table)
    }

    /// Returns the number of samples; a sample in two data sets counts once.
    pub(crate) fn len(&self) -> usize {
        self.times.len()
    }

    fn batches(&self, sources: &[Source], rank: RankOf) -> Result<TestBatches> {
        let Self {
            micro_batch, seed, ..
        } = *self;
        Ok(match self.samples {
            Samples::Test => test_batches(sources, micro_batch, seed, rank)?,
            Samples::Training(count) => training_batches(sources, count, micro_batch, seed, rank)?,
        })
    }

    /// Returns the mean loss and the loss by noise level; `None` if the table is empty.
    fn measure(
        &self,
        stepper: &Stepper,
        sources: &[Source],
        comm: &Comm,
    ) -> Result<Option<TableLoss>> {
        if self.times.is_empty() {
            return Ok(None);
        }
        let mut bins = Bins::new(self.bins);
        let mut batches = self.batches(sources, comm.rank())?;
        loop {
            let next = batches.by_ref().take(stepper.workers.width());
            let next = next.collect::<rectiflow_data::Result<Vec<_>>>()?;
            if next.is_empty() {
                break;
            }
            let workers = &stepper.workers;
            let losses =
                workers.map_tensors(stepper, &next, |stepper, batch| self.losses(stepper, batch));
            for (batch, losses) in next.iter().zip(losses) {
                self.add(&mut bins, batch, &losses?);
            }
        }
        Ok(Some(bins.of_all(comm)?.means()))
    }

    /// Adds the losses of a batch to the sums by noise level.
    fn add(&self, bins: &mut Bins, batch: &MicroBatch, losses: &[f32]) {
        for ((loss, id), weight) in losses.iter().zip(&batch.ids).zip(&batch.weights) {
            bins.add(self.times[id], f64::from(*loss), f64::from(*weight));
        }
    }

    /// Returns the loss of each sample of a batch at its own time and noise.
    fn losses(&self, stepper: &Stepper, batch: &MicroBatch) -> Result<Vec<f32>> {
        let times: Vec<f64> = batch.ids.iter().map(|id| self.times[id]).collect();
        Ok(to_vec(&no_grad(|| {
            stepper.losses(batch, &self.noise(batch), &times)
        })?))
    }

    fn noise(&self, batch: &MicroBatch) -> Tensor {
        let mut size = latent_size(batch);
        size[0] = 1;
        let mut rows = Vec::with_capacity(batch.ids.len());
        for id in &batch.ids {
            let seed = key_u64(self.seed, Purpose::TestLoss, &[id.0]);
            rows.push(initial_noise(seed, &size));
        }
        Tensor::cat(&rows, 0)
    }
}

/// Returns a time for each sample: cells are assigned by a keyed shuffle, and the time is the
/// cell's middle.
fn times(mut ids: Vec<SampleId>, seed: u64) -> HashMap<SampleId, f64> {
    ids.sort_unstable_by_key(|id| id.0);
    ids.dedup();
    Rng::keyed(seed, Purpose::TestLoss, &[]).shuffle(&mut ids);
    let count = ids.len() as f64;
    ids.into_iter()
        .enumerate()
        .map(|(cell, id)| (id, (cell as f64 + 0.5) / count))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fill_their_cells_whatever_the_order_of_ids() {
        let ids: Vec<SampleId> = (0..40).map(SampleId).collect();
        let mut reversed = ids.clone();
        reversed.reverse();
        let table = times(ids, 5);
        assert_eq!(table, times(reversed, 5));
        let mut all: Vec<f64> = table.values().copied().collect();
        all.sort_by(f64::total_cmp);
        assert!(
            all.iter()
                .enumerate()
                .all(|(i, t)| (t - (i as f64 + 0.5) / 40.0).abs() < 1e-12)
        );
        assert_ne!(table, times((0..40).map(SampleId).collect(), 6));
    }
}
