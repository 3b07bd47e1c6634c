//! Collectives between the ranks of a run: one interface for a single rank, for CPUs (Gloo) and for
//! GPUs (NCCL).
//!
//! All ranks make the same calls in the same order. Vectors are sent bucket by bucket
//! (`partition`). Sums that this file computes (with Gloo) are added in the order of the ranks, and
//! in any case the result is the same on all ranks. A failed call names the rank at fault and what
//! that rank was doing (`pulse`). After that no collective works any more, and the process should
//! end.
//!
//! The caller can begin a reduce-scatter or an all-gather, compute, and wait for it later, also on
//! another thread.
//!
//! Gloo's own reduce-scatter is an all-reduce of the whole vector, which sends twice the bytes.
//! Here it is an exchange of pieces (all-to-all) followed by a sum of R pieces.

use std::{
    mem::forget,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use rectiflow_data::order::RankOf;
use rectiflow_sdxl::write::write_to;
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    error::{Error, Result},
    ranks::{
        c10d::{Group, Store, Transport, Work},
        launch::{Launch, RanksConfig},
        pulse::{self, Pulse},
        rendezvous::{LINGER, Rendezvous},
        spare::SpareMemory,
        traffic::{Collective, Counter, Traffic},
    },
    state::layout::narrow,
};

/// One rank's connection to all ranks of a run.
#[derive(Debug)]
pub struct Comm {
    rank: RankOf,
    /// The ranks on this machine.
    machine: Range<usize>,
    peers: Option<Peers>,
    traffic: Counter,
    /// Memory that receives messages.
    pub(super) spare: SpareMemory,
}

/// The connections to the other ranks.
#[derive(Debug)]
struct Peers {
    /// `None` once a collective has failed: a group with a work that never ends cannot be closed.
    group: Option<Group>,
    transport: Transport,
    /// Device of small messages.
    device: Device,
    timeout: Duration,
    pulse: Pulse,
    serves_store: bool,
    broken: AtomicBool,
    // Last field: the group and the pulse must be dropped before the store that this process may
    // serve.
    _store: Store,
}

/// The activity that a rank reports. It ends when this value is dropped, and the previous activity
/// continues.
#[derive(Debug)]
#[must_use = "the activity ends when this is dropped"]
pub struct Doing<'a> {
    _begun: Option<pulse::Doing<'a>>,
}

/// A collective in progress. If it is dropped before it is done, it continues on its own.
#[derive(Debug)]
pub struct Pending {
    collective: Collective,
    work: Option<Work>,
    sent: Tensor,
    found: Tensor,
    /// The memory of `found`, to be released.
    spare: Option<Tensor>,
    began: Instant,
}

impl Drop for Pending {
    fn drop(&mut self) {
        // The work may still be writing into its tensors, which it keeps alive.
        forget(self.work.take());
    }
}

/// Interval at which a waiting rank checks whether another one has failed.
const GLANCE: Duration = Duration::from_millis(100);

impl Comm {
    /// Returns the connection of a single rank. Every collective is done as soon as it begins.
    pub fn alone() -> Self {
        Self::new(RankOf::ONLY, 0..1, None)
    }

    /// Connects to the other ranks.
    ///
    /// # Errors
    /// [`Error::Launch`] if a rank does not start in time, the port is in use, or the build lacks
    /// NCCL for GPUs; [`Error::Interrupted`] if `stop` is set on any rank meanwhile.
    pub fn open(
        launch: &Launch,
        device: Device,
        config: &RanksConfig,
        stop: &AtomicBool,
    ) -> Result<Self> {
        let peers = Peers::open(launch, device, config, stop)?;
        Ok(Self::new(launch.rank, launch.machine.clone(), Some(peers)))
    }

    fn new(rank: RankOf, machine: Range<usize>, peers: Option<Peers>) -> Self {
        Self {
            rank,
            machine,
            peers,
            traffic: Counter::default(),
            spare: SpareMemory::default(),
        }
    }

