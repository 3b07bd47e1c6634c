//! Collectives between the ranks of a run: one interface, for one rank alone, for processors (Gloo) and for GPUs (NCCL).
//!
//! All ranks make the same calls in the same order. Vectors go in rounds of a few megabytes. A sum is made in the order
//! of the ranks where this file makes it (Gloo), and comes out alike on all ranks in any case. A call that fails says
//! which rank is to blame and what that rank was doing (`pulse`); after that nothing works any more, and the
//! process should end.
//!
//! Gloo's own reduce-scatter is an all-reduce of the whole vector, twice the traffic: here it is an exchange of pieces
//! (all-to-all) and a sum of R pieces.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    mem::forget,
    net::{ToSocketAddrs, UdpSocket},
    ops::Range,
    time::{Duration, Instant},
};

use rectiflow_data::order::RankOf;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    c10d::{Group, Store, Transport, Work, has_nccl},
    error::{Error, Result},
    flat::part,
    launch::{Launch, RanksConfig},
    partition::Partition,
    pulse::Pulse,
};

/// A kind of collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Collective {
    /// Everybody gets the sum.
    AllReduce,
    /// Everybody gets its part of the sum.
    ReduceScatter,
    /// Everybody gets everybody's part.
    AllGather,
    /// Everybody gets what one has.
    Broadcast,
    /// Everybody waits for everybody.
    Barrier,
}

impl Collective {
    fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all-reduce",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllGather => "all-gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        }
    }
}

/// What this rank has sent, and how long it has waited.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Traffic {
    /// Bytes that cross the wire for each rank, by collective; `docs/ranks.md` has the formula of each.
    pub bytes: BTreeMap<Collective, u64>,
    /// Seconds in collectives, waiting for slower ranks included.
    pub secs: f64,
}

/// The ranks of a run, as one of them sees them.
#[derive(Debug)]
pub struct Comm {
    rank: RankOf,
    /// The ranks on this machine.
    machine: Range<usize>,
    peers: Option<Peers>,
    traffic: RefCell<Traffic>,
}

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
    broken: Cell<bool>,
    /// Where a round is laid out, and where it arrives.
    buffers: [Buffer; 2],
    // Last: the group and the pulse have to end before the store that this process may serve.
    _store: Store,
}

/// Elements of all parts together in one round: 64 MiB of fp32.
const ROUND: i64 = 1 << 24;
/// A collective in progress is left alone for so long before others' failures are looked at.
const GLANCE: Duration = Duration::from_millis(100);
/// Rank 0 ends so much later than it could, where it serves the store in which the others read why.
const LINGER: Duration = Duration::from_secs(2);

impl Comm {
    /// One rank alone: every collective is done as soon as it is begun.
    pub fn alone() -> Self {
        Self { rank: RankOf::ONLY, machine: 0..1, peers: None, traffic: RefCell::default() }
    }

