//! Ranks as processes: killed, stopped, terminated, restarted with fewer and with more. Tested are
//! the time in which they end and their messages; the numbers are tested in `train`.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{json, prepare, rectiflow, text, write_recipe};

/// Time limit of a test, many times what it takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// Forty steps of four micro-batches of one sample, a checkpoint every five, a time-out of three
/// seconds.
const SETS: [&str; 12] = [
    "--set",
    "train.samples=160",
    "--set",
    "train.micro_batch=1",
    "--set",
    "train.micro_batches=4",
    "--set",
    "checkpoint.every_steps=5",
    "--set",
    "test.every_steps=1000",
    "--set",
    "ranks.timeout_secs=3",
];

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .expect("a free port")
        .port()
}

/// Starts `ranks` ranks as a launcher does.
fn start(recipe: &Path, ranks: usize) -> Vec<Child> {
    let port = free_port();
    (0..ranks)
        .map(|rank| start_one(recipe, rank, ranks, port))
        .collect()
}

/// Starts rank `rank` of `ranks`, which meet at `port`.
fn start_one(recipe: &Path, rank: usize, ranks: usize, port: u16) -> Child {
    let mut command = rectiflow(&[&["train", text(recipe)], &SETS[..]].concat());
    let (rank, ranks, port) = (rank.to_string(), ranks.to_string(), port.to_string());
    let own = [
        ("RANK", &rank),
        ("WORLD_SIZE", &ranks),
        ("LOCAL_RANK", &rank),
        ("MASTER_PORT", &port),
    ];
    command.envs(own).env("MASTER_ADDR", "127.0.0.1");
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a rank starts")
}

fn count(run: &Path, event: &str) -> usize {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines()
        .filter(|line| line.contains(&format!("\"event\":\"{event}\"")))
        .count()
}

fn steps_in(run: &Path) -> usize {
    count(run, "step")
}

/// Waits until the run has made this number of further steps.
fn wait_for_steps(run: &Path, before: usize, more: usize, ranks: &mut [Child]) {
    wait_for("step", run, before + more, ranks);
}

/// Waits until the run has written this number of events of a kind.
fn wait_for(event: &str, run: &Path, wanted: usize, ranks: &mut [Child]) {
    let end = Instant::now() + PATIENCE;
    while count(run, event) < wanted {
        for (rank, child) in ranks.iter_mut().enumerate() {
            if child.try_wait().expect("a rank can be asked").is_some() {
                let mut message = String::new();
                let stderr = child.stderr.as_mut().expect("it is piped");
                std::io::Read::read_to_string(stderr, &mut message).expect("it can be read");
                panic!("rank {rank} ended by itself: {message}");
            }
        }
        assert!(Instant::now() < end, "the run writes no {event}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill")
        .args([&format!("-{name}"), &child.id().to_string()])
        .status();
    assert!(status.expect("kill runs").success());
}

/// The exit statuses of the ranks, in their order. The limit is far above the three seconds of the
/// time-out.
fn ends(ranks: Vec<Child>) -> Vec<Output> {
    let end = Instant::now() + PATIENCE;
    let wait = |mut child: Child| {
        while child.try_wait().expect("a rank can be asked").is_none() {
            assert!(Instant::now() < end, "a rank does not end");
            thread::sleep(Duration::from_millis(5));
        }
        child.wait_with_output().expect("its output can be read")
    };
    ranks.into_iter().map(wait).collect()
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_dead_or_stopped_rank_is_named_and_the_run_goes_on_with_fewer_or_more() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    prepare(folder.path());
    let (recipe, run) = (
        write_recipe(folder.path(), "faults"),
        folder.path().join("faults"),
    );
    // (ranks, which of them, what happens to it)
    for (ranks, victim, what) in [(4, 2, "KILL"), (3, 0, "KILL"), (4, 3, "STOP")] {
        let (steps, checkpoints) = (steps_in(&run), count(&run, "checkpoint"));
        let mut all = start(&recipe, ranks);
        wait_for_steps(&run, steps, 7, &mut all);
        // The checkpoint is written while training continues.
        wait_for("checkpoint", &run, checkpoints + 1, &mut all);
        signal(&all[victim], what);
        let stopped = all.remove(victim);
        for output in ends(all) {
            let message = message(&output);
            assert_eq!(output.status.code(), Some(1), "{message}");
            let expected = format!(
                "rank {victim}{} dead or stopped; it was last ",
                if victim == 0 {
                    ", or the process that serves the store, is"
                } else {
                    " is"
                }
            );
            assert!(message.contains(&expected), "{message}");
            let errors = message
                .lines()
                .filter(|line| line.contains("error: "))
                .count();
            assert_eq!(errors, 1, "one line says it: {message}");
        }
        signal(&stopped, "KILL");
        ends(vec![stopped]);
    }
    let outputs = ends(start(&recipe, 2));
    for output in &outputs {
        assert!(output.status.success(), "{}", message(output));
    }
    // Each time it resumed from a checkpoint and not from the beginning.
    let events = fs::read_to_string(run.join("metrics.jsonl")).expect("metrics are written");
    let starts: Vec<u64> = events
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|event| event["event"] == "start")
        .map(|event| event["step"].as_u64().expect("a number"))
        .collect();
    assert!(
        starts.len() == 4 && starts[0] == 0 && starts.windows(2).all(|pair| pair[0] < pair[1]),
        "{starts:?}"
    );
    assert!(
        run.join("checkpoints/step-00000040/optimizer-00002-of-00002.safetensors")
            .is_file()
    );
}

