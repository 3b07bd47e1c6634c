//! The mirror of a run at its start and at its end.
//!
//! A mirror that cannot be used is a warning to a run that has checkpoints in its folder. A run
//! without any does not start: nothing shows whether the mirror has checkpoints of it, and a new
//! course would take their place.

use std::{fs::File, time::Duration};

use rectiflow_data::Bucket;

use crate::{
    checkpoint::{
        Checkpoints,
        mirror::{
            probe::probe,
            restore::{has_checkpoints, take_newer, take_stop},
            sides::{Others, Sides},
            worker::Mirror,
        },
    },
    error::{Error, Result},
    measure::metrics::Event,
    recipe::Checked,
    run::{blackbox, stop_file},
};

/// Folders whose files are copied.
const FOLDERS: [&str; 3] = ["base", "previews", blackbox::FOLDER];

/// What a process still does when its run has ended and other ranks need nothing from it.
#[derive(Debug, Default)]
pub(super) struct Afterwards {
    /// The lock of the run folder, held by rank 0.
    pub(super) lock: Option<File>,
    pub(super) mirror: Option<Mirror>,
    patience: Duration,
}

impl Afterwards {
    pub(super) fn new(checked: &Checked) -> Self {
        let patience = Duration::from_secs(checked.recipe.checkpoint.mirror_wait_secs);
        Self {
            lock: None,
            mirror: None,
            patience,
        }
    }

    /// Starts the mirror's thread. A thread that cannot be started is a warning.
    pub(super) fn start(&mut self, sides: Sides) {
        match Mirror::start(sides) {
            Ok(mirror) => self.mirror = Some(mirror),
            Err(error) => tracing::warn!("no mirror: {error}; the run continues"),
        }
    }

    /// Waits for the mirror, and says what is missing there.
    pub(super) fn leave(self) {
        if let Some(mirror) = self.mirror {
            let url = mirror.url().to_owned();
            let missing = mirror.leave(self.patience);
            Mirror::say_missing(&url, &missing);
        }
        drop(self.lock);
    }
}

/// Returns the two sides of the recipe's mirror, if it has one.
///
/// # Errors
/// [`Error::Data`].
pub(super) fn sides(checked: &Checked, checkpoints: &Checkpoints) -> Result<Option<Sides>> {
    let config = &checked.recipe.checkpoint;
    let Some(url) = &config.mirror else {
        return Ok(None);
    };
    Ok(Some(Sides {
        run_dir: checked.recipe.run.dir.clone(),
        checkpoints: checkpoints.clone(),
        bucket: Bucket::open(url, config.mirror_mbit)?,
        others: Others {
            stopped: stop_file::FILE,
            acknowledged: stop_file::ACKNOWLEDGED,
            events: "metrics",
            folders: &FOLDERS,
        },
    }))
}

/// Probes the mirror and takes the reason of a stop from it. Returns whether it can be used. Called
/// by rank 0, which holds the folder's lock.
///
/// # Errors
/// As [`probe`], if the folder has no checkpoint.
pub(super) fn meet(sides: &Sides) -> Result<bool> {
    let met = probe(&sides.bucket).and_then(|()| take_stop(sides));
    usable(sides, met)
}

/// Takes a checkpoint from the mirror that is newer than those of the folder. Called by rank 0.
///
/// # Errors
/// As [`take_newer`], if the folder has no checkpoint.
pub(super) fn catch_up(sides: &Sides) -> Result<()> {
    let taken = take_newer(sides).map(drop);
    usable(sides, taken).map(drop)
}

/// Turns an error of the mirror into a warning if the folder has a checkpoint.
fn usable(sides: &Sides, done: Result<()>) -> Result<bool> {
    match done {
        Ok(()) => Ok(true),
        Err(error) if has_checkpoints(&sides.checkpoints)? => {
            tracing::warn!("{error}. The run resumes from its own folder");
            Ok(false)
        }
        Err(error) => {
            let reason = format!("it has no checkpoint, and its mirror cannot be used: {error}");
            Err(Error::checkpoint(&sides.run_dir, reason))
        }
    }
}

/// Whether an event comes with a file that the mirror should have soon.
pub(super) fn is_news(event: &Event) -> bool {
    matches!(
        event,
        Event::Checkpoint { .. } | Event::Guard(_) | Event::Preview { .. }
    )
}
