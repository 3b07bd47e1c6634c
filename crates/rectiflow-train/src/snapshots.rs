//! The states that the guard can go back to, in host memory.
//!
//! For each distance d (5, 50 and 500 updates, say) the two newest snapshots at least d updates apart are kept, so that
//! one of them is d to 2 d updates back once the run is that old. A snapshot may serve several distances.

use std::rc::Rc;

use tch::{Device, Tensor, no_grad};

use crate::{
    guard::{GuardConfig, Normal},
    state::{Position, TrainState},
};

/// All that an update changes of what this rank owns.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) position: Position,
    pub(crate) normal: Normal,
    masters: Tensor,
    mean: Tensor,
    mean_square: Tensor,
    average: Option<Tensor>,
}

impl Snapshot {
    fn of(state: &TrainState, normal: &Normal) -> Self {
        Self {
            position: state.position,
            normal: normal.clone(),
            masters: on_host(&state.parameters.masters),
            mean: on_host(&state.optimizer.mean),
            mean_square: on_host(&state.optimizer.mean_square),
            average: state.average.as_ref().map(on_host),
        }
    }

    /// Makes this rank's part of the state what it was, but for the place in the data: what was passed stays passed.
    /// The masters are then to be published.
    pub(crate) fn restore(&self, state: &mut TrainState) {
        no_grad(|| {
            state.parameters.masters.copy_(&self.masters);
            state.optimizer.mean.copy_(&self.mean);
            state.optimizer.mean_square.copy_(&self.mean_square);
            if let (Some(average), Some(kept)) = (&mut state.average, &self.average) {
                average.copy_(kept);
            }
        });
        state.position.update = self.position.update;
    }
}

fn on_host(tensor: &Tensor) -> Tensor {
    if tensor.device() == Device::Cpu { tensor.copy() } else { tensor.to_device(Device::Cpu) }
}

/// What a snapshot of so many elements takes, in bytes: values, both moments, and the average where there is one, in
/// fp32.
pub(crate) fn bytes(elements: i64, has_average: bool) -> u64 {
    4 * if has_average { 4 } else { 3 } * elements as u64
}

/// The distances whose snapshots fit into `budget_bytes`, from the shortest on; a snapshot takes `snapshot_bytes`.
pub(crate) fn affordable(distances: &[u64], snapshot_bytes: u64, budget_bytes: u64) -> &[u64] {
    let levels = budget_bytes / (SNAPSHOTS_A_LEVEL as u64 * snapshot_bytes).max(1);
    &distances[..distances.len().min(usize::try_from(levels).unwrap_or(usize::MAX))]
}

/// What the snapshots of a guard take in all, where one takes `snapshot_bytes`.
pub(crate) fn total_bytes(guard: &GuardConfig, snapshot_bytes: u64) -> u64 {
    if !guard.enabled {
        return 0;
    }
    let budget_bytes = (guard.snapshot_gib * f64::from(1 << 30)) as u64;
    let levels = affordable(&guard.snapshot_updates, snapshot_bytes, budget_bytes).len();
    (SNAPSHOTS_A_LEVEL * levels) as u64 * snapshot_bytes
}

/// The newest of a distance, and the one before it.
const SNAPSHOTS_A_LEVEL: usize = 2;

/// The snapshots of a run.
#[derive(Debug)]
pub(crate) struct Ring {
    /// Distance in updates, and its snapshots, newest first.
    levels: Vec<(u64, Vec<Rc<Snapshot>>)>,
}

impl Ring {
    /// An empty ring for these distances.
    pub(crate) fn new(distances: &[u64]) -> Self {
        Self { levels: distances.iter().map(|&distance| (distance, Vec::new())).collect() }
    }

    /// Snapshots that it holds once the run is old enough, at most.
    pub(crate) fn capacity(&self) -> usize {
        SNAPSHOTS_A_LEVEL * self.levels.len()
    }

