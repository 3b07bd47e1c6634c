//! A model of a step on many GPUs: which bytes cross which link, for how long, and how much of that
//! time computation hides. Pure.
//!
//! ```text
//! once   last backward pass  | reduce-scatter of gradients (fp32) | update | all-gather of weights
//! each   every backward pass | its reduce-scatter                 | update | all-gather of weights
//! none   last backward pass  | all-reduce of gradients            | update
//!                              (reduce-scatter and all-gather)
//! ```
//!
//! Collectives are hierarchical rings. In a ring of n ranks each one sends (n - 1) / n of the
//! message, in n - 1 hops (Thakur, Rabenseifner and Gropp, "Optimization of Collective
//! Communication Operations in MPICH", 2005, section 4). A reduce-scatter over N machines of g
//! GPUs is one inside each machine, then one of a g-th of the message between machines, over g
//! cards at the same time or over the card that the GPUs share. (NCCL's rings move the same bytes
//! over the same links concurrently; the sum used here is an upper bound.) An all-gather is the
//! same in reverse. A message is sent in buckets, each of which costs the latency of its hops.
//!
//! With overlap a bucket is sent as soon as its gradients are complete. What remains is the time
//! that exceeds the backward pass, and at least that of the last bucket. The all-gather is not
//! hidden: the next forward pass waits for all of it.
//!
//! Not included: stragglers, shared links beyond a machine's card, GPUs that are slower while they
//! communicate. The prediction is a lower bound of the losses.

use crate::{hardware::Link, ranks::launch::Sharding};

/// The ranks of a run and the links between them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cluster {
    /// Total number of ranks, one per GPU.
    pub ranks: usize,
    /// Ranks per machine, at most.
    pub ranks_per_node: usize,
    /// Link between the GPUs of a machine.
    pub inside: Link,
    /// Link between machines, as each GPU sees it when all GPUs of a machine send.
    pub between: Link,
}

/// The work of a rank in a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepWork {
    /// Seconds of a micro-batch's forward and backward pass.
    pub micro_batch_secs: f64,
    /// Share of the backward pass in them: 2/3, or 3/4 if it recomputes the forward pass.
    pub backward_share: f64,
    /// Number of micro-batches of the rank.
    pub micro_batches: u64,
    /// Seconds for the update of the rank's part.
    pub update_secs: f64,
    /// Bytes of all gradients as sent: 4 per parameter.
    pub gradient_bytes: f64,
    /// Bytes of all weights as sent: 4 per parameter, 2 if bf16 copies are gathered.
    pub weight_bytes: f64,
    /// Bytes of a bucket.
    pub bucket_bytes: f64,
}

/// The prediction for a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Seconds of the step.
    pub step_secs: f64,
    /// Seconds of the step in which the rank waits for the network.
    pub waiting_secs: f64,
    /// Seconds in which messages are in transit, hidden or not.
    pub network_secs: f64,
    /// Bytes that the rank sends in a step.
    pub sent_bytes: f64,
    /// Share of the step in which the rank computes, 0 to 1: 1 if the network costs nothing.
    pub efficiency: f64,
}

/// Seconds to launch a collective, as NCCL assumes (`src/graph/tuning.cc`, ring, "simple").
const CALL_SECS: f64 = 8.4e-6;
/// Bytes of a bucket of gradients: PyTorch's default of 25 MiB.
pub const BUCKET_BYTES: f64 = 25.0 * 1_048_576.0;

impl Cluster {
    /// Returns the number of machines.
    fn nodes(&self) -> usize {
        self.ranks.div_ceil(self.ranks_per_node.max(1))
    }

    /// Returns the number of ranks on the fullest machine.
    fn on_a_node(&self) -> usize {
        self.ranks.min(self.ranks_per_node.max(1))
    }

    /// Returns the seconds that a reduce-scatter or an all-gather of `bytes` takes.
    pub fn scatter_secs(&self, bytes: f64) -> f64 {
        if self.ranks < 2 {
            return 0.0;
        }
        let part = bytes / self.on_a_node() as f64;
        CALL_SECS
            + ring_secs(self.inside, self.on_a_node(), bytes)
            + ring_secs(self.between, self.nodes(), part)
    }

