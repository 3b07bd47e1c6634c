//! What a start takes from a mirror: the reason of a stop, and the newest whole checkpoint if it is
//! newer than those of the folder, with the events and the frozen parts that the folder lacks.
//!
//! A checkpoint is downloaded under its unfinished name, verified like any other, and renamed.

use std::{
    fs,
    io::ErrorKind,
    path::{Component, Path},
    time::Instant,
};

use rectiflow_data::Error as DataError;
use rectiflow_sdxl::durable::rename_folder;

use crate::{
    checkpoint::{
        Checkpoints, SUMS, UNFINISHED,
        found::Found,
        mirror::{
            index::{Index, object_of, sums_of_step},
            sides::{BASE, MOST_TEXT_BYTES, Sides},
        },
        step_of,
        sums::{DAMAGED, Sums, damaged},
    },
    error::{Error, Result},
};

/// Whether the folder has a checkpoint. It may not exist yet.
pub(crate) fn has_checkpoints(checkpoints: &Checkpoints) -> Result<bool> {
    Ok(checkpoints.folder().is_dir() && !checkpoints.list()?.is_empty())
}

/// Copies the reason of a stop to the folder, unless it is there or was acknowledged there.
///
/// # Errors
/// [`Error::Data`], [`Error::Io`].
pub(crate) fn take_stop(sides: &Sides) -> Result<()> {
    let others = &sides.others;
    let place = sides.run_dir.join(others.stopped);
    if place.is_file() {
        return Ok(());
    }
    let Some(reason) = sides.bucket.read(others.stopped, MOST_TEXT_BYTES)? else {
        return Ok(());
    };
    let acknowledged = fs::read(sides.run_dir.join(others.acknowledged));
    if acknowledged.is_ok_and(|acknowledged| acknowledged == reason) {
        return Ok(());
    }
    fs::write(&place, reason).map_err(Error::io(&place))
}

/// Downloads the newest whole checkpoint that is newer than those of the folder, if there is one.
/// A damaged one is passed over with a warning. Returns its step.
///
/// # Errors
/// [`Error::Data`], [`Error::Io`]; the damage of the newest one, if the folder has none and the
/// mirror has only damaged ones.
pub(crate) fn take_newer(sides: &Sides) -> Result<Option<u64>> {
    let index = Index::of(sides.bucket.list()?);
    let here = sides.checkpoints.list()?;
    let newest_here = here.last().and_then(|path| step_of(path));
    let mut damage = None;
    for step in index.whole().into_iter().rev() {
        if newest_here.is_some_and(|here| here >= step) {
            return Ok(None);
        }
        let began = Instant::now();
        match download(sides, step) {
            Ok(()) => {
                take_others(sides, &index)?;
                tracing::info!(
                    "the checkpoint of step {step} is taken from {} ({:.1} s)",
                    sides.bucket.url(),
                    began.elapsed().as_secs_f64()
                );
                return Ok(Some(step));
            }
            Err(error) if is_damage(&error) => {
                tracing::warn!("the mirror's checkpoint of step {step} cannot be used: {error}");
                damage.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    match damage {
        Some(error) if newest_here.is_none() => {
            let advice = "no other checkpoint of the mirror is sound either: restore a copy there, \
                          or name another checkpoint.mirror to start over";
            Err(Error::checkpoint(
                &sides.run_dir,
                format!("{error}; {advice}"),
            ))
        }
        _ => Ok(None),
    }
}

/// Downloads and verifies a checkpoint, then renames it.
fn download(sides: &Sides, step: u64) -> Result<()> {
    let checkpoints = &sides.checkpoints;
    let place = checkpoints.place(step);
    let unfinished = place.with_extension(UNFINISHED);
    let fetched = fetch_files(sides, step, &unfinished);
    let verified = fetched.and_then(|()| verify(&unfinished, step));
    if let Err(error) = verified {
        // What cannot be removed now is removed when the run is next opened.
        let _ = fs::remove_dir_all(&unfinished);
        return Err(error);
    }
    checkpoints.make_way(&place)?;
    Ok(rename_folder(&unfinished, &place)?)
}

fn fetch_files(sides: &Sides, step: u64, folder: &Path) -> Result<()> {
    let bucket = &sides.bucket;
    bucket.fetch(&sums_of_step(step), &folder.join(SUMS))?;
    let Some(sums) = Sums::read(folder)? else {
        return Err(damaged(&folder.join(SUMS), "it is missing"));
    };
    for (name, _) in sums.files() {
        if !is_inside(name) {
            let reason = format!("{name} is no name of a file in a checkpoint");
            return Err(damaged(&folder.join(SUMS), &reason));
        }
        match bucket.fetch(&object_of(step, name), &folder.join(name)) {
            Err(error) if is_missing(&error) => {
                return Err(damaged(&folder.join(name), &error.to_string()));
            }
            fetched => fetched?,
        }
    }
    Ok(())
}

/// Whether a name leads to a file below its folder.
fn is_inside(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    !name.is_empty() && parts.all(|part| matches!(part, Component::Normal(_)))
}

fn verify(folder: &Path, step: u64) -> Result<()> {
    let found = Found::whole(folder)?;
    let cursor = found.saved.position.cursor;
    if cursor == step {
        return Ok(());
    }
    Err(damaged(
        folder,
        &format!("expected step {step}, found {cursor}"),
    ))
}

/// Downloads the events and the frozen parts that the folder lacks. A new event file would take the
/// place of the mirror's longer one.
fn take_others(sides: &Sides, index: &Index) -> Result<()> {
    for name in index.bytes.keys() {
        let is_wanted = sides.others.is_events(name) || name.starts_with(BASE);
        let place = sides.run_dir.join(name);
        if is_wanted && is_inside(name) && !place.exists() {
            sides.bucket.fetch(name, &place)?;
        }
    }
    Ok(())
}

fn is_missing(error: &DataError) -> bool {
    match error {
        DataError::Remote { missing, .. } => *missing,
        DataError::Io { source, .. } => source.kind() == ErrorKind::NotFound,
        _ => false,
    }
}

fn is_damage(error: &Error) -> bool {
    matches!(error, Error::Checkpoint { reason, .. } if reason.starts_with(DAMAGED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_from_a_mirror_stays_inside_of_the_folder() {
        for name in ["state.json", "unet/config.json"] {
            assert!(is_inside(name), "{name}");
        }
        for name in ["", "..", "../x", "/x", "unet/../../x", "."] {
            assert!(!is_inside(name), "{name}");
        }
    }
}
