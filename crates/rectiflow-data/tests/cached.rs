//! Data sets at a URL with a cache on a disk: no process fetches a cached block again, and a
//! process that is killed does not stop the next one. Also `owned` mode, which depends on the
//! cache.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod object_server;
mod packed;

use std::{
    collections::HashMap,
    fs::{self, File},
    ops::Range,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use object_server::{Fault, ObjectServer, Request, Served};
use packed::{
    SEED, needed_bytes, pack, packed,
    remote::{cached, network, open, settings, steps, take},
    source,
};
use rectiflow_data::{
    Dataset, Network, Split,
    amplification::amplification,
    batch::Source,
    cache::DiskCache,
    loader::Loader,
    order::{Mode, OrderSettings, RankOf},
};

fn healthy(_: &Request) -> Option<Fault> {
    None
}

/// Files of blocks in a cache's folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        fs::read_dir(folder)
            .map(|all| all.map(|entry| entry.unwrap().path()).collect())
            .unwrap_or_default()
    };
    let parts = entries(folder)
        .into_iter()
        .flat_map(|dataset| [dataset.join("latents"), dataset.join("text")]);
    let mut files: Vec<PathBuf> = parts.flat_map(|part| entries(&part)).collect();
    files.sort();
    files
}

fn file_bytes(folder: &Path) -> u64 {
    // An empty temporary file can be deleted in the meantime.
    files(folder)
        .iter()
        .filter_map(|path| path.metadata().ok())
        .map(|found| found.len())
        .sum()
}

/// The counter of a cache and the bytes of its files, at one instant: files appear, grow and are
/// evicted only under the counter's lock.
fn counted(folder: &Path) -> (u64, u64) {
    let usage = File::open(folder.join("usage")).unwrap();
    usage.lock_shared().unwrap();
    let counter = fs::read(folder.join("usage")).unwrap().try_into().unwrap();
    (u64::from_le_bytes(counter), file_bytes(folder))
}

/// The counter matches the files. Returns the bytes.
fn assert_counted(folder: &Path) -> u64 {
    let (counter, on_disk) = counted(folder);
    assert_eq!(counter, on_disk);
    counter
}

/// No byte of an object was requested twice.
fn assert_fetched_once(served: &Served) {
    let mut ranges = HashMap::<&str, Vec<Range<u64>>>::new();
    for (name, range) in served.names.iter().filter(|(name, _)| name.contains('/')) {
        ranges.entry(name).or_default().extend(range.clone());
    }
    assert!(!ranges.is_empty());
    for (name, mut ranges) in ranges {
        ranges.sort_by_key(|range| range.start);
        assert!(
            ranges.windows(2).all(|pair| pair[0].end <= pair[1].start),
            "{name}: {ranges:?}"
        );
    }
}

#[test]
fn what_is_on_the_disk_is_not_fetched_again() {
    let (root, folder) = (packed(), tempfile::tempdir().unwrap());
    let clean = steps(&source(root.path()), Mode::Window, 20);
    let server = ObjectServer::start(root.path(), healthy);
    let cached = |limit_bytes: u64| {
        let (source, cache) = cached(&server.url(), folder.path(), limit_bytes);
        server.reset();
        assert_eq!(steps(&source, Mode::Window, 20), clean);
        (server.served().requests, cache.used_bytes())
    };
    // No room: everything comes over the network, in each of more than seven epochs.
    let (streamed, used) = cached(0);
    assert!(streamed > 7 * 6 && used == 0, "{streamed}");
    let train = source(root.path()).dataset.num_bytes(Split::Train);
    let (first, used) = cached(1 << 20);
    assert!(
        first <= streamed && used <= train,
        "{first} of {streamed}, {used} bytes"
    );
    assert_eq!(cached(1 << 20), (0, used));
    // One file has a wrong byte, one is short, one is missing: these blocks are fetched again.
    let latents = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path().join("latents"));
    let files = latents
        .filter(|path| path.exists())
        .flat_map(|path| fs::read_dir(path).unwrap());
    let mut files: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let bytes = fs::read(&files[0]).unwrap();
    fs::write(&files[0], [&[bytes[0] ^ 1], &bytes[1..]].concat()).unwrap();
    fs::write(&files[1], &bytes[..9]).unwrap();
    fs::remove_file(&files[2]).unwrap();
    let (again, _) = cached(1 << 20);
    assert!(again > 0);
    assert_eq!((cached(1 << 20).0, file_bytes(folder.path())), (0, used));
}

