//! Restores state from a checkpoint, of the same run or of another one.
//!
//! Moments and averages are matched by name and shape, so neither the number of ranks nor the set
//! of trained tensors has to be that of the run that wrote them. Each rank reads what it owns.

use std::{collections::BTreeMap, ops::Range, path::Path, sync::Arc};

use rectiflow_data::order::RankOf;
use rectiflow_sdxl::{model::Component, tensor_file::TensorFile, write::write_to};
use tch::{Kind, Tensor};

use crate::{
    checkpoint::{EMA, Saved, optimizer_name, slices_of},
    error::{Error, Result},
    state::{
        TrainState,
        eight_bit::{blocks::Blocks, pass::EightBit},
        flat::{FlatParameters, copy_piece},
        layout::{Slice, intersect, narrow},
        moments::{EIGHT_BIT_NAMES, FP32_NAMES, Moments, MomentsKind},
        partition::{Partition, Piece},
        tensor_norms::NormMean,
    },
};

/// Restores the state of a run from its own checkpoint. The parameters must already be the
/// checkpoint's.
///
/// # Errors
/// [`Error::Checkpoint`] that names the first difference if the run trains other tensors;
/// [`Error::Model`].
pub(crate) fn restore(checkpoint: &Path, saved: &Saved, state: &mut TrainState) -> Result<()> {
    check_same_tensors(checkpoint, saved, state)?;
    inherit(checkpoint, saved, state)?;
    let passed_over = saved.passed_over.iter();
    state.passed_over = passed_over.map(|&(first, end)| first..end).collect();
    Ok(())
}

/// Checks that a checkpoint has exactly the tensors that the run trains.
fn check_same_tensors(checkpoint: &Path, saved: &Saved, state: &TrainState) -> Result<()> {
    // The order of the tensors may differ, because moments are matched by name.
    let mut layout = Saved::layout(&state.parameters.slices);
    layout.sort();
    let mut found = saved.layout.clone();
    found.sort();
    if found == layout {
        return Ok(());
    }
    let reason = match layout.iter().zip(&found).find(|(a, b)| a != b) {
        Some((expected, found)) => format!("expected {expected:?}, found {found:?}"),
        None => format!("expected {} tensors, found {}", layout.len(), found.len()),
    };
    Err(Error::Checkpoint {
        path: checkpoint.to_owned(),
        reason: format!("{reason}: it has another model or frozen set"),
    })
}

/// Inherits from a checkpoint whatever fits a state that may train other tensors: moments and
/// averages by name and shape, updates and samples. The parameters must already be the
/// checkpoint's. Moments that the checkpoint lacks start at zero.
///
/// # Errors
/// [`Error::Checkpoint`] if the optimiser's vectors do not have the length that the layout implies;
/// [`Error::Model`].
pub(crate) fn inherit(checkpoint: &Path, saved: &Saved, state: &mut TrainState) -> Result<()> {
    state.position = saved.position;
    for (from, group) in state.moments_from.iter_mut().zip(&state.parameters.groups) {
        let prefix = format!("{}.", group.component);
        let mut names = saved.layout.iter().map(|(name, _)| name);
        *from = if names.any(|name| name.starts_with(&prefix)) {
            let known = saved.moments_from.get(&group.component);
            known.copied().unwrap_or(0)
        } else {
            saved.position.update
        };
    }
    inherit_moments(checkpoint, saved, state)?;
    inherit_norms(saved, state);
    if let Some(average) = &state.average {
        inherit_average(&checkpoint.join(EMA), state, average)?;
    }
    Ok(())
}

/// Restores the whole state of a running run from one of its own checkpoints: the parameters too.
/// The cursor becomes that of the checkpoint, the steps that were passed over stay so.
///
/// # Errors
/// As [`restore`].
pub(crate) fn reload(checkpoint: &Path, saved: &Saved, state: &mut TrainState) -> Result<()> {
    check_same_tensors(checkpoint, saved, state)?;
    for component in Component::ALL {
        let path = checkpoint
            .join(component.folder())
            .join(component.weights_name());
        let mut slices = slices_of(&state.parameters.slices, component).peekable();
        if slices.peek().is_none() {
            continue;
        }
        let file = TensorFile::open(&path)?;
        for (name, slice) in slices {
            let found = file.tensor(name)?.flatten(0, -1);
            state.parameters.write(slice, &found);
        }
    }
    inherit(checkpoint, saved, state)
}