#[test]
fn a_rank_that_is_told_to_end_ends_all_in_good_order() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    prepare(folder.path());
    let (recipe, run) = (
        write_recipe(folder.path(), "ended"),
        folder.path().join("ended"),
    );
    let mut all = start(&recipe, 2);
    wait_for_steps(&run, 0, 3, &mut all);
    signal(&all[1], "TERM");
    for output in ends(all) {
        assert_eq!(output.status.code(), Some(143), "{}", message(&output));
    }
    let last = newest(&run);
    assert!(last.join("BLAKE3SUMS").is_file(), "all have saved");

    // The same through `--ranks`, which forwards a signal.
    let arguments = [
        &["train", text(&recipe), "--ranks", "2", "--json"],
        &SETS[..],
    ]
    .concat();
    let before = steps_in(&run);
    let child = rectiflow(&arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut all = vec![child];
    wait_for_steps(&run, before, 3, &mut all);
    signal(&all[0], "TERM");
    let output = ends(all).remove(0);
    assert_eq!(output.status.code(), Some(143), "{}", message(&output));
    assert!(
        newest(&run) > last && json(&output)["finished"] == false,
        "{}",
        message(&output)
    );

    let output = rectiflow(&arguments).output().expect("it starts");
    assert!(output.status.success(), "{}", message(&output));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).lines().count(),
        1,
        "rank 0 alone answers"
    );
    assert_eq!(
        (
            json(&output)["finished"].as_bool(),
            json(&output)["step"].as_u64()
        ),
        (Some(true), Some(40))
    );
}

/// The newest checkpoint.
fn newest(run: &Path) -> PathBuf {
    let entries = fs::read_dir(run.join("checkpoints")).expect("checkpoints");
    entries
        .map(|entry| entry.expect("an entry").path())
        .max()
        .expect("a checkpoint")
}

#[test]
fn sigterm_that_is_repeated_is_one_request() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    prepare(folder.path());
    // (ranks, how often each gets the signal)
    for (ranks, repeats) in [(1, 2), (2, 2), (2, 5)] {
        let name = format!("repeated-{ranks}-{repeats}");
        let (recipe, run) = (
            write_recipe(folder.path(), &name),
            folder.path().join(&name),
        );
        let mut all = start(&recipe, ranks);
        wait_for_steps(&run, 0, 3, &mut all);
        for _ in 0..repeats {
            for child in &all {
                signal(child, "TERM");
            }
        }
        for output in ends(all) {
            assert_eq!(output.status.code(), Some(143), "{}", message(&output));
        }
        // The last step is saved.
        let last = run.join(format!("checkpoints/step-{:08}", steps_in(&run)));
        assert!(last.join("BLAKE3SUMS").is_file(), "{}", last.display());
    }
}

