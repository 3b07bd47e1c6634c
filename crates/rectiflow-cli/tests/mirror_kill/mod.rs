//! A run with a mirror over S3 that is killed in the middle of an upload, and goes on on an empty
//! machine.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    object_server::{Fault, ObjectServer, Request},
    prepare, rectiflow, succeed, tensors_of, text, write_recipe,
};

const PATIENCE: Duration = Duration::from_secs(120);
const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";

/// The command with the environment that a user sets for S3.
fn with_s3(server: &ObjectServer, recipe: &Path) -> Command {
    let sets = [
        "--set",
        "checkpoint.mirror=s3://bucket/run",
        "--set",
        "checkpoint.every_steps=5",
        "--set",
        "checkpoint.mirror_wait_secs=60",
    ];
    let mut command = rectiflow(&[&["train", text(recipe)], &sets[..]].concat());
    let environment = [
        ("AWS_ENDPOINT_URL", server.url().as_str().to_owned()),
        ("AWS_REGION", "auto".to_owned()),
        ("AWS_ACCESS_KEY_ID", "key".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "secret".to_owned()),
    ];
    command.envs(environment);
    command
}

/// Waits until `is_so`.
fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Runs the command until its events have a line with `needle`, then asks it to stop.
fn stop_when(mut command: Command, events: &Path, needle: &str) {
    let mut child = command.stderr(Stdio::null()).spawn().expect("it starts");
    wait_until(needle, || {
        fs::read_to_string(events).is_ok_and(|text| text.contains(needle))
    });
    let pid = child.id().to_string();
    let killed = Command::new("kill").args(["-TERM", &pid]).status();
    assert!(killed.expect("kill starts").success());
    child.wait().expect("the child is reaped");
}

/// Requests for parts of the moments that are refused. The client tries each of four parts four
/// times on its own.
const REFUSED: u32 = 16;

/// What a store is asked to write, in order. It is away for a while: more often than the client
/// tries again on its own.
#[derive(Default)]
struct Written {
    names: Mutex<Vec<String>>,
    refused: AtomicU32,
}

impl Written {
    fn take(&self, request: &Request) -> Option<Fault> {
        if request.method != "PUT" {
            return None;
        }
        let is_of_moments = request.name.ends_with("optimizer.safetensors");
        if is_of_moments && self.refused.fetch_add(1, Ordering::SeqCst) < REFUSED {
            return Some(Fault::Status(500));
        }
        let mut names = self.names.lock().expect("no thread panics with it");
        names.push(request.name.clone());
        None
    }

    /// Checks that the list of hashes of a checkpoint was written once, after all else.
    fn check_order(&self, checkpoint: &str) {
        let names = self.names.lock().expect("no thread panics with it");
        let mut of_it: Vec<&String> = names.iter().collect();
        of_it.retain(|name| name.contains(checkpoint));
        let is_list = |name: &&&String| name.ends_with("BLAKE3SUMS");
        assert_eq!(of_it.iter().filter(is_list).count(), 1, "{of_it:?}");
        assert!(of_it.last().iter().all(is_list), "{of_it:?}");
        assert!(of_it.len() > 5, "{of_it:?}");
    }
}

#[test]
fn a_kill_during_an_upload_leaves_the_last_whole_checkpoint() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    prepare(folder);
    let straight = write_recipe(folder, "straight");
    succeed(&["train", text(&straight)]);

    // The first machine: asked to stop, it leaves a whole checkpoint in the mirror.
    let bucket = folder.join("store/bucket");
    fs::create_dir_all(&bucket).expect("a folder");
    let killed = write_recipe(folder, "killed");
    let server = ObjectServer::start(&folder.join("store"), |_| None);
    let events = folder.join("killed/metrics.jsonl");
    let step_7 = "\"event\":\"step\",\"step\":7,";
    stop_when(with_s3(&server, &killed), &events, step_7);
    let last = folder.join("store/bucket/run/checkpoints/step-00000020");
    assert!(!last.exists(), "stopped too late to prove anything");

    // The second: killed while it sends the next one.
    fs::remove_dir_all(folder.join("killed")).expect("removed");
    let is_hanging = Arc::new(AtomicBool::new(false));
    let hangs = Arc::clone(&is_hanging);
    let server = ObjectServer::start(&folder.join("store"), move |request| {
        let is_of_weights = request.method == "PUT" && request.name.ends_with(WEIGHTS);
        hangs.fetch_or(is_of_weights, Ordering::SeqCst);
        is_of_weights.then_some(Fault::Silence)
    });
    let mut child = with_s3(&server, &killed)
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("the command starts");
    wait_until("no upload hangs", || is_hanging.load(Ordering::SeqCst));
    child.kill().expect("the child is killed");
    child.wait().expect("the child is reaped");

    // The third, on which only the recipe and the data are.
    fs::remove_dir_all(folder.join("killed")).expect("removed");
    let written = Arc::new(Written::default());
    let faults = Arc::clone(&written);
    let server = ObjectServer::start(&folder.join("store"), move |request| faults.take(request));
    let output = with_s3(&server, &killed).output().expect("it starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(
        stderr.contains("could not be brought up to date"),
        "{stderr}"
    );
    assert!(stderr.contains("is up to date again"), "{stderr}");
    written.check_order("step-00000020");
    assert!(stderr.contains("is taken from s3://bucket/run"), "{stderr}");
    let straight = tensors_of(&folder.join("straight"));
    assert!(straight == tensors_of(&folder.join("killed")));
    // Nothing is left of the upload that was killed, and the last one is whole.
    let mut names = Vec::new();
    for entry in fs::read_dir(bucket.join("run/checkpoints")).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.join("state.json").exists() {
            assert!(path.join("BLAKE3SUMS").is_file(), "{}", path.display());
            names.push(path);
        }
    }
    assert!(names.contains(&last), "{names:?}");
}

#[test]
fn a_bucket_without_rights_is_one_line_at_the_start() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    prepare(folder);
    fs::create_dir_all(folder.join("store/bucket")).expect("a folder");
    let recipe = write_recipe(folder, "denied");
    let denies = |request: &Request| (request.method == "PUT").then_some(Fault::Status(403));
    let server = ObjectServer::start(&folder.join("store"), denies);
    let output = with_s3(&server, &recipe).output().expect("it starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    for needle in [
        "s3://bucket/run",
        "denies access",
        "PutObject",
        "checkpoint.mirror",
    ] {
        assert!(stderr.contains(needle), "{needle} is missing in {stderr}");
    }
    assert_eq!(stderr.trim().lines().count(), 1, "{stderr}");
}