/// Takes over the usual norms of the tensors that the checkpoint has.
fn inherit_norms(saved: &Saved, state: &mut TrainState) {
    let known = saved.layout.iter().zip(&saved.tensor_norms);
    let known: BTreeMap<&str, NormMean> = known
        .map(|((name, _), norm)| (name.as_str(), *norm))
        .collect();
    for (norm, slice) in state.tensor_norms.iter_mut().zip(&state.parameters.slices) {
        *norm = known.get(slice.name.as_str()).copied().unwrap_or_default();
    }
}

/// Copies this rank's moments from the checkpoint's files, which any number of ranks may have
/// written.
fn inherit_moments(checkpoint: &Path, saved: &Saved, state: &TrainState) -> Result<()> {
    if saved.layout.is_empty() {
        return Ok(());
    }
    let written = Written::of(saved);
    for rank in 0..saved.shards {
        let path = checkpoint.join(optimizer_name(rank, saved.shards));
        let file = Arc::new(TensorFile::open(&path)?);
        let shard = RankOf {
            rank,
            ranks: saved.shards,
        };
        let owned = written.partition.owned(shard);
        let overlaps = written.overlaps(shard, &state.parameters);
        match (saved.moments, &state.optimizer.moments) {
            (MomentsKind::Fp32, Moments::Fp32 { mean, mean_square }) => {
                for (name, vector) in FP32_NAMES.iter().zip([mean, mean_square]) {
                    let found = vector_of(&file, &path, name, Kind::Float, owned)?;
                    for Overlap { from, to } in &overlaps {
                        write_to(&narrow(vector, to), &narrow(&found, from));
                        file.release_pages(name);
                    }
                }
            }
            (MomentsKind::EightBit, moments) => {
                let blocks = Blocks::of(&written.slices, &written.partition, shard);
                let found = eight_bit_of(&file, &path, owned, blocks)?;
                let release = || {
                    let names = EIGHT_BIT_NAMES.iter().flatten();
                    names.for_each(|name| file.release_pages(name));
                };
                copy_eight_bit(&found, moments, &overlaps, &release)
                    .map_err(|reason| Error::checkpoint(checkpoint, reason))?;
            }
            (MomentsKind::Fp32, Moments::EightBit(_)) => {
                return Err(Error::checkpoint(checkpoint, fp32_found(checkpoint)));
            }
        }
    }
    Ok(())
}

/// Returns why moments in fp32 are not taken into 8 bits.
fn fp32_found(checkpoint: &Path) -> String {
    format!(
        "its moments are in fp32, and optimizer.state = \"8bit\" would round them; set \
         optimizer.state = \"fp32\", or start from its weights alone, with moments of zero: \
         model.base = \"{}\" without --branch-from",
        checkpoint.display()
    )
}

/// Returns a vector of a file, in place: a copy would take as much memory as the run's own.
fn vector_of(
    file: &Arc<TensorFile>,
    path: &Path,
    name: &str,
    kind: Kind,
    length: i64,
) -> Result<Tensor> {
    let Some(shape) = file.shape(name) else {
        // The error that names what the file has.
        return Ok(file.mapped(name)?);
    };
    if *shape == [length] && file.kind(name) == Some(kind) {
        return Ok(file.mapped(name)?);
    }
    let reason = format!(
        "{name}: expected shape [{length}], found {shape:?}; expected {kind:?}, found {}",
        file.dtype_name(name)
    );
    let path = path.to_owned();
    Err(Error::Checkpoint { path, reason })
}

/// Returns the moments in 8 bits that a file has for these blocks.
fn eight_bit_of(
    file: &Arc<TensorFile>,
    path: &Path,
    owned: i64,
    blocks: Blocks,
) -> Result<EightBit> {
    let [of_mean, of_root] = EIGHT_BIT_NAMES;
    let num_blocks = blocks.len();
    let vectors = |[codes, scales]: [&str; 2]| -> Result<[Tensor; 2]> {
        Ok([
            vector_of(file, path, codes, Kind::Uint8, owned)?,
            vector_of(file, path, scales, Kind::Float, num_blocks)?,
        ])
    };
    Ok(EightBit::new(blocks, vectors(of_mean)?, vectors(of_root)?))
}

