//! The last checkpoint of a run whose folder cannot be written to the end: in another folder of
//! this machine, from where the mirror gets it too.
//!
//! The run ends with an error that names the place, since its own folder lacks the checkpoint.

use std::{
    env, iter,
    path::{Path, PathBuf},
};

use crate::{checkpoint::Checkpoints, error::Error, run::Run};

/// A folder in memory.
const MEMORY: &str = "/dev/shm";

impl Run<'_> {
    /// Writes the last checkpoint to the first spare folder that has room. Returns the error of the
    /// run folder, with the place if there is one.
    pub(super) fn save_in_spare(&mut self, error: Error) -> Error {
        let comm = self.parts.comm;
        if comm.machine().len() != comm.rank().ranks {
            // Ranks of other machines do not see the folder.
            return error;
        }
        let named = comm.first(|| Ok(self.spare_folders()));
        let folders = match named {
            Ok(folders) => folders,
            Err(error) => return error,
        };
        for folder in folders {
            match self.try_to_save_in(&Checkpoints::in_spare(&folder)) {
                Ok(()) => return self.is_in_spare(&error),
                Err(other) if other.concerns_all_ranks() => return other,
                Err(other) => tracing::error!("{other}"),
            }
        }
        error
    }

    /// Returns the folders to try: that of the recipe, or those of the system.
    fn spare_folders(&self) -> Vec<PathBuf> {
        let recipe = self.recipe();
        let given = recipe.checkpoint.spare_dir.clone();
        let run_dir = &recipe.run.dir;
        let full = run_dir.canonicalize().unwrap_or_else(|_| run_dir.clone());
        let hash = blake3::hash(full.to_string_lossy().as_bytes()).to_hex();
        let name = format!("rectiflow-{}", &hash[..16]);
        let roots: Vec<PathBuf> = match given {
            Some(given) => vec![given],
            None => iter::once(env::temp_dir())
                .chain([Path::new(MEMORY).to_owned()])
                .collect(),
        };
        roots.iter().map(|root| root.join(&name)).collect()
    }

    /// Returns the error of a run whose last checkpoint is in a spare folder, after it was offered
    /// to the mirror.
    fn is_in_spare(&self, error: &Error) -> Error {
        let Some(place) = self.saver.last().map(Path::to_owned) else {
            return Error::checkpoint(&self.recipe().run.dir, error.to_string());
        };
        let folder = self.parts.checkpoints.folder();
        let mut reason = format!(
            "the last checkpoint of the run is here and whole, since it could not be written to \
             {}: {error}. To resume from it, make room and move it there: mv {} {}",
            folder.display(),
            place.display(),
            folder.display()
        );
        if let Some(mirror) = self.parts.mirror {
            mirror.add_spare(place.clone());
            reason += &format!(
                ". It is also sent to {}, from where the same command takes it",
                mirror.url()
            );
        }
        Error::checkpoint(&place, reason)
    }
}