    /// Meets the other ranks.
    ///
    /// # Errors
    /// [`Error::Launch`] where they do not come, the port is in use, or the build has no NCCL for a GPU.
    pub fn open(launch: &Launch, device: Device, config: &RanksConfig) -> Result<Self> {
        let fail = |reason: String| Error::Launch { reason };
        let transport = if device == Device::Cpu { Transport::Gloo } else { Transport::Nccl };
        if transport == Transport::Nccl && !has_nccl() {
            let reason = "several ranks on GPUs need NCCL, and this rectiflow was built without it: build it with \
                          `--features nccl` against a libtorch with CUDA, or set run.device = \"cpu\"";
            return Err(fail(reason.to_owned()));
        }
        let Launch { rank, host, port, attempt, .. } = launch;
        let serves_store = rank.rank == 0 && !launch.store_is_launchers;
        let start = Duration::from_secs(config.start_secs);
        let prefix = format!("rectiflow/{attempt}");
        let store = Store::open(host, *port, serves_store, start, &prefix);
        let store = store.map_err(|reason| fail(unreachable_store(launch, serves_store, &reason)))?;
        meet(&store, *rank, start)?;
        let interface = std::env::var("GLOO_SOCKET_IFNAME").unwrap_or_default();
        let address = if interface.is_empty() { own_address(host, *port) } else { String::new() };
        let group = Group::open(&store, transport, [rank.rank, rank.ranks], &interface, &address);
        let group =
            group.map_err(|reason| fail(format!("rank {}: cannot connect to the others: {reason}", rank.rank)))?;
        let own = Store::open(host, *port, false, start, &prefix);
        let own = own.map_err(|reason| fail(unreachable_store(launch, false, &reason)))?;
        let peers = Peers {
            group: Some(group),
            transport,
            device,
            timeout: config.timeout(),
            pulse: Pulse::start(own, *rank),
            serves_store,
            broken: Cell::new(false),
            buffers: Default::default(),
            _store: store,
        };
        Ok(Self { rank: *rank, machine: launch.machine.clone(), peers: Some(peers), traffic: RefCell::default() })
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

    /// Says what this rank does from now on, should others have to name it.
    pub fn work(&self, what: impl FnOnce() -> String) {
        if let Some(peers) = &self.peers {
            peers.pulse.work(what());
        }
    }

    /// As [`Self::work`], of something that may take longer than the time-out.
    pub fn long_work(&self, what: &str) {
        if let Some(peers) = &self.peers {
            peers.pulse.long_work(what.to_owned());
        }
    }

    /// What was sent since the last call.
    pub fn take_traffic(&self) -> Traffic {
        self.traffic.take()
    }

    /// Seconds of it.
    pub(crate) fn traffic_secs(&self) -> f64 {
        self.traffic.borrow().secs
    }

    /// Sums a contiguous tensor over all ranks, in place; bit for bit the same on all of them.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn all_reduce(&self, vector: &Tensor) -> Result<()> {
        let Some(peers) = &self.peers else { return Ok(()) };
        let flat = vector.view([-1]);
        let length = flat.numel() as i64;
        for start in (0..length).step_by(ROUND as usize) {
            let piece = part(&flat, &(start..length.min(start + ROUND)));
            self.finish(Collective::AllReduce, &piece, peers.group()?.all_reduce(&piece))?;
        }
        let ranks = self.rank.ranks as u64;
        self.count(Collective::AllReduce, 2 * bytes_of(vector) * (ranks - 1) / ranks);
        Ok(())
    }

