//! What a run takes over from a checkpoint: its own, or another run's.
//!
//! Moments and averages are found by name and shape, so that neither the number of ranks that wrote them nor the tensors
//! that were trained have to be those of now. A rank reads what it owns.

use std::{collections::BTreeMap, ops::Range, path::Path};

use rectiflow_sdxl::{model::Component, tensor_file::TensorFile};
use tch::{Tensor, no_grad};

use crate::{
    checkpoint::{EMA, Saved, optimizer_name, slices_of},
    error::{Error, Result},
    exchange::meet,
    flat::{Slice, part},
    partition::Partition,
    state::TrainState,
};

/// Puts a checkpoint's numbers into the state of the run that it is of. The parameters are the checkpoint's already.
///
/// # Errors
/// [`Error::Checkpoint`] where the run trains other tensors, naming the first difference; [`Error::Model`].
pub fn restore(checkpoint: &Path, saved: &Saved, state: &mut TrainState) -> Result<()> {
    let path = checkpoint.to_owned();
    let layout = Saved::layout(&state.parameters.slices);
    if saved.layout != layout {
        let differs = layout.iter().zip(&saved.layout).find(|(a, b)| a != b);
        let reason = match differs {
            Some((expected, found)) => format!("expected {expected:?}, found {found:?}"),
            None => format!("expected {} tensors, found {}", layout.len(), saved.layout.len()),
        };
        return Err(Error::Checkpoint { path, reason: format!("{reason}: it is of another model or frozen set") });
    }
    inherit(checkpoint, saved, state)?;
    state.passed_over = saved.passed_over.iter().map(|&(first, end)| first..end).collect();
    Ok(())
}

/// Takes over from a checkpoint, whose parameters the state has already, what fits a state that may train other tensors:
/// moments and averages by name and shape, updates and samples. What has no moments begins with none.
///
/// # Errors
/// [`Error::Checkpoint`] where the optimiser's vectors are not as long as the layout says; [`Error::Model`].
pub fn inherit(checkpoint: &Path, saved: &Saved, state: &mut TrainState) -> Result<()> {
    state.position = saved.position;
    for (from, group) in state.moments_from.iter_mut().zip(&state.parameters.groups) {
        let prefix = format!("{}.", group.component);
        let has_moments = saved.layout.iter().any(|(name, _)| name.starts_with(&prefix));
        let known = saved.moments_from.get(&group.component).copied().unwrap_or(0);
        *from = if has_moments { known } else { saved.position.update };
    }
    inherit_moments(checkpoint, saved, state)?;
    if let Some(average) = &state.average {
        inherit_average(&checkpoint.join(EMA), state, average)?;
    }
    Ok(())
}

/// Copies this rank's moments from the files that the ranks of another day wrote.
fn inherit_moments(checkpoint: &Path, saved: &Saved, state: &TrainState) -> Result<()> {
    if saved.layout.is_empty() {
        return Ok(());
    }
    let mut places = BTreeMap::new();
    let mut end = 0;
    for (name, shape) in &saved.layout {
        let start = end;
        end += shape.iter().product::<i64>();
        places.insert(name.as_str(), (shape, start));
    }
    let written = Partition::new(end, saved.shards);
    for shard in 0..saved.shards {
        let path = checkpoint.join(optimizer_name(shard, saved.shards));
        let (file, held) = (TensorFile::open(&path)?, written.of(shard));
        for (name, vector) in [("mean", &state.optimizer.mean), ("mean_square", &state.optimizer.mean_square)] {
            let found = file.tensor(name)?;
            if found.size() != [held.end - held.start] {
                let reason = format!("{name}: expected shape [{}], found {:?}", held.end - held.start, found.size());
                return Err(Error::Checkpoint { path, reason });
            }
            for slice in &state.parameters.slices {
                if let Some((_, start)) = places.get(slice.name.as_str()).filter(|(shape, _)| **shape == slice.shape) {
                    copy_common(vector, &state.own, slice, &found, &(held.start - start..held.end - start));
                }
            }
        }
    }
    Ok(())
}

/// Copies what both a rank's part of the vector and some elements of a tensor have: `own` are the elements of the flat
/// vector that `vector` is, `held` those of the tensor, counted from its first one, that `found` is.
fn copy_common(vector: &Tensor, own: &Range<i64>, slice: &Slice, found: &Tensor, held: &Range<i64>) {
    let wanted = meet(own, &slice.range);
    let wanted = wanted.start - slice.range.start..wanted.end - slice.range.start;
    let common = meet(held, &wanted);
    if common.is_empty() {
        return;
    }
    let shift = slice.range.start - own.start;
    let from = part(found, &(common.start - held.start..common.end - held.start));
    no_grad(|| part(vector, &(common.start + shift..common.end + shift)).copy_(&from));
}