/// Copies moments that were stored in 8 bits, and calls `release` after each tensor.
///
/// # Errors
/// Why they cannot be copied without rounding.
fn copy_eight_bit(
    found: &EightBit,
    moments: &Moments,
    overlaps: &[Overlap],
    release: &impl Fn(),
) -> std::result::Result<(), String> {
    for Overlap { from, to } in overlaps {
        match moments {
            Moments::Fp32 { mean, mean_square } => {
                let numbers = found.read(from);
                write_to(&narrow(mean, to), &numbers.mean);
                write_to(&narrow(mean_square, to), &numbers.mean_square);
            }
            Moments::EightBit(own) => own.copy_blocks(to, found, from)?,
        }
        release();
    }
    Ok(())
}

/// The order and the partition of the optimiser's vectors in a checkpoint.
struct Written<'a> {
    /// Shape and first element of each tensor, by name.
    places: BTreeMap<&'a str, (&'a [i64], i64)>,
    /// The tensors, in order.
    slices: Vec<Slice>,
    partition: Partition,
}

/// Elements of one tensor that a shard has and this rank owns.
struct Overlap {
    /// Their places in the shard's vectors.
    from: Range<i64>,
    /// Their places among those that the rank owns.
    to: Range<i64>,
}

impl<'a> Written<'a> {
    fn of(saved: &'a Saved) -> Self {
        let mut places: BTreeMap<&str, (&[i64], i64)> = BTreeMap::new();
        let mut slices = Vec::new();
        let mut end = 0;
        for (name, shape) in &saved.layout {
            places.insert(name, (shape.as_slice(), end));
            let start = end;
            end += shape.iter().product::<i64>();
            slices.push(Slice {
                name: name.clone(),
                shape: shape.clone(),
                range: start..end,
                kind: Kind::Float,
            });
        }
        let partition = if saved.buckets.is_empty() {
            Partition::new(end, saved.shards)
        } else {
            let lengths = saved.buckets.iter().copied();
            Partition::in_multiples(lengths, saved.shards, saved.moments.multiple())
        };
        Self {
            places,
            slices,
            partition,
        }
    }

    /// Returns what this rank owns of `parameters` and a `shard` has.
    fn overlaps(&self, shard: RankOf, parameters: &FlatParameters) -> Vec<Overlap> {
        let mut found = Vec::new();
        let held: Vec<Piece> = self.partition.pieces(shard).collect();
        let owned: Vec<Piece> = parameters.partition.pieces(parameters.share).collect();
        for slice in &parameters.slices {
            let Some(&(shape, start)) = self.places.get(slice.name.as_str()) else {
                continue;
            };
            if shape != slice.shape {
                continue;
            }
            // Places in the checkpoint's vector, less this, are places in this run's.
            let moved = start - slice.range.start;
            let whole = start..start + slice.range.end - slice.range.start;
            for held in meeting(&held, &whole) {
                let common = intersect(&whole, &held.range);
                let here = common.start - moved..common.end - moved;
                for own in meeting(&owned, &here) {
                    let both = intersect(&here, &own.range);
                    let from = held.own.start - held.range.start + moved;
                    let to = own.own.start - own.range.start;
                    found.push(Overlap {
                        from: both.start + from..both.end + from,
                        to: both.start + to..both.end + to,
                    });
                }
            }
        }
        found
    }
}

/// Returns the pieces, which are in order, that have elements of a range.
fn meeting<'a>(pieces: &'a [Piece], range: &Range<i64>) -> impl Iterator<Item = &'a Piece> {
    let first = pieces.partition_point(|piece| piece.range.end <= range.start);
    let end = range.end;
    let is_met = move |piece: &&Piece| piece.range.start < end;
    let met = pieces[first..].iter().take_while(is_met);
    met.filter(|piece| !piece.range.is_empty())
}

/// Copies into `vector`, which holds what this rank owns, the owned elements among `found`: a part
/// of the slice's tensor, from its element `first` on.
fn copy_owned(
    vector: &Tensor,
    parameters: &FlatParameters,
    slice: &Slice,
    found: &Tensor,
    first: i64,
) {
    for piece in parameters.partition.pieces(parameters.share) {
        copy_piece(vector, &piece, found, slice.range.start + first);
    }
}