    /// Makes a contiguous tensor what rank `from` has.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn broadcast(&self, tensor: &Tensor, from: usize) -> Result<()> {
        let Some(peers) = &self.peers else { return Ok(()) };
        self.finish(Collective::Broadcast, tensor, peers.group()?.broadcast(tensor, from))?;
        let ranks = self.rank.ranks as u64;
        self.count(Collective::Broadcast, bytes_of(tensor) * (ranks - 1) / ranks);
        Ok(())
    }

    /// Makes this rank's part of `vector` `[n]` the sum of all ranks'. The other parts stay as they are.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn reduce_scatter(&self, vector: &Tensor, partition: &Partition) -> Result<()> {
        let fill = |range: &std::ops::Range<i64>, mut place: Tensor| place.copy_(&part(vector, range));
        let add = |range: &std::ops::Range<i64>, sum: &Tensor| part(vector, range).copy_(sum);
        self.reduce_scatter_from((vector.kind(), vector.device()), partition, &fill, &add)
    }

    /// As [`Self::reduce_scatter`] of a vector of this kind that need not exist as a whole: `fill` writes a range of it,
    /// all of it, into a place, `take` is given the sum of a range of this rank's part.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub(crate) fn reduce_scatter_from(
        &self,
        (kind, device): (Kind, Device),
        partition: &Partition,
        fill: &dyn Fn(&std::ops::Range<i64>, Tensor),
        take: &dyn Fn(&std::ops::Range<i64>, &Tensor),
    ) -> Result<()> {
        let ranks = self.rank.ranks as i64;
        let Some(peers) = &self.peers else {
            let whole = partition.of(0);
            let sum = Tensor::empty([whole.end], (kind, device));
            fill(&whole, sum.shallow_clone());
            take(&whole, &sum);
            return Ok(());
        };
        for round in partition.rounds(ROUND) {
            let length = round.end - round.start;
            let pieces = peers.buffers[0].take(ranks * length, kind, device).view([ranks, length]);
            for rank in 0..self.rank.ranks {
                let (range, row) = (partition.at(rank, &round), pieces.get(rank as i64));
                let filled = range.end - range.start;
                no_grad(|| {
                    fill(&range, row.narrow(0, 0, filled));
                    let _ = row.narrow(0, filled, length - filled).zero_();
                });
            }
            let sum = no_grad(|| self.sum_of_pieces(peers, &pieces))?;
            let own = partition.at(self.rank.rank, &round);
            no_grad(|| take(&own, &sum.narrow(0, 0, own.end - own.start)));
            self.count(Collective::ReduceScatter, bytes_of(&pieces) / ranks as u64 * (ranks as u64 - 1));
        }
        Ok(())
    }

    /// The sum over ranks of this rank's row of `pieces` `[R, k]`: `[k]`.
    fn sum_of_pieces(&self, peers: &Peers, pieces: &Tensor) -> Result<Tensor> {
        let group = peers.group()?;
        if peers.transport == Transport::Nccl {
            let sum = pieces.get(0).empty_like();
            self.finish(Collective::ReduceScatter, pieces, group.reduce_scatter(&sum, pieces))?;
            return Ok(sum);
        }
        let [ranks, length] = [pieces.size()[0], pieces.size()[1]];
        let received = peers.buffers[1].take(ranks * length, pieces.kind(), pieces.device()).view([ranks, length]);
        self.finish(Collective::ReduceScatter, pieces, group.all_to_all(&received, pieces))?;
        let mut sum = received.get(0);
        for rank in 1..ranks {
            sum += received.get(rank);
        }
        Ok(sum)
    }

    /// Makes every part of `vector` `[n]` what the rank has that owns it.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn all_gather(&self, vector: &Tensor, partition: &Partition) -> Result<()> {
        let Some(peers) = &self.peers else { return Ok(()) };
        let ranks = self.rank.ranks as i64;
        for round in partition.rounds(ROUND) {
            let length = round.end - round.start;
            let (own, kind, device) = (partition.at(self.rank.rank, &round), vector.kind(), vector.device());
            let mut piece = part(vector, &own);
            if own.end - own.start < length {
                let padded = Tensor::zeros([length], (kind, device));
                no_grad(|| padded.narrow(0, 0, own.end - own.start).copy_(&piece));
                piece = padded;
            }
            let all = peers.buffers[0].take(ranks * length, kind, device);
            self.finish(Collective::AllGather, &piece, peers.group()?.all_gather(&all, &piece))?;
            for rank in (0..self.rank.ranks).filter(|&rank| rank != self.rank.rank) {
                let range = partition.at(rank, &round);
                let found = all.narrow(0, rank as i64 * length, range.end - range.start);
                no_grad(|| part(vector, &range).copy_(&found));
            }
            self.count(Collective::AllGather, bytes_of(&piece) * (ranks as u64 - 1));
        }
        Ok(())
    }

    /// Everybody's numbers, in the order of the ranks, bit for bit. All give equally many.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn gather_numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>> {
        let Some(peers) = &self.peers else { return Ok(vec![own.to_vec()]) };
        let piece = Tensor::from_slice(own).to_device(peers.device);
        let all = self.gather(peers, &piece)?;
        Ok((0..self.rank.ranks as i64)
            .map(|rank| Vec::try_from(all.get(rank).to_device(Device::Cpu)).expect("a row of numbers"))
            .collect())
    }

    /// Numbers summed over all ranks, in the order of the ranks: bit for bit the same on all of them.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn sum_numbers(&self, own: &[f64]) -> Result<Vec<f64>> {
        let all = self.gather_numbers(own)?;
        let sum = |at: usize| all.iter().map(|numbers| numbers[at]).sum();
        Ok((0..own.len()).map(sum).collect())
    }

    /// Everybody's text, in the order of the ranks.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub fn gather_texts(&self, own: &str) -> Result<Vec<String>> {
        let Some(peers) = &self.peers else { return Ok(vec![own.to_owned()]) };
        let lengths = self.gather_numbers(&[own.len() as f64])?;
        let lengths: Vec<usize> = lengths.iter().map(|numbers| numbers[0] as usize).collect();
        let mut bytes = own.as_bytes().to_vec();
        bytes.resize(lengths.iter().copied().max().unwrap_or(0).max(1), 0);
        let all = self.gather(peers, &Tensor::from_slice(&bytes).to_device(peers.device))?.to_device(Device::Cpu);
        let text = |(rank, length): (i64, usize)| {
            let bytes: Vec<u8> = Vec::try_from(all.get(rank)).expect("a row of bytes");
            String::from_utf8_lossy(&bytes[..length]).into_owned()
        };
        Ok((0..).zip(lengths).map(text).collect())
    }

    /// `piece` `[k]` of every rank: `[R, k]`.
    fn gather(&self, peers: &Peers, piece: &Tensor) -> Result<Tensor> {
        let ranks = self.rank.ranks as i64;
        let all = Tensor::empty([ranks * piece.size()[0]], (piece.kind(), piece.device()));
        self.finish(Collective::AllGather, piece, peers.group()?.all_gather(&all, piece))?;
        self.count(Collective::AllGather, bytes_of(piece) * (ranks as u64 - 1));
        Ok(all.view([ranks, -1]))
    }

    /// What rank 0 makes, on all ranks. Where it cannot, all fail.
    ///
    /// # Errors
    /// Rank 0's own error there, elsewhere the same where it is a stop by the guard, or [`Error::OtherRank`].
    pub(crate) fn first<T: Serialize + DeserializeOwned>(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.peers.is_none() {
            return make();
        }
        let made = if self.is_first() { Some(make()) } else { None };
        let told = match &made {
            None => String::new(),
            Some(Ok(value)) => serde_json::to_string(&Told::Made(value)).expect("plain data that JSON can hold"),
            Some(Err(error)) => serde_json::to_string(&Told::<()>::of(error)).expect("plain data that JSON can hold"),
        };
        let told = self.gather_texts(&told)?.swap_remove(0);
        if let Some(made) = made {
            return made;
        }
        match serde_json::from_str(&told).expect("rank 0 wrote it") {
            Told::Made(value) => Ok(value),
            Told::Stopped { run_dir, reason } => Err(Error::Stopped { run_dir, reason }),
            Told::Failed { message } => Err(Error::OtherRank { rank: 0, message }),
        }
    }

    /// Whether all ranks could do something, each in its own way: the first rank's failure on all of them.
    ///
    /// # Errors
    /// This rank's own error, [`Error::OtherRank`], or [`Error::Collective`].
    pub(crate) fn all_could<T>(&self, own: Result<T>) -> Result<T> {
        let message = own.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let messages = self.gather_texts(&message)?;
        let value = own?;
        match messages.into_iter().enumerate().find(|(_, message)| !message.is_empty()) {
            None => Ok(value),
            Some((rank, message)) => Err(Error::OtherRank { rank, message }),
        }
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
            peers.pulse.tell(format!("rank {} failed {}: {error}", self.rank.rank, peers.pulse.doing()));
        }
        self.break_down(peers);
        if peers.serves_store {
            std::thread::sleep(LINGER);
        }
    }

    fn break_down(&self, peers: &Peers) {
        peers.broken.set(true);
    }

    fn count(&self, collective: Collective, bytes: u64) {
        *self.traffic.borrow_mut().bytes.entry(collective).or_default() += bytes;
    }

    /// Waits for a collective, looking after the other ranks.
    fn finish(&self, collective: Collective, tensor: &Tensor, work: std::result::Result<Work, String>) -> Result<()> {
        let peers = self.peers.as_ref().expect("a rank alone has no works");
        let began = Instant::now();
        let before = peers.pulse.wait_in(collective.name());
        let done = match work {
            Ok(work) => peers.wait(work, began),
            Err(reason) => Err(reason),
        };
        self.traffic.borrow_mut().secs += began.elapsed().as_secs_f64();
        peers.pulse.resume(before);
        done.map_err(|reason| {
            let reason = peers.pulse.tell(reason);
            self.break_down(peers);
            let RankOf { rank, ranks } = self.rank;
            Error::Collective { collective: collective.name(), rank, ranks, bytes: bytes_of(tensor), reason }
        })
    }
}