/// A data set with shares for eight lanes, and two buckets that are too small for that.
fn large() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    pack(
        root.path(),
        &[(24, 16, 2_000, 0), (16, 24, 40, 0), (16, 16, 1, 2)],
        0,
        "a",
    );
    root
}

#[test]
fn shares_bring_the_same_samples_from_anywhere_at_any_number_of_ranks() {
    let (root, folder) = (large(), tempfile::tempdir().unwrap());
    let server = ObjectServer::start(root.path(), healthy);
    // More than two epochs.
    let whole = steps(&source(root.path()), Mode::Owned, 150);
    assert_eq!(
        steps(
            &cached(&server.url(), folder.path(), 1 << 30).0,
            Mode::Owned,
            150
        ),
        whole
    );
    for ranks in [2, 3, 8] {
        let part = |rank| {
            let source = cached(&server.url(), folder.path(), 1 << 30).0;
            let loader =
                Loader::new(vec![source], settings(Mode::Owned), RankOf { rank, ranks }).unwrap();
            let mut loader = loader.on_machine_with(0..ranks);
            loader.seek(55);
            take(&mut loader, 20)
        };
        let parts: Vec<_> = (0..ranks).map(part).collect();
        for (at, step) in whole.iter().skip(55).take(20).enumerate() {
            let mut together: Vec<_> = parts
                .iter()
                .flat_map(|part| part[at].micro_batches.clone())
                .collect();
            together.sort_by_key(|batch| batch.slot);
            assert_eq!(together, step.micro_batches, "{ranks} ranks");
        }
    }
    // From an empty disk, in the middle of a later pass.
    let empty = tempfile::tempdir().unwrap();
    let source = cached(&server.url(), empty.path(), 1 << 30).0;
    let mut seeker = Loader::new(vec![source], settings(Mode::Owned), RankOf::ONLY).unwrap();
    for step in [140, 0, 63, 64, 65, 7] {
        seeker.seek(step);
        assert_eq!(seeker.next_step().unwrap(), whole[step as usize]);
    }
}

#[test]
fn from_the_second_epoch_on_shares_need_no_network() {
    let root = large();
    let server = ObjectServer::start(root.path(), healthy);
    for ranks in [1, 2, 3, 4, 8] {
        // Each rank is on a machine of its own.
        let folders: Vec<_> = (0..ranks).map(|_| tempfile::tempdir().unwrap()).collect();
        let loader = |rank: usize| {
            let source = cached(&server.url(), folders[rank].path(), 1 << 30).0;
            let loader =
                Loader::new(vec![source], settings(Mode::Owned), RankOf { rank, ranks }).unwrap();
            let least = loader.least_read_ahead_bytes();
            loader.read_ahead(least).unwrap()
        };
        let mut loaders: Vec<_> = (0..ranks).map(loader).collect();
        let order = loaders[0].order().clone();
        let epoch_steps = order.epoch_start(1) as usize / 8;
        let needed = needed_bytes(&open(&server.url()).dataset, 2_041);
        server.reset();
        // The bytes read ahead of an epoch's last step belong to the next epoch and are mostly
        // small.
        loaders
            .iter_mut()
            .for_each(|loader| drop(take(loader, epoch_steps + 1)));
        let first = server.served().bytes as f64 / needed;
        let (least, most) = (0.98, amplification(&order, 0) + amplification(&order, 1));
        assert!(
            (least..most).contains(&first),
            "{ranks} ranks: {first} of {most}"
        );
        server.reset();
        loaders
            .iter_mut()
            .for_each(|loader| drop(take(loader, 2 * epoch_steps)));
        let later = server.served().bytes as f64 / needed / 2.0;
        assert!(
            later <= amplification(&order, 1) * 1.1,
            "{ranks} ranks: {later}, {}",
            amplification(&order, 1)
        );
        // A single machine also keeps the remainders and the small buckets.
        assert!(ranks > 1 || later == 0.0, "{later}");
    }
}

