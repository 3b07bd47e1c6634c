//! Snapshots of the state that the guard can rewind to, in host memory and on disk.
//!
//! For each distance d (for example 5, 50 and 500 updates), the two newest snapshots that are at
//! least d updates apart are kept, so once the run is old enough one of them is d to 2 d updates
//! old. A snapshot may serve several distances. If memory has no space for a distance, its
//! snapshots are files, one for each rank: `RUN/snapshots/update-00000500-rank-00000.safetensors`.
//! Only the process that wrote them uses them, and they are deleted with it.

use std::{
    fs,
    path::{Path, PathBuf},
    rc::Rc,
};

use rectiflow_sdxl::{
    tensor_file::{TensorFile, write_tensors},
    write::write_to,
};
use tch::{Device, Tensor};

use crate::{
    error::{Error, Result},
    guard::{GuardConfig, Normal},
    ranks::comm::Comm,
    state::{Position, TrainState, moments::MomentsKind, tensor_norms::NormMean},
};

/// Everything that an update changes in this rank's part of the state.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) position: Position,
    pub(crate) normal: Normal,
    norms: Vec<NormMean>,
    kept: Kept,
}

#[derive(Debug)]
enum Kept {
    /// Vectors in the order of [`vectors`].
    Memory(Vec<Tensor>),
    /// Path of a file, which is removed when the snapshot is dropped.
    Disk(PathBuf),
}

/// Returns the vectors of a state that a snapshot holds, with their names.
fn vectors(state: &TrainState) -> Vec<(String, &Tensor)> {
    let optimizer = &state.optimizer;
    let mut all = state.parameters.masters.tensors();
    for (name, vector) in optimizer.tensors() {
        all.push((name.to_owned(), vector));
    }
    if let Some(average) = &state.average {
        all.push(("average".to_owned(), average));
    }
    all
}

impl Snapshot {
    fn in_memory(state: &TrainState, normal: &Normal) -> Self {
        let kept = Kept::Memory(
            vectors(state)
                .into_iter()
                .map(|(_, vector)| on_host(vector))
                .collect(),
        );
        Self {
            position: state.position,
            normal: normal.clone(),
            norms: state.tensor_norms.clone(),
            kept,
        }
    }

    fn on_disk(state: &TrainState, normal: &Normal, path: PathBuf) -> Result<Self> {
        let vectors = vectors(state);
        let named = vectors
            .iter()
            .map(|(name, vector)| (name.as_str(), *vector));
        write_tensors(&path, named, None, &[])?;
        Ok(Self {
            position: state.position,
            normal: normal.clone(),
            norms: state.tensor_norms.clone(),
            kept: Kept::Disk(path),
        })
    }

    /// Restores this rank's part of the state, except the position in the data: steps that were
    /// passed stay passed. The caller must publish the masters afterwards.
    ///
    /// # Errors
    /// [`Error::Model`] if a file can no longer be read.
    pub(crate) fn restore(&self, state: &mut TrainState) -> Result<()> {
        match &self.kept {
            Kept::Memory(kept) => {
                for ((_, vector), kept) in vectors(state).into_iter().zip(kept) {
                    write_to(vector, kept);
                }
            }
            Kept::Disk(path) => {
                let file = TensorFile::open(path)?;
                for (name, vector) in vectors(state) {
                    write_to(vector, &file.tensor(&name)?);
                }
            }
        }
        state.position.update = self.position.update;
        state.position.samples = self.position.samples;
        state.tensor_norms.clone_from(&self.norms);
        Ok(())
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        if let Kept::Disk(path) = &self.kept {
            // A file that cannot be removed now is removed when the run is next opened.
            let _ = fs::remove_file(path);
        }
    }
}

/// Returns a copy in host memory.
pub(crate) fn on_host(tensor: &Tensor) -> Tensor {
    if tensor.device() == Device::Cpu {
        tensor.copy()
    } else {
        tensor.to_device(Device::Cpu)
    }
}

/// Returns the size of a snapshot of `elements` parameters in bytes: masters, both moments and, if
/// there is one, the average.
pub(crate) fn bytes(elements: i64, moments: MomentsKind, has_average: bool) -> u64 {
    let elements = elements as u64;
    let fp32 = 4 * if has_average { 2 } else { 1 } * elements;
    fp32 + moments.bytes(elements)
}