    /// Returns whether this is a single rank, which exchanges nothing.
    pub(crate) fn is_alone(&self) -> bool {
        self.peers.is_none()
    }

    /// Returns this rank and the number of ranks.
    pub fn rank(&self) -> RankOf {
        self.rank
    }

    /// Returns the ranks on this machine, including this one.
    pub fn machine(&self) -> Range<usize> {
        self.machine.clone()
    }

    /// Returns whether this rank does the tasks of a single rank: the console, the lock, the names
    /// of checkpoints.
    pub fn is_first(&self) -> bool {
        self.rank.rank == 0
    }

    /// Reports what this rank is doing until the returned value is dropped, so that other ranks can
    /// name it. They wait for it no longer than the time-out.
    pub fn work(&self, what: impl FnOnce() -> String) -> Doing<'_> {
        Doing {
            _begun: self.peers.as_ref().map(|peers| peers.pulse.work(what())),
        }
    }

    /// Like [`Self::work`], for tasks that may take longer than the time-out: files, pictures, the
    /// test loss.
    pub fn long(&self, what: &str) -> Doing<'_> {
        Doing {
            _begun: self
                .peers
                .as_ref()
                .map(|peers| peers.pulse.long(what.to_owned())),
        }
    }

    /// Returns the traffic since the last call, and resets it.
    pub fn take_traffic(&self) -> Traffic {
        self.traffic.take()
    }

    /// Returns the seconds in collectives since the last [`Self::take_traffic`].
    pub(crate) fn traffic_secs(&self) -> f64 {
        self.traffic.secs()
    }

    /// Begins to sum a contiguous tensor over all ranks, in place. The result is bit for bit the
    /// same on all ranks.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn begin_all_reduce(&self, bucket: Tensor) -> Result<Pending> {
        let Some(peers) = &self.peers else {
            return Ok(Pending::done(Collective::AllReduce, bucket));
        };
        let (work, ranks) = (peers.group()?.all_reduce(&bucket), self.rank.ranks as u64);
        self.traffic.add_bytes(
            Collective::AllReduce,
            2 * bytes_of(&bucket) * (ranks - 1) / ranks,
        );
        self.begun(Collective::AllReduce, bucket.shallow_clone(), bucket, work)
    }

    /// Waits until the collective is done.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn end_all_reduce(&self, mut pending: Pending) -> Result<()> {
        self.wait_pending(&mut pending)
    }

    /// Copies a contiguous tensor of rank `from` to all ranks, in place.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn broadcast(&self, tensor: &Tensor, from: usize) -> Result<()> {
        let Some(peers) = &self.peers else {
            return Ok(());
        };
        self.finish(
            Collective::Broadcast,
            tensor,
            peers.group()?.broadcast(tensor, from),
        )?;
        let ranks = self.rank.ranks as u64;
        self.traffic.add_bytes(
            Collective::Broadcast,
            bytes_of(tensor) * (ranks - 1) / ranks,
        );
        Ok(())
    }

    /// Begins to sum a bucket `[R c]` over all ranks. This rank receives its own piece `[c]`.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn begin_reduce_scatter(&self, bucket: Tensor) -> Result<Pending> {
        let Some(peers) = &self.peers else {
            return Ok(Pending::done(Collective::ReduceScatter, bucket));
        };
        let (group, ranks) = (peers.group()?, self.rank.ranks as i64);
        self.traffic.add_bytes(
            Collective::ReduceScatter,
            bytes_of(&bucket) / ranks as u64 * (ranks as u64 - 1),
        );
        let (len, kind, device) = (bucket.numel() as i64, bucket.kind(), bucket.device());
        if peers.transport == Transport::Nccl {
            let found = Tensor::empty([len / ranks], (kind, device));
            let work = group.reduce_scatter(&found, &bucket);
            return self.begun(Collective::ReduceScatter, bucket, found, work);
        }
        let spare = self.spare.take(len, kind, device);
        let found = narrow(&spare, &(0..len));
        let work = group.all_to_all(&found, &bucket);
        let mut pending = self.begun(Collective::ReduceScatter, bucket, found, work)?;
        pending.spare = Some(spare);
        Ok(pending)
    }

    /// Waits until a reduce-scatter is done, and calls `take` with this rank's piece of the sum.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn end_reduce_scatter(
        &self,
        mut pending: Pending,
        take: impl FnOnce(&Tensor),
    ) -> Result<()> {
        self.wait_pending(&mut pending)?;
        no_grad(|| {
            let Some(spare) = pending.spare.take() else {
                take(&pending.found);
                return;
            };
            let rows = pending.found.view([self.rank.ranks as i64, -1]);
            let mut sum = rows.get(0);
            for rank in 1..self.rank.ranks as i64 {
                sum += rows.get(rank);
            }
            take(&sum);
            self.spare.release(spare);
        });
        Ok(())
    }

    /// Begins to collect in `all` `[R c]` the pieces `[c]` of all ranks.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn begin_all_gather(&self, all: &Tensor, piece: Tensor) -> Result<Pending> {
        let Some(peers) = &self.peers else {
            write_to(all, &piece);
            return Ok(Pending::done(Collective::AllGather, piece));
        };
        let work = peers.group()?.all_gather(all, &piece);
        self.traffic.add_bytes(
            Collective::AllGather,
            bytes_of(&piece) * (self.rank.ranks as u64 - 1),
        );
        self.begun(Collective::AllGather, piece, all.shallow_clone(), work)
    }

    /// Waits until the collective is done.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn end_all_gather(&self, mut pending: Pending) -> Result<()> {
        self.wait_pending(&mut pending)
    }

    fn begun(
        &self,
        collective: Collective,
        sent: Tensor,
        found: Tensor,
        work: std::result::Result<Work, String>,
    ) -> Result<Pending> {
        let work = work.map_err(|reason| self.failed(collective, &sent, reason))?;
        Ok(Pending {
            collective,
            work: Some(work),
            sent,
            found,
            spare: None,
            began: Instant::now(),
        })
    }

    /// Returns the `piece` `[k]` of every rank as `[R, k]`, on the device of small messages.
    pub(crate) fn gather(&self, piece: &Tensor) -> Result<Tensor> {
        let Some(peers) = &self.peers else {
            return Ok(piece.view([1, -1]));
        };
        let (ranks, piece) = (self.rank.ranks as i64, piece.to_device(peers.device));
        let all = Tensor::empty([ranks * piece.size()[0]], (piece.kind(), piece.device()));
        self.finish(
            Collective::AllGather,
            &piece,
            peers.group()?.all_gather(&all, &piece),
        )?;
        self.traffic
            .add_bytes(Collective::AllGather, bytes_of(&piece) * (ranks as u64 - 1));
        Ok(all.view([ranks, -1]))
    }

    /// Waits until all ranks have called this.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn barrier(&self) -> Result<()> {
        let Some(peers) = &self.peers else {
            return Ok(());
        };
        let nothing = Tensor::zeros([1], (Kind::Float, peers.device));
        self.finish(
            Collective::Barrier,
            &nothing,
            peers.group()?.all_reduce(&nothing),
        )
    }

    /// Tells the other ranks that this one ends because of `error`, unless they already know or end
    /// for the same reason.
    pub fn abandon(&self, error: &Error) {
        let Some(peers) = &self.peers else { return };
        if !matches!(
            error,
            Error::Stopped { .. } | Error::Collective { .. } | Error::OtherRank { .. }
        ) {
            peers.pulse.tell(format!(
                "rank {} failed {}: {error}",
                self.rank.rank,
                peers.pulse.last_begun()
            ));
        }
        peers.break_down();
        if peers.serves_store {
            std::thread::sleep(LINGER);
        }
    }

    /// Waits for a collective and reports that this rank is waiting.
    fn finish(
        &self,
        collective: Collective,
        tensor: &Tensor,
        work: std::result::Result<Work, String>,
    ) -> Result<()> {
        let mut pending = self.begun(
            collective,
            tensor.shallow_clone(),
            tensor.shallow_clone(),
            work,
        )?;
        self.waiting(collective, || self.wait_pending(&mut pending))
    }

    /// Waits for a collective, on any thread.
    fn wait_pending(&self, pending: &mut Pending) -> Result<()> {
        let (Some(peers), Some(work)) = (&self.peers, pending.work.take()) else {
            return Ok(());
        };
        peers
            .wait(work, pending.began)
            .map_err(|reason| self.failed(pending.collective, &pending.sent, reason))
    }

    /// Calls `wait`, which waits in a collective, and reports and times it.
    pub(crate) fn waiting<T>(&self, collective: Collective, wait: impl FnOnce() -> T) -> T {
        let Some(peers) = &self.peers else {
            return wait();
        };
        let began = Instant::now();
        let _doing = peers.pulse.wait_in(collective.name());
        let found = wait();
        self.traffic.add_secs(began.elapsed().as_secs_f64());
        found
    }

    /// Adds the seconds in which messages were in transit while this rank computed.
    pub(crate) fn note_hidden(&self, secs: f64) {
        self.traffic.add_hidden_secs(secs);
    }

    fn failed(&self, collective: Collective, tensor: &Tensor, reason: String) -> Error {
        let RankOf { rank, ranks } = self.rank;
        let reason = match &self.peers {
            None => reason,
            Some(peers) => {
                let reason = peers.pulse.tell(reason);
                peers.break_down();
                reason
            }
        };
        Error::Collective {
            collective: collective.name(),
            rank,
            ranks,
            bytes: bytes_of(tensor),
            reason,
        }
    }
}

