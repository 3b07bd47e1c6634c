//! Where the parts of a checkpoint are that training left as they were: the checkpoint names each
//! by its path and by the hash of its weights, and the base that they belong to may have moved.
//!
//! ```text
//! --base
//! the recorded path
//! base/ of the run            the parts that a branch froze, if the whole run has moved
//! model.base                  of the command's recipe, then of the checkpoint's own
//! ```
//!
//! The first place whose weights have the recorded hash is taken. A place is hashed at most once by
//! a command, and none after the first that fits.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use rectiflow_sdxl::{folder, model::Component};

use crate::{
    checkpoint::{
        Frozen, STATE, Saved,
        found::Found,
        weights_hash::{hash_files, hash_weights},
    },
    error::{Error, Result},
};

/// The places besides the recorded ones where the parts of checkpoints may be, and the hashes of
/// parts that were computed so far.
#[derive(Debug, Default)]
pub struct Bases {
    recipe: Option<PathBuf>,
    given: Option<PathBuf>,
    hashes: Mutex<BTreeMap<(Component, PathBuf), String>>,
}

/// The kinds of places where a part may be, in the order in which they are tried.
#[derive(Debug, Clone, Copy)]
enum Place {
    Given,
    Recorded,
    Run,
    Recipe,
    OwnRecipe,
}

impl Place {
    const ALL: [Self; 5] = [
        Self::Given,
        Self::Recorded,
        Self::Run,
        Self::Recipe,
        Self::OwnRecipe,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Given => "--base",
            Self::Recorded => "the recorded path",
            Self::Run => "base/ of the run",
            Self::Recipe => "model.base",
            Self::OwnRecipe => "model.base of its recipe",
        }
    }
}

/// A part that a checkpoint references.
struct Part<'a> {
    checkpoint: &'a Found,
    component: Component,
    frozen: &'a Frozen,
}

impl Bases {
    /// Returns the bases of a command: that of its recipe, and its argument `--base`.
    pub fn new(recipe: Option<&Path>, given: Option<&Path>) -> Self {
        Self {
            recipe: recipe.map(Path::to_owned),
            given: given.map(Path::to_owned),
            hashes: Mutex::default(),
        }
    }

    /// Finds a part of a checkpoint by the hash of its weights. Returns its folder or its
    /// single-file checkpoint, and the hash; `None` if the checkpoint holds the part itself.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] that says where it was looked for, and what was there.
    pub(crate) fn find(
        &self,
        checkpoint: &Found,
        component: Component,
    ) -> Result<Option<(PathBuf, String)>> {
        let Some(part) = Part::of(checkpoint, component) else {
            return Ok(None);
        };
        let found = self.search(&part, &|place| self.same_weights(&part, place))?;
        Ok(Some(found))
    }

    /// Returns the first place that has the configuration of a part of a checkpoint, whatever its
    /// weights; `None` if the checkpoint holds the part itself.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] that says where it was looked for.
    pub(crate) fn find_config(
        &self,
        checkpoint: &Found,
        component: Component,
    ) -> Result<Option<PathBuf>> {
        let Some(part) = Part::of(checkpoint, component) else {
            return Ok(None);
        };
        let (place, ()) = self.search(&part, &|_| Ok(()))?;
        Ok(Some(place))
    }

    /// Returns the first place that `check` accepts, and what that returns.
    fn search<T>(
        &self,
        part: &Part<'_>,
        check: &dyn Fn(&Path) -> std::result::Result<T, String>,
    ) -> Result<(PathBuf, T)> {
        let mut seen = BTreeSet::new();
        let mut problems = Vec::new();
        for kind in Place::ALL {
            let Some(path) = self.path(kind, part) else {
                continue;
            };
            let place = part_at(part.component, &path);
            let checked = match place {
                Err(problem) => Err(problem),
                Ok(place) if !seen.insert(full(&place)) => continue,
                Ok(place) => check(&place).map(|checked| (place, checked)),
            };
            match checked {
                Ok((place, checked)) => {
                    part.say_if_moved(&place);
                    return Ok((place, checked));
                }
                Err(problem) => problems.push(format!("{}: {problem}", kind.name())),
            }
        }
        Err(part.missing(&problems))
    }

    /// Returns the path of a kind of place, if it is known.
    fn path(&self, kind: Place, part: &Part<'_>) -> Option<PathBuf> {
        match kind {
            Place::Given => self.given.clone(),
            Place::Recorded => Some(part.frozen.path.clone()),
            Place::Run => kept_in_run(part.checkpoint, part.component),
            Place::Recipe => self.recipe.clone(),
            Place::OwnRecipe => own_base(part.checkpoint),
        }
    }

