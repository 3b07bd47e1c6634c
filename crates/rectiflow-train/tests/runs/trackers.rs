//! Runs that are recorded for other programs: they train the same, and a resume from an earlier
//! step leaves the new values alone.

use std::fs;

use rectiflow_train::{metrics::Event, run::Options};
use rusqlite::Connection;

use crate::fixture::{Fixture, run, run_until, run_with};

const ALL: &str = "report.to=['tensorboard', 'trackio', 'wandb']";
const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";

#[test]
fn trackers_change_no_weight_and_follow_a_resume() {
    let fixture = Fixture::new();
    run(&fixture.recipe("plain", &[])).unwrap();
    let checked = fixture.recipe("tracked", &[ALL]);
    run_until(&checked, Options::default(), 11);
    // As after a crash: steps 9 to 11 come again.
    fs::remove_dir_all(fixture.checkpoint("tracked", 11)).unwrap();
    let ran = run_with(&checked, Options::default(), |_| {});
    assert!(ran.outcome.unwrap().finished);
    let plain = fs::read(fixture.checkpoint("plain", 16).join(WEIGHTS)).unwrap();
    let tracked = fs::read(fixture.checkpoint("tracked", 16).join(WEIGHTS)).unwrap();
    assert!(plain == tracked);

    // What the steps spent on it is in the last event.
    let Some(Event::End {
        secs,
        reporting_secs: Some(spent),
        ..
    }) = ran.events.last()
    else {
        panic!("{:?}", ran.events.last())
    };
    assert!(0.0 < *spent && spent < secs, "{spent} s of {secs} s");

    // Each step once.
    let folder = fixture.path("tracked");
    let database = Connection::open(folder.join("trackio/tracked.db")).unwrap();
    let select = "SELECT COUNT(*), COUNT(DISTINCT step), COUNT(DISTINCT run_id), MAX(step)
                  FROM metrics WHERE metrics LIKE '%step_secs/step%'";
    let counts: (i64, i64, i64, i64) = database
        .query_row(select, (), |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })
        .unwrap();
    assert_eq!(counts, (16, 16, 1, 16));

    // One folder of W&B, one file of TensorBoard a process.
    assert_eq!(fs::read_dir(folder.join("wandb")).unwrap().count(), 1);
    assert_eq!(fs::read_dir(folder.join("tensorboard")).unwrap().count(), 2);
}