/// What rank 0 tells the others.
#[derive(Serialize, Deserialize)]
enum Told<T> {
    Made(T),
    Stopped { run_dir: std::path::PathBuf, reason: String },
    Failed { message: String },
}

impl<T> Told<T> {
    fn of(error: &Error) -> Self {
        match error {
            Error::Stopped { run_dir, reason } => Self::Stopped { run_dir: run_dir.clone(), reason: reason.clone() },
            error => Self::Failed { message: error.to_string() },
        }
    }
}

impl Peers {
    fn group(&self) -> Result<&Group> {
        let broken = || Error::Launch { reason: "a collective has failed before: this process should end".to_owned() };
        self.group.as_ref().filter(|_| !self.broken.get()).ok_or_else(broken)
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

/// Memory that is used in every round: taken anew each time, it would be zeroed by the system each time.
#[derive(Debug, Default)]
struct Buffer(RefCell<Option<Tensor>>);

impl Buffer {
    /// `len` elements of anything.
    fn take(&self, len: i64, kind: Kind, device: Device) -> Tensor {
        let mut kept = self.0.borrow_mut();
        let fits = |kept: &Tensor| kept.kind() == kind && kept.device() == device && kept.numel() as i64 >= len;
        if !kept.as_ref().is_some_and(fits) {
            *kept = Some(Tensor::empty([len], (kind, device)));
        }
        kept.as_ref().expect("it was just made").narrow(0, 0, len)
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        if self.broken.get() {
            // Closing waits for works in progress, which may never end.
            forget(self.group.take());
        }
    }
}

/// Waits until all ranks are there.
fn meet(store: &Store, rank: RankOf, start: Duration) -> Result<()> {
    let key = |rank: usize| format!("here/{rank}");
    let fail = |reason: String| Error::Launch { reason };
    store.set(&key(rank.rank), b"1").map_err(fail)?;
    let end = Instant::now() + start;
    for other in 0..rank.ranks {
        let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(10));
        if store.get(&key(other), left).is_err() {
            let missing = (0..rank.ranks).filter(|&other| !store.has(&key(other)).unwrap_or(false));
            let missing: Vec<String> = missing.map(|rank| rank.to_string()).collect();
            let (secs, ranks) = (start.as_secs(), rank.ranks);
            return Err(fail(format!(
                "rank {}: of {ranks} ranks these have not come up in {secs} s (ranks.start_secs): {}",
                rank.rank,
                missing.join(", ")
            )));
        }
    }
    Ok(())
}

fn unreachable_store(launch: &Launch, serves_store: bool, reason: &str) -> String {
    let Launch { rank, host, port, .. } = launch;
    if serves_store && reason.contains("EADDRINUSE") {
        return format!("MASTER_PORT {port} is in use on this machine: choose another one, on all ranks");
    }
    let doing = if serves_store { "cannot serve" } else { "cannot reach" };
    format!("rank {}: {doing} the store of rank 0 at MASTER_ADDR {host}, MASTER_PORT {port}: {reason}", rank.rank)
}

/// This machine's address on the way to the store: where the other ranks can reach it. Empty where it is not known.
fn own_address(host: &str, port: u16) -> String {
    let find = || {
        let to = (host, port).to_socket_addrs().ok()?.next()?;
        // Nothing is sent: connecting a UDP socket only chooses the way.
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).ok()?;
        socket.connect(to).ok()?;
        Some(socket.local_addr().ok()?.ip().to_string())
    };
    find().unwrap_or_default()
}

fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}
