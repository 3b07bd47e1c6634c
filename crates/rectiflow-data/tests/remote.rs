//! Data sets at a URL: the same samples as from a folder, few requests, and faults that heal or are
//! reported in time.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod object_server;
mod packed;

use std::{
    collections::HashSet,
    fs,
    ops::Range,
    path::Path,
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use object_server::{CHILD, Fault, ObjectServer, Request, with_s3};
use packed::{
    BUCKETS, SEED, needed_bytes, pack, packed,
    remote::{network, open, settings, steps, take},
    source,
};
use rectiflow_data::{
    Dataset, Error, Network, Split,
    amplification::amplification,
    batch::Source,
    loader::Loader,
    order::{Mode, OrderSettings, RankOf},
    prompt::PromptSettings,
    publish::publish,
    test_batches::test_batches,
};

fn healthy(_: &Request) -> Option<Fault> {
    None
}

#[test]
fn opening_takes_two_requests_whatever_the_number_of_buckets() {
    let root = tempfile::tempdir().unwrap();
    let buckets: Vec<_> = (1..=60).map(|side| (8 * side, 16, 3, 0)).collect();
    pack(root.path(), &buckets, 0, "a");
    let server = ObjectServer::start(root.path(), healthy);
    let dataset = Dataset::open(server.url()).unwrap();
    assert_eq!(dataset.buckets(Split::Train).len(), 60);
    assert_eq!(server.served().requests, 2, "{:?}", server.served());
    assert_eq!(
        dataset.identity(),
        Dataset::open(root.path()).unwrap().identity()
    );
}

#[test]
fn a_small_remote_data_set_is_as_good_as_a_local_one() {
    let root = packed();
    let server = ObjectServer::start(root.path(), healthy);
    let (local, remote) = (source(root.path()), open(&server.url()));
    let mut loader = Loader::new(vec![remote.clone()], settings(Mode::Auto), RankOf::ONLY).unwrap();
    assert_eq!(loader.order().settings().mode, Mode::Local);
    assert_eq!(take(&mut loader, 12), steps(&local, Mode::Local, 12));
    // The training split has three buckets, of 3, 1 and 1 blocks: each block's latents and each
    // object's text are requested once, and the manifest and the block table. Consecutive blocks
    // that are needed at once share a request.
    let served = server.served();
    assert!(served.requests <= 2 + 3 + 5, "{served:?}");
    assert_eq!(
        served.names.iter().collect::<HashSet<_>>().len() as u64,
        served.requests
    );
    let test = |source: &Source| -> Vec<_> {
        test_batches(std::slice::from_ref(source), 4, SEED, RankOf::ONLY)
            .unwrap()
            .map(Result::unwrap)
            .collect()
    };
    assert_eq!(test(&remote), test(&local));
    (0..remote.dataset.manifest().objects.len())
        .for_each(|object| remote.dataset.verify_object(object).unwrap());
}

#[test]
fn a_fixed_pass_asks_for_many_buckets_at_a_time() {
    let root = tempfile::tempdir().unwrap();
    let buckets: Vec<_> = (1..=16).map(|side| (8 * side, 16, 0, 3)).collect();
    pack(root.path(), &buckets, 0, "a");
    // No request for a file is answered before eight of its kind have arrived.
    let arrived = Arc::new((Mutex::new([0; 2]), Condvar::new()));
    let (counts, patience) = (arrived.clone(), Duration::from_secs(10));
    let wait = move |request: &Request| {
        let part = ["text/", "latents/"]
            .iter()
            .position(|part| request.name.starts_with(part))?;
        let mut count = counts.0.lock().unwrap();
        count[part] += 1;
        counts.1.notify_all();
        let (_held, timeout) = counts
            .1
            .wait_timeout_while(count, patience, |count| count[part] < 8)
            .unwrap();
        timeout.timed_out().then_some(Fault::Status(403))
    };
    let server = ObjectServer::start(root.path(), wait);
    // With the default timeouts: those of `open` are short.
    let dataset = Arc::new(Dataset::open(server.url()).unwrap());
    let batches = test_batches(
        &[Source {
            dataset,
            ..source(root.path())
        }],
        4,
        SEED,
        RankOf::ONLY,
    )
    .unwrap();
    let ids: HashSet<_> = batches.flat_map(|batch| batch.unwrap().ids).collect();
    assert_eq!((ids.len(), *arrived.0.lock().unwrap()), (48, [16, 16]));
}

#[test]
fn windows_bring_the_same_samples_from_anywhere_at_any_number_of_ranks() {
    let root = tempfile::tempdir().unwrap();
    pack(
        root.path(),
        &[
            (24, 16, 700, 0),
            (16, 24, 70, 0),
            (16, 16, 1, 0),
            (24, 24, 5, 3),
        ],
        0,
        "a",
    );
    let server = ObjectServer::start(root.path(), healthy);
    let (local, remote) = (source(root.path()), open(&server.url()));
    let whole = steps(&local, Mode::Window, 60);
    assert_eq!(steps(&remote, Mode::Window, 60), whole);
    let mut ids = HashSet::new();
    let epoch = whole.iter().take(24).flat_map(|step| &step.micro_batches);
    assert!(
        epoch
            .flat_map(|batch| batch.ids.iter().zip(&batch.passes))
            .all(|sample| ids.insert(sample))
    );
    for ranks in [2, 3, 8] {
        let part = |rank| {
            let rank = RankOf { rank, ranks };
            take(
                &mut Loader::new(vec![remote.clone()], settings(Mode::Window), rank).unwrap(),
                20,
            )
        };
        let parts: Vec<_> = (0..ranks).map(part).collect();
        for (at, step) in whole.iter().take(20).enumerate() {
            let mut together: Vec<_> = parts
                .iter()
                .flat_map(|part| part[at].micro_batches.clone())
                .collect();
            together.sort_by_key(|batch| batch.slot);
            assert_eq!(together, step.micro_batches, "{ranks} ranks");
        }
    }
    let mut seeker = Loader::new(vec![remote], settings(Mode::Window), RankOf::ONLY).unwrap();
    for step in [59, 0, 30, 31, 7] {
        seeker.seek(step);
        assert_eq!(seeker.next_step().unwrap(), whole[step as usize]);
    }
}

#[test]
fn an_epoch_of_windows_fetches_every_byte_once() {
    let root = tempfile::tempdir().unwrap();
    pack(root.path(), &[(24, 16, 26_005, 0)], 0, "a");
    // Without prompts, which would take most of the time.
    let prompt = PromptSettings {
        dropped: 1.0,
        ..PromptSettings::default()
    };
    let settings = OrderSettings {
        micro_batch: 16,
        window_samples: 128,
        ..settings(Mode::Window)
    };
    for ranks in [1, 2, 3, 4, 8] {
        // One server each: late requests of the loaders dropped before still arrive at theirs.
        let server = ObjectServer::start(root.path(), healthy);
        let dataset = Arc::new(Dataset::open(server.url()).unwrap());
        let source = Source {
            dataset,
            prompt: prompt.clone(),
            ..source(root.path())
        };
        server.reset();
        let (mut delivered, mut ahead, mut factor) = (0, 0, 0.0);
        for rank in (0..ranks).map(|rank| RankOf { rank, ranks }) {
            let loader = Loader::new(vec![source.clone()], settings.clone(), rank).unwrap();
            let least = loader.least_read_ahead_bytes();
            let mut loader = loader.read_ahead(least).unwrap();
            ahead += least;
            let batches = take(&mut loader, 26_005 / 128)
                .into_iter()
                .flat_map(|step| step.micro_batches);
            delivered += batches.map(|batch| batch.ids.len() as u64).sum::<u64>();
            factor = (0..3)
                .map(|epoch| amplification(loader.order(), epoch))
                .fold(0.0, f64::max);
        }
        let (served, needed) = (server.served(), needed_bytes(&source.dataset, delivered));
        let samples = delivered as f64 / served.requests as f64;
        assert!(
            factor <= 1.01 && (ahead as f64) < 0.3 * needed,
            "{factor}, {ahead} of {needed}"
        );
        // The reading threads are up to two steps ahead of the delivered ones, and beyond these
        // they hold up to their limits.
        let most = needed_bytes(&source.dataset, delivered + 2 * 128) * factor + ahead as f64;
        let served_bytes = served.bytes as f64;
        assert!(
            (needed..most).contains(&served_bytes),
            "{served_bytes}, {needed} needed, {most} at most"
        );
        assert!(samples >= 32.0, "{samples} samples per request");
    }
}

#[test]
fn what_is_read_ahead_stays_within_its_limit() {
    let root = tempfile::tempdir().unwrap();
    pack(root.path(), &[(24, 16, 4_000, 0)], 0, "a");
    let server = ObjectServer::start(root.path(), healthy);
    let source = open(&server.url());
    let loader =
        || Loader::new(vec![source.clone()], settings(Mode::Window), RankOf::ONLY).unwrap();
    let least = loader().least_read_ahead_bytes();
    let error = loader().read_ahead(least - 1).unwrap_err().to_string();
    assert!(
        error.contains(&format!("at least {least} bytes")),
        "{error}"
    );
    let mut loader = loader().read_ahead(least).unwrap();
    server.reset();
    let row_bytes = needed_bytes(&source.dataset, 1);
    for step in 1..100 {
        loader.next_step().unwrap();
        // Up to three more steps are ready, each of four samples in each of eight lanes.
        let delivered = row_bytes * 32.0 * f64::from(step + 3);
        // Texts differ in length: the delivered ones can be longer than the average.
        assert!(
            (server.served().bytes as f64) < 1.1 * delivered + least as f64,
            "step {step}"
        );
    }
}

type Breaks = fn(&Request) -> Option<Fault>;

/// Whether a request is for bytes of an object, not for the manifest or the block table.
fn is_data(request: &Request) -> bool {
    request.name.contains('/')
}

#[test]
fn faults_that_heal_change_no_sample() {
    let root = packed();
    let clean = [Mode::Local, Mode::Window].map(|mode| steps(&source(root.path()), mode, 8));
    let breaks: [(&str, Breaks); 11] = [
        ("a burst of 503", |r| {
            (r.number % 3 < 2 && r.repeat < 3).then_some(Fault::Status(503))
        }),
        ("500", |r| (r.repeat == 0).then_some(Fault::Status(500))),
        ("429", |r| (r.repeat < 2).then_some(Fault::Status(429))),
        ("hangup", |r| (r.repeat == 0).then_some(Fault::Hangup)),
        ("cut body", |r| (r.repeat < 2).then_some(Fault::Cut(7))),
        ("empty body", |r| (r.repeat == 0).then_some(Fault::Cut(0))),
        ("flipped byte", |r| {
            (r.repeat == 0 && is_data(r)).then_some(Fault::Flip(r.number as usize * 31))
        }),
        ("stall", |r| {
            (r.repeat == 0 && r.number % 4 == 0).then_some(Fault::Stall(5))
        }),
        ("silence", |r| {
            (r.repeat == 0 && r.number % 4 == 0).then_some(Fault::Silence)
        }),
        ("other tag", |_| Some(Fault::OtherTag)),
        ("slow", |r| {
            (r.number % 3 == 0).then_some(Fault::Slow(Duration::from_millis(20)))
        }),
    ];
    for (what, fault) in breaks {
        let server = ObjectServer::start(root.path(), fault);
        for (mode, clean) in [Mode::Local, Mode::Window].into_iter().zip(&clean) {
            assert_eq!(
                steps(&open(&server.url()), mode, 8),
                *clean,
                "{what}, {mode}"
            );
        }
    }
}

/// Opens a data set whose data always fails, reads until the error, and checks its message.
fn check_lasting(root: &Path, mode: Mode, fault: Fault, words: &[&str]) -> Error {
    let broken = fault.clone();
    let server = ObjectServer::start(root, move |r| {
        (is_data(r) && r.name.contains("24x16")).then(|| broken.clone())
    });
    let mut loader = Loader::new(vec![open(&server.url())], settings(mode), RankOf::ONLY).unwrap();
    let began = Instant::now();
    let error = (0..20)
        .find_map(|_| loader.next_step().err())
        .expect("an object is broken");
    // One deadline for the request that fails, one for an earlier wait.
    assert!(
        began.elapsed() < network().deadline * 2,
        "{fault:?}: {:?}",
        began.elapsed()
    );
    let message = error.to_string();
    for word in words.iter().chain(&["24x16", &server.url()]) {
        assert!(
            message.contains(word),
            "{fault:?}, {mode}: no {word:?} in {message}"
        );
    }
    error
}

#[test]
fn faults_that_last_are_named_with_object_range_and_cause() {
    let root = packed();
    let range = |error: &Error| -> Option<Range<u64>> {
        match error {
            Error::Remote { range, .. } => range.clone(),
            Error::Damaged { range, .. } => Some(range.clone()),
            _ => None,
        }
    };
    let attempts = |error: &Error| match error {
        Error::Remote { attempts, .. } => *attempts,
        _ => 0,
    };
    for mode in [Mode::Local, Mode::Window] {
        for (fault, words) in [
            (Fault::Status(503), &["503", "gave up after 4 attempts"][..]),
            (Fault::Hangup, &["gave up after 4 attempts"]),
            (Fault::Cut(9), &["gave up after 4 attempts"]),
            (Fault::Stall(9), &["stalled", "after 9 bytes"]),
            (Fault::Silence, &["stalled", "after 0 bytes"]),
        ] {
            let error = check_lasting(root.path(), mode, fault, words);
            assert!(
                range(&error).is_some_and(|range| range.end > range.start),
                "{error:?}"
            );
        }
        let error = check_lasting(root.path(), mode, Fault::Flip(3), &["damaged", "checksum"]);
        assert!(
            matches!(error, Error::Damaged { .. }) && range(&error).is_some(),
            "{error:?}"
        );
        for (status, word) in [
            (404, "no such object"),
            (403, "credentials"),
            (401, "credentials"),
            (400, "refuses"),
        ] {
            let error = check_lasting(
                root.path(),
                mode,
                Fault::Status(status),
                &[word, &status.to_string()],
            );
            assert_eq!(attempts(&error), 1, "{error:?}");
        }
        check_lasting(root.path(), mode, Fault::NoRanges, &["does not support"]);
    }
}

#[test]
fn lasting_refusals_are_asked_once() {
    let root = packed();
    let server = ObjectServer::start(root.path(), |r| is_data(r).then_some(Fault::Status(403)));
    let mut loader = Loader::new(
        vec![open(&server.url())],
        settings(Mode::Local),
        RankOf::ONLY,
    )
    .unwrap();
    server.reset();
    loader.next_step().unwrap_err();
    assert!(
        server
            .served()
            .names
            .iter()
            .all(|(name, _)| name.starts_with("text/")),
        "{:?}",
        server.served()
    );
    assert_eq!(server.served().requests, 1);
}

#[test]
fn a_description_that_is_wrong_is_refused_by_name() {
    let root = packed();
    let open = |url: &str| Dataset::open_with(url, &network()).unwrap_err().to_string();
    let server = ObjectServer::start(&root.path().join("nowhere"), healthy);
    assert!(
        open(&server.url()).contains("manifest.json: the store has no such object"),
        "{}",
        open(&server.url())
    );
    let server = ObjectServer::start(root.path(), |r| (!is_data(r)).then_some(Fault::Flip(500)));
    assert!(
        open(&server.url()).contains("manifest"),
        "{}",
        open(&server.url())
    );
    let manifest = fs::read(root.path().join("manifest.json")).unwrap();
    fs::write(
        root.path().join("manifest.json"),
        &manifest[..manifest.len() / 2],
    )
    .unwrap();
    let server = ObjectServer::start(root.path(), healthy);
    assert!(
        open(&server.url()).contains("not a valid manifest"),
        "{}",
        open(&server.url())
    );
    assert!(open("http://127.0.0.1:1/x").contains("gave up after 4 attempts"));
}

#[test]
fn s3_addresses_work_with_the_usual_environment() {
    let Ok(bucket) = std::env::var(CHILD) else {
        let folder = tempfile::tempdir().unwrap();
        let bucket = folder.path().join("bucket");
        fs::create_dir_all(bucket.join("data/set")).unwrap();
        pack(&bucket.join("data/set"), &BUCKETS, 0, "a");
        return with_s3(
            "s3_addresses_work_with_the_usual_environment",
            &bucket,
            healthy,
        );
    };
    let (remote, local) = (
        open("s3://bucket/data/set/"),
        source(Path::new(&bucket).join("data/set")),
    );
    assert_eq!(
        steps(&remote, Mode::Window, 4),
        steps(&local, Mode::Window, 4)
    );
    let missing = Dataset::open("s3://bucket/elsewhere")
        .unwrap_err()
        .to_string();
    assert!(
        missing.starts_with("s3://bucket/elsewhere/manifest.json: the store has no such object"),
        "{missing}"
    );
}

#[test]
fn publishing_sends_what_is_not_there_and_the_manifest_last() {
    let Ok(bucket) = std::env::var(CHILD) else {
        let folder = tempfile::tempdir().unwrap();
        let bucket = folder.path().join("bucket");
        fs::create_dir_all(&bucket).unwrap();
        // The client retries when the store is busy.
        let busy = |r: &Request| {
            (r.method == "PUT" && r.number.is_multiple_of(5) && r.repeat == 0)
                .then_some(Fault::Status(503))
        };
        return with_s3(
            "publishing_sends_what_is_not_there_and_the_manifest_last",
            &bucket,
            busy,
        );
    };
    let (root, url) = (tempfile::tempdir().unwrap(), "s3://bucket/new");
    // The first object is larger than one part of an upload: 1200 rows of 16 KB.
    pack(root.path(), &[(512, 256, 1200, 0), (16, 24, 7, 2)], 0, "a");
    let mut heard = (0, 0);
    let published = publish(root.path(), url, &mut |done, all| heard = (done, all)).unwrap();
    assert_eq!(
        (published.num_files, published.num_kept, heard.0),
        (8, 0, heard.1)
    );
    let remote = Dataset::open(url).unwrap();
    (0..3).for_each(|object| remote.verify_object(object).unwrap());
    assert_eq!(
        publish(root.path(), url, &mut |_, _| {}).unwrap().num_files,
        0
    );
    // An interrupted upload: no manifest yet, one file is truncated, one belongs to another data
    // set.
    let place = Path::new(&bucket).join("new");
    fs::remove_file(place.join("manifest.json")).unwrap();
    let latents = place.join("latents/512x256-0-0.safetensors");
    let bytes = fs::read(&latents).unwrap();
    fs::write(&latents, &bytes[..bytes.len() - 1]).unwrap();
    let text = place.join("text/16x24-1-1.parquet");
    let mut bytes = fs::read(&text).unwrap();
    bytes[20] ^= 1;
    fs::write(&text, bytes).unwrap();
    let again = publish(root.path(), url, &mut |_, _| {}).unwrap();
    assert_eq!((again.num_files, again.num_kept), (4, 4));
    let remote = Dataset::open(url).unwrap();
    (0..3).for_each(|object| remote.verify_object(object).unwrap());
    assert!(publish(root.path(), "/a/folder", &mut |_, _| {}).is_err());
}

/// `scripts/check_s3.sh` starts a server and sets the environment.
#[test]
#[ignore = "needs an S3 server: scripts/check_s3.sh"]
fn a_real_s3_server_agrees() {
    let url = std::env::var("RECTIFLOW_S3_URL").expect("scripts/check_s3.sh sets it");
    let root = tempfile::tempdir().unwrap();
    pack(
        root.path(),
        &[(512, 256, 1200, 0), (16, 24, 70, 20), (16, 16, 1, 0)],
        0,
        "a",
    );
    let began = Instant::now();
    let published = loop {
        match publish(root.path(), &url, &mut |_, _| {}) {
            Ok(published) => break published,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(120), "{error}"),
        }
    };
    assert!(
        published.num_files + published.num_kept >= 10,
        "{published:?}"
    );
    let (remote, local) = (
        Source {
            dataset: Arc::new(Dataset::open(&url).unwrap()),
            ..source(root.path())
        },
        source(root.path()),
    );
    (0..4).for_each(|object| remote.dataset.verify_object(object).unwrap());
    for mode in [Mode::Local, Mode::Window] {
        assert_eq!(steps(&remote, mode, 10), steps(&local, mode, 10));
    }
    let missing = Dataset::open(format!("{url}/nothing"))
        .unwrap_err()
        .to_string();
    assert!(missing.contains("no such object"), "{missing}");
}

#[test]
fn a_loader_that_waits_for_a_silent_server_can_be_dropped() {
    let root = packed();
    // The server answers the requests for the manifest, the block table and the first step, and no
    // later ones.
    let server = ObjectServer::start(root.path(), |r| (r.number >= 40).then_some(Fault::Silence));
    let patient = Network {
        stall_timeout: Duration::from_secs(60),
        ..network()
    };
    let dataset = Arc::new(Dataset::open_with(server.url(), &patient).unwrap());
    let source = Source {
        dataset,
        ..open(&server.url())
    };
    let mut loader = Loader::new(vec![source], settings(Mode::Window), RankOf::ONLY).unwrap();
    loader.next_step().unwrap();
    let began = Instant::now();
    drop(loader);
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
}