    /// Returns the bytes that a rank sends in a reduce-scatter or an all-gather of `bytes`: (R - 1)
    /// / R of them.
    pub fn sent_bytes(&self, bytes: f64) -> f64 {
        let part = |ranks: usize| (ranks - 1) as f64 / ranks as f64;
        let on_a_node = self.on_a_node();
        bytes * part(on_a_node) + bytes / on_a_node as f64 * part(self.nodes())
    }

    /// Returns the seconds of a message that is sent in buckets: (all buckets, the last one).
    fn bucketed_secs(&self, bytes: f64, bucket_bytes: f64) -> (f64, f64) {
        let num_buckets = (bytes / bucket_bytes).ceil();
        if num_buckets < 1.0 {
            return (0.0, 0.0);
        }
        let one = self.scatter_secs(bytes / num_buckets);
        (num_buckets * one, one)
    }
}

/// Returns the seconds of a reduce-scatter or an all-gather in a ring.
fn ring_secs(link: Link, ranks: usize, bytes: f64) -> f64 {
    let hops = (ranks - 1) as f64;
    hops * (bytes / ranks as f64 / link.bytes_per_sec + link.latency_secs)
}

/// Predicts a step on a cluster. `overlap`: whether gradients are sent during the backward pass.
pub fn predict(
    cluster: &Cluster,
    work: &StepWork,
    sharding: Sharding,
    overlap: bool,
) -> Prediction {
    // How often gradients are sent, how many bytes each time, and how many bytes return after the
    // update.
    let (times, gradient_bytes, weight_bytes) = match sharding {
        Sharding::Once => (1.0, work.gradient_bytes, work.weight_bytes),
        Sharding::Each => (
            work.micro_batches as f64,
            work.gradient_bytes,
            work.weight_bytes,
        ),
        Sharding::None => (1.0, 2.0 * work.gradient_bytes, 0.0),
    };
    let (scatter, last) = cluster.bucketed_secs(gradient_bytes, work.bucket_bytes);
    let (gather, _) = cluster.bucketed_secs(weight_bytes, work.bucket_bytes);
    let backward_secs = work.micro_batch_secs * work.backward_share;
    let left_over = if overlap {
        (scatter - backward_secs).max(last)
    } else {
        scatter
    };
    let waiting_secs = times * left_over + gather;
    let busy_secs = work.micro_batches as f64 * work.micro_batch_secs + work.update_secs;
    let step_secs = busy_secs + waiting_secs;
    Prediction {
        step_secs,
        waiting_secs,
        network_secs: times * scatter + gather,
        sent_bytes: times * cluster.sent_bytes(gradient_bytes) + cluster.sent_bytes(weight_bytes),
        efficiency: if step_secs > 0.0 {
            busy_secs / step_secs
        } else {
            1.0
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Link = Link {
        label: "free",
        bytes_per_sec: f64::INFINITY,
        latency_secs: 0.0,
    };

    fn link(bytes_per_sec: f64) -> Link {
        Link {
            bytes_per_sec,
            ..FREE
        }
    }

    fn cluster(ranks: usize) -> Cluster {
        Cluster {
            ranks,
            ranks_per_node: 4,
            inside: link(100.0),
            between: link(10.0),
        }
    }

    fn work() -> StepWork {
        StepWork {
            micro_batch_secs: 3.0,
            backward_share: 2.0 / 3.0,
            micro_batches: 5,
            update_secs: 1.0,
            gradient_bytes: 400.0,
            weight_bytes: 200.0,
            bucket_bytes: 100.0,
        }
    }

    #[track_caller]
    fn near(found: f64, expected: f64) {
        // The hand-computed values leave out the few microseconds of the calls.
        assert!(
            (found - expected).abs() < 1e-3,
            "found {found}, expected {expected}"
        );
    }

    #[test]
    fn one_rank_sends_nothing() {
        for sharding in [Sharding::Once, Sharding::Each, Sharding::None] {
            let alone = predict(&cluster(1), &work(), sharding, false);
            assert_eq!(
                (alone.sent_bytes, alone.waiting_secs, alone.efficiency),
                (0.0, 0.0, 1.0)
            );
            near(alone.step_secs, 16.0);
        }
    }

    #[test]
    fn a_free_network_costs_nothing() {
        let free = Cluster {
            inside: FREE,
            between: FREE,
            ..cluster(1024)
        };
        for overlap in [false, true] {
            let found = predict(&free, &work(), Sharding::Each, overlap);
            near(found.step_secs, 16.0);
            assert!(found.efficiency > 0.9999 && found.sent_bytes > 0.0);
        }
    }

    #[test]
    fn rings_take_what_the_formula_says() {
        // Two ranks of a machine: half of 400 B at 100 B/s.
        near(cluster(2).scatter_secs(400.0), 2.0);
        // Four: three quarters.
        near(cluster(4).scatter_secs(400.0), 3.0);
        // Three machines of four: 3 s inside; then a fourth of the message, 100 B, of which two
        // thirds at 10 B/s.
        near(
            cluster(12).scatter_secs(400.0),
            3.0 + 100.0 * 2.0 / 3.0 / 10.0,
        );
        // With any hierarchy a rank sends (R - 1) / R of the message.
        for ranks in [1, 2, 4, 8, 12, 1024] {
            near(
                cluster(ranks).sent_bytes(400.0),
                400.0 * (ranks - 1) as f64 / ranks as f64,
            );
        }
        let slow = Cluster {
            inside: Link {
                latency_secs: 0.5,
                ..FREE
            },
            ..cluster(4)
        };
        near(slow.scatter_secs(400.0), 3.0 * 0.5);
    }

    #[test]
    fn what_is_not_hidden_is_waited_for() {
        // Four ranks of a machine: the gradients take 3 s in 4 buckets, the weights 1.5 s in 2.
        let four = cluster(4);
        near(
            predict(&four, &work(), Sharding::Once, false).step_secs,
            16.0 + 3.0 + 1.5,
        );
        near(
            predict(&four, &work(), Sharding::Each, false).step_secs,
            16.0 + 5.0 * 3.0 + 1.5,
        );
        // A backward pass of 2 s hides all but 1 s, more than the last bucket's 0.75 s.
        near(
            predict(&four, &work(), Sharding::Once, true).step_secs,
            16.0 + 1.0 + 1.5,
        );
        near(
            predict(&four, &work(), Sharding::Each, true).step_secs,
            16.0 + 5.0 + 1.5,
        );
        // With long passes only the last bucket of the gradients is not hidden.
        let long = StepWork {
            micro_batch_secs: 300.0,
            ..work()
        };
        near(
            predict(&four, &long, Sharding::Once, true).waiting_secs,
            0.75 + 1.5,
        );
    }

    #[test]
    fn traffic_of_once_does_not_depend_on_the_number_of_micro_batches() {
        let many = StepWork {
            micro_batches: 50,
            ..work()
        };
        let sent =
            |work: &StepWork, sharding| predict(&cluster(8), work, sharding, true).sent_bytes;
        near(sent(&work(), Sharding::Once), 600.0 * 7.0 / 8.0);
        near(sent(&many, Sharding::Once), 600.0 * 7.0 / 8.0);
        near(
            sent(&many, Sharding::Each),
            (50.0 * 400.0 + 200.0) * 7.0 / 8.0,
        );
        near(sent(&many, Sharding::None), 2.0 * 400.0 * 7.0 / 8.0);
    }

    #[test]
    fn efficiency_falls_with_ranks_and_rises_with_overlap() {
        let of = |ranks, sharding, overlap| {
            predict(&cluster(ranks), &work(), sharding, overlap).efficiency
        };
        for sharding in [Sharding::Once, Sharding::Each, Sharding::None] {
            let falling: Vec<f64> = [1, 2, 4, 8, 64, 1024]
                .map(|ranks| of(ranks, sharding, false))
                .into();
            assert!(
                falling.windows(2).all(|pair| pair[0] > pair[1]),
                "{falling:?}"
            );
            assert!(of(1024, sharding, true) > of(1024, sharding, false));
        }
        assert!(of(64, Sharding::Once, true) > of(64, Sharding::Each, true));
    }
}
