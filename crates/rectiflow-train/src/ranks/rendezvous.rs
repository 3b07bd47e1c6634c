//! How ranks meet: at a store that rank 0 or the launcher serves, where they join a process group.
//!
//! A rank that is asked to stop while it waits leaves at once. Between ranks that have reached the
//! store, the first to decide decides for all: either all go on, or all leave. No rank therefore
//! joins a group that another one, asked to stop a moment earlier, does not join.

use std::{
    env, io,
    net::{TcpStream, ToSocketAddrs, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use tch::Device;

use crate::{
    error::{Error, Result},
    ranks::{
        c10d::{Group, Store, Transport, has_nccl},
        launch::{Launch, RanksConfig},
    },
};

/// Interval at which a waiting rank checks for the others, and whether it was asked to stop.
const GLANCE: Duration = Duration::from_millis(100);
/// Longest wait for the answer of a machine that may not be there yet.
const ANSWER: Duration = Duration::from_secs(2);
/// Time for which rank 0 stays alive after a failure or a stop at the start if it serves the store,
/// so that the others can read the reason.
pub(crate) const LINGER: Duration = Duration::from_secs(2);
/// The key of the decision whether the ranks go on, and its two values.
const DECISION: &str = "decision";
const GO: &[u8] = b"go";
const STOP: &[u8] = b"stop";

/// What a rank holds once all ranks have met.
#[derive(Debug)]
pub(crate) struct Rendezvous {
    pub(crate) group: Group,
    pub(crate) transport: Transport,
    /// The connection over which the group was opened. Must outlive the group.
    pub(crate) store: Store,
    /// A second connection, for the thread of the pulse.
    pub(crate) pulse_store: Store,
    /// Whether this process serves the store.
    pub(crate) serves_store: bool,
}

impl Rendezvous {
    /// Connects to the other ranks.
    ///
    /// # Errors
    /// [`Error::Launch`] if a rank does not start in time, the port is in use, or the build lacks
    /// NCCL for GPUs; [`Error::Interrupted`] if a rank is asked to stop meanwhile.
    pub(crate) fn open(
        launch: &Launch,
        device: Device,
        config: &RanksConfig,
        stop: &AtomicBool,
    ) -> Result<Self> {
        let transport = transport(device)?;
        let serves_store = launch.rank.rank == 0 && !launch.store_is_launchers;
        let start = Duration::from_secs(config.start_secs);
        let waiting = Waiting {
            launch,
            stop,
            start,
            end: Instant::now() + start,
        };
        if !serves_store {
            waiting.for_store()?;
        }
        let store = open_store(launch, serves_store, start)?;
        if let Err(error) = waiting.for_all(&store) {
            if serves_store && matches!(error, Error::Interrupted) {
                thread::sleep(LINGER);
            }
            return Err(error);
        }
        let group = open_group(launch, transport, &store, start)?;
        let pulse_store = open_store(launch, false, start)?;
        Ok(Self {
            group,
            transport,
            store,
            pulse_store,
            serves_store,
        })
    }
}

/// A rank that waits for the others to start.
struct Waiting<'a> {
    launch: &'a Launch,
    /// Set once this rank is asked to stop.
    stop: &'a AtomicBool,
    start: Duration,
    end: Instant,
}

impl Waiting<'_> {
    /// Waits until the store accepts connections.
    fn for_store(&self) -> Result<()> {
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            let Err(error) = knock(&self.launch.host, self.launch.port) else {
                return Ok(());
            };
            if Instant::now() > self.end {
                let reason = format!("{error}, for {} s (ranks.start_secs)", self.start.as_secs());
                return Err(self.store_failed(&reason));
            }
            thread::sleep(GLANCE);
        }
    }

    /// Waits until all ranks have started or one was asked to stop, and does what all ranks do.
    fn for_all(&self, store: &Store) -> Result<()> {
        let failed = |reason: String| self.store_failed(&reason);
        let rank = self.launch.rank;
        store.set(&here(rank.rank), b"1").map_err(failed)?;
        let mut missing = 0;
        while missing < rank.ranks {
            if store.has(&here(missing)).map_err(failed)? {
                missing += 1;
            } else if self.stop.load(Ordering::Relaxed) || store.has(DECISION).map_err(failed)? {
                break;
            } else if Instant::now() > self.end {
                return Err(self.not_started(store));
            } else {
                thread::sleep(GLANCE);
            }
        }
        let own = if self.stop.load(Ordering::Relaxed) {
            STOP
        } else {
            GO
        };
        let decided = store.set_once(DECISION, own).map_err(failed)?;
        if decided == STOP {
            return Err(Error::Interrupted);
        }
        Ok(())
    }

    fn store_failed(&self, reason: &str) -> Error {
        Error::Launch {
            reason: unreachable_store(self.launch, false, reason),
        }
    }

    /// The error that names the ranks that have not started.
    fn not_started(&self, store: &Store) -> Error {
        let rank = self.launch.rank;
        let missing = (0..rank.ranks).filter(|&other| !store.has(&here(other)).unwrap_or(false));
        let missing: Vec<String> = missing.map(|rank| rank.to_string()).collect();
        Error::Launch {
            reason: format!(
                "rank {}: of {} ranks these did not start within {} s (ranks.start_secs): {}",
                rank.rank,
                rank.ranks,
                self.start.as_secs(),
                missing.join(", ")
            ),
        }
    }
}