/// The distances, in updates, for which snapshots are kept, by storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Distances<'a> {
    /// In host memory: the shortest ones.
    pub(crate) memory: &'a [u64],
    /// On disk: those that do not fit into memory.
    pub(crate) disk: &'a [u64],
}

impl<'a> Distances<'a> {
    /// Returns the distances of a guard whose snapshots, of `snapshot_bytes` each, fit.
    pub(crate) fn of(guard: &'a GuardConfig, snapshot_bytes: u64) -> Self {
        if !guard.enabled {
            return Self {
                memory: &[],
                disk: &[],
            };
        }
        let fit = |distances: &[u64], gib: f64| {
            let budget_bytes = (gib * f64::from(1 << 30)) as u64;
            let levels = budget_bytes / (SNAPSHOTS_A_LEVEL as u64 * snapshot_bytes).max(1);
            distances
                .len()
                .min(usize::try_from(levels).unwrap_or(usize::MAX))
        };
        let all = &guard.snapshot_updates[..];
        let (memory, rest) = all.split_at(fit(all, guard.snapshot_gib));
        Self {
            memory,
            disk: &rest[..fit(rest, guard.snapshot_disk_gib)],
        }
    }
}

/// Returns the distances of the guard's snapshots that fit into its memory and disk space, and
/// warns if some do not.
pub(crate) fn snapshot_distances(guard: &GuardConfig, snapshot_bytes: u64) -> Distances<'_> {
    let found = Distances::of(guard, snapshot_bytes);
    let room = found.memory.len() + found.disk.len();
    if guard.enabled && room < guard.snapshot_updates.len() {
        tracing::warn!(
            "guard.snapshot_gib = {} and guard.snapshot_disk_gib = {}: of guard.snapshot_updates = {:?} only {:?} \
             fit; two snapshots of {:.1} GiB are kept for each",
            guard.snapshot_gib,
            guard.snapshot_disk_gib,
            guard.snapshot_updates,
            &guard.snapshot_updates[..room],
            snapshot_bytes as f64 / f64::from(1 << 30)
        );
    }
    found
}

/// Returns the host memory of all snapshots of a guard in bytes, with `snapshot_bytes` each.
pub(crate) fn total_bytes(guard: &GuardConfig, snapshot_bytes: u64) -> u64 {
    (SNAPSHOTS_A_LEVEL * Distances::of(guard, snapshot_bytes).memory.len()) as u64 * snapshot_bytes
}

/// Snapshots kept for each distance: the newest and the one before it.
const SNAPSHOTS_A_LEVEL: usize = 2;
/// Folder of the snapshots on disk, below the folder of the run.
const FOLDER: &str = "snapshots";

/// Removes the files that a killed process left.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn clean(run_dir: &Path) -> Result<()> {
    let folder = run_dir.join(FOLDER);
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(Error::io(&folder))
    } else {
        Ok(())
    }
}

/// The snapshots of a run.
#[derive(Debug)]
pub(crate) struct Ring {
    levels: Vec<Level>,
    folder: PathBuf,
}

#[derive(Debug)]
struct Level {
    /// Least number of updates between two snapshots.
    distance: u64,
    on_disk: bool,
    /// Newest first.
    kept: Vec<Rc<Snapshot>>,
}

impl Ring {
    /// Returns an empty ring for these distances of a run.
    pub(crate) fn new(distances: Distances<'_>, run_dir: &Path) -> Self {
        let level = |on_disk| {
            move |&distance: &u64| Level {
                distance,
                on_disk,
                kept: Vec::new(),
            }
        };
        let levels = distances
            .memory
            .iter()
            .map(level(false))
            .chain(distances.disk.iter().map(level(true)));
        Self {
            levels: levels.collect(),
            folder: run_dir.join(FOLDER),
        }
    }

    /// Returns whether there is no space for any snapshot.
    pub(crate) fn is_useless(&self) -> bool {
        self.levels.is_empty()
    }

