//! Collectives between the ranks of a run: one interface, for one rank alone, for processors (Gloo) and for GPUs (NCCL).
//!
//! All ranks make the same calls in the same order. Vectors go bucket by bucket (`partition`). A sum is made in the order
//! of the ranks where this file makes it (Gloo), and comes out alike on all ranks in any case. A call that fails says
//! which rank is to blame and what that rank was doing (`pulse`); after that nothing works any more, and the
//! process should end.
//!
//! A reduce-scatter and an all-gather can be begun and waited for later, on another thread too, while this one calculates.
//!
//! Gloo's own reduce-scatter is an all-reduce of the whole vector, twice the traffic: here it is an exchange of pieces
//! (all-to-all) and a sum of R pieces.

use std::{
    mem::forget,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use rectiflow_data::order::RankOf;
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    error::{Error, Result},
    ranks::{
        c10d::{Group, Store, Transport, Work},
        launch::{Launch, RanksConfig},
        pulse::{self, Pulse},
        rendezvous::Rendezvous,
        spare::SpareMemory,
        traffic::{Collective, Counter, Traffic},
    },
    state::{layout::narrow, write::write_to},
};

/// The ranks of a run, as one of them sees them.
#[derive(Debug)]
pub struct Comm {
    rank: RankOf,
    /// The ranks on this machine.
    machine: Range<usize>,
    peers: Option<Peers>,
    traffic: Counter,
    /// Where messages arrive.
    pub(super) spare: SpareMemory,
}

/// The other ranks, as this one reaches them.
#[derive(Debug)]
struct Peers {
    /// `None` once it is broken: what never ends cannot be closed.
    group: Option<Group>,
    transport: Transport,
    /// Where small messages are made.
    device: Device,
    timeout: Duration,
    pulse: Pulse,
    serves_store: bool,
    broken: AtomicBool,
    // Last: the group and the pulse have to end before the store that this process may serve.
    _store: Store,
}

/// What a rank says it is doing. It ends when this is dropped, and the rank is back at what it did before.
#[derive(Debug)]
#[must_use = "what a rank does ends when this is dropped"]
pub struct Doing<'a> {
    _begun: Option<pulse::Doing<'a>>,
}

/// A collective that has begun. One that is dropped before it is done is left to itself.
#[derive(Debug)]
pub struct Pending {
    collective: Collective,
    work: Option<Work>,
    sent: Tensor,
    found: Tensor,
    /// Memory that `found` is in, to be given back.
    spare: Option<Tensor>,
    began: Instant,
}

impl Drop for Pending {
    fn drop(&mut self) {
        // It may still be writing into its tensors, which the work keeps.
        forget(self.work.take());
    }
}

/// A collective in progress is left alone for so long before others' failures are looked at.
const GLANCE: Duration = Duration::from_millis(100);
/// Rank 0 ends so much later than it could, where it serves the store in which the others read why.
const LINGER: Duration = Duration::from_secs(2);

impl Comm {
    /// One rank alone: every collective is done as soon as it is begun.
    pub fn alone() -> Self {
        Self::new(RankOf::ONLY, 0..1, None)
    }

    /// Meets the other ranks.
    ///
    /// # Errors
    /// [`Error::Launch`] where they do not come, the port is in use, or the build has no NCCL for a GPU.
    pub fn open(launch: &Launch, device: Device, config: &RanksConfig) -> Result<Self> {
        let peers = Peers::open(launch, device, config)?;
        Ok(Self::new(launch.rank, launch.machine.clone(), Some(peers)))
    }

    fn new(rank: RankOf, machine: Range<usize>, peers: Option<Peers>) -> Self {
        Self { rank, machine, peers, traffic: Counter::default(), spare: SpareMemory::default() }
    }

    /// Whether there is nothing to exchange with others.
    pub(crate) fn is_alone(&self) -> bool {
        self.peers.is_none()
    }

    /// Which of how many.
    pub fn rank(&self) -> RankOf {
        self.rank
    }