fn inherit_average(ema: &Path, state: &TrainState, average: &Tensor) -> Result<()> {
    for component in Component::ALL {
        let path = ema.join(component.folder()).join(component.weights_name());
        if !path.is_file() {
            continue;
        }
        let file = TensorFile::open(&path)?;
        for (name, slice) in slices_of(&state.parameters.slices, component) {
            let is_own = !state.parameters.own_part(&slice.range).is_empty();
            if is_own && file.shape(name).is_some_and(|shape| shape == slice.shape) {
                let found = file.tensor(name)?.flatten(0, -1);
                copy_owned(average, &state.parameters, slice, &found, 0);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use checks::mutation::cases;
    use rectiflow_sdxl::{init::Init, tensor_file::write_tensors, weights::Weights};
    use tch::Device;

    use super::*;
    use crate::{
        checkpoint::{
            STATE, SUMS,
            found::verify,
            sums::{collect_files, sums_of},
        },
        guard::{GuardConfig, GuardState, Observation},
        lr::LrRatios,
        state::{
            Position,
            flat::FlatParameters,
            gradient_vector::GradientVector,
            optim::{Optimizer, OptimizerConfig},
            workers::Workers,
        },
    };

    /// A state with three tensors of 6, 5 and 2 elements, of which this rank owns a part.
    fn state(share: RankOf) -> TrainState {
        let mut weights = Weights::random(0, Kind::Float, Device::Cpu);
        for (name, shape) in [("a", &[2i64, 3][..]), ("b", &[5]), ("c", &[2])] {
            let _ = weights.take(name, shape, Init::Zeros);
        }
        let parameters = FlatParameters::adopt_share(
            &[("unet", &weights.finish().expect("random weights fit"))],
            crate::state::precision::Precision::Fp32,
            share,
        );
        TrainState {
            position: Position::default(),
            optimizer: Optimizer::of(OptimizerConfig::default(), &parameters),
            average: Some(parameters.masters.zeros()),
            moments_from: vec![0],
            tensor_norms: Vec::new(),
            passed_over: Vec::new(),
            parameters,
        }
    }

    fn saved(shards: usize, layout: &[(String, Vec<i64>)], buckets: &[i64]) -> Saved {
        let json = serde_json::json!({
            "format": 4, "position": {"cursor": 12, "update": 11, "samples": 345}, "order_hash": "", "frozen": {},
            "objective": rectiflow_sdxl::flow::ObjectiveSettings::default(), "data": [], "program": "",
            "layout": layout, "shards": shards, "buckets": buckets, "passed_over": [(3, 4)],
        });
        serde_json::from_value(json).expect("a state")
    }

    /// Writes a checkpoint as `shards` ranks would: moments 0, 1, 2... and 100, 101, 102...,
    /// averages 200, 201, 202...
    fn write(folder: &Path, shards: usize, layout: &[(String, Vec<i64>)], buckets: &[i64]) {
        let number = |from: i64| Tensor::arange_start(from, from + 13, (Kind::Float, Device::Cpu));
        let partition = Partition::of_buckets(
            if buckets.is_empty() {
                vec![13]
            } else {
                buckets.to_vec()
            },
            shards,
        );
        for rank in 0..shards {
            let own = |from: i64| {
                let pieces = partition.pieces(RankOf {
                    rank,
                    ranks: shards,
                });
                Tensor::cat(
                    &pieces
                        .map(|piece| narrow(&number(from), &piece.range))
                        .collect::<Vec<_>>(),
                    0,
                )
            };
            let vectors = [("mean", &own(0)), ("mean_square", &own(100))];
            write_tensors(
                &folder.join(optimizer_name(rank, shards)),
                vectors,
                None,
                &[],
            )
            .expect("writes");
        }
        let ema = folder.join(EMA).join(Component::UNet.folder());
        std::fs::create_dir_all(&ema).expect("a folder");
        let mut start = 0;
        let mut tensors = Vec::new();
        for (name, shape) in layout {
            let end = start + shape.iter().product::<i64>();
            let values = narrow(&number(200), &(start..end)).view(shape.as_slice());
            tensors.push((name.trim_start_matches("unet.").to_owned(), values));
            start = end;
        }
        let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_tensors(
            &ema.join(Component::UNet.weights_name()),
            tensors,
            None,
            &[],
        )
        .expect("writes");
    }

    #[test]
    fn every_number_of_ranks_reads_what_every_other_wrote_exactly() {
        let layout = Saved::layout(&state(RankOf::ONLY).parameters.slices);
        // The current buckets, those of another version of the program, and those of format 3.
        for (writers, buckets) in
            (1..=5).flat_map(|ranks| [(ranks, &[6i64, 5, 2][..]), (ranks, &[8, 5]), (ranks, &[])])
        {
            let folder = tempfile::tempdir().expect("a temporary folder");
            write(folder.path(), writers, &layout, buckets);
            for (rank, ranks) in (1..=5).flat_map(|ranks| (0..ranks).map(move |rank| (rank, ranks)))
            {
                let share = RankOf { rank, ranks };
                let mut state = state(share);
                restore(folder.path(), &saved(writers, &layout, buckets), &mut state)
                    .expect("it fits");
                assert_eq!(
                    (state.position.update, state.passed_over[0].clone()),
                    (11, 3..4)
                );
                let average = state.average.expect("an average");
                let moments = state.optimizer.tensors();
                for (vector, from) in [(moments[0].1, 0), (moments[1].1, 100), (&average, 200)] {
                    let found: Vec<f32> = Vec::try_from(vector).expect("a vector");
                    let own = state
                        .parameters
                        .partition
                        .pieces(share)
                        .flat_map(|piece| piece.range);
                    let expected: Vec<f32> = own.map(|at| (from + at) as f32).collect();
                    assert_eq!(
                        found, expected,
                        "{writers} wrote, rank {rank} of {ranks} reads"
                    );
                }
            }
        }
    }

    #[test]
    fn moments_are_found_by_name_in_whatever_order_they_lie() {
        let mut layout = Saved::layout(&state(RankOf::ONLY).parameters.slices);
        layout.reverse();
        let folder = tempfile::tempdir().expect("a temporary folder");
        write(folder.path(), 2, &layout, &[7, 6]);
        let mut state = state(RankOf::ONLY);
        restore(folder.path(), &saved(2, &layout, &[7, 6]), &mut state).expect("it fits");
        // The elements of a, b and c follow each other in another order.
        let expected: Vec<f32> = (7..13)
            .chain(2..7)
            .chain(0..2)
            .map(|at: i32| at as f32)
            .collect();
        assert_eq!(
            Vec::<f32>::try_from(state.optimizer.tensors()[0].1).expect("a vector"),
            expected
        );
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let layout = Saved::layout(&state(RankOf::ONLY).parameters.slices);
        let folder = tempfile::tempdir().expect("a temporary folder");
        write(folder.path(), 2, &layout, &[]);
        let (one, two) = (optimizer_name(0, 2), optimizer_name(1, 2));
        std::fs::copy(folder.path().join(two), folder.path().join(one)).expect("copies");
        let error = restore(
            folder.path(),
            &saved(2, &layout, &[]),
            &mut state(RankOf::ONLY),
        );
        let error = error.expect_err("too short").to_string();
        assert!(
            error.contains("optimizer-00001-of-00002")
                && error.contains("expected shape [7], found [6]"),
            "{error}"
        );
    }

    /// A checkpoint of two ranks, with its sums.
    fn write_whole(folder: &Path) {
        let layout = Saved::layout(&state(RankOf::ONLY).parameters.slices);
        write(folder, 2, &layout, &[8, 5]);
        let mut saved = saved(2, &layout, &[8, 5]);
        saved.moments_from.insert("unet".to_owned(), 3);
        saved.guard = guard_after_some_steps();
        let json = serde_json::to_vec_pretty(&saved).expect("a state");
        std::fs::write(folder.join(STATE), json).expect("writes");
        seal(folder);
    }

    /// A guard that has seen ten steps, one of them skipped.
    fn guard_after_some_steps() -> GuardState {
        let mut guard = GuardState::default();
        for step in 0..10 {
            let loss = if step == 7 { f64::NAN } else { 0.5 };
            guard.judge(&GuardConfig::default(), seen(loss));
        }
        guard
    }

    fn seen(loss: f64) -> Observation {
        Observation {
            loss,
            gradient_norm: 1.5,
        }
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names = Vec::new();
        collect_files(folder, &mut names).expect("a readable folder");
        names.retain(|name| name != SUMS);
        names.sort();
        names
    }

    /// Writes the sums of the files that are there.
    fn seal(folder: &Path) {
        let sums = sums_of(folder, &names(folder)).expect("readable files");
        std::fs::write(folder.join(SUMS), sums).expect("writes");
    }

    #[test]
    fn mutated_checkpoints_are_refused_by_their_sums() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_whole(folder.path());
        let mut files = names(folder.path());
        files.push(SUMS.to_owned());
        verify(folder.path()).expect("it is whole");
        for case in cases() {
            let mut random = case.random();
            let path = folder.path().join(random.of(&files));
            let good = std::fs::read(&path).expect("reads");
            let bad = case.mutation.of(&good, &mut random);
            std::fs::write(&path, &bad).expect("writes");
            let is_whole = case.run("a checkpoint", || verify(folder.path()).is_ok());
            assert_eq!(is_whole, bad == good, "{case:?} of {}", path.display());
            std::fs::write(&path, good).expect("writes");
        }
    }

    #[test]
    fn mutated_checkpoints_with_new_sums_are_restored_or_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_whole(folder.path());
        let files = names(folder.path());
        let mut num_restored = 0;
        for case in cases() {
            let mut random = case.random();
            // Most mutations are of the state, which has most of the numbers.
            let name = if random.below(4) > 0 {
                STATE
            } else {
                random.of(&files)
            };
            let path = folder.path().join(name);
            let good = std::fs::read(&path).expect("reads");
            let bad = if name == STATE {
                case.mutation.of(&good, &mut random)
            } else {
                case.mutation.of_tensors(&good, &mut random)
            };
            std::fs::write(&path, bad).expect("writes");
            num_restored += usize::from(case.run(name, || go_on(folder.path())));
            std::fs::write(&path, good).expect("writes");
        }
        assert!(num_restored > cases().len() / 50, "{num_restored}");
    }

    /// Restores a checkpoint and does what a run does then; returns whether it could.
    fn go_on(folder: &Path) -> bool {
        seal(folder);
        let Ok(saved) = verify(folder).and_then(|()| Saved::read(folder)) else {
            return false;
        };
        for share in [RankOf::ONLY, RankOf { rank: 1, ranks: 3 }] {
            let mut state = state(share);
            if restore(folder, &saved, &mut state).is_err() {
                return false;
            }
            state.position.update += 1;
            state.update_ranges(1e-4, &LrRatios::default());
            let cursor = state.position.cursor;
            state.pass_over(cursor..cursor + 1);
            state.pass_over(cursor + 2..cursor + 3);
        }
        let mut guard = saved.guard;
        for loss in [0.5, f64::NAN, f64::NAN, f64::NAN, 0.5, f64::NAN] {
            guard.judge(&GuardConfig::default(), seen(loss));
        }
        true
    }

    /// A state with moments of a kind after two updates. Gradients depend on the element alone.
    fn trained(kind: MomentsKind, share: RankOf) -> TrainState {
        let mut weights = Weights::random(0, Kind::Float, Device::Cpu);
        for (name, length) in [("a", 300i64), ("b", 5), ("c", 1000), ("d", 70)] {
            let _ = weights.take(name, &[length], Init::Zeros);
        }
        let weights = weights.finish().expect("random weights fit");
        let parameters = FlatParameters::adopt_multiples(
            &[("unet", &weights)],
            crate::state::precision::Precision::Bf16,
            share,
            kind.multiple(),
        );
        let config = OptimizerConfig {
            state: kind,
            ..OptimizerConfig::default()
        };
        let mut state = TrainState {
            position: Position::default(),
            optimizer: Optimizer::of(config, &parameters),
            average: None,
            moments_from: vec![0],
            tensor_norms: Vec::new(),
            passed_over: Vec::new(),
            parameters,
        };
        let whole = (Tensor::arange(1375, (Kind::Float, Device::Cpu)) * 0.71).sin();
        let pieces = state.parameters.partition.pieces(share);
        let own: Vec<Tensor> = pieces.map(|piece| narrow(&whole, &piece.range)).collect();
        for update in 1..=2 {
            state.position.update = update;
            let gradients = GradientVector::new([Tensor::cat(&own, 0) * update as f64]);
            let ranges = state.update_ranges(1e-3, &LrRatios::default());
            let masters = &state.parameters.masters;
            let workers = Workers::new(Device::Cpu, 1);
            let alone = |own: &[f64]| Ok(own.to_vec());
            let updated = (state.optimizer).update(masters, &gradients, &ranges, &workers, &alone);
            updated.expect("nothing is exchanged");
        }
        state
    }

    /// Writes the moments of all ranks, and returns their state.
    fn write_trained(folder: &Path, kind: MomentsKind, shards: usize) -> Saved {
        let of = |rank| {
            trained(
                kind,
                RankOf {
                    rank,
                    ranks: shards,
                },
            )
        };
        for rank in 0..shards {
            let state = of(rank);
            let path = folder.join(optimizer_name(rank, shards));
            write_tensors(&path, state.optimizer.tensors(), None, &[]).expect("writes");
        }
        let parameters = of(0).parameters;
        let layout = Saved::layout(&parameters.slices);
        let mut saved = saved(
            shards,
            &layout,
            &Saved::bucket_lengths(&parameters.partition),
        );
        saved.moments = kind;
        saved
    }

    /// Returns a state like [`trained`] whose moments are zero.
    fn fresh(kind: MomentsKind, share: RankOf) -> TrainState {
        let mut state = trained(kind, share);
        let config = OptimizerConfig {
            state: kind,
            ..OptimizerConfig::default()
        };
        state.optimizer = Optimizer::of(config, &state.parameters);
        state
    }

    #[test]
    fn any_number_of_ranks_has_the_same_moments_in_8_bits_and_reads_what_any_other_wrote() {
        let kind = MomentsKind::EightBit;
        for writers in 1..=4 {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let saved = write_trained(folder.path(), kind, writers);
            for (rank, ranks) in (1..=4).flat_map(|ranks| (0..ranks).map(move |rank| (rank, ranks)))
            {
                let share = RankOf { rank, ranks };
                let wanted = trained(kind, share);
                let mut state = fresh(kind, share);
                restore(folder.path(), &saved, &mut state).expect("it fits");
                let both = state
                    .optimizer
                    .tensors()
                    .into_iter()
                    .zip(wanted.optimizer.tensors());
                for ((name, found), (_, wanted)) in both {
                    assert!(found.equal(wanted), "{writers}, {rank} of {ranks}: {name}");
                }
            }
        }
    }

    #[test]
    fn moments_of_another_kind_are_taken_where_that_is_exact_and_else_named() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let saved = write_trained(folder.path(), MomentsKind::EightBit, 3);
        let mut state = fresh(MomentsKind::Fp32, RankOf::ONLY);
        restore(folder.path(), &saved, &mut state).expect("8 bits fit into 32");
        let wanted = trained(MomentsKind::EightBit, RankOf::ONLY);
        let wanted = wanted.optimizer.moments.read(&(0..1375));
        let found = state.optimizer.moments.read(&(0..1375));
        assert!(found.mean.equal(&wanted.mean) && found.mean_square.equal(&wanted.mean_square));
        assert!(found.mean.norm().double_value(&[]) > 0.0);

        let folder = tempfile::tempdir().expect("a temporary folder");
        let saved = write_trained(folder.path(), MomentsKind::Fp32, 1);
        let mut state = fresh(MomentsKind::EightBit, RankOf::ONLY);
        let error = restore(folder.path(), &saved, &mut state).expect_err("it would be rounded");
        let error = error.to_string();
        assert!(error.contains("optimizer.state = \"fp32\""), "{error}");
    }

    #[test]
    fn moments_whose_blocks_begin_elsewhere_are_named() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut saved = write_trained(folder.path(), MomentsKind::EightBit, 1);
        // As if another version had cut the vector otherwise.
        saved.buckets = vec![1375];
        let mut state = fresh(MomentsKind::EightBit, RankOf::ONLY);
        let error = restore(folder.path(), &saved, &mut state).expect_err("other blocks");
        let error = error.to_string();
        let is_named = error.contains("blocks of 64") || error.contains("expected shape");
        assert!(is_named, "{error}");
    }
}