    /// Takes a snapshot of the state if one is due. Called on all ranks together. If the files of a
    /// distance cannot be written, all distances on disk are given up, with an error message.
    ///
    /// # Errors
    /// [`Error::Collective`].
    pub(crate) fn keep(&mut self, state: &TrainState, normal: &Normal, comm: &Comm) -> Result<()> {
        let update = state.position.update;
        let is_due = |level: &Level| {
            level
                .kept
                .first()
                .is_none_or(|last| update >= last.position.update + level.distance)
        };
        for on_disk in [false, true] {
            let due: Vec<&mut Level> = self
                .levels
                .iter_mut()
                .filter(|level| level.on_disk == on_disk && is_due(level))
                .collect();
            if due.is_empty() {
                continue;
            }
            let taken = if on_disk {
                let path = self.folder.join(format!(
                    "update-{update:08}-rank-{:05}.safetensors",
                    comm.rank().rank
                ));
                let folder = fs::create_dir_all(&self.folder).map_err(Error::io(&self.folder));
                comm.all_could(folder.and_then(|()| Snapshot::on_disk(state, normal, path)))
            } else {
                Ok(Snapshot::in_memory(state, normal))
            };
            match taken {
                Ok(taken) => {
                    let taken = Rc::new(taken);
                    for level in due {
                        level.kept.insert(0, taken.clone());
                        level.kept.truncate(SNAPSHOTS_A_LEVEL);
                    }
                }
                Err(error @ Error::Collective { .. }) => return Err(error),
                Err(error) => {
                    tracing::error!(
                        "snapshots can no longer be written: {error}; the guard can only rewind to those \
                                     in memory"
                    );
                    self.levels.retain(|level| !level.on_disk);
                }
            }
        }
        Ok(())
    }

    /// Returns the newest snapshot that is at least `back` updates older than `update`, or else the
    /// oldest one. Newer ones are dropped.
    pub(crate) fn back(&mut self, update: u64, back: u64) -> Option<Rc<Snapshot>> {
        let all = || self.levels.iter().flat_map(|level| &level.kept);
        let old_enough = all().filter(|snapshot| snapshot.position.update + back <= update);
        let chosen = old_enough.max_by_key(|snapshot| snapshot.position.update);
        let chosen = chosen
            .or_else(|| all().min_by_key(|snapshot| snapshot.position.update))?
            .clone();
        for level in &mut self.levels {
            level
                .kept
                .retain(|snapshot| snapshot.position.update <= chosen.position.update);
        }
        Some(chosen)
    }
}

#[cfg(test)]
mod tests {
    use rectiflow_sdxl::{init::Init, weights::Weights};

    use super::*;
    use crate::state::{
        flat::FlatParameters,
        optim::{Optimizer, OptimizerConfig},
        precision::Precision,
    };

    /// A state of a single parameter, which is the number of updates.
    fn state() -> TrainState {
        let mut weights = Weights::random(0, tch::Kind::Float, Device::Cpu);
        let _ = weights.take("x", &[1], Init::Zeros);
        let parameters = FlatParameters::adopt(
            &[("unet", &weights.finish().expect("random weights fit"))],
            Precision::Fp32,
        );
        TrainState {
            position: Position::default(),
            optimizer: Optimizer::new(OptimizerConfig::default(), &parameters.masters),
            parameters,
            moments_from: Vec::new(),
            average: None,
            tensor_norms: Vec::new(),
            passed_over: Vec::new(),
        }
    }

    const ALL: [u64; 3] = [5, 50, 500];

    fn run_to(update: u64) -> (Ring, TrainState) {
        run_with(
            Distances {
                memory: &ALL,
                disk: &[],
            },
            Path::new("nowhere"),
            update,
        )
    }

    fn run_with(distances: Distances<'_>, run_dir: &Path, update: u64) -> (Ring, TrainState) {
        let (mut ring, mut state, comm) = (Ring::new(distances, run_dir), state(), Comm::alone());
        ring.keep(&state, &Normal::default(), &comm).expect("alone");
        for _ in 0..update {
            state.position.update += 1;
            state.position.cursor += 2;
            let value = Tensor::from_slice(&[state.position.update as f32]);
            state.parameters.masters.write(0, &value);
            ring.keep(&state, &Normal::default(), &comm).expect("alone");
        }
        (ring, state)
    }