    /// Returns the hash of the weights at a place; an error says why they are not the part's.
    fn same_weights(&self, part: &Part<'_>, place: &Path) -> std::result::Result<String, String> {
        let found = match self.hash(part.component, place) {
            Ok(found) => found,
            Err(error) => return Err(error.to_string()),
        };
        let expected = &part.frozen.blake3;
        if found == *expected || part.is_by_files(place) {
            Ok(found)
        } else {
            Err(format!("{} has BLAKE3 {found}", place.display()))
        }
    }

    /// Returns the hash of a part at a place.
    fn hash(&self, component: Component, place: &Path) -> Result<String> {
        let key = (component, place.to_owned());
        let known = |hashes: &BTreeMap<_, String>| hashes.get(&key).cloned();
        let hashes = || self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(hash) = known(&hashes()) {
            return Ok(hash);
        }
        let hash = hash_weights(component, place)?;
        hashes().insert(key, hash.clone());
        Ok(hash)
    }
}

impl<'a> Part<'a> {
    /// Returns `None` if the checkpoint holds the part itself.
    fn of(checkpoint: &'a Found, component: Component) -> Option<Self> {
        let frozen = checkpoint.saved.frozen.get(component.folder())?;
        Some(Self {
            checkpoint,
            component,
            frozen,
        })
    }

    /// Whether the part is named by the files at a place, as older checkpoints did.
    fn is_by_files(&self, place: &Path) -> bool {
        self.checkpoint.saved.format <= 2
            && hash_files(place).is_ok_and(|hash| hash == self.frozen.blake3)
    }

    fn say_if_moved(&self, place: &Path) {
        if full(place) != full(&self.frozen.path) {
            tracing::info!(
                "{}: its {} is taken from {} instead of {}",
                self.checkpoint.path.display(),
                self.component.folder(),
                place.display(),
                self.frozen.path.display()
            );
        }
    }

    fn missing(&self, problems: &[String]) -> Error {
        let reason = format!(
            "its {} with BLAKE3 {} is at none of the places where it may be ({}); put it back, or \
             say where its base is: --base, or model.base of a recipe",
            self.component.folder(),
            self.frozen.blake3,
            problems.join("; ")
        );
        Error::checkpoint(&self.checkpoint.path, reason)
    }
}

/// Returns the full path of a place, by which places are compared.
fn full(place: &Path) -> PathBuf {
    place.canonicalize().unwrap_or_else(|_| place.to_owned())
}

/// Returns the place of a part that a branch froze, if the checkpoint is in the folder of its run.
fn kept_in_run(checkpoint: &Found, component: Component) -> Option<PathBuf> {
    let root = checkpoint.root().canonicalize().ok()?;
    let kept = root.parent()?.parent()?.join("base");
    Some(kept.join(component.folder())).filter(|kept| kept.is_dir())
}

/// Returns `model.base` of the recipe that a checkpoint was trained with, if it can be read.
fn own_base(checkpoint: &Found) -> Option<PathBuf> {
    let text = match checkpoint.recipe() {
        Ok(text) => text,
        Err(error) => {
            tracing::warn!("{error}; no base is taken from it");
            return None;
        }
    };
    let recipe: toml::Table = text.parse().ok()?;
    let base = recipe.get("model")?.get("base")?.as_str()?;
    Some(PathBuf::from(base))
}

