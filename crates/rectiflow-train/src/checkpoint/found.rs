//! The door to checkpoints: every reader of one enters here, with what it is going to read. Exactly
//! that is verified, once, against the checkpoint's list of hashes.
//!
//! Averaged weights are a folder of their own inside of a checkpoint, whose list covers them. From
//! format 2 on a list that is missing is damage, as is any file that differs from it. Format 1 had
//! none: it is read with a warning, if nothing in the folder is newer.
//!
//! Not here: where the parts are that a checkpoint only references (`bases`).

use std::path::{Path, PathBuf};

use rectiflow_data::text_file;
use rectiflow_sdxl::model::Component;
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value};

use crate::{
    checkpoint::{
        EMA, RECIPE, STATE, SUMS, Saved,
        sums::{DAMAGED, Sums, damaged},
    },
    error::{Error, Result},
};

/// What a reader reads of a checkpoint, besides its `state.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    /// Everything, to continue the run.
    Everything,
    /// The components that it holds, to draw with them, measure, export, or train from them.
    Model,
    /// One component.
    Part(Component),
    /// The configurations of the components that it holds.
    Configs,
}

impl Reads {
    /// Whether a file is read, by its name in the folder of the model.
    fn includes(self, name: &str, saved: &Saved) -> bool {
        if self == Self::Everything {
            return true;
        }
        let folder = name.split_once('/').map(|(folder, _)| folder);
        let mut components = Component::ALL.into_iter();
        let Some(component) = components.find(|component| Some(component.folder()) == folder)
        else {
            return false;
        };
        // A part that the checkpoint references is read elsewhere.
        let is_own = !saved.frozen.contains_key(component.folder());
        is_own
            && match self {
                Self::Everything | Self::Model => true,
                Self::Part(part) => component == part,
                Self::Configs => name.ends_with("/config.json"),
            }
    }
}

/// The keys of `state.json` in format 1, and those that are newer.
#[derive(Deserialize)]
#[expect(dead_code, reason = "only the names of the fields count")]
struct KeysOfFormat1 {
    format: IgnoredAny,
    position: IgnoredAny,
    order_hash: IgnoredAny,
    objective: IgnoredAny,
    frozen: IgnoredAny,
    data: IgnoredAny,
    program: IgnoredAny,
    layout: IgnoredAny,
    #[serde(flatten)]
    newer: Map<String, Value>,
}

/// A checkpoint or its averaged weights, of which what is read has been verified.
#[derive(Debug, Clone)]
pub struct Found {
    /// The folder of the model.
    pub(crate) path: PathBuf,
    /// Its `state.json`.
    pub(crate) saved: Saved,
    /// The folder of the checkpoint: that of the model, or the one around averaged weights.
    root: PathBuf,
    /// `None` in format 1.
    sums: Option<Sums>,
}

/// Returns the checkpoint at a path, of which what is read has been verified; `None` if there is no
/// checkpoint.
///
/// # Errors
/// [`Error::Checkpoint`] if it is damaged or has a newer format; [`Error::Io`].
pub(crate) fn found(path: &Path, reads: Reads) -> Result<Option<Found>> {
    match Found::verified(path, reads) {
        Err(Error::Checkpoint { path, reason }) if reason.starts_with(DAMAGED) => {
            let advice = "use another checkpoint, or restore a copy of this one";
            Err(Error::Checkpoint {
                path,
                reason: format!("{reason}; {advice}"),
            })
        }
        found => found,
    }
}

/// Verifies all files of a checkpoint.
///
/// # Errors
/// [`Error::Checkpoint`] that names the first missing or different file; [`Error::Io`].
pub fn verify(checkpoint: &Path) -> Result<()> {
    Found::whole(checkpoint).map(drop)
}

impl Found {
    /// Returns the checkpoint at a path with all files verified, without advice in the message.
    ///
    /// # Errors
    /// As [`found`], or [`Error::Checkpoint`] if there is none.
    pub(crate) fn whole(path: &Path) -> Result<Self> {
        let found = Self::verified(path, Reads::Everything)?;
        found.ok_or_else(|| {
            let reason = format!("expected the folder of a checkpoint, found no {STATE}");
            Error::checkpoint(path, reason)
        })
    }

