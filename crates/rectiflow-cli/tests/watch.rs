//! `rectiflow watch` as a browser sees it: what it answers, and what it refuses.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};

/// A server that ends with the test.
struct Server {
    process: Child,
    port: u16,
    /// The address as it was printed.
    url: String,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let process = Command::new(env!("CARGO_BIN_EXE_rectiflow"))
            .args(["watch", "--port", "0"])
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut server = Self {
            process,
            port: 0,
            url: String::new(),
        };
        let pipe = server.process.stderr.take().expect("a pipe");
        let mut lines = BufReader::new(pipe).lines().map_while(Result::ok);
        let line = lines.find(|line| line.contains("watch at "));
        let line = line.expect("the server says where it is");
        let (_, url) = line.split_once("watch at ").expect("it was found");
        let url = url.split(' ').next().expect("an address");
        let port = url.rsplit(':').next().expect("a port");
        let port = port.split('/').next().expect("a port");
        server.port = port.parse().expect("a number");
        server.url = url.to_owned();
        server
    }

    /// Head and body of the answer to a request line and further header lines.
    fn ask(&self, request: &str, headers: &str) -> (String, Vec<u8>) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("connects");
        let text = format!("{request} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n");
        stream.write_all(text.as_bytes()).expect("writes");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("reads");
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
        let body = answer.split_off(end.expect("a head") + 4);
        let head = String::from_utf8_lossy(&answer).to_lowercase();
        (head, body)
    }

    /// Status and body of a GET request from this machine.
    fn get(&self, path: &str) -> (u16, Vec<u8>) {
        let (head, body) = self.ask(&format!("GET {path}"), "Host: localhost\r\n");
        (status(&head), body)
    }

    fn json(&self, path: &str) -> Value {
        let (status, body) = self.get(path);
        assert_eq!(status, 200, "{path}: {}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).expect("JSON")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn status(head: &str) -> u16 {
    let word = head.split(' ').nth(1).expect("a status");
    word.parse().expect("a number")
}

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR";

/// A run of three steps with a preview, and one that names a file outside the run.
fn write_run(folder: &Path) {
    fs::create_dir_all(folder.join("previews")).expect("a folder");
    fs::write(folder.join("previews/step-2.png"), PNG).expect("writes");
    fs::write(folder.join("secret.png"), PNG).expect("writes");
    let mut lines = vec![json!({
        "event": "start", "step": 0, "unix_secs": 1_795_639_471_u64, "order_hash": "74",
        "num_parameters": 10, "num_train": 5, "num_test": 2, "threads": 2, "buckets": [],
    })];
    for step in 1..=3 {
        lines.push(json!({
            "event": "step", "step": step, "samples": 8 * step, "epoch": 0, "loss": 0.5,
            "gradient_norm": 1.0, "lr": 1e-4, "secs": 0.5, "data_secs": 0.01,
        }));
    }
    for (step, name) in [(2, "step-2.png"), (3, "../secret.png")] {
        lines.push(json!({"event": "preview", "step": step, "name": name, "secs": 1.0}));
    }
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    fs::write(folder.join("metrics.jsonl"), text + "{\"event\":\"st").expect("writes");
}

#[test]
fn a_run_is_served_and_followed_and_nothing_but_it() {
    let root = tempfile::tempdir().expect("a temporary folder");
    let folder = root.path().join("<b>run</b>");
    write_run(&folder);
    let server = Server::start(&[root.path().to_str().expect("UTF-8")]);

    // The page, and the rule that keeps it from loading anything else.
    let (head, body) = server.ask("GET /", "Host: localhost\r\n");
    assert!(body.starts_with(b"<!doctype html>"));
    for header in [
        "content-security-policy: default-src 'none'",
        "nosniff",
        "no-store",
    ] {
        assert!(head.contains(header), "{header} is not in {head}");
    }
    for path in [
        "/page.js",
        "/charts.js",
        "/page.css",
        "/favicon.svg",
        "/api/charts",
    ] {
        assert_eq!(server.get(path).0, 200, "{path}");
    }

    // The run, then what is new of it.
    let runs = server.json("/api/runs");
    assert_eq!(runs["runs"][0]["name"], "<b>run</b>");
    let reply = server.json("/api/runs/0?axis=step&bins=100");
    assert_eq!(
        reply["view"]["curves"]["loss/training"]["s"],
        json!([1, 2, 3])
    );
    assert_eq!(reply["problem"], Value::Null);
    let mut text = fs::read_to_string(folder.join("metrics.jsonl")).expect("reads");
    text += "ep\"}\n";
    fs::write(folder.join("metrics.jsonl"), text).expect("writes");
    let more = format!(
        "/api/runs/0?generation={}&moments={}&acts=0&previews=2",
        reply["generation"], reply["moments"]
    );
    let more = server.json(&more);
    assert_eq!(more["is_whole"], json!(false));
    assert!(
        more["problem"]
            .as_str()
            .expect("a line")
            .contains("1 lines")
    );

    // Previews by number; what they are called is not trusted.
    assert_eq!(server.get("/api/runs/0/previews/0"), (200, PNG.to_vec()));
    for path in [
        "/api/runs/0/previews/1",
        "/api/runs/0/previews/2",
        "/api/runs/1/previews/0",
        "/api/runs/1",
        "/api/runs/-1",
        "/api/runs/0?axis=x",
        "/api/runs/0?bins=x",
        "/secret.png",
        "/../secret.png",
        "/%2e%2e/secret.png",
        "/api/runs/0/previews/..%2fsecret.png",
        "/metrics.jsonl",
        "//etc/passwd",
    ] {
        let (status, body) = server.get(path);
        assert!((400..500).contains(&status), "{path}: {status}");
        assert!(!body.starts_with(b"\x89PNG"), "{path}");
    }
}

#[test]
fn the_server_is_for_reading_and_for_this_machine_alone() {
    let root = tempfile::tempdir().expect("a temporary folder");
    write_run(root.path());
    let server = Server::start(&[root.path().to_str().expect("UTF-8")]);
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let (head, _) = server.ask(&format!("{method} /api/runs/0"), "Host: localhost\r\n");
        assert_eq!(status(&head), 405, "{method}");
    }
    let (head, _) = server.ask("GET /api/runs", "Host: evil.example\r\n");
    assert_eq!(status(&head), 403);
}