    #[test]
    fn a_snapshot_is_at_least_as_old_as_asked_and_at_most_twice() {
        for update in [1000, 1003, 1049, 1234] {
            for back in [5, 50, 500] {
                let (mut ring, mut state) = run_to(update);
                let snapshot = ring.back(update, back).expect("there are snapshots");
                let age = update - snapshot.position.update;
                assert!(
                    (back..2 * back).contains(&age),
                    "{back} updates back from {update}: {age}"
                );
                snapshot.restore(&mut state).expect("it is in memory");
                assert_eq!(state.position.update, update - age);
                assert_eq!(
                    state.position.cursor,
                    2 * update,
                    "the position in the data stays"
                );
                let restored = state.parameters.masters.to_tensor();
                assert_eq!(restored.double_value(&[0]), (update - age) as f64);
            }
        }
    }

    #[test]
    fn what_memory_has_no_room_for_is_on_disk() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let files = || fs::read_dir(folder.path().join(FOLDER)).map_or(0, Iterator::count);
        let distances = Distances {
            memory: &ALL[..1],
            disk: &ALL[1..],
        };
        let (mut ring, mut state) = run_with(distances, folder.path(), 1234);
        assert_eq!(files(), 4, "two of each distance");
        let snapshot = ring.back(1234, 500).expect("there are snapshots");
        let update = snapshot.position.update;
        assert_eq!(update, 500, "the newest that is old enough");
        snapshot.restore(&mut state).expect("it can be read");
        assert_eq!(
            (
                state.position.update,
                state.parameters.masters.to_tensor().double_value(&[0])
            ),
            (500, 500.0)
        );
        assert_eq!(
            files(),
            1,
            "the newer ones are dropped, and two distances share one"
        );
        drop((ring, snapshot));
        assert_eq!(files(), 0, "no file is left behind");
        clean(folder.path()).expect("the folder can be removed");
        assert!(!folder.path().join(FOLDER).exists());
    }

    #[test]
    fn a_full_disk_costs_the_distances_on_disk() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::write(folder.path().join(FOLDER), "").expect("a file in place of the folder");
        let (mut ring, _) = run_with(
            Distances {
                memory: &ALL[..1],
                disk: &ALL[1..],
            },
            folder.path(),
            100,
        );
        assert_eq!(
            ring.back(100, 500)
                .expect("those in memory")
                .position
                .update,
            95
        );
    }

    #[test]
    fn the_shortest_distances_are_in_memory_and_the_furthest_are_given_up_first() {
        let gib = |snapshots: u64| (100 * snapshots) as f64 / f64::from(1 << 30);
        let kept = |memory: u64, disk: u64| {
            let (snapshot_gib, snapshot_disk_gib) = (gib(memory), gib(disk));
            let guard = GuardConfig {
                snapshot_gib,
                snapshot_disk_gib,
                ..GuardConfig::default()
            };
            let Distances { memory, disk } = Distances::of(&guard, 100);
            assert_eq!(total_bytes(&guard, 100), 200 * memory.len() as u64);
            (memory.to_vec(), disk.to_vec())
        };
        assert_eq!(kept(6, 6), (vec![5, 50, 500], vec![]));
        assert_eq!(kept(5, 2), (vec![5, 50], vec![500]));
        assert_eq!(kept(2, 3), (vec![5], vec![50]));
        assert_eq!(kept(1, 4), (vec![], vec![5, 50]));
        assert_eq!(kept(1, 1), (vec![], vec![]));
    }

    #[test]
    fn going_back_again_goes_further() {
        let (mut ring, _) = run_to(1000);
        let first = ring
            .back(1000, 5)
            .expect("there are snapshots")
            .position
            .update;
        let second = ring
            .back(first, 5)
            .expect("there are snapshots")
            .position
            .update;
        assert!(second + 5 <= first, "{first} then {second}");
    }

    #[test]
    fn a_young_run_goes_back_to_its_start() {
        let (mut ring, _) = run_to(3);
        assert_eq!(
            ring.back(3, 500)
                .expect("there are snapshots")
                .position
                .update,
            0
        );
        let mut none = Ring::new(
            Distances {
                memory: &[],
                disk: &[],
            },
            Path::new("nowhere"),
        );
        assert!(none.is_useless() && none.back(3, 5).is_none());
    }
}
