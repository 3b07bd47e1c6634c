//! How ranks meet: at a store that rank 0 or the launcher serves, where they join a process group.

use std::{
    env,
    net::{ToSocketAddrs, UdpSocket},
    time::{Duration, Instant},
};

use rectiflow_data::order::RankOf;
use tch::Device;

use crate::{
    error::{Error, Result},
    ranks::{
        c10d::{Group, Store, Transport, has_nccl},
        launch::{Launch, RanksConfig},
    },
};

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
    /// NCCL for GPUs.
    pub(crate) fn open(launch: &Launch, device: Device, config: &RanksConfig) -> Result<Self> {
        let transport = transport(device)?;
        let rank = launch.rank;
        let serves_store = rank.rank == 0 && !launch.store_is_launchers;
        let start = Duration::from_secs(config.start_secs);
        let store = open_store(launch, serves_store, start)?;
        meet(&store, rank, start)?;

        let interface = env::var("GLOO_SOCKET_IFNAME").unwrap_or_default();
        let address = if interface.is_empty() {
            own_address(&launch.host, launch.port)
        } else {
            String::new()
        };
        let group = Group::open(
            &store,
            transport,
            [rank.rank, rank.ranks],
            &interface,
            &address,
        )
        .map_err(|reason| Error::Launch {
            reason: format!("rank {}: cannot connect to the others: {reason}", rank.rank),
        })?;
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

/// Returns the transport between ranks that compute on `device`.
fn transport(device: Device) -> Result<Transport> {
    if device == Device::Cpu {
        return Ok(Transport::Gloo);
    }
    if has_nccl() {
        return Ok(Transport::Nccl);
    }
    let reason = "several ranks on GPUs need NCCL, and this rectiflow was built without it: build it with \
                  `--features nccl` against a libtorch with CUDA, or set run.device = \"cpu\"";
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

/// Waits until all ranks have started.
fn meet(store: &Store, rank: RankOf, start: Duration) -> Result<()> {
    let key = |rank: usize| format!("here/{rank}");
    let fail = |reason: String| Error::Launch { reason };
    store.set(&key(rank.rank), b"1").map_err(fail)?;
    let end = Instant::now() + start;
    for other in 0..rank.ranks {
        let left = end
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(10));
        if store.get(&key(other), left).is_err() {
            let missing = (0..rank.ranks).filter(|&other| !store.has(&key(other)).unwrap_or(false));
            let missing: Vec<String> = missing.map(|rank| rank.to_string()).collect();
            let (secs, ranks) = (start.as_secs(), rank.ranks);
            return Err(fail(format!(
                "rank {}: of {ranks} ranks these did not start within {secs} s \
                 (ranks.start_secs): {}",
                rank.rank,
                missing.join(", ")
            )));
        }
    }
    Ok(())
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
