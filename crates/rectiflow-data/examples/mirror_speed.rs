//! Measures how fast a bucket sends files, beside a plain upload of the same bytes over the same
//! loopback link.
//!
//!     cargo run --release -p rectiflow-data --example mirror_speed -- FOLDER [MEGABYTES]
//!
//! Writes a file into FOLDER and sends it to an object store, a process of its own, that keeps it
//! there: as one PUT on a plain socket, in parts, in parts with the hash, and with a limit. Prints
//! one JSON object per line; `cpu_secs` is the processor time of the sender, all threads.

#![expect(clippy::print_stdout, reason = "an example prints its results")]
#![allow(
    clippy::unwrap_used,
    reason = "a measurement that fails has nothing else to say"
)]

#[path = "../tests/object_server/mod.rs"]
mod object_server;

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use clap::Parser;
use object_server::ObjectServer;
use rectiflow_data::Bucket;
use serde_json::json;

/// Rounds of each way, of which all are printed.
const ROUNDS: usize = 3;
/// The limit, in megabits a second.
const LIMIT_MBIT: f64 = 400.0;
/// Set in the process that serves.
const SERVES: &str = "RECTIFLOW_MIRROR_SPEED_SERVES";
/// Set in the process that sends, with the address of the server.
const SENDS: &str = "RECTIFLOW_MIRROR_SPEED_SENDS";

/// Measures how fast a bucket sends files.
#[derive(Debug, Parser)]
struct Arguments {
    /// Folder for the file and its copies.
    folder: PathBuf,
    /// Length of the file in megabytes.
    #[arg(default_value_t = 512)]
    megabytes: usize,
}

fn main() {
    let arguments = Arguments::parse();
    let store = arguments.folder.join("store");
    fs::create_dir_all(store.join("bucket")).unwrap();
    if env::var_os(SERVES).is_some() {
        serve(&store);
    } else if let Ok(address) = env::var(SENDS) {
        measure(&arguments, &address);
    } else {
        direct();
    }
}

/// Starts the server, then the sender with the environment of S3.
fn direct() {
    let mut server = again(&[(SERVES, "1")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let address = first_line(&mut server);
    let environment = [
        (SENDS, address.as_str()),
        ("AWS_ENDPOINT_URL", &address),
        ("AWS_REGION", "auto"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
    ];
    let status = again(&environment).status().unwrap();
    // The end of its input ends the server.
    drop(server.stdin.take());
    server.wait().unwrap();
    assert!(status.success(), "{status}");
}

fn again(environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(env::args_os().skip(1))
        .envs(environment.iter().copied());
    command
}

fn first_line(server: &mut Child) -> String {
    let mut line = String::new();
    let mut output = BufReader::new(server.stdout.as_mut().unwrap());
    output.read_line(&mut line).unwrap();
    line.trim().to_owned()
}

/// Serves until the input ends.
fn serve(store: &Path) {
    let server = ObjectServer::start(store, |_| None);
    println!("{}", server.url());
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).unwrap();
}

fn measure(arguments: &Arguments, address: &str) {
    let file = arguments.folder.join("file");
    let mut bytes = vec![0; arguments.megabytes * 1_000_000];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    fs::write(&file, &bytes).unwrap();
    let hash = blake3::hash(&bytes).to_hex().to_string();
    drop(bytes);
    let url = "s3://bucket/run";
    let free = Bucket::open(url, None).unwrap();
    let limited = Bucket::open(url, Some(LIMIT_MBIT)).unwrap();
    for _ in 0..ROUNDS {
        time(arguments, "plain PUT", || plain(address, &file));
        time(arguments, "parts", || {
            free.put_file("parts", &file, None).unwrap();
        });
        time(arguments, "parts, hashed", || {
            free.put_file("hashed", &file, Some(&hash)).unwrap();
        });
        time(arguments, "parts, hashed, 400 Mbit/s", || {
            limited.put_file("limited", &file, Some(&hash)).unwrap();
        });
    }
}

fn time(arguments: &Arguments, way: &str, send: impl FnOnce()) {
    let (began, cpu) = (Instant::now(), cpu_secs());
    send();
    let secs = began.elapsed().as_secs_f64();
    let megabytes = arguments.megabytes as f64;
    let line = json!({
        "way": way,
        "megabytes": megabytes,
        "secs": secs,
        "mbit_per_sec": 8.0 * megabytes / secs,
        "cpu_secs": cpu_secs() - cpu,
    });
    println!("{line}");
}

/// Sends a file as the body of one request.
fn plain(address: &str, file: &Path) {
    let host = address.trim_start_matches("http://");
    let mut file = fs::File::open(file).unwrap();
    let len = file.metadata().unwrap().len();
    let mut socket = TcpStream::connect(host).unwrap();
    let head =
        format!("PUT /bucket/plain HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len}\r\n\r\n");
    socket.write_all(head.as_bytes()).unwrap();
    std::io::copy(&mut file, &mut socket).unwrap();
    let mut answer = [0; 12];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
}

/// Returns the processor time of this process in seconds, all threads.
fn cpu_secs() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let (_, rest) = stat.rsplit_once(')').unwrap();
    let mut ticks = rest.split_whitespace().skip(11).take(2);
    let mut sum = 0.0;
    for _ in 0..2 {
        sum += ticks.next().unwrap().parse::<f64>().unwrap();
    }
    sum / 100.0
}
