//! Writes a checkpoint while training continues.
//!
//! ```text
//! begin    all ranks   create the folder under its unfinished name; copy the state to host memory
//! write    a thread    write and hash this rank's files
//!          all ranks   in every step: check whether the threads of all ranks are done
//! finish   all ranks   write the list of hashes, rename the folder, remove older checkpoints
//! ```
//!
//! Training pauses only for the copy. All ranks finish in the same step, because the numbers that
//! they exchange in every step include the state of their threads. At the end of a run, and if a
//! recipe has no memory for the copy, the caller waits for the thread and nothing is copied. A
//! thread is never left behind: dropping a [`Pending`] waits for it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    thread::{Builder, JoinHandle},
    time::Instant,
};

use rectiflow_sdxl::{
    durable::{rename_folder, write_bytes},
    tensor_file::{Metadata, Planned, write_streamed, write_tensors},
};
use tch::{Kind, Tensor};

use crate::{
    checkpoint::{
        Checkpoints, EMA, RECIPE, STATE, SUMS, Saved, Trained, UNFINISHED, optimizer_name,
        slices_of,
        snapshots::on_host,
        sums::{collect_files, sums_of},
    },
    error::{Error, Result},
    ranks::comm::Comm,
    state::{TrainState, layout::Slice, masters::Masters, moments::MomentsKind},
};

/// The contents of a checkpoint.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Save<'a> {
    pub(crate) saved: &'a Saved,
    pub(crate) recipe: &'a str,
    pub(crate) trained: &'a [Trained],
    pub(crate) state: &'a TrainState,
    pub(crate) comm: &'a Comm,
    /// Whether training continues meanwhile, so that the state may change and a copy is needed.
    pub(crate) goes_on: bool,
}

/// A checkpoint that is being written.
#[derive(Debug)]
pub(crate) struct Pending {
    /// Number of steps completed when the save began.
    pub(crate) step: u64,
    pub(crate) began: Instant,
    unfinished: PathBuf,
    /// Returns this rank's lines of the list of hashes. `None` once it has been joined.
    thread: Option<Result<JoinHandle<Result<String>>>>,
}

impl Pending {
    /// Returns whether this rank has written all its files, or has failed to.
    pub(crate) fn is_written(&self) -> bool {
        !matches!(&self.thread, Some(Ok(thread)) if !thread.is_finished())
    }

    fn wait(&mut self) -> Result<String> {
        let panicked = || Error::Checkpoint {
            path: self.unfinished.clone(),
            reason: "the thread that wrote the checkpoint panicked; its message is above"
                .to_owned(),
        };
        let thread = self.thread.take().expect("a checkpoint is finished once");
        thread?.join().unwrap_or_else(|_| Err(panicked()))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(Ok(thread)) = self.thread.take() {
            // The caller that drops it has an error of its own to report.
            let _ = thread.join();
        }
    }
}

impl Checkpoints {
    /// Begins to write a checkpoint. Called on all ranks together.
    ///
    /// # Errors
    /// [`Error::Io`], on other ranks [`Error::OtherRank`], if the folder cannot be created;
    /// [`Error::Collective`].
    pub(crate) fn begin(&self, save: &Save<'_>) -> Result<Pending> {
        let began = Instant::now();
        let step = save.saved.position.cursor;
        let unfinished = self.place(step).with_extension(UNFINISHED);
        save.comm
            .first(|| fs::create_dir_all(&unfinished).map_err(Error::io(&unfinished)))?;
        let files = Files::of(save, &unfinished)?;
        let thread = Builder::new()
            .name("rectiflow-checkpoint".to_owned())
            .spawn(move || files.write());
        let thread = Some(thread.map_err(Error::io(&unfinished)));
        Ok(Pending {
            step,
            began,
            unfinished,
            thread,
        })
    }

