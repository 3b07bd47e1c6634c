//! Vital signs of a model's parts, measured at intervals: values that change before the loss does.
//!
//! - *Moment ratio*, the root mean square of `g / sqrt(v)` with Adam's second moment `v` after the
//!   update: about 1 while `v` matches the size of the gradients. Loss spikes follow 1 to 8 updates
//!   after it has jumped (arXiv 2304.13013).
//! - *Update ratio*, the norm of the update over the norm of the weights: usually 1e-3 or less; a
//!   part with a rising ratio is being rewritten.
//! - *Gradient norm*, as the update used it: after clipping.
//!
//! The parts are the top-level entries of the UNet's state dictionary, down to a level
//! (`unet.down_blocks.1`, `unet.mid_block`), and each text encoder as a whole. Each rank measures
//! the elements that it updates.

use std::{collections::BTreeMap, ops::Range, slice::from_ref};

use rectiflow_sdxl::model::Component;
use tch::{Kind, Tensor};

use crate::{
    error::Result,
    lr::LrRatios,
    measure::metrics::Vitals,
    ranks::exchange::Exchange,
    state::{TrainState, gradient_vector::GradientVector, layout::Slice, optim::UpdateRange},
};

/// Measures the vital signs of the update that was just applied with rate `lr` from `gradients`,
/// those of this rank's elements.
pub(crate) fn measure(
    state: &TrainState,
    gradients: &GradientVector,
    lr: f64,
    ratios: &LrRatios,
    exchange: &Exchange,
) -> Result<Vec<Vitals>> {
    let modules = modules(&state.parameters.slices);
    let mut own = Vec::new();
    for module in &modules {
        let mut sums = Sums::default();
        for range in &module.ranges {
            let range = module_range(state, range, lr, ratios);
            sums.add(Sums::of(state, gradients, &range));
        }
        own.extend(sums.to_numbers());
    }
    let all = exchange.total(&own)?;
    let (all, _) = all.as_chunks();
    let mut vitals = Vec::with_capacity(modules.len());
    for (module, &sums) in modules.into_iter().zip(all) {
        vitals.push(Sums::from_numbers(sums).vitals(module));
    }
    Ok(vitals)
}

/// Sums of squares over some of a rank's elements.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    /// g^2
    gradient: f64,
    /// g^2 / v
    moment_ratio: f64,
    /// update^2
    update: f64,
    /// weight^2
    weight: f64,
}

impl Sums {
    /// Returns the sums over the elements of `range` that this rank owns.
    fn of(state: &TrainState, gradients: &GradientVector, range: &UpdateRange) -> Self {
        let masters = &state.parameters.masters;
        let mut sums = Self::default();
        for chunk in state.optimizer.chunks(masters, gradients, from_ref(range)) {
            let chunk = chunk.open();
            sums.add(Self {
                gradient: square_sum(&chunk.gradient),
                moment_ratio: chunk.excess(),
                update: square_sum(&chunk.step(range.rate)),
                weight: square_sum(&chunk.numbers.fp32()),
            });
        }
        sums
    }

    fn add(&mut self, other: Self) {
        self.gradient += other.gradient;
        self.moment_ratio += other.moment_ratio;
        self.update += other.update;
        self.weight += other.weight;
    }

    fn to_numbers(self) -> [f64; 4] {
        [self.gradient, self.moment_ratio, self.update, self.weight]
    }

    fn from_numbers([gradient, moment_ratio, update, weight]: [f64; 4]) -> Self {
        Self {
            gradient,
            moment_ratio,
            update,
            weight,
        }
    }

    /// Returns the vital signs of a module of these elements.
    fn vitals(&self, module: Module) -> Vitals {
        let num_elements = num_elements(&module.ranges);
        Vitals {
            module: module.name,
            gradient_norm: self.gradient.sqrt(),
            moment_ratio: (self.moment_ratio / num_elements as f64).sqrt(),
            update_ratio: (self.update / self.weight).sqrt(),
        }
    }
}

fn square_sum(tensor: &Tensor) -> f64 {
    tensor.square().sum(Kind::Double).double_value(&[])
}

/// Returns some elements of a module as the optimiser sees them: this rank's part, as a range of
/// the elements that it owns.
fn module_range(
    state: &TrainState,
    module: &Range<i64>,
    lr: f64,
    ratios: &LrRatios,
) -> UpdateRange {
    let mut groups = state.parameters.groups.iter().zip(&state.moments_from);
    let (group, from) = groups
        .find(|(group, _)| group.range.contains(&module.start))
        .expect("groups cover the vector");
    UpdateRange {
        range: state.parameters.own_part(module),
        whole: module.end - module.start,
        rate: lr * ratios.of(&group.component),
        update: state.position.update - from,
    }
}

/// A part of the model, as ranges in the flat vector: parameters that stay in fp32 are separate
/// from the others.
struct Module {
    name: String,
    ranges: Vec<Range<i64>>,
}

