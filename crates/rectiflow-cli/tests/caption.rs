//! `rectiflow caption` as a program: killed and started again, merged by `prep` without encoding,
//! and its messages for what a user gets wrong.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use rectiflow_annotate::loopback::{
    manner::{Manner, Misdeed},
    server::Loopback,
};
use rectiflow_data::picture::Picture;
use serde_json::Value;

fn rectiflow(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rectiflow"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text
        .lines()
        .last()
        .unwrap_or_else(|| panic!("no answer: {output:?}"));
    serde_json::from_str(line).expect("the answer is JSON")
}

/// Pictures whose stripes are the bits of their numbers, so that their JPEGs differ: the server
/// knows a picture by its JPEG, and flat colours that differ by one can have the same.
fn pictures(folder: &Path, num: u8) -> PathBuf {
    let source = folder.join("source");
    fs::create_dir_all(&source).unwrap();
    for number in 0..num {
        let mut pixels = Vec::new();
        for row in 0..40 {
            let is_light = number >> (row / 5) & 1 == 1;
            pixels.extend([if is_light { 255 } else { 0 }; 3 * 40]);
        }
        let picture = Picture::new(40, 40, pixels);
        fs::write(source.join(format!("{number:03}.png")), picture.to_png()).unwrap();
    }
    source
}

/// Arguments of a run that asks `server` about the pictures in `source`.
fn arguments<'a>(source: &'a str, table: &'a str, server: &'a str) -> Vec<&'a str> {
    vec![
        "--json",
        "caption",
        source,
        "--out",
        table,
        "--set",
        server,
        "--set",
        "caption.requests=6",
        "--set",
        "caption.probe=false",
    ]
}

/// Kill -9 at three moments: no answer that was written down is asked for again, and what is asked
/// for twice was under way.
#[test]
fn a_killed_run_asks_nothing_twice() {
    const NUM_PICTURES: u8 = 150;
    let folder = tempfile::tempdir().unwrap();
    let source = pictures(folder.path(), NUM_PICTURES);
    let source = source.to_str().unwrap();
    let table = folder.path().join("captions.parquet");
    let table = table.to_str().unwrap();
    let manner = Manner {
        delay: Duration::from_millis(30),
        misdeeds: Box::new(|asked| {
            let fails = asked.repeat == 0 && asked.number % 17 == 5;
            fails.then_some(Misdeed::Status(500, 0))
        }),
        ..Manner::default()
    };
    let server = Loopback::start(manner, || {});
    let servers = format!("caption.servers=[\"{}\"]", server.url());
    for num_asked in [1, 40, 90] {
        let mut child = rectiflow(&arguments(source, table, &servers))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while server.num_asked() < num_asked {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "the run asks nothing"
            );
            assert_eq!(child.try_wait().unwrap(), None, "the run ended by itself");
            thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let output = rectiflow(&arguments(source, table, &servers))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let answer = json(&output);
    assert_eq!(answer["rows"], u64::from(NUM_PICTURES));
    let known = answer["captions"]["known"].as_u64().unwrap();
    assert!(known > 50, "the killed runs left {known} answers");
    assert_eq!(server.pictures().len(), usize::from(NUM_PICTURES));
    // Each of the three deaths loses at most the six requests under way.
    let mut num_twice = 0;
    for count in server.pictures().values() {
        num_twice += count.answered.saturating_sub(1);
    }
    assert!(
        num_twice <= 3 * 6,
        "{num_twice} answers were asked for again"
    );

    let num_asked = server.num_asked();
    let output = rectiflow(&arguments(source, table, &servers))
        .output()
        .unwrap();
    assert_eq!(json(&output)["captions"]["total"], 0);
    assert_eq!(server.num_asked(), num_asked);
}

#[test]
fn mistakes_are_said_in_one_line_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let source = pictures(folder.path(), 1);
    let source = source.to_str().unwrap();
    let table = folder.path().join("t.parquet");
    let table = table.to_str().unwrap();
    let server = Loopback::start(Manner::default(), || {});
    let servers = format!("caption.servers=[\"{}\"]", server.url());
    let no_server = "caption.servers=[\"http://127.0.0.1:9/v1\"]";
    let run = |arguments: &[&str]| {
        let output = rectiflow(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        assert_eq!(text.lines().count(), 1, "{text}");
        (output.status.code().unwrap(), text)
    };
    for (arguments, code, part) in [
        (
            vec!["caption", source, "--set", &servers],
            2,
            "--out is needed",
        ),
        (
            vec!["caption", source, "--out", table, "--set", no_server],
            1,
            "it cannot be reached",
        ),
        (
            vec![
                "caption", source, "--out", table, "--set", &servers, "--mode", "haiku",
            ],
            2,
            "no such mode, but descriptive, short, phrases",
        ),
        (
            vec![
                "caption",
                source,
                "--out",
                table,
                "--set",
                "caption.requests=0",
            ],
            2,
            "caption.requests = 0: must be 1 to 4096",
        ),
        (
            vec![
                "caption",
                source,
                "--out",
                table,
                "--set",
                "caption.servrs=['x']",
            ],
            2,
            "servers",
        ),
        (
            vec![
                "caption",
                "/no/such/folder",
                "--out",
                table,
                "--set",
                &servers,
            ],
            1,
            "/no/such/folder",
        ),
    ] {
        let (found, text) = run(&arguments);
        assert!(text.contains(part), "{text}");
        assert_eq!(found, code, "{text}");
    }
    assert_eq!(server.num_asked(), 0);
}
