//! The search for the newest intact checkpoint, which sets damaged ones aside.

use std::{fs, path::PathBuf};

use crate::{
    checkpoint::{Checkpoints, found::Found},
    error::{Error, Result},
};

/// Extension of a damaged checkpoint that has been set aside.
const DAMAGED: &str = "damaged";

impl Checkpoints {
    /// Returns the newest checkpoint whose files are intact, or `None` if there is no checkpoint at
    /// all. Newer, damaged ones are set aside with a warning.
    ///
    /// # Errors
    /// If no checkpoint is intact, the damage of the newest one: starting over is the user's
    /// decision.
    pub(crate) fn newest_sound(&self) -> Result<Option<Found>> {
        let mut damaged: Vec<(PathBuf, Error)> = Vec::new();
        for path in self.list()?.into_iter().rev() {
            match Found::whole(&path) {
                Err(error) => damaged.push((path, error)),
                Ok(found) => {
                    for (damaged, error) in damaged {
                        tracing::warn!("{error}; resuming from {} instead", path.display());
                        let aside = damaged.with_extension(DAMAGED);
                        if aside.exists() {
                            fs::remove_dir_all(&aside).map_err(Error::io(&aside))?;
                        }
                        fs::rename(&damaged, &aside).map_err(Error::io(&damaged))?;
                    }
                    return Ok(Some(found));
                }
            }
        }
        match damaged.into_iter().next() {
            None => Ok(None),
            Some((path, error)) => {
                let reason = format!(
                    "{error}; no other checkpoint is intact either: restore a copy, or remove {} \
                     to start over",
                    self.folder.display()
                );
                Err(Error::Checkpoint { path, reason })
            }
        }
    }
}
