//! Sends gradients during the backward pass: a thread that sends each bucket as soon as it is
//! complete.
//!
//! All ranks send the buckets in the same order. The order changes no number, because a bucket's
//! sum does not depend on the others. The first step therefore uses an arbitrary order and records
//! the order in which buckets are completed, which is nearly the same in every later step.

use std::{
    collections::VecDeque,
    sync::mpsc::{Receiver, TryRecvError},
    time::Instant,
};

use rectiflow_data::order::RankOf;
use tch::Tensor;

use crate::{
    error::Result,
    ranks::comm::{Comm, Pending},
    state::{
        gradients::Buckets,
        layout::narrow,
        partition::{Partition, Piece},
    },
};

/// Sends the buckets of one sum.
pub(crate) struct Reducer<'a> {
    pub(crate) comm: &'a Comm,
    pub(crate) partition: &'a Partition,
    pub(crate) share: RankOf,
    pub(crate) buckets: Buckets,
    /// The order in which all ranks send the buckets.
    pub(crate) order: Vec<usize>,
    /// Yields the index of each bucket that is complete.
    pub(crate) complete: Receiver<usize>,
    /// Vector to which this rank's part of the sum is added, `[k]` fp32. `None` if the rank owns
    /// all parameters: buckets are then summed in place.
    pub(crate) own: Option<Tensor>,
}

/// Measurements of a reduction.
#[derive(Debug, Default)]
pub(crate) struct Reduced {
    /// The buckets in the order of their completion.
    pub(crate) order: Vec<usize>,
    /// Seconds in which at least one bucket was in transit.
    pub(crate) secs: f64,
}

/// Largest number of buckets that stay in transit: one that is waited for, and those after it.
const MOST_UNDER_WAY: usize = 3;

impl Reducer<'_> {
    /// Reduces all buckets. Returns early if some are never completed: the passes have then failed
    /// with their own error.
    pub(crate) fn run(self) -> Result<Reduced> {
        // One thread already adds at the speed of memory; the other threads compute.
        rectiflow_sdxl::test_threads::set();
        let pieces: Vec<Piece> = self.partition.pieces(self.share).collect();
        let mut is_complete = vec![false; pieces.len()];
        let mut reduced = Reduced::default();
        let mut under_way = VecDeque::new();
        let mut since = Instant::now();
        let end_one =
            |under_way: &mut VecDeque<(usize, Pending)>, since: Instant, reduced: &mut Reduced| {
                let Some((bucket, pending)) = under_way.pop_front() else {
                    return Ok(false);
                };
                self.end(&pieces[bucket], pending)?;
                if under_way.is_empty() {
                    reduced.secs += since.elapsed().as_secs_f64();
                }
                Ok::<bool, crate::error::Error>(true)
            };
        for &bucket in &self.order {
            while !is_complete[bucket] {
                let told = match self.complete.try_recv() {
                    Err(TryRecvError::Empty) if end_one(&mut under_way, since, &mut reduced)? => {
                        continue;
                    }
                    Err(TryRecvError::Empty) => self.complete.recv().ok(),
                    told => told.ok(),
                };
                let Some(told) = told else { return Ok(reduced) };
                is_complete[told] = true;
                reduced.order.push(told);
            }
            if under_way.is_empty() {
                since = Instant::now();
            }
            under_way.push_back((bucket, self.begin(bucket)?));
            if under_way.len() > MOST_UNDER_WAY {
                end_one(&mut under_way, since, &mut reduced)?;
            }
        }
        while end_one(&mut under_way, since, &mut reduced)? {}
        Ok(reduced)
    }

    fn begin(&self, bucket: usize) -> Result<Pending> {
        let sum = self.buckets.take(bucket);
        match self.own {
            Some(_) => self.comm.begin_reduce_scatter(sum),
            None => self.comm.begin_all_reduce(sum),
        }
    }

    fn end(&self, piece: &Piece, pending: Pending) -> Result<()> {
        let Some(own) = &self.own else {
            return self.comm.end_all_reduce(pending);
        };
        let len = piece.own.end - piece.own.start;
        self.comm.end_reduce_scatter(pending, |found| {
            let _ = narrow(own, &piece.own)
                .f_add_(&narrow(found, &(0..len)))
                .expect("a piece is as long as its place");
        })
    }
}
