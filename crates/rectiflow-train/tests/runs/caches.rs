//! Ranks with one disk cache each, over an object store; one of the caches is damaged.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rectiflow_train::metrics::Event;

use crate::{
    fixture::{Fixture, Ran, run_ranks},
    object_server::{Fault, ObjectServer, Request},
};

/// Flips one bit in every block file of a cache.
fn damage(folder: &Path) -> usize {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        fs::read_dir(folder)
            .map(|all| all.map(|entry| entry.unwrap().path()).collect())
            .unwrap_or_default()
    };
    let blocks = entries(folder)
        .into_iter()
        .flat_map(|dataset| [dataset.join("latents"), dataset.join("text")]);
    let files: Vec<PathBuf> = blocks.flat_map(|part| entries(&part)).collect();
    for path in &files {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    }
    files.len()
}

fn losses(ran: &Ran) -> Vec<f64> {
    let loss = |event: &Event| {
        if let Event::Step(step) = event {
            Some(step.loss)
        } else {
            None
        }
    };
    ran.events.iter().filter_map(loss).collect()
}

#[test]
fn a_damaged_cache_is_fetched_again_and_where_it_cannot_be_all_ranks_are_told() {
    let fixture = Fixture::new();
    let refuses = Arc::new(AtomicBool::new(false));
    let asked = refuses.clone();
    let faults = move |request: &Request| {
        let is_of_blocks =
            request.name.starts_with("latents/") || request.name.starts_with("text/");
        (asked.load(Ordering::SeqCst) && is_of_blocks).then_some(Fault::Status(403))
    };
    let server = ObjectServer::start(&fixture.path("data"), faults);
    let cache = |rank: usize| fixture.path(&format!("cache-{rank}"));
    let run = |name: &str| {
        let recipe = |rank: usize| {
            let (data, cache) = (server.url(), cache(rank));
            let sets = [
                format!("data.path={data}"),
                format!("run.cache_dir={}", cache.display()),
            ];
            let more = [
                "run.cache_gib=1",
                "train.mode=window",
                "ranks.timeout_secs=20",
                "lr.peak=1e-4",
            ];
            fixture.recipe(
                name,
                &[&sets.each_ref().map(String::as_str)[..], &more].concat(),
            )
        };
        let before = server.served().requests;
        let ran = run_ranks(&[recipe(0), recipe(1)], |_, _| {});
        (ran, server.served().requests - before)
    };
    let (clean, fetched) = run("clean");
    let (again, opened) = run("again");
    assert!(
        clean[0]
            .outcome
            .as_ref()
            .is_ok_and(|outcome| outcome.finished),
        "{:?}",
        clean[0].outcome
    );
    assert!(
        opened < fetched,
        "the caches are used: {opened} requests, {fetched} the first time"
    );
    assert!(losses(&again[0]) == losses(&clean[0]) && losses(&clean[0]).len() == 16);

    assert!(damage(&cache(1)) > 0);
    let (healed, repaired) = run("healed");
    assert!(
        healed.iter().all(|ran| ran.outcome.is_ok()),
        "{:?}",
        healed[1].outcome
    );
    assert!(
        losses(&healed[0]) == losses(&clean[0]),
        "no wrong byte is trained on"
    );
    assert!(
        repaired > opened,
        "damaged blocks are fetched again: {repaired} requests, {opened} without damage"
    );

    assert!(damage(&cache(1)) > 0);
    refuses.store(true, Ordering::SeqCst);
    let (failed, _) = run("failed");
    let own = failed[1].outcome.as_ref().unwrap_err().to_string();
    assert!(
        own.contains("403") && !own.contains("rank 1 failed"),
        "{own}"
    );
    let other = failed[0].outcome.as_ref().unwrap_err().to_string();
    assert!(
        other.contains("rank 1 failed ") && other.contains(&own),
        "{other}"
    );
}
