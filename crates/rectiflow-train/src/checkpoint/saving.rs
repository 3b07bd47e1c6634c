//! How a checkpoint comes to be while training goes on.
//!
//! ```text
//! begin    all ranks   the folder, under its unfinished name; a copy of what will be written, in host memory
//! write    a thread    the files of this rank, and their hashes
//!          all ranks   in every step: is everybody's thread done?
//! finish   all ranks   the list of hashes, the final name, older checkpoints removed
//! ```
//!
//! The copy is what training pauses for. All ranks finish in the same step, since they see each other's threads in the
//! numbers that they exchange in every step. At the end of a run, and where a recipe has no memory for the copy, the caller
//! waits for the thread, and nothing is copied. A thread is never left behind: whoever drops it waits for it.

use std::{
    fs,
    path::{Path, PathBuf},
    thread::{Builder, JoinHandle},
    time::Instant,
};

use rectiflow_sdxl::{
    durable::{rename_folder, write_bytes},
    tensor_file::write_tensors,
};
use tch::Tensor;

use crate::{
    checkpoint::{
        Checkpoints, EMA, RECIPE, STATE, SUMS, Saved, Trained, UNFINISHED, collect_files, optimizer_name, slices_of,
        snapshots::on_host, sums_of, view,
    },
    error::{Error, Result},
    ranks::comm::Comm,
    state::{TrainState, layout::Slice},
};

/// What goes into a checkpoint.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Save<'a> {
    pub(crate) saved: &'a Saved,
    pub(crate) recipe: &'a str,
    pub(crate) trained: &'a [Trained],
    pub(crate) state: &'a TrainState,
    pub(crate) comm: &'a Comm,
    /// Whether the state may change while it is being written, so that a copy is needed.
    pub(crate) goes_on: bool,
}

/// A checkpoint that is being written.
#[derive(Debug)]
pub(crate) struct Pending {
    /// Steps done when it was begun.
    pub(crate) step: u64,
    pub(crate) began: Instant,
    unfinished: PathBuf,
    /// Gives this rank's lines of the list of hashes. `None` once somebody has waited for it.
    thread: Option<Result<JoinHandle<Result<String>>>>,
}

impl Pending {
    /// Whether this rank's files are all there, or will never be.
    pub(crate) fn is_written(&self) -> bool {
        !matches!(&self.thread, Some(Ok(thread)) if !thread.is_finished())
    }

    fn wait(&mut self) -> Result<String> {
        let panicked = || Error::Checkpoint {
            path: self.unfinished.clone(),
            reason: "the thread that wrote it panicked; its message is above".to_owned(),
        };
        let thread = self.thread.take().expect("a checkpoint is finished once");
        thread?.join().unwrap_or_else(|_| Err(panicked()))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(Ok(thread)) = self.thread.take() {
            // Whoever drops it has an error of its own to report.
            let _ = thread.join();
        }
    }
}

impl Checkpoints {
    /// Begins to write a checkpoint, on all ranks together.
    ///
    /// # Errors
    /// [`Error::Io`], on other ranks [`Error::OtherRank`], where the folder cannot be made; [`Error::Collective`].
    pub(crate) fn begin(&self, save: &Save<'_>) -> Result<Pending> {
        let began = Instant::now();
        let step = save.saved.position.cursor;
        let unfinished = self.place(step).with_extension(UNFINISHED);
        save.comm.first(|| fs::create_dir_all(&unfinished).map_err(Error::io(&unfinished)))?;
        let files = Files::of(save, &unfinished)?;
        let thread = Builder::new().name("rectiflow-checkpoint".to_owned()).spawn(move || files.write());
        let thread = Some(thread.map_err(Error::io(&unfinished)));
        Ok(Pending { step, began, unfinished, thread })
    }

    /// Waits for all ranks' files, gives the checkpoint its name and removes older ones that need not be kept. Gives its
    /// folder.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Model`], on other ranks [`Error::OtherRank`]; earlier checkpoints are untouched then.
    /// [`Error::Collective`].
    pub(crate) fn finish(&self, mut pending: Pending, comm: &Comm) -> Result<PathBuf> {
        let (place, unfinished) = (self.place(pending.step), pending.unfinished.clone());
        let lines = comm.all_could(pending.wait()).and_then(|lines| comm.gather_texts(&lines));
        let finish = |lines: Vec<String>| {
            write_sums(&unfinished, &lines)?;
            if place.exists() {
                // The same step saved again, e.g. by an interrupt right after a resume: the new one is as good.
                fs::remove_dir_all(&place).map_err(Error::io(&place))?;
            }
            rename_folder(&unfinished, &place)?;
            self.prune()
        };
        let finished = lines.and_then(|lines| comm.first(|| finish(lines)));
        if finished.is_err() && comm.is_first() {
            // On a full disk the room is needed; what cannot be removed now is when the run is opened again.
            let _ = fs::remove_dir_all(&unfinished);
        }
        finished.map(|()| place)
    }
}