    fn verified(path: &Path, reads: Reads) -> Result<Option<Self>> {
        let Some(place) = Place::of(path) else {
            return Ok(None);
        };
        let Some(sums) = Sums::read(&place.root)? else {
            return Self::unprotected(path, place).map(Some);
        };
        // What the state says decides what else is read.
        let prefix = place.prefix;
        let state = format!("{prefix}{STATE}");
        sums.verify(|name| name == state)?;
        let saved = Saved::read(path)?;
        if saved.format == 1 {
            return Err(not_format_1(path, SUMS));
        }
        sums.verify(|name| {
            let own = name.strip_prefix(prefix);
            own.is_some_and(|own| own != STATE && reads.includes(own, &saved))
        })?;
        Ok(Some(Self {
            path: path.to_owned(),
            saved,
            root: place.root,
            sums: Some(sums),
        }))
    }

    /// Reads a checkpoint without a list of hashes, which only format 1 has.
    fn unprotected(path: &Path, place: Place) -> Result<Self> {
        let saved = Saved::read(path)?;
        if saved.format > 1 {
            let mut reason = format!(
                "it is missing, and a checkpoint of format {} has it",
                saved.format
            );
            if place.is_alone {
                reason += ", in the folder around averaged weights: copy the whole checkpoint";
            }
            return Err(damaged(&place.root.join(SUMS), &reason));
        }
        if let Some(newer) = newer_than_format_1(path)? {
            return Err(not_format_1(path, &newer));
        }
        tracing::warn!(
            "{}: a checkpoint of format 1 has no list of hashes: nothing shows whether its files \
             are as they were written",
            path.display()
        );
        Ok(Self {
            path: path.to_owned(),
            saved,
            root: place.root,
            sums: None,
        })
    }

    /// Reads the state of a checkpoint that another process has verified, or that need not be
    /// verified.
    ///
    /// # Errors
    /// [`Error::Checkpoint`], [`Error::Io`].
    pub fn unverified(path: &Path) -> Result<Self> {
        let root = Place::of(path).map_or_else(|| path.to_owned(), |place| place.root);
        Ok(Self {
            path: path.to_owned(),
            saved: Saved::read(path)?,
            root,
            sums: None,
        })
    }

    /// Returns the checkpoint's `state.json`.
    pub fn saved(&self) -> &Saved {
        &self.saved
    }

    /// Returns the folder of the checkpoint: the one around averaged weights.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Whether these are the averaged weights of a checkpoint.
    pub fn is_average(&self) -> bool {
        self.root != self.path
    }

    /// Returns the text of the recipe that the checkpoint was trained with, verified. Averaged
    /// weights have that of the checkpoint that they are in.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is damaged; [`Error::Io`].
    pub fn recipe(&self) -> Result<String> {
        if let Some(sums) = &self.sums {
            sums.verify(|name| name == RECIPE)?;
        }
        Ok(text_file::read(&self.root.join(RECIPE))?)
    }
}

/// Where the files of a checkpoint are.
struct Place {
    /// The folder with the list of hashes.
    root: PathBuf,
    /// What the names of the model's files begin with in the list.
    prefix: &'static str,
    /// Whether these are averaged weights without the checkpoint around them.
    is_alone: bool,
}

impl Place {
    /// Returns `None` if there is no checkpoint at `path`.
    fn of(path: &Path) -> Option<Self> {
        // `path` may be a link, or relative, such as ".".
        let full = path.canonicalize().ok()?;
        let is_average = full.ends_with(EMA);
        if let Some(around) = full.parent()
            && is_average
            && is_root(around)
        {
            let given = path.parent().filter(|_| path.ends_with(EMA));
            let given = given.filter(|around| !around.as_os_str().is_empty());
            return Some(Self {
                root: given.unwrap_or(around).to_owned(),
                prefix: "ema/",
                is_alone: false,
            });
        }
        is_root(&full).then(|| Self {
            root: path.to_owned(),
            prefix: "",
            is_alone: is_average,
        })
    }
}

/// Whether a folder is that of a checkpoint, if maybe a damaged one.
fn is_root(folder: &Path) -> bool {
    folder.join(STATE).is_file() || folder.join(SUMS).is_file()
}

fn not_format_1(path: &Path, newer: &str) -> Error {
    let reason = format!("it says format 1, which had no {newer}");
    damaged(&path.join(STATE), &reason)
}

/// Returns the name of something in a checkpoint without a list of hashes that format 1 did not
/// have; `None` if there is none.
fn newer_than_format_1(path: &Path) -> Result<Option<String>> {
    let state = path.join(STATE);
    let text = text_file::read(&state)?;
    let keys: KeysOfFormat1 =
        serde_json::from_str(&text).map_err(|error| damaged(&state, &error.to_string()))?;
    if let Some(key) = keys.newer.keys().next() {
        return Ok(Some(format!("`{key}`")));
    }
    Ok(path.join(EMA).exists().then(|| format!("{EMA}/")))
}