/// The key that a rank sets when it has started.
fn here(rank: usize) -> String {
    format!("here/{rank}")
}

/// Opens a connection to `host:port` and closes it. c10d's own attempts cannot be interrupted, so
/// they begin when one is sure to succeed.
fn knock(host: &str, port: u16) -> io::Result<()> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, ANSWER) {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Returns the transport between ranks that compute on `device`.
fn transport(device: Device) -> Result<Transport> {
    if device == Device::Cpu {
        return Ok(Transport::Gloo);
    }
    if has_nccl() {
        return Ok(Transport::Nccl);
    }
    let reason = "several ranks on GPUs need NCCL, and this rectiflow was built without it: build \
                  it with `RECTIFLOW_LIBTORCH=cuda make build`, or set run.device = \"cpu\"";
    Err(Error::Launch {
        reason: reason.to_owned(),
    })
}

/// Connects to the store of rank 0, or starts it if this process serves it. Ranks of other attempts
/// do not see the keys of this one.
fn open_store(launch: &Launch, serves: bool, timeout: Duration) -> Result<Store> {
    let prefix = format!("rectiflow/{}", launch.attempt);
    Store::open(&launch.host, launch.port, serves, timeout, &prefix).map_err(|reason| {
        Error::Launch {
            reason: unreachable_store(launch, serves, &reason),
        }
    })
}

/// Joins the process group of ranks that have all started.
fn open_group(
    launch: &Launch,
    transport: Transport,
    store: &Store,
    timeout: Duration,
) -> Result<Group> {
    let rank = launch.rank;
    let interface = env::var("GLOO_SOCKET_IFNAME").unwrap_or_default();
    let address = if interface.is_empty() {
        own_address(&launch.host, launch.port)
    } else {
        String::new()
    };
    Group::open(
        store,
        transport,
        [rank.rank, rank.ranks],
        [&interface, &address],
        timeout,
    )
    .map_err(|reason| Error::Launch {
        reason: format!("rank {}: cannot connect to the others: {reason}", rank.rank),
    })
}

fn unreachable_store(launch: &Launch, serves_store: bool, reason: &str) -> String {
    let Launch {
        rank, host, port, ..
    } = launch;
    if serves_store && reason.contains("EADDRINUSE") {
        return format!(
            "MASTER_PORT {port} is in use on this machine: choose another one, on all ranks"
        );
    }
    let doing = if serves_store {
        "cannot serve"
    } else {
        "cannot reach"
    };
    format!(
        "rank {}: {doing} the store of rank 0 at MASTER_ADDR {host}, MASTER_PORT {port}: {reason}",
        rank.rank
    )
}

/// Returns this machine's address on the route to the store, where other ranks can reach it. Empty
/// if unknown.
fn own_address(host: &str, port: u16) -> String {
    address_towards(host, port).unwrap_or_default()
}

fn address_towards(host: &str, port: u16) -> Option<String> {
    let to = (host, port).to_socket_addrs().ok()?.next()?;
    // Nothing is sent: connecting a UDP socket only selects the route.
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip().to_string())
}
