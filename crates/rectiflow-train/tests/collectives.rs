//! One conformance suite for every transport: a single rank, and groups of two to four ranks that
//! meet at a store on this machine. Each rank is a thread with its own process group.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    net::TcpListener,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use rectiflow_data::order::RankOf;
use rectiflow_train::{
    Error,
    comm::Comm,
    launch::{Launch, RanksConfig},
    partition::Partition,
    traffic::Collective,
};
use tch::{Device, Kind, Tensor};

/// Returns a port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

fn launch(rank: usize, ranks: usize, port: u16) -> Launch {
    let rank = RankOf { rank, ranks };
    let (host, attempt) = ("127.0.0.1".to_owned(), String::new());
    Launch {
        rank,
        local_rank: rank.rank,
        machine: 0..rank.ranks,
        host,
        port,
        store_is_launchers: false,
        attempt,
    }
}

/// Calls `work` on every rank and returns the results in the order of the ranks.
fn on_ranks<R: Send>(ranks: usize, work: impl Fn(&Comm) -> R + Sync) -> Vec<R> {
    let (port, work) = (free_port(), &work);
    let one = move |rank| {
        let comm = if ranks == 1 {
            Comm::alone()
        } else {
            Comm::open(
                &launch(rank, ranks, port),
                Device::Cpu,
                &RanksConfig::default(),
                &AtomicBool::new(false),
            )
            .unwrap()
        };
        let result = work(&comm);
        comm.barrier().unwrap();
        result
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks)
            .map(|rank| scope.spawn(move || one(rank)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// Returns numbers that identify rank and place, and whose sums are exact in fp32.
fn numbers(rank: usize, len: i64) -> Tensor {
    Tensor::arange(len, (Kind::Float, Device::Cpu)) + (1000 * (rank + 1)) as f64
}

fn sum(ranks: usize, len: i64) -> Tensor {
    (0..ranks)
        .map(|rank| numbers(rank, len))
        .reduce(|a, b| a + b)
        .unwrap()
}

#[test]
fn every_wire_does_the_same() {
    // Lengths that are not divisible by the number of ranks, a single element, no element for some
    // rank, and more than one round.
    for ranks in 1..=4 {
        for len in [1, 3, 10, 1000] {
            on_ranks(ranks, |comm| conforms(comm, len));
        }
    }
    on_ranks(2, |comm| conforms(comm, (1 << 24) + 12_345));
}

fn conforms(comm: &Comm, len: i64) {
    let RankOf { rank, ranks } = comm.rank();
    let vector = numbers(rank, len);
    let pending = comm.begin_all_reduce(vector.shallow_clone()).unwrap();
    comm.end_all_reduce(pending).unwrap();
    assert!(
        vector.equal(&sum(ranks, len)),
        "all-reduce, {ranks} ranks, {len}"
    );

    // Two at a time, awaited in the order in which they began.
    let whole = len * ranks as i64;
    let begin = || comm.begin_reduce_scatter(numbers(rank, whole)).unwrap();
    for pending in [begin(), begin()] {
        let mut taken = Tensor::zeros([0], (Kind::Float, Device::Cpu));
        comm.end_reduce_scatter(pending, |piece| taken = piece.copy())
            .unwrap();
        let expected = sum(ranks, whole).narrow(0, rank as i64 * len, len);
        assert!(
            taken.equal(&expected),
            "reduce-scatter, {ranks} ranks, {len}"
        );
    }

    let all = Tensor::zeros([whole], (Kind::Float, Device::Cpu));
    let pending = comm.begin_all_gather(&all, numbers(rank, len)).unwrap();
    comm.end_all_gather(pending).unwrap();
    let expected: Vec<Tensor> = (0..ranks).map(|rank| numbers(rank, len)).collect();
    assert!(
        all.equal(&Tensor::cat(&expected, 0)),
        "all-gather, {ranks} ranks, {len}"
    );

    let (vector, partition) = (
        numbers(rank, len),
        Partition::of_buckets([len / 3, 0, len - len / 3], ranks),
    );
    comm.all_gather(&vector, &partition).unwrap();
    let piece = |range: Range<i64>, rank: usize| {
        numbers(rank, len).narrow(0, range.start, range.end - range.start)
    };
    let buckets = partition.buckets().iter();
    let pieces: Vec<Tensor> = buckets
        .flat_map(|bucket| (0..ranks).map(|rank| piece(bucket.of(rank), rank)))
        .collect();
    assert!(
        vector.equal(&Tensor::cat(&pieces, 0)),
        "all-gather by buckets, {ranks} ranks, {len}"
    );

    let vector = numbers(rank, len);
    comm.broadcast(&vector, ranks - 1).unwrap();
    assert!(
        vector.equal(&numbers(ranks - 1, len)),
        "broadcast, {ranks} ranks, {len}"
    );

    let all = comm.gather_numbers(&[rank as f64, 0.1 + 0.2]).unwrap();
    assert_eq!(
        all,
        (0..ranks)
            .map(|rank| vec![rank as f64, 0.1 + 0.2])
            .collect::<Vec<_>>()
    );
    let texts = comm.gather_texts(&"ä".repeat(rank)).unwrap();
    assert_eq!(
        texts,
        (0..ranks).map(|rank| "ä".repeat(rank)).collect::<Vec<_>>()
    );
}

#[test]
fn bytes_are_those_of_the_theory() {
    let (ranks, len) = (3usize, 30_000i64);
    let sent = on_ranks(ranks, |comm| {
        let (rank, partition) = (comm.rank().rank, Partition::new(len, ranks));
        let vector = numbers(rank, len);
        comm.take_traffic();
        let pending = comm.begin_all_reduce(numbers(rank, len)).unwrap();
        comm.end_all_reduce(pending).unwrap();
        let pending = comm.begin_reduce_scatter(numbers(rank, len)).unwrap();
        comm.end_reduce_scatter(pending, |_| ()).unwrap();
        comm.all_gather(&vector, &partition).unwrap();
        comm.take_traffic()
    });
    let part = 4 * len as u64 / ranks as u64;
    for traffic in sent {
        assert_eq!(traffic.bytes[&Collective::AllReduce], 2 * 2 * part);
        assert_eq!(traffic.bytes[&Collective::ReduceScatter], 2 * part);
        assert_eq!(traffic.bytes[&Collective::AllGather], 2 * part);
        assert!(traffic.secs > 0.0);
    }
    let comm = Comm::alone();
    comm.all_gather(&numbers(0, 10), &Partition::new(10, 1))
        .unwrap();
    assert!(
        comm.take_traffic().bytes.is_empty(),
        "a single rank sends nothing"
    );
}

#[test]
fn a_rank_that_fails_is_named_by_the_others() {
    let messages = on_failing_ranks(|comm| {
        let _doing = comm.work(|| "reading the data of step 7".to_owned());
        if comm.rank().rank == 1 {
            let reason = "the disk is on fire".to_owned();
            let error = Error::Launch { reason };
            comm.abandon(&error);
            return Err(error);
        }
        comm.all_gather(&numbers(0, 100), &Partition::new(100, 3))
    });
    for rank in [0, 2] {
        let expected = format!(
            "rank {rank} of 3: all-gather of 136 bytes: rank 1 failed reading the data of step 7: the disk is on fire"
        );
        assert_eq!(messages[rank], expected);
    }
}

#[test]
fn a_rank_that_does_not_come_to_a_collective_is_named() {
    let messages = on_failing_ranks(|comm| {
        let _doing = comm.work(|| "in the passes of step 3".to_owned());
        if comm.rank().rank == 2 {
            // Longer than the others' time-out of a second plus their investigation.
            thread::sleep(Duration::from_secs(9));
            return Ok(());
        }
        comm.all_gather(&numbers(0, 100), &Partition::new(100, 3))
    });
    for message in &messages[..2] {
        assert!(
            message.contains("rank 2 has been in the passes of step 3 for "),
            "{message}"
        );
    }
}

/// Like [`on_ranks`], for three ranks that fail. Returns their messages, empty for a rank that does
/// not fail.
fn on_failing_ranks(work: impl Fn(&Comm) -> rectiflow_train::Result<()> + Sync) -> Vec<String> {
    let (port, work) = (free_port(), &work);
    let one = move |rank| {
        let config = RanksConfig {
            timeout_secs: 1,
            ..RanksConfig::default()
        };
        let (launch, stop) = (launch(rank, 3, port), AtomicBool::new(false));
        let comm = Comm::open(&launch, Device::Cpu, &config, &stop).unwrap();
        let failed = work(&comm).err();
        if let Some(error) = &failed {
            comm.abandon(error);
        }
        failed.map(|error| error.to_string()).unwrap_or_default()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|rank| scope.spawn(move || one(rank))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

#[test]
fn ranks_that_do_not_come_up_and_ports_in_use_are_told_in_one_line() {
    let config = RanksConfig {
        start_secs: 1,
        ..RanksConfig::default()
    };
    let stop = AtomicBool::new(false);
    let open = |rank, port| {
        Comm::open(&launch(rank, 3, port), Device::Cpu, &config, &stop)
            .unwrap_err()
            .to_string()
    };
    let missing = open(0, free_port());
    assert_eq!(
        missing,
        "rank 0: of 3 ranks these did not start within 1 s (ranks.start_secs): 1, 2"
    );

    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let message = open(0, port);
    assert!(
        message.contains(&format!("MASTER_PORT {port} is in use")) && !message.contains('\n'),
        "{message}"
    );

    let port = free_port();
    let message = open(2, port);
    assert!(
        message.starts_with("rank 2: cannot reach the store of rank 0 at MASTER_ADDR 127.0.0.1"),
        "{message}"
    );
    assert!(!message.contains('\n'), "{message}");

    let message = Comm::open(&launch(0, 3, free_port()), Device::Cuda(0), &config, &stop)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("built without it: build it with `RECTIFLOW_LIBTORCH=cuda make build`"),
        "{message}"
    );
}

/// Opens `ranks` of three ranks, each a thread; rank `asked` is asked to stop after `delay`. With
/// `tells_all`, a rank that leaves ends the others, as launchers do: one that leaves before it has
/// met them can tell them nothing. Returns whether each was interrupted.
fn interrupted(ranks: &[usize], asked: usize, delay: Duration, tells_all: bool) -> Vec<bool> {
    let port = free_port();
    let stops = [const { AtomicBool::new(false) }; 3];
    let one = |rank: usize| {
        let (launch, config) = (launch(rank, 3, port), RanksConfig::default());
        let stop = &stops[rank];
        thread::scope(|scope| {
            if rank == asked {
                scope.spawn(move || {
                    thread::sleep(delay);
                    stop.store(true, Ordering::Relaxed);
                });
            }
            match Comm::open(&launch, Device::Cpu, &config, stop) {
                Ok(comm) => {
                    comm.barrier().unwrap();
                    false
                }
                Err(Error::Interrupted) => {
                    for other in stops.iter().filter(|_| tells_all) {
                        other.store(true, Ordering::Relaxed);
                    }
                    true
                }
                Err(error) => panic!("rank {rank}: {error}"),
            }
        })
    };
    thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .iter()
            .map(|&rank| {
                let one = &one;
                scope.spawn(move || one(rank))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

#[test]
fn a_rank_that_waits_at_the_start_leaves_when_asked_to_stop_and_takes_those_it_has_met_along() {
    let a_second = Duration::from_secs(1);
    // (ranks that start, which of them is asked)
    for (ranks, asked) in [(&[0][..], 0), (&[2], 2), (&[0, 2], 0), (&[0, 2], 2)] {
        let all = interrupted(ranks, asked, a_second, false);
        assert!(all.iter().all(|&left| left), "{ranks:?}, {asked}: {all:?}");
    }
    // If all start while one is asked, all go on or all leave.
    for asked in 0..3 {
        for delay_ms in [0, 5, 20, 50, 80, 100, 120, 200] {
            let all = interrupted(&[0, 1, 2], asked, Duration::from_millis(delay_ms), true);
            let agree = all.iter().all(|&left| left == all[0]);
            assert!(agree, "rank {asked} after {delay_ms} ms: {all:?}");
        }
    }
}