#[test]
fn a_share_needs_a_disk_with_room_for_a_window_a_lane() {
    let (root, folder) = (large(), tempfile::tempdir().unwrap());
    let server = ObjectServer::start(root.path(), healthy);
    let loader = |source: Source| {
        Loader::new(
            vec![source],
            settings(Mode::Owned),
            RankOf { rank: 1, ranks: 2 },
        )
        .unwrap()
    };
    let refused = |source: Source| {
        let mut loader = loader(source);
        let error = loader.check_cache().unwrap_err().to_string();
        assert_eq!(loader.next_step().unwrap_err().to_string(), error);
        error
    };
    let error = refused(open(&server.url()));
    assert!(error.contains("keeps blocks on a local disk"), "{error}");
    let number = |error: &str, after: &str| -> u64 {
        let digits = error.split_once(after).unwrap().1;
        digits[..digits.find(|c: char| !c.is_ascii_digit()).unwrap()]
            .parse()
            .unwrap()
    };
    let least = number(&error, "at least ");
    let error = refused(cached(&server.url(), folder.path(), least - 1).0);
    assert!(
        error.contains(&format!("{least} bytes, found a limit of {}", least - 1)),
        "{error}"
    );
    loader(cached(&server.url(), folder.path(), least).0)
        .check_cache()
        .unwrap();
}

/// Two lanes, so that one window of each is a small part of the data.
fn two_lanes(mode: Mode, seed: u64) -> OrderSettings {
    OrderSettings {
        seed,
        lanes: Some(2),
        window_samples: 32,
        ..settings(mode)
    }
}

#[test]
fn a_disk_too_small_for_the_shares_changes_no_sample_and_is_never_overrun() {
    let (root, folder) = (large(), tempfile::tempdir().unwrap());
    let server = ObjectServer::start(root.path(), healthy);
    let loader = |source: Source| {
        Loader::new(vec![source], two_lanes(Mode::Owned, SEED), RankOf::ONLY).unwrap()
    };
    let clean = take(&mut loader(source(root.path())), 130);
    let num_bytes = source(root.path()).dataset.num_bytes(Split::Train);
    let limit = num_bytes / 2;
    let (source, cache) = cached(&server.url(), folder.path(), limit);
    let mut loader = loader(source);
    for step in clean {
        if step.step == 64 {
            server.reset();
        }
        assert_eq!(loader.next_step().unwrap(), step);
        let used = assert_counted(folder.path());
        assert!(used <= limit, "{used} of {limit}");
    }
    let used = cache.used_bytes();
    assert!(used > limit / 10 * 8, "{used} of {limit}");
    // If blocks were evicted at random, every second row would cost a block of 32 rows: 16 times
    // the bytes.
    let fetched = server.served().bytes as f64 / num_bytes as f64;
    assert!((1.0..9.0).contains(&fetched), "{fetched}");
}