fn write_sums(folder: &Path, of_ranks: &[String]) -> Result<()> {
    let mut lines: Vec<&str> = of_ranks.iter().flat_map(|lines| lines.lines()).collect();
    lines.sort_by_key(|line| line.split_once("  ").map(|(_, name)| name));
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    Ok(write_bytes(&folder.join(SUMS), text.as_bytes())?)
}

/// What one rank writes of a checkpoint.
#[derive(Debug)]
struct Files {
    folder: PathBuf,
    saved: Saved,
    /// On rank 0.
    model: Option<ModelFiles>,
    /// Mean and mean square, where this rank has a part of its own.
    moments: Option<(String, [Tensor; 2])>,
}

/// The model, which rank 0 writes.
#[derive(Debug)]
struct ModelFiles {
    recipe: String,
    trained: Vec<Trained>,
    slices: Vec<Slice>,
    /// Masters, `[n]` fp32.
    values: Tensor,
    /// Their average.
    average: Option<Tensor>,
}

impl Files {
    /// Takes what will be written from the state, on all ranks together; a copy where training goes on.
    fn of(save: &Save<'_>, folder: &Path) -> Result<Self> {
        let Save { saved, recipe, trained, state, comm, goes_on } = *save;
        let parameters = &state.parameters;
        let take = |tensor: &Tensor| if goes_on { on_host(tensor) } else { tensor.shallow_clone() };
        // What was collected from several ranks is a copy already.
        let is_own = parameters.partition.ranks() == 1;
        let collect = |own: &Tensor| -> Result<Option<Tensor>> {
            let whole = comm.collect(own, &parameters.partition)?;
            Ok(whole.map(|whole| if is_own { take(&whole) } else { whole }))
        };
        let values = collect(&parameters.masters)?;
        let average: Option<Tensor> = state.average.as_ref().map(collect).transpose()?.flatten();
        let model = values.map(|values| ModelFiles {
            recipe: recipe.to_owned(),
            trained: trained.to_vec(),
            slices: parameters.slices.clone(),
            values,
            average,
        });
        let rank = comm.rank().rank;
        let moments = (rank < saved.shards).then(|| {
            let vectors = [&state.optimizer.mean, &state.optimizer.mean_square].map(take);
            (optimizer_name(rank, saved.shards), vectors)
        });
        Ok(Self { folder: folder.to_owned(), saved: saved.clone(), model, moments })
    }

    /// Writes all of it; gives a line for each file: hash, two spaces, name.
    fn write(self) -> Result<String> {
        let Self { folder, saved, model, moments } = self;
        let mut names = Vec::new();
        if let Some(model) = model {
            model.write(&folder, &saved)?;
            collect_files(&folder, "", &mut names)?;
            // Other ranks write theirs into the same folder.
            names.retain(|name| name.contains('/') || [STATE, RECIPE].contains(&name.as_str()));
        }
        if let Some((name, [mean, mean_square])) = &moments {
            let vectors = [("mean", mean), ("mean_square", mean_square)];
            write_tensors(&folder.join(name), vectors, None, &[])?;
            names.push(name.clone());
        }
        sums_of(&folder, &names)
    }
}

impl ModelFiles {
    fn write(&self, folder: &Path, saved: &Saved) -> Result<()> {
        self.write_model(folder, saved, &self.values)?;
        write_bytes(&folder.join(RECIPE), self.recipe.as_bytes())?;
        if let Some(average) = &self.average {
            let model = Saved { layout: Vec::new(), buckets: Vec::new(), ..saved.clone() };
            self.write_model(&folder.join(EMA), &model, average)?;
        }
        Ok(())
    }

    /// Writes what makes a folder a model: `state.json` and the trained components, with the values `[n]`.
    fn write_model(&self, folder: &Path, saved: &Saved, values: &Tensor) -> Result<()> {
        for part in &self.trained {
            let folder = folder.join(part.component.folder());
            fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
            write_bytes(&folder.join("config.json"), &part.config)?;
            let slices = slices_of(&self.slices, part.component);
            let tensors: Vec<(&str, Tensor)> = slices.map(|(name, slice)| (name, view(values, slice))).collect();
            let tensors = tensors.iter().map(|(name, tensor)| (*name, tensor));
            write_tensors(&folder.join(part.component.weights_name()), tensors, None, &[("format", "pt")])?;
        }
        let json = serde_json::to_vec_pretty(saved).expect("the state is plain data that JSON can hold");
        Ok(write_bytes(&folder.join(STATE), &json)?)
    }
}

/// Host memory that the copy takes on the rank that writes the model, in bytes: of `trained` parameters all masters and
/// averages, and a `shards`-th of both moments.
pub(crate) fn copy_bytes(trained: u64, shards: u64, has_average: bool) -> u64 {
    4 * trained * if has_average { 2 } else { 1 } + (8 * trained).div_ceil(shards)
}
