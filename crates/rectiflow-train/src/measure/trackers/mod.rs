//! A run's events in the files of experiment trackers: TensorBoard, trackio, W&B.
//!
//! A tracker is written while a run goes on, or from the events of a past run. Both ways the same
//! calls are made: every event in the order of writing. After a resume the steps since the
//! checkpoint come again, and each tracker sees to it that its program shows the later values. A
//! rewind of the guard needs nothing: step numbers go on.
//!
//! Charts and curves have the names of [`curves`](crate::measure::metrics::curves).

mod about;
mod clock;
mod event_file;
#[cfg(test)]
mod made_up;
mod protobuf;
mod record_log;
mod tensorboard;
mod trackio;
mod wandb;
mod wandb_records;

pub use about::About;

use crate::{
    error::Result,
    measure::{
        metrics::Event,
        trackers::{tensorboard::TensorBoard, trackio::Trackio, wandb::Wandb},
    },
    recipe::report::Destination,
};

/// The files of one program.
#[derive(Debug)]
pub struct Tracker(Kind);

#[derive(Debug)]
enum Kind {
    TensorBoard(TensorBoard),
    Trackio(Trackio),
    Wandb(Wandb),
}

impl Tracker {
    /// A tracker of a run; its files are made at the first start.
    pub fn new(to: Destination, about: About) -> Self {
        Self(match to {
            Destination::TensorBoard => Kind::TensorBoard(TensorBoard::new(about)),
            Destination::Trackio => Kind::Trackio(Trackio::new(about)),
            Destination::Wandb => Kind::Wandb(Wandb::new(about)),
        })
    }

    /// Writes what an event says. Events before the first start are not written.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn write(&mut self, event: &Event) -> Result<()> {
        match &mut self.0 {
            Kind::TensorBoard(board) => board.write(event),
            Kind::Trackio(trackio) => trackio.write(event),
            Kind::Wandb(wandb) => wandb.write(event),
        }
    }

    /// Writes that an error has ended the run, where the format has a place for it.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn fail(&mut self, reason: &str) -> Result<()> {
        match &mut self.0 {
            Kind::TensorBoard(_) => Ok(()),
            Kind::Trackio(trackio) => trackio.fail(reason),
            Kind::Wandb(wandb) => wandb.fail(),
        }
    }
}

/// The folder of a tracker, below the run's.
pub fn folder(to: Destination) -> &'static str {
    match to {
        Destination::TensorBoard => tensorboard::FOLDER,
        Destination::Trackio => trackio::FOLDER,
        Destination::Wandb => wandb::FOLDER,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    const ALL: [Destination; 3] = [
        Destination::TensorBoard,
        Destination::Trackio,
        Destination::Wandb,
    ];

    fn tracker(to: Destination, run_dir: &Path) -> Tracker {
        let about = About {
            run_dir: run_dir.to_owned(),
            recipe: String::new(),
            is_past: true,
        };
        Tracker::new(to, about)
    }

    #[test]
    fn numbers_at_the_edges_of_their_ranges_are_written() {
        let most = u64::MAX;
        let lines = [
            format!(
                r#"{{"event":"start","step":{most},"unix_secs":{most},"order_hash":"7",
                "num_parameters":1,"num_train":1,"num_test":1,"buckets":[],"threads":1}}"#
            ),
            format!(
                r#"{{"event":"step","step":{most},"samples":{most},"epoch":0,"loss":"inf",
                "gradient_norm":"NaN","lr":-1e308,"secs":1e308,"data_secs":5e-324}}"#
            ),
            format!(
                r#"{{"event":"guard","step":{most},"action":"stop","reason":"a","update":{most}}}"#
            ),
            r#"{"event":"preview","step":1,"name":"../../a.png","secs":1e308}"#.to_owned(),
            format!(r#"{{"event":"end","step":{most},"reason":"stopped","secs":-1.0}}"#),
        ];
        for to in ALL {
            let run = tempfile::tempdir().expect("a temporary folder");
            let mut tracker = tracker(to, run.path());
            for line in lines.iter().chain(&lines) {
                let event = serde_json::from_str(line).expect("an event");
                tracker.write(&event).expect("writes");
            }
            tracker.fail("the end").expect("writes");
            assert!(run.path().join(folder(to)).is_dir());
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error_and_no_panic() {
        let start = r#"{"event":"start","step":0,"unix_secs":1,"order_hash":"7",
            "num_parameters":1,"num_train":1,"num_test":1,"buckets":[],"threads":1}"#;
        let start = serde_json::from_str(start).expect("an event");
        for to in ALL {
            let run = tempfile::tempdir().expect("a temporary folder");
            fs::write(run.path().join(folder(to)), "a file").expect("writes");
            let mut tracker = tracker(to, run.path());
            assert!(tracker.write(&start).is_err());
            assert!(tracker.fail("the end").is_ok(), "nothing is open");
        }
    }
}