/// When each block is used once per epoch, no eviction rule serves more blocks than fit, so the
/// cache evicts nothing.
#[test]
fn a_full_cache_of_window_mode_serves_what_fits_and_is_left_as_it_is() {
    let (root, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    pack(root.path(), &[(24, 16, 4_000, 0)], 0, "a");
    let server = ObjectServer::start(root.path(), healthy);
    let num_bytes = source(root.path()).dataset.num_bytes(Split::Train);
    let settings = OrderSettings {
        micro_batch: 16,
        ..two_lanes(Mode::Window, SEED)
    };
    let (source, cache) = cached(&server.url(), folder.path(), num_bytes / 2);
    let loader = Loader::new(vec![source], settings, RankOf::ONLY).unwrap();
    let least = loader.least_read_ahead_bytes();
    let mut loader = loader.read_ahead(least).unwrap();
    let epoch_steps = 4_000 / 128;
    take(&mut loader, epoch_steps + 10);
    let blocks = || {
        let is_block = |path: &PathBuf| !path.to_string_lossy().contains(".writing-");
        files(folder.path())
            .into_iter()
            .filter(is_block)
            .collect::<Vec<_>>()
    };
    let there = blocks();
    server.reset();
    take(&mut loader, 2 * epoch_steps);
    let fetched = server.served().bytes as f64 / num_bytes as f64 / 2.0;
    assert!((0.4..0.6).contains(&fetched), "{fetched}");
    assert_eq!(blocks(), there);
    assert!(cache.used_bytes() <= num_bytes / 2);
}

#[test]
fn blocks_are_fetched_once_by_all_processes_of_a_machine() {
    let root = large();
    for mode in [Mode::Local, Mode::Owned] {
        let folder = tempfile::tempdir().unwrap();
        // Slow, so that all of them request a block while one is fetching it.
        let slow = |r: &Request| {
            r.name
                .contains('/')
                .then_some(Fault::Slow(Duration::from_millis(5)))
        };
        let server = ObjectServer::start(root.path(), slow);
        let clean = steps(&source(root.path()), mode, 100);
        thread::scope(|scope| {
            // In `local` mode each of them reads everything, in `owned` mode its lanes' shares.
            let run = |rank: RankOf| {
                let source = cached(&server.url(), folder.path(), 1 << 30).0;
                let loader = Loader::new(vec![source], settings(mode), rank).unwrap();
                let steps = take(&mut loader.on_machine_with(0..rank.ranks), 100);
                for (step, clean) in steps.iter().zip(&clean) {
                    let of_rank = |slot: u32| slot as usize % rank.ranks == rank.rank;
                    let clean = clean
                        .micro_batches
                        .iter()
                        .filter(|batch| of_rank(batch.slot));
                    assert!(
                        step.micro_batches.iter().eq(clean),
                        "{mode}, {rank:?}, step {}",
                        step.step
                    );
                }
            };
            for at in 0..4 {
                let rank = if mode == Mode::Local {
                    RankOf::ONLY
                } else {
                    RankOf { rank: at, ranks: 4 }
                };
                scope.spawn(move || run(rank));
            }
        });
        assert_fetched_once(&server.served());
    }
}

#[test]
fn an_earlier_data_set_makes_room_for_a_new_one() {
    let (old, new, folder) = (
        large(),
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    pack(new.path(), &[(24, 16, 2_000, 0)], 50_000, "a");
    let limit = source(old.path()).dataset.num_bytes(Split::Train) + 10_000;
    for root in [&old, &new] {
        let server = ObjectServer::start(root.path(), healthy);
        let clean = steps(&source(root.path()), Mode::Window, 120);
        for round in 0..2 {
            let (source, cache) = cached(&server.url(), folder.path(), limit);
            server.reset();
            assert_eq!(steps(&source, Mode::Window, 120), clean);
            assert!(cache.used_bytes() <= limit);
            assert!(
                round == 0 || server.served().requests == 0,
                "{:?}",
                server.served().requests
            );
        }
    }
}

#[test]
fn two_runs_share_a_cache_too_small_for_both() {
    let (root, folder) = (large(), tempfile::tempdir().unwrap());
    let server = ObjectServer::start(root.path(), healthy);
    let limit = source(root.path()).dataset.num_bytes(Split::Train) / 2;
    let run = |mode: Mode, seed: u64| {
        let settings = two_lanes(mode, seed);
        let read = |source: Source| {
            take(
                &mut Loader::new(vec![source], settings.clone(), RankOf::ONLY).unwrap(),
                150,
            )
        };
        assert_eq!(
            read(cached(&server.url(), folder.path(), limit).0),
            read(source(root.path())),
            "{mode}"
        );
    };
    thread::scope(|scope| {
        for (mode, seed) in [
            (Mode::Window, SEED),
            (Mode::Owned, SEED + 1),
            (Mode::Window, SEED + 2),
        ] {
            let run = &run;
            scope.spawn(move || run(mode, seed));
        }
    });
    let cache = DiskCache::open(folder.path(), limit).unwrap();
    assert_counted(folder.path());
    assert!(
        cache.used_bytes() <= limit,
        "{} of {limit}",
        cache.used_bytes()
    );
}

/// Two ranks that do not declare that they share a machine: neither evicts blocks that only the
/// other one needs.
#[test]
fn what_another_living_run_needs_is_left_alone() {
    let (root, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Two shares of 512 rows without a remainder.
    pack(root.path(), &[(24, 16, 1_024, 0)], 0, "a");
    let server = ObjectServer::start(root.path(), healthy);
    let limit = source(root.path()).dataset.num_bytes(Split::Train) / 100 * 55;
    let loader = |rank| {
        let source = cached(&server.url(), folder.path(), limit).0;
        Loader::new(
            vec![source],
            two_lanes(Mode::Owned, SEED),
            RankOf { rank, ranks: 2 },
        )
        .unwrap()
    };
    let mut first = loader(0);
    // An epoch is 32 steps.
    take(&mut first, 40);
    let mut second = loader(1);
    let clean = Loader::new(
        vec![source(root.path())],
        two_lanes(Mode::Owned, SEED),
        RankOf { rank: 1, ranks: 2 },
    );
    assert_eq!(take(&mut second, 40), take(&mut clean.unwrap(), 40));
    // Stop its reading ahead.
    drop(second);
    server.reset();
    take(&mut first, 40);
    assert_eq!(server.served().requests, 0);
}

/// Set in a child process that a test kills: the server's URL, and the cache's folder.
const CHILD: [&str; 2] = ["RECTIFLOW_TEST_URL", "RECTIFLOW_TEST_CACHE"];

#[test]
fn a_process_that_is_killed_leaves_nothing_that_stops_another() {
    let name = "a_process_that_is_killed_leaves_nothing_that_stops_another";
    let patient = Network {
        stall_timeout: Duration::from_secs(60),
        ..network()
    };
    if let [Ok(url), Ok(folder)] = CHILD.map(std::env::var) {
        let cache = Arc::new(DiskCache::open(Path::new(&folder), 1 << 30).unwrap());
        let dataset = Dataset::open_with(url, &patient)
            .unwrap()
            .with_cache(&cache);
        let source = Source {
            dataset: Arc::new(dataset),
            ..source(std::env::var("RECTIFLOW_TEST_ROOT").unwrap())
        };
        // Reads until it is killed.
        steps(&source, Mode::Owned, 1_000_000);
        return;
    }
    let (root, folder) = (large(), tempfile::tempdir().unwrap());
    let (silent, (reached, has_reached)) = (Arc::new(AtomicBool::new(true)), mpsc::channel());
    let is_silent = silent.clone();
    let server = ObjectServer::start(root.path(), move |r| {
        let stops = is_silent.load(Ordering::SeqCst) && r.number >= 40;
        if stops {
            // After the first message there may be no receiver.
            let _ = reached.send(());
        }
        stops.then_some(Fault::Silence)
    });
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name])
        .envs([
            (CHILD[0], server.url().as_str()),
            (CHILD[1], folder.path().to_str().unwrap()),
        ])
        .env("RECTIFLOW_TEST_ROOT", root.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    has_reached.recv_timeout(Duration::from_secs(60)).unwrap();
    let on_their_way = files(folder.path())
        .iter()
        .filter(|path| path.to_string_lossy().contains(".writing-"))
        .count();
    assert!(on_their_way > 0, "the child has blocks on their way");
    silent.store(false, Ordering::SeqCst);
    // A reader in this process waits for the child's blocks and takes them over.
    let clean = steps(&source(root.path()), Mode::Owned, 130);
    let (beside, _cache) = cached(&server.url(), folder.path(), 1 << 30);
    thread::scope(|scope| {
        let reading = scope.spawn(|| steps(&beside, Mode::Owned, 130));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(reading.join().unwrap(), clean);
    });
    drop((beside, _cache));
    let (again, _cache) = cached(&server.url(), folder.path(), 1 << 30);
    server.reset();
    assert_eq!(steps(&again, Mode::Owned, 130), clean);
    assert_eq!(server.served().requests, 0);
    assert_counted(folder.path());
    assert!(
        files(folder.path())
            .iter()
            .all(|path| !path.to_string_lossy().contains(".writing-"))
    );
}