    /// Waits for the files of all ranks, renames the checkpoint to its final name and removes older
    /// ones that need not be kept. Returns its folder.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Model`], on other ranks [`Error::OtherRank`]; earlier checkpoints
    /// stay untouched. [`Error::Collective`].
    pub(crate) fn finish(&self, mut pending: Pending, comm: &Comm) -> Result<PathBuf> {
        let (place, unfinished) = (self.place(pending.step), pending.unfinished.clone());
        let lines = comm
            .all_could(pending.wait())
            .and_then(|lines| comm.gather_texts(&lines));
        let finish = |lines: Vec<String>| {
            write_sums(&unfinished, &lines)?;
            self.make_way(&place)?;
            rename_folder(&unfinished, &place)?;
            if let Err(error) = self.prune(&place) {
                tracing::warn!("an old checkpoint could not be removed: {error}");
            }
            Ok(())
        };
        let finished = lines.and_then(|lines| comm.first(|| finish(lines)));
        if finished.is_err() && comm.is_first() {
            // On a full disk the space is needed. What cannot be removed now is removed when the
            // run is next opened.
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

/// One rank's part of a checkpoint.
#[derive(Debug)]
struct Files {
    folder: PathBuf,
    saved: Saved,
    /// Present on rank 0 only.
    model: Option<ModelFiles>,
    /// File name and the moments' vectors, if this rank writes a part of them.
    moments: Option<(String, Vec<(&'static str, Tensor)>)>,
}

/// The model, written by rank 0.
#[derive(Debug)]
struct ModelFiles {
    recipe: String,
    trained: Vec<Trained>,
    slices: Vec<Slice>,
    /// Masters, `[n]`.
    values: Masters,
    /// Averaged weights, `[n]`.
    average: Option<Masters>,
}

impl Files {
    /// Collects what this rank writes, as a copy if training continues. Called on all ranks
    /// together.
    fn of(save: &Save<'_>, folder: &Path) -> Result<Self> {
        let Save {
            saved,
            recipe,
            trained,
            state,
            comm,
            goes_on,
        } = *save;
        let parameters = &state.parameters;
        let take = |tensor: &Tensor| {
            if goes_on {
                on_host(tensor)
            } else {
                tensor.shallow_clone()
            }
        };
        // A vector collected from several ranks is a copy already.
        let collect = |own: &Tensor| -> Result<Option<Masters>> {
            let whole = comm.collect(own, &parameters.partition)?;
            Ok(whole.map(Masters::whole))
        };
        let (values, average) = if parameters.partition.ranks() > 1 {
            let average = state.average.as_ref().map(collect).transpose()?;
            (collect(&parameters.masters.to_tensor())?, average.flatten())
        } else if comm.is_first() {
            let average = state.average.as_ref().map(take).map(Masters::whole);
            (Some(parameters.masters.on_host(take)), average)
        } else {
            (None, None)
        };
        let model = values.map(|values| ModelFiles {
            recipe: recipe.to_owned(),
            trained: trained.to_vec(),
            slices: parameters.slices.clone(),
            values,
            average,
        });
        let rank = comm.rank().rank;
        let moments = (rank < saved.shards).then(|| {
            let vectors = state.optimizer.tensors().into_iter();
            let vectors = vectors.map(|(name, vector)| (name, take(vector)));
            (optimizer_name(rank, saved.shards), vectors.collect())
        });
        Ok(Self {
            folder: folder.to_owned(),
            saved: saved.clone(),
            model,
            moments,
        })
    }

    /// Writes all files. Returns one line for each of them: hash, two spaces, name.
    fn write(self) -> Result<String> {
        let Self {
            folder,
            saved,
            model,
            moments,
        } = self;
        let mut names = Vec::new();
        if let Some(model) = model {
            model.write(&folder, &saved)?;
            collect_files(&folder, &mut names)?;
            // Other ranks write their files into the same folder.
            names.retain(|name| name.contains('/') || [STATE, RECIPE].contains(&name.as_str()));
        }
        if let Some((name, vectors)) = &moments {
            let vectors = vectors.iter().map(|(name, vector)| (*name, vector));
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
            let model = Saved {
                layout: Vec::new(),
                buckets: Vec::new(),
                tensor_norms: Vec::new(),
                ..saved.clone()
            };
            self.write_model(&folder.join(EMA), &model, average)?;
        }
        Ok(())
    }

    /// Writes `state.json` and the trained components, with the weights `values` `[n]`. Of these,
    /// one tensor at a time is in memory as fp32.
    fn write_model(&self, folder: &Path, saved: &Saved, values: &Masters) -> Result<()> {
        for part in &self.trained {
            let folder = folder.join(part.component.folder());
            fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
            write_bytes(&folder.join("config.json"), &part.config)?;
            let slices: BTreeMap<&str, &Slice> = slices_of(&self.slices, part.component).collect();
            let planned = slices.iter().map(|(name, slice)| Planned {
                name: (*name).to_owned(),
                kind: Kind::Float,
                shape: slice.shape.clone(),
            });
            let metadata = Metadata {
                entries: &[("format", "pt")],
                hash: None,
            };
            let path = folder.join(part.component.weights_name());
            write_streamed(&path, planned.collect(), metadata, &mut |name| {
                let slice = slices[name];
                Ok(values.read(&slice.range).view(slice.shape.as_slice()))
            })?;
        }
        let json = serde_json::to_vec_pretty(saved)
            .expect("the state is plain data that JSON can represent");
        Ok(write_bytes(&folder.join(STATE), &json)?)
    }
}

/// Returns the host memory of the copy on the rank that writes the model, in bytes: all masters and
/// averages of `trained` parameters, and one part in `shards` of both moments.
pub(crate) fn copy_bytes(
    trained: u64,
    moments: MomentsKind,
    shards: u64,
    has_average: bool,
) -> u64 {
    let fp32 = 4 * trained * if has_average { 2 } else { 1 };
    fp32 + moments.bytes(trained).div_ceil(shards)
}