/// Waits until the process handles SIGTERM itself.
fn wait_for_handler(child: &mut Child) {
    let end = Instant::now() + PATIENCE;
    loop {
        let path = format!("/proc/{}/status", child.id());
        let status = fs::read_to_string(path).expect("the process is alive");
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let caught = u64::from_str_radix(caught.expect("Linux says it").trim(), 16);
        // Bit 14 is signal 15.
        if (caught.expect("a mask of bits") >> 14) & 1 == 1 {
            return;
        }
        assert!(Instant::now() < end, "it handles no SIGTERM");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_rank_that_waits_for_others_at_the_start_obeys_the_first_signal() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    prepare(folder.path());
    let recipe = write_recipe(folder.path(), "waiting");
    // Rank 0, which serves the store, and a rank that waits for it.
    for (rank, name, code) in [(0, "TERM", 143), (1, "TERM", 143), (0, "INT", 130)] {
        let mut waiting = start_one(&recipe, rank, 2, free_port());
        wait_for_handler(&mut waiting);
        signal(&waiting, name);
        let output = ends(vec![waiting]).remove(0);
        let message = message(&output);
        assert_eq!(output.status.code(), Some(code), "rank {rank}: {message}");
        let answer = String::from_utf8_lossy(&output.stdout);
        let expected = "stopped before all ranks had started; run the same command to resume";
        assert_eq!(answer.contains(expected), rank == 0, "{answer}");
    }
    // Nothing has changed: the same command trains.
    for output in ends(start(&recipe, 2)) {
        assert!(output.status.success(), "{}", message(&output));
    }
}

#[test]
fn ranks_that_cannot_be_are_refused_in_one_line() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    prepare(folder.path());
    let recipe = write_recipe(folder.path(), "refused");
    let refused = |command: &mut Command, needles: &[&str]| {
        let output = command.output().expect("it starts");
        let message = message(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(
            needles.iter().all(|needle| message.contains(needle)),
            "{needles:?}: {message}"
        );
        message
    };
    let train = ["train", text(&recipe)];
    let message = refused(
        rectiflow(&train).env("WORLD_SIZE", "2"),
        &["WORLD_SIZE is set and RANK is not"],
    );
    assert_eq!(message.lines().count(), 1, "{message}");
    refused(
        rectiflow(&train).env("RANK", "2").env("WORLD_SIZE", "2"),
        &["RANK = 2 and WORLD_SIZE = 2"],
    );
    let both = ["train", text(&recipe), "--ranks", "2"];
    let launcher = [
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "a"),
        ("MASTER_PORT", "1"),
    ];
    refused(
        rectiflow(&both).envs(launcher),
        &["--ranks 2: a launcher has set RANK"],
    );
    let many = [
        "train",
        text(&recipe),
        "--ranks",
        "3",
        "--set",
        "ranks.start_secs=20",
    ];
    refused(&mut rectiflow(&many), &["3 ranks", "lanes"]);
}

#[test]
fn the_bench_counts_the_bytes_that_go_over_the_wire() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    prepare(folder.path());
    let recipe = write_recipe(folder.path(), "bench");
    let arguments = [
        "bench",
        "ranks",
        text(&recipe),
        "--steps",
        "3",
        "--micro-batches",
        "2",
        "--json",
    ];
    let output = rectiflow(&arguments).output().expect("it starts");
    assert!(output.status.success(), "{}", message(&output));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).lines().count(),
        1,
        "the ranks print nothing"
    );
    let rows = json(&output);
    let number = |row: usize, name: &str| rows[row][name].as_f64().expect("a number");
    assert_eq!(
        (
            number(0, "ranks"),
            number(1, "ranks"),
            number(0, "step_bytes")
        ),
        (1.0, 2.0, 0.0)
    );
    assert!(
        (0..2).all(|row| number(row, "samples_per_sec") > 0.0 && number(row, "efficiency") > 0.0),
        "{rows}"
    );
    // Both ranks send the counted bytes; other traffic of this machine adds to them.
    let (counted, sent) = (
        2.0 * number(1, "step_bytes"),
        number(1, "loopback_step_bytes"),
    );
    assert!(
        counted > 1e6 && sent > 0.99 * counted,
        "{counted} counted, {sent} sent"
    );
    assert!(
        !folder.path().join("bench").exists(),
        "the run folder is not touched"
    );
}