    /// The ranks on this machine, this one among them.
    pub fn machine(&self) -> Range<usize> {
        self.machine.clone()
    }

    /// Whether this rank does what only one does: the console, the lock, the names of checkpoints.
    pub fn is_first(&self) -> bool {
        self.rank.rank == 0
    }

    /// Says what this rank does, should others have to name it, until the returned value is dropped. Others wait for it
    /// no longer than the time-out.
    pub fn work(&self, what: impl FnOnce() -> String) -> Doing<'_> {
        Doing { _begun: self.peers.as_ref().map(|peers| peers.pulse.work(what())) }
    }

    /// As [`Self::work`], of something that may take longer than the time-out: files, pictures, the test loss.
    pub fn long(&self, what: &str) -> Doing<'_> {
        Doing { _begun: self.peers.as_ref().map(|peers| peers.pulse.long(what.to_owned())) }
    }

    /// What was sent since the last call.
    pub fn take_traffic(&self) -> Traffic {
        self.traffic.take()
    }

    /// Seconds of it.
    pub(crate) fn traffic_secs(&self) -> f64 {
        self.traffic.secs()
    }

    /// Begins to sum a contiguous tensor over all ranks, in place; bit for bit the same on all of them.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn begin_all_reduce(&self, bucket: Tensor) -> Result<Pending> {
        let Some(peers) = &self.peers else { return Ok(Pending::done(Collective::AllReduce, bucket)) };
        let (work, ranks) = (peers.group()?.all_reduce(&bucket), self.rank.ranks as u64);
        self.traffic.add_bytes(Collective::AllReduce, 2 * bytes_of(&bucket) * (ranks - 1) / ranks);
        self.begun(Collective::AllReduce, bucket.shallow_clone(), bucket, work)
    }

    /// Waits until it is done.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn end_all_reduce(&self, mut pending: Pending) -> Result<()> {
        self.wait_pending(&mut pending)
    }

    /// Makes a contiguous tensor what rank `from` has.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn broadcast(&self, tensor: &Tensor, from: usize) -> Result<()> {
        let Some(peers) = &self.peers else { return Ok(()) };
        self.finish(Collective::Broadcast, tensor, peers.group()?.broadcast(tensor, from))?;
        let ranks = self.rank.ranks as u64;
        self.traffic.add_bytes(Collective::Broadcast, bytes_of(tensor) * (ranks - 1) / ranks);
        Ok(())
    }

    /// Begins to sum up a bucket `[R c]` over all ranks, of which this rank wants its own piece `[c]`.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn begin_reduce_scatter(&self, bucket: Tensor) -> Result<Pending> {
        let Some(peers) = &self.peers else { return Ok(Pending::done(Collective::ReduceScatter, bucket)) };
        let (group, ranks) = (peers.group()?, self.rank.ranks as i64);
        self.traffic.add_bytes(Collective::ReduceScatter, bytes_of(&bucket) / ranks as u64 * (ranks as u64 - 1));
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

    /// Ends it: `take` is given this rank's piece of the sum.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn end_reduce_scatter(&self, mut pending: Pending, take: impl FnOnce(&Tensor)) -> Result<()> {
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

    /// Begins to make `all` `[R c]` the pieces `[c]` of all ranks.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn begin_all_gather(&self, all: &Tensor, piece: Tensor) -> Result<Pending> {
        let Some(peers) = &self.peers else {
            write_to(all, &piece);
            return Ok(Pending::done(Collective::AllGather, piece));
        };
        let work = peers.group()?.all_gather(all, &piece);
        self.traffic.add_bytes(Collective::AllGather, bytes_of(&piece) * (self.rank.ranks as u64 - 1));
        self.begun(Collective::AllGather, piece, all.shallow_clone(), work)
    }

    /// Waits until it is done.
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
        Ok(Pending { collective, work: Some(work), sent, found, spare: None, began: Instant::now() })
    }

    /// `piece` `[k]` of every rank, where small messages are made: `[R, k]`.
    pub(crate) fn gather(&self, piece: &Tensor) -> Result<Tensor> {
        let Some(peers) = &self.peers else { return Ok(piece.view([1, -1])) };
        let (ranks, piece) = (self.rank.ranks as i64, piece.to_device(peers.device));
        let all = Tensor::empty([ranks * piece.size()[0]], (piece.kind(), piece.device()));
        self.finish(Collective::AllGather, &piece, peers.group()?.all_gather(&all, &piece))?;
        self.traffic.add_bytes(Collective::AllGather, bytes_of(&piece) * (ranks as u64 - 1));
        Ok(all.view([ranks, -1]))
    }

    /// Waits until all ranks have come here.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn barrier(&self) -> Result<()> {
        let Some(peers) = &self.peers else { return Ok(()) };
        let nothing = Tensor::zeros([1], (Kind::Float, peers.device));
        self.finish(Collective::Barrier, &nothing, peers.group()?.all_reduce(&nothing))
    }

    /// Tells the others that this rank ends because of `error`, unless they know or end for the same reason.
    pub fn abandon(&self, error: &Error) {
        let Some(peers) = &self.peers else { return };
        if !matches!(error, Error::Stopped { .. } | Error::Collective { .. } | Error::OtherRank { .. }) {
            peers.pulse.tell(format!("rank {} failed {}: {error}", self.rank.rank, peers.pulse.last_begun()));
        }
        peers.break_down();
        if peers.serves_store {
            std::thread::sleep(LINGER);
        }
    }

    /// Waits for a collective, looking after the other ranks.
    fn finish(&self, collective: Collective, tensor: &Tensor, work: std::result::Result<Work, String>) -> Result<()> {
        let mut pending = self.begun(collective, tensor.shallow_clone(), tensor.shallow_clone(), work)?;
        self.waiting(collective, || self.wait_pending(&mut pending))
    }

    /// Waits for what has begun, on whatever thread.
    fn wait_pending(&self, pending: &mut Pending) -> Result<()> {
        let (Some(peers), Some(work)) = (&self.peers, pending.work.take()) else { return Ok(()) };
        peers.wait(work, pending.began).map_err(|reason| self.failed(pending.collective, &pending.sent, reason))
    }

    /// Has nothing else to do than to wait in a collective.
    pub(crate) fn waiting<T>(&self, collective: Collective, wait: impl FnOnce() -> T) -> T {
        let Some(peers) = &self.peers else { return wait() };
        let began = Instant::now();
        let _doing = peers.pulse.wait_in(collective.name());
        let found = wait();
        self.traffic.add_secs(began.elapsed().as_secs_f64());
        found
    }

    /// Notes for how long messages were under way while this rank did something else.
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
        Error::Collective { collective: collective.name(), rank, ranks, bytes: bytes_of(tensor), reason }
    }
}

impl Pending {
    /// Of a rank alone.
    fn done(collective: Collective, tensor: Tensor) -> Self {
        let found = tensor.shallow_clone();
        Self { collective, work: None, sent: tensor, found, spare: None, began: Instant::now() }
    }
}

impl Peers {
    /// Meets the other ranks.
    ///
    /// # Errors
    /// [`Error::Launch`] where they do not come, the port is in use, or the build has no NCCL for a GPU.
    fn open(launch: &Launch, device: Device, config: &RanksConfig) -> Result<Self> {
        let Rendezvous { group, transport, store, pulse_store, serves_store } =
            Rendezvous::open(launch, device, config)?;
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

    /// The process group.
    ///
    /// # Errors
    /// [`Error::Launch`] once a collective has failed.
    fn group(&self) -> Result<&Group> {
        let broken = || Error::Launch { reason: "a collective has failed before: this process should end".to_owned() };
        self.group.as_ref().filter(|_| !self.broken.load(Ordering::SeqCst)).ok_or_else(broken)
    }

    /// No collective is begun any more.
    fn break_down(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    /// Waits for a work; the reason where it cannot be done.
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
                // It may still be writing into its tensors.
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