fn inherit_average(ema: &Path, state: &TrainState, average: &Tensor) -> Result<()> {
    for component in Component::ALL {
        let path = ema.join(component.folder()).join(component.weights_name());
        if !path.is_file() {
            continue;
        }
        let file = TensorFile::open(&path)?;
        for (name, slice) in slices_of(&state.parameters.slices, component) {
            let is_own = !meet(&slice.range, &state.own).is_empty();
            if is_own && file.shape(name).is_some_and(|shape| shape == slice.shape) {
                let found = file.tensor(name)?.flatten(0, -1);
                copy_common(average, &state.own, slice, &found, &(0..found.numel() as i64));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rectiflow_sdxl::{init::Init, tensor_file::write_tensors, weights::Weights};
    use tch::{Device, Kind};

    use super::*;
    use crate::{
        flat::FlatParameters,
        optim::{Optimizer, OptimizerConfig},
        state::Position,
    };

    /// Three tensors of 6, 5 and 2 elements; this rank owns `own` of them.
    fn state(own: Range<i64>) -> TrainState {
        let mut weights = Weights::random(0, Kind::Float, Device::Cpu);
        for (name, shape) in [("a", &[2i64, 3][..]), ("b", &[5]), ("c", &[2])] {
            let _ = weights.take(name, shape, Init::Zeros);
        }
        let parameters = FlatParameters::adopt(
            &[("unet", &weights.finish().expect("random weights fit"))],
            crate::precision::Precision::Fp32,
        );
        let values = part(&parameters.values, &own);
        TrainState {
            position: Position::default(),
            optimizer: Optimizer::new(OptimizerConfig::default(), &values),
            average: Some(values.zeros_like()),
            moments_from: vec![0],
            passed_over: Vec::new(),
            own,
            parameters,
        }
    }

    fn saved(shards: usize, layout: &[(String, Vec<i64>)]) -> Saved {
        let json = serde_json::json!({
            "format": 3, "position": {"cursor": 12, "update": 11, "samples": 345}, "order_hash": "", "frozen": {},
            "objective": rectiflow_sdxl::flow::ObjectiveSettings::default(), "data": [], "program": "",
            "layout": layout, "shards": shards, "passed_over": [(3, 4)],
        });
        serde_json::from_value(json).expect("a state")
    }

    /// A checkpoint that `shards` ranks wrote: moments 0, 1, 2... and 100, 101, 102..., averages 200, 201, 202...
    fn write(folder: &Path, shards: usize, layout: &[(String, Vec<i64>)]) {
        let number = |from: i64, range: Range<i64>| {
            Tensor::arange_start(from + range.start, from + range.end, (Kind::Float, Device::Cpu))
        };
        let partition = Partition::new(13, shards);
        for shard in 0..shards {
            let vectors =
                [("mean", &number(0, partition.of(shard))), ("mean_square", &number(100, partition.of(shard)))];
            write_tensors(&folder.join(optimizer_name(shard, shards)), vectors, None, &[]).expect("writes");
        }
        let ema = folder.join(EMA).join(Component::UNet.folder());
        std::fs::create_dir_all(&ema).expect("a folder");
        let mut start = 0;
        let mut tensors = Vec::new();
        for (name, shape) in layout {
            let end = start + shape.iter().product::<i64>();
            tensors.push((name.trim_start_matches("unet.").to_owned(), number(200, start..end).view(shape.as_slice())));
            start = end;
        }
        let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_tensors(&ema.join(Component::UNet.weights_name()), tensors, None, &[]).expect("writes");
    }

    #[test]
    fn every_number_of_ranks_reads_what_every_other_wrote_exactly() {
        let layout = Saved::layout(&state(0..13).parameters.slices);
        for writers in 1..=5 {
            let folder = tempfile::tempdir().expect("a temporary folder");
            write(folder.path(), writers, &layout);
            for readers in 1..=5 {
                for rank in 0..readers {
                    let own = Partition::new(13, readers).of(rank);
                    let mut state = state(own.clone());
                    restore(folder.path(), &saved(writers, &layout), &mut state).expect("it fits");
                    assert_eq!((state.position.update, state.passed_over[0].clone()), (11, 3..4));
                    let average = state.average.expect("an average");
                    for (vector, from) in
                        [(&state.optimizer.mean, 0), (&state.optimizer.mean_square, 100), (&average, 200)]
                    {
                        let found: Vec<f32> = Vec::try_from(vector).expect("a vector");
                        let expected: Vec<f32> = own.clone().map(|at| (from + at) as f32).collect();
                        assert_eq!(found, expected, "{writers} wrote, rank {rank} of {readers} reads");
                    }
                }
            }
        }
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let layout = Saved::layout(&state(0..13).parameters.slices);
        let folder = tempfile::tempdir().expect("a temporary folder");
        write(folder.path(), 2, &layout);
        let (one, two) = (optimizer_name(0, 2), optimizer_name(1, 2));
        std::fs::copy(folder.path().join(two), folder.path().join(one)).expect("copies");
        let error = restore(folder.path(), &saved(2, &layout), &mut state(0..13)).expect_err("too short").to_string();
        assert!(
            error.contains("optimizer-00001-of-00002") && error.contains("expected shape [7], found [6]"),
            "{error}"
        );
    }
}