impl Pending {
    /// Returns a completed collective of a single rank.
    fn done(collective: Collective, tensor: Tensor) -> Self {
        let found = tensor.shallow_clone();
        Self {
            collective,
            work: None,
            sent: tensor,
            found,
            spare: None,
            began: Instant::now(),
        }
    }
}

impl Peers {
    /// Connects to the other ranks.
    ///
    /// # Errors
    /// [`Error::Launch`] if a rank does not start in time, the port is in use, or the build lacks
    /// NCCL for GPUs; [`Error::Interrupted`] if `stop` is set on any rank meanwhile.
    fn open(
        launch: &Launch,
        device: Device,
        config: &RanksConfig,
        stop: &AtomicBool,
    ) -> Result<Self> {
        let Rendezvous {
            group,
            transport,
            store,
            pulse_store,
            serves_store,
        } = Rendezvous::open(launch, device, config, stop)?;
        Ok(Self {
            group: Some(group),
            transport,
            device,
            timeout: config.timeout(),
            pulse: Pulse::start(pulse_store, launch.rank),
            serves_store,
            broken: AtomicBool::new(false),
            _store: store,
        })
    }

    /// Returns the process group.
    ///
    /// # Errors
    /// [`Error::Launch`] once a collective has failed.
    fn group(&self) -> Result<&Group> {
        let broken = || Error::Launch {
            reason: "a collective has already failed: this process should end".to_owned(),
        };
        self.group
            .as_ref()
            .filter(|_| !self.broken.load(Ordering::SeqCst))
            .ok_or_else(broken)
    }

    /// Prevents all further collectives.
    fn break_down(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    /// Waits for a work. The error is the reason why it cannot complete.
    fn wait(&self, work: Work, began: Instant) -> std::result::Result<(), String> {
        let mut patience = self.timeout;
        loop {
            let reason = match work.wait(GLANCE) {
                Ok(true) => return Ok(()),
                Ok(false) if began.elapsed() > patience => {
                    patience += self.timeout;
                    self.pulse.investigate(self.timeout)
                }
                Ok(false) => self.pulse.failure(),
                Err(reason) => Some(self.pulse.investigate(self.timeout).unwrap_or(reason)),
            };
            if let Some(reason) = reason {
                // The work may still be writing into its tensors.
                forget(work);
                return Err(reason);
            }
        }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        if self.broken.load(Ordering::SeqCst) {
            // Closing waits for works in progress, which may never end.
            forget(self.group.take());
        }
    }
}

fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}
