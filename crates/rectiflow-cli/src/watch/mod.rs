//! `rectiflow watch`: a page that shows runs while they run, from a folder or an object store.
//!
//! It reads and never writes. A run is read from its event file ([`source`]) into curves
//! ([`run_log`]), of which a page is sent what fits on a screen ([`view`]); the page asks twice a
//! second for what is new. `rectiflow report` puts the same page and the same data into one file.

pub(crate) mod access;
pub(crate) mod page;
mod ranks;
pub(crate) mod reply;
pub(crate) mod run_log;
pub(crate) mod runs;
mod server;
pub(crate) mod source;
pub(crate) mod status;
pub(crate) mod view;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, atomic::Ordering},
    thread,
    time::Duration,
};

use anyhow::Context;
use serde_json::json;
use tokio::{net::TcpListener, runtime::Runtime};

use crate::{
    terminal::{answer::Answer, log, signals::StopSignal},
    watch::{
        access::{Access, Token},
        runs::Runs,
        server::Shared,
    },
};

/// Serve a page that shows runs live: losses, speed, money, acts of the guard, previews.
///
/// The page is for this machine alone; from another one use `ssh -L 8471:localhost:8471 HOST`, or
/// `--host 0.0.0.0`, which asks for the token that is printed. It shows runs that are finished as
/// well, several laid over each other, and new ones as they begin. Ctrl-C ends it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run folders, folders of runs, or URLs of runs in object storage (`s3://bucket/run`).
    #[arg(required = true)]
    places: Vec<String>,
    /// The address to listen on. Any other than this machine's own asks for a token.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// The port [default: 8471, or the next that is free; 0 for any].
    #[arg(long)]
    port: Option<u16>,
    /// Ask for a token on this machine, too, which other people may share.
    #[arg(long)]
    token: bool,
}

/// The port if none is named, and how many others are tried after it.
const PORT: u16 = 8471;
const TRIED: u16 = 20;

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let mut runs = Runs::open(&args.places)?;
    let found = runs.list().len();
    let stop = StopSignal::listen().context("listening for Ctrl-C")?;
    let runtime = Runtime::new().context("starting the server")?;

    // Listen, and say where.
    let listener = runtime.block_on(listen(args))?;
    let address = listener.local_addr().context("the server's address")?;
    let access = if args.token || !args.host.is_loopback() {
        Access::Token(Token::new(address.port()).context("/dev/urandom")?)
    } else {
        Access::Loopback
    };
    let url = url(address, &access);
    say(args, found, &url);

    // Answer until Ctrl-C.
    let shared = Shared {
        runs: Mutex::new(runs),
        access,
    };
    let served = runtime.spawn(server::serve(listener, Arc::new(shared)));
    while !stop.flag().load(Ordering::Relaxed) && !served.is_finished() {
        thread::sleep(Duration::from_millis(50));
    }
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(Answer::done(String::new(), json!({ "url": url })))
}

fn say(args: &Args, found: usize, url: &str) {
    match found {
        0 => log::line(&format!(
            "no runs (folders with a metrics.jsonl) in {} yet; the page shows them as they begin",
            args.places.join(", ")
        )),
        1 => log::line("1 run"),
        many => log::line(&format!("{many} runs")),
    }
    log::line(&format!("watch at {url} (Ctrl-C ends)"));
}

/// Listens at the port that is named, or at the first that is free.
async fn listen(args: &Args) -> anyhow::Result<TcpListener> {
    let first = args.port.unwrap_or(PORT);
    let last = if args.port.is_some() {
        first
    } else {
        PORT + TRIED
    };
    let mut failed = None;
    for port in first..=last {
        match TcpListener::bind((args.host, port)).await {
            Ok(listener) => return Ok(listener),
            Err(error) => failed = Some(error),
        }
    }
    let error = failed.expect("at least one port is tried");
    let advice = if error.kind() == std::io::ErrorKind::AddrInUse {
        "; another program listens there: choose another port with --port, or --port 0 for any"
    } else {
        ""
    };
    let ports = if first == last {
        format!("{first}")
    } else {
        format!("{first} to {last}")
    };
    Err(error).context(format!("listening on {} port {ports}{advice}", args.host))
}

/// The address to open, with the token if there is one.
fn url(address: SocketAddr, access: &Access) -> String {
    let port = address.port();
    let host = match address.ip() {
        ip if ip.is_unspecified() => "THIS-MACHINE".to_owned(),
        IpAddr::V6(ip) => format!("[{ip}]"),
        IpAddr::V4(ip) => ip.to_string(),
    };
    match access {
        Access::Loopback => format!("http://{host}:{port}/"),
        Access::Token(token) => format!("http://{host}:{port}/?token={}", token.text()),
    }
}