    /// Takes a snapshot of a state where one is due.
    pub(crate) fn keep(&mut self, state: &TrainState, normal: &Normal) {
        let update = state.position.update;
        let mut taken: Option<Rc<Snapshot>> = None;
        for (distance, kept) in &mut self.levels {
            if kept.first().is_none_or(|newest| update >= newest.position.update + *distance) {
                let snapshot = taken.get_or_insert_with(|| Rc::new(Snapshot::of(state, normal)));
                kept.insert(0, snapshot.clone());
                kept.truncate(SNAPSHOTS_A_LEVEL);
            }
        }
    }

    /// The newest snapshot that is at least `back` updates older than `update`, or else the oldest there is. Newer ones
    /// are dropped.
    pub(crate) fn back(&mut self, update: u64, back: u64) -> Option<Rc<Snapshot>> {
        let all = || self.levels.iter().flat_map(|(_, kept)| kept);
        let old_enough = all().filter(|snapshot| snapshot.position.update + back <= update);
        let chosen = old_enough.max_by_key(|snapshot| snapshot.position.update);
        let chosen = chosen.or_else(|| all().min_by_key(|snapshot| snapshot.position.update))?.clone();
        for (_, kept) in &mut self.levels {
            kept.retain(|snapshot| snapshot.position.update <= chosen.position.update);
        }
        Some(chosen)
    }
}

#[cfg(test)]
mod tests {
    use rectiflow_sdxl::{init::Init, weights::Weights};

    use super::*;
    use crate::{
        flat::FlatParameters,
        optim::{Optimizer, OptimizerConfig},
        precision::Precision,
    };

    /// A state of one number, which is the number of updates.
    fn state() -> TrainState {
        let mut weights = Weights::random(0, tch::Kind::Float, Device::Cpu);
        let _ = weights.take("x", &[1], Init::Zeros);
        let parameters =
            FlatParameters::adopt(&[("unet", &weights.finish().expect("random weights fit"))], Precision::Fp32);
        TrainState {
            position: Position::default(),
            optimizer: Optimizer::new(OptimizerConfig::default(), &parameters.masters),
            parameters,
            moments_from: Vec::new(),
            average: None,
            passed_over: Vec::new(),
        }
    }

    fn run_to(update: u64) -> (Ring, TrainState) {
        let (mut ring, mut state) = (Ring::new(&[5, 50, 500]), state());
        ring.keep(&state, &Normal::default());
        for _ in 0..update {
            state.position.update += 1;
            state.position.cursor += 2;
            let _ = state.parameters.masters.fill_(state.position.update as f64);
            ring.keep(&state, &Normal::default());
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
                assert!((back..2 * back).contains(&age), "{back} updates back from {update}: {age}");
                snapshot.restore(&mut state);
                assert_eq!(state.position.update, update - age);
                assert_eq!(state.position.cursor, 2 * update, "the data go on");
                assert_eq!(state.parameters.masters.double_value(&[0]), (update - age) as f64);
            }
        }
    }

    #[test]
    fn the_furthest_distances_are_given_up_first() {
        let distances = [5, 50, 500];
        let kept = |budget_bytes| affordable(&distances, 100, budget_bytes).to_vec();
        assert_eq!(kept(600), [5, 50, 500]);
        assert_eq!(kept(599), [5, 50]);
        assert_eq!(kept(200), [5]);
        assert_eq!(kept(199), [0u64; 0]);
    }

    #[test]
    fn going_back_again_goes_further() {
        let (mut ring, _) = run_to(1000);
        let first = ring.back(1000, 5).expect("there are snapshots").position.update;
        let second = ring.back(first, 5).expect("there are snapshots").position.update;
        assert!(second + 5 <= first, "{first} then {second}");
    }

    #[test]
    fn a_young_run_goes_back_to_its_start() {
        let (mut ring, _) = run_to(3);
        assert_eq!(ring.back(3, 500).expect("there are snapshots").position.update, 0);
        assert!(Ring::new(&[]).back(3, 5).is_none());
    }
}