/// Returns the folder or file of a part in a model at `path`; an error says what is there.
fn part_at(component: Component, path: &Path) -> std::result::Result<PathBuf, String> {
    if path.is_file() {
        return Ok(path.to_owned());
    }
    let shown = path.display();
    if !path.exists() {
        return Err(format!("nothing at {shown}"));
    }
    if let Ok(found) = folder::find(component, path) {
        return Ok(found);
    }
    // A checkpoint references parts too; what is there is hashed like all others.
    if path.join(STATE).is_file()
        && let Ok(other) = Saved::read(path)
        && let Some(part) = other.frozen.get(component.folder())
        && part.path.exists()
    {
        return Ok(part.path.clone());
    }
    let config = Path::new(component.folder()).join("config.json");
    Err(format!("no {} in {shown}", config.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rectiflow_sdxl::tensor_file::write_tensors;
    use tch::Tensor;

    use super::*;

    /// Writes a VAE's folder with one weight.
    fn write_part(folder: &Path, value: f32) {
        fs::create_dir_all(folder).expect("a folder");
        fs::write(folder.join("config.json"), "{}").expect("written");
        let weights = folder.join(Component::Vae.weights_name());
        let tensor = Tensor::from_slice(&[value]);
        write_tensors(&weights, [("a", &tensor)], None, &[]).expect("written");
    }

    /// Writes a checkpoint that references a VAE.
    fn write_checkpoint(folder: &Path, format: u32, part: &Path, hash: &str) -> Found {
        fs::create_dir_all(folder).expect("a folder");
        let state = serde_json::json!({
            "format": format, "position": {"cursor": 1, "update": 1, "samples": 1},
            "order_hash": "", "data": [], "program": "", "layout": [],
            "objective": rectiflow_sdxl::flow::ObjectiveSettings::default(),
            "frozen": {"vae": {"path": part, "blake3": hash}},
        });
        fs::write(folder.join(STATE), state.to_string()).expect("written");
        Found::unverified(folder).expect("it can be read")
    }

    #[test]
    fn older_formats_name_weights_by_their_files_too() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let part = folder.path().join("vae");
        write_part(&part, 1.5);
        let by_files = hash_files(&part).expect("hashed");
        let by_tensors = hash_weights(Component::Vae, &part).expect("hashed");
        assert_ne!(by_files, by_tensors);
        for (format, hash, is_found) in [
            (1, &by_files, true),
            (1, &by_tensors, true),
            (2, &by_files, true),
            (3, &by_files, false),
            (5, &by_tensors, true),
        ] {
            let checkpoint = folder.path().join("step");
            let checkpoint = write_checkpoint(&checkpoint, format, &part, hash);
            let found = Bases::default().find(&checkpoint, Component::Vae);
            assert_eq!(found.is_ok(), is_found, "format {format}: {found:?}");
            if let Ok(found) = found {
                // The hash by which data sets name it, whatever the checkpoint has.
                assert_eq!(found, Some((part.clone(), by_tensors.clone())));
            }
        }
    }

    #[test]
    fn a_place_is_hashed_once_by_a_command() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let part = folder.path().join("vae");
        write_part(&part, 1.5);
        let hash = hash_weights(Component::Vae, &part).expect("hashed");
        let checkpoint = write_checkpoint(&folder.path().join("step"), 5, &part, &hash);
        let bases = Bases::new(None, Some(&part));
        let find = || bases.find(&checkpoint, Component::Vae).is_ok();
        assert!(find());
        // A second reading would find other numbers.
        write_part(&part, 2.5);
        assert!(find());
        assert!(Bases::default().find(&checkpoint, Component::Vae).is_err());
    }

    #[test]
    fn places_are_tried_in_their_order_and_named_in_the_message() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = |name: &str| folder.path().join(name);
        write_part(&path("right/vae"), 1.0);
        write_part(&path("wrong/vae"), 2.0);
        let hash = hash_weights(Component::Vae, &path("right/vae")).expect("hashed");
        let (right, wrong) = (path("right"), path("wrong"));
        let found = |recorded: &str, recipe: &Path, given: Option<&Path>| {
            let part = path(recorded);
            let checkpoint = write_checkpoint(&path("run/checkpoints/step"), 5, &part, &hash);
            let found = Bases::new(Some(recipe), given).find(&checkpoint, Component::Vae);
            found.map_err(|error| error.to_string())
        };
        let is_right = |found: &std::result::Result<Option<(PathBuf, String)>, String>| matches!(found, Ok(Some((place, _))) if *place == path("right/vae"));
        for (recorded, recipe, given) in [
            ("right/vae", &wrong, Some(&wrong)),
            ("wrong/vae", &right, Some(&wrong)),
            ("wrong/vae", &wrong, Some(&right)),
            ("gone/vae", &right, None),
        ] {
            let found = found(recorded, recipe, given.map(PathBuf::as_path));
            assert!(is_right(&found), "{recorded}: {found:?}");
        }
        let message = found("gone/vae", &wrong, Some(&wrong)).expect_err("it is nowhere");
        let places = [
            "--base: ",
            "has BLAKE3",
            "the recorded path: nothing at",
            "put it back",
        ];
        for words in places.into_iter().chain([hash.as_str()]) {
            assert!(message.contains(words), "{words}: {message}");
        }
        assert_eq!(
            message.matches("has BLAKE3").count(),
            1,
            "a place is named once"
        );
        // A part that the run kept, though the run has moved.
        write_part(&path("run/base/vae"), 1.0);
        let found = found("gone/vae", &wrong, None).expect("it is in the run");
        assert!(found.is_some_and(|(place, _)| place.ends_with("run/base/vae")));
    }
}
