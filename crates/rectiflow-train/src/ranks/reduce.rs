//! Gradients on their way while the backward pass goes on: a thread that sends each bucket as soon as it is complete.
//!
//! All ranks send the buckets in one order. It changes no number, since a bucket's sum does not depend on the others; so the
//! first step takes any, and sees in which order buckets come to be complete, which is nearly that of every later step.

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
    /// The order in which all ranks send them.
    pub(crate) order: Vec<usize>,
    /// Says which buckets are complete.
    pub(crate) complete: Receiver<usize>,
    /// Where the sum of what this rank owns is added to, `[k]` fp32; none where it owns all: then buckets are summed up in
    /// their place.
    pub(crate) own: Option<Tensor>,
}

/// What was seen of it.
#[derive(Debug, Default)]
pub(crate) struct Reduced {
    /// The buckets as they came to be complete.
    pub(crate) order: Vec<usize>,
    /// Seconds in which something was under way.
    pub(crate) secs: f64,
}

/// Buckets under way at a time: one that is waited for, and the next ones behind it.
const MOST_UNDER_WAY: usize = 3;

impl Reducer<'_> {
    /// Reduces all buckets. Ends early where some do not come: then the passes have failed, and say why.
    pub(crate) fn run(self) -> Result<Reduced> {
        // One adds up as fast as memory is; the others calculate.
        tch::set_num_threads(1);
        let pieces: Vec<Piece> = self.partition.pieces(self.share).collect();
        let mut is_complete = vec![false; pieces.len()];
        let mut reduced = Reduced::default();
        let mut under_way = VecDeque::new();
        let mut since = Instant::now();
        let end_one = |under_way: &mut VecDeque<(usize, Pending)>, since: Instant, reduced: &mut Reduced| {
            let Some((bucket, pending)) = under_way.pop_front() else { return Ok(false) };
            self.end(&pieces[bucket], pending)?;
            if under_way.is_empty() {
                reduced.secs += since.elapsed().as_secs_f64();
            }
            Ok::<bool, crate::error::Error>(true)
        };
        for &bucket in &self.order {
            while !is_complete[bucket] {
                let told = match self.complete.try_recv() {
                    Err(TryRecvError::Empty) if end_one(&mut under_way, since, &mut reduced)? => continue,
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
        let Some(own) = &self.own else { return self.comm.end_all_reduce(pending) };
        let len = piece.own.end - piece.own.start;
        self.comm.end_reduce_scatter(pending, |found| {
            let _ = narrow(own, &piece.own).f_add_(&narrow(found, &(0..len))).expect("a piece is as long as its place");
        })
    }
}