#[test]
fn from_elsewhere_the_page_asks_for_its_token() {
    let root = tempfile::tempdir().expect("a temporary folder");
    write_run(root.path());
    let server = Server::start(&["--host", "0.0.0.0", root.path().to_str().expect("UTF-8")]);
    let (_, token) = server.url.split_once("?token=").expect("a token");
    let ask = |path: &str, headers: &str| {
        let (head, _) = server.ask(&format!("GET {path}"), &format!("Host: node7\r\n{headers}"));
        head
    };
    for path in [
        "/",
        "/page.js",
        "/api/runs",
        "/api/runs/0",
        "/?token=0123456789abcdef",
    ] {
        assert_eq!(status(&ask(path, "")), 403, "{path}");
    }
    let head = ask(&format!("/?token={token}"), "");
    assert_eq!(status(&head), 303);
    let cookie = head.split("set-cookie: ").nth(1).expect("a cookie");
    let cookie = cookie.split(';').next().expect("a pair");
    assert_eq!(
        status(&ask("/api/runs/0", &format!("Cookie: {cookie}\r\n"))),
        200
    );
}

#[test]
fn a_port_in_use_is_named_with_what_to_do() {
    let root = tempfile::tempdir().expect("a temporary folder");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_rectiflow"))
        .args([
            "watch",
            root.path().to_str().expect("UTF-8"),
            "--port",
            &port,
        ])
        .output()
        .expect("runs");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(
        message.contains(&port) && message.contains("--port"),
        "{message}"
    );
}