/// Returns the modules ordered by name.
fn modules(slices: &[Slice]) -> Vec<Module> {
    let mut by_name = BTreeMap::<&str, Vec<Range<i64>>>::new();
    for slice in slices {
        let ranges = by_name.entry(module_of(&slice.name)).or_default();
        match ranges.last_mut() {
            Some(last) if last.end == slice.range.start => last.end = slice.range.end,
            _ => ranges.push(slice.range.clone()),
        }
    }
    let mut modules = Vec::with_capacity(by_name.len());
    for (name, ranges) in by_name {
        modules.push(Module {
            name: name.to_owned(),
            ranges,
        });
    }
    modules
}

fn num_elements(ranges: &[Range<i64>]) -> i64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// Returns the module of a parameter: `unet.down_blocks.1` for
/// `unet.down_blocks.1.resnets.0.conv1.weight`; a text encoder is one module.
fn module_of(name: &str) -> &str {
    let (component, rest) = name
        .split_once('.')
        .expect("a slice's name begins with its component");
    if component != Component::UNet.folder() {
        return component;
    }
    let (first, rest) = rest.split_once('.').unwrap_or((rest, ""));
    let numbered = rest
        .split_once('.')
        .map(|(number, _)| number)
        .filter(|number| number.parse::<u32>().is_ok());
    let len = component.len() + 1 + first.len() + numbered.map_or(0, |number| 1 + number.len());
    &name[..len]
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{
        ranks::{comm::Comm, launch::Sharding},
        state::{
            Position,
            flat::FlatParameters,
            layout::narrow,
            optim::{Optimizer, OptimizerConfig},
            workers::Workers,
        },
    };
    use rectiflow_sdxl::{init::Init, weights::Weights};

    #[test]
    fn a_level_of_the_unet_and_a_text_encoder_are_modules() {
        let names = [
            ("unet.conv_in.weight", "unet.conv_in"),
            (
                "unet.down_blocks.1.resnets.0.conv1.weight",
                "unet.down_blocks.1",
            ),
            ("unet.mid_block.attentions.0.norm.bias", "unet.mid_block"),
            ("unet.time_embedding.linear_1.bias", "unet.time_embedding"),
            (
                "text_encoder_2.text_model.encoder.layers.3.mlp.fc1.bias",
                "text_encoder_2",
            ),
        ];
        for (name, module) in names {
            assert_eq!(module_of(name), module);
        }
    }

    #[test]
    fn the_first_update_has_signs_that_are_known() {
        let mut weights = Weights::random(1, Kind::Float, Device::Cpu);
        let ones = Init::Normal { std: 1.0 };
        let _conv = weights.take("conv_in.weight", &[100], ones);
        let _mid = weights.take("mid_block.resnets.0.conv1.weight", &[300], ones);
        let unet = weights.finish().unwrap();
        let parameters =
            FlatParameters::adopt(&[("unet", &unet)], crate::state::precision::Precision::Fp32);
        let config = OptimizerConfig {
            weight_decay: 0.0,
            ..OptimizerConfig::default()
        };
        let before = parameters.masters.to_tensor();
        let mut state = TrainState {
            position: Position {
                cursor: 1,
                update: 1,
                samples: 1,
            },
            optimizer: Optimizer::new(config, &parameters.masters),
            moments_from: vec![0],
            average: None,
            tensor_norms: Vec::new(),
            passed_over: Vec::new(),
            parameters,
        };
        let gradients = Tensor::arange(400, (Kind::Float, Device::Cpu)) + 1.0;
        let (lr, ratios, comm) = (1e-2, LrRatios::default(), Comm::alone());
        let exchange = Exchange::new(&comm, Sharding::Once);
        let ranges = state.update_ranges(lr, &ratios);
        let total = |own: &[f64]| Ok(own.to_vec());
        let workers = Workers::new(Device::Cpu, 1);
        let vector = |factor: f64| GradientVector::new([&gradients * factor]);
        state
            .optimizer
            .update(
                &state.parameters.masters,
                &vector(1.0),
                &ranges,
                &workers,
                &total,
            )
            .unwrap();
        let vitals = measure(&state, &vector(1.0), lr, &ratios, &exchange).unwrap();
        assert_eq!(
            vitals
                .iter()
                .map(|vitals| &vitals.module[..])
                .collect::<Vec<_>>(),
            ["unet.conv_in", "unet.mid_block"]
        );
        let after = state.parameters.masters.to_tensor();
        let moved = &after - &before;
        for (vitals, range) in vitals.iter().zip([0..100, 100..400]) {
            let norm = |tensor: &Tensor| narrow(tensor, &range).norm().double_value(&[]);
            assert!((vitals.gradient_norm / norm(&gradients) - 1.0).abs() < 1e-5);
            // With bias correction, the second moment of the first update is g^2.
            assert!((vitals.moment_ratio - 1.0).abs() < 1e-4, "{vitals:?}");
            let wanted = norm(&moved) / norm(&after);
            assert!(
                (vitals.update_ratio / wanted - 1.0).abs() < 1e-3,
                "{vitals:?} {wanted}"
            );
        }
        // Gradients a hundred times as large, which the second moment does not contain yet.
        let vitals = measure(&state, &vector(100.0), lr, &ratios, &exchange).unwrap();
        assert!(
            vitals
                .iter()
                .all(|vitals| (vitals.moment_ratio - 100.0).abs() < 0.1),
            "{vitals:?}"
        );
    }
}
