//! The sum of a step's gradients: one fp32 vector `[n]`, added to as backward passes go.
//!
//! A sink takes each parameter's gradient (bf16 where its compute copy is) the moment it is complete, adds it and frees
//! it, so that no micro-batch's gradients are ever in memory together. Micro-batches run side by side on a CPU, and a
//! sum depends on its order: a gradient that comes before those of earlier micro-batches waits for them.

use std::{
    cell::Cell,
    collections::BTreeMap,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use rectiflow_sdxl::autograd::Sink;
use tch::{Kind, Tensor, no_grad};

use crate::{
    error::{Error, Result},
    flat::{Slice, part},
};

thread_local! {
    /// Which of a step's micro-batches this thread works on.
    static MICRO_BATCH: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Sums the gradients of parameters that lie in one vector.
#[derive(Debug)]
pub(crate) struct GradientSum {
    shared: Arc<Shared>,
    _sinks: Vec<Sink>,
}

#[derive(Debug)]
struct Shared {
    sum: Mutex<Option<Tensor>>,
    places: Vec<Mutex<Place>>,
    /// The micro-batch worked on, for threads of libtorch's own, which it has on a GPU only; there is one at a time then.
    only: AtomicUsize,
}

/// One parameter's part of the sum.
#[derive(Debug)]
struct Place {
    range: Range<i64>,
    shape: Vec<i64>,
    /// Its part of the vector, in the parameter's shape.
    total: Option<Tensor>,
    /// Whether the part has been written: until then what is in there is arbitrary.
    is_written: bool,
    /// The micro-batch whose gradient is added next.
    next: usize,
    /// Gradients of later ones; `None` where the loss does not depend on the parameter.
    waiting: BTreeMap<usize, Option<Tensor>>,
}

impl GradientSum {
    /// Takes all future gradients of `leaves`, which lie in the vector as `slices` says.
    pub(crate) fn new(leaves: &[Tensor], slices: &[Slice]) -> Self {
        let place = |slice: &Slice| Place {
            range: slice.range.clone(),
            shape: slice.shape.clone(),
            total: None,
            is_written: false,
            next: 0,
            waiting: BTreeMap::new(),
        };
        let places = slices.iter().map(|slice| Mutex::new(place(slice))).collect();
        let shared = Arc::new(Shared { sum: Mutex::new(None), places, only: AtomicUsize::new(0) });
        let sink = |(index, leaf): (usize, &Tensor)| {
            let shared = shared.clone();
            let take = move |gradient| shared.arrive(index, shared.micro_batch(), Some(gradient));
            Sink::new(leaf, take).expect("parameters are leaves that require gradients")
        };
        let sinks = leaves.iter().enumerate().map(sink).collect();
        Self { shared, _sinks: sinks }
    }

    /// Begins a new sum on the device of `like`. Its memory is written, and on a CPU taken, as gradients come.
    pub(crate) fn begin(&self, like: &Tensor) {
        let sum = Tensor::empty([like.numel() as i64], (Kind::Float, like.device()));
        for place in &self.shared.places {
            let mut place = place.lock().expect(UNPOISONED);
            let total = part(&sum, &place.range).view(place.shape.as_slice());
            *place = Place {
                range: place.range.clone(),
                shape: std::mem::take(&mut place.shape),
                total: Some(total),
                is_written: false,
                next: 0,
                waiting: BTreeMap::new(),
            };
        }
        *self.shared.sum.lock().expect(UNPOISONED) = Some(sum);
    }

    /// Adds the gradient of a micro-batch's loss; `micro_batch` counts those of the step from 0. Others may be worked on
    /// by other threads at the same time.
    pub(crate) fn add(&self, micro_batch: usize, loss: &Tensor) -> Result<()> {
        MICRO_BATCH.set(Some(micro_batch));
        self.shared.only.store(micro_batch, Ordering::SeqCst);
        let done = loss.f_backward().map_err(Error::torch("the backward pass"));
        MICRO_BATCH.set(None);
        done?;
        for index in 0..self.shared.places.len() {
            self.shared.arrive(index, micro_batch, None);
        }
        Ok(())
    }

    /// The sum `[n]` of all micro-batches since [`Self::begin`].
    pub(crate) fn finish(&self) -> Tensor {
        for place in &self.shared.places {
            let mut place = place.lock().expect(UNPOISONED);
            let is_written = place.is_written;
            if let (Some(mut total), false) = (place.total.take(), is_written) {
                let _ = no_grad(|| total.zero_());
            }
        }
        self.shared.sum.lock().expect(UNPOISONED).take().expect("a sum was begun")
    }
}

impl Shared {
    fn micro_batch(&self) -> usize {
        MICRO_BATCH.get().unwrap_or_else(|| self.only.load(Ordering::SeqCst))
    }

    /// A parameter's gradient of a micro-batch is complete, or there is none. The first word counts.
    fn arrive(&self, index: usize, micro_batch: usize, gradient: Option<Tensor>) {
        let mut place = self.places[index].lock().expect(UNPOISONED);
        if micro_batch < place.next || place.waiting.contains_key(&micro_batch) {
            return;
        }
        place.waiting.insert(micro_batch, gradient);
        let next = place.next;
        place.next +=
            place.waiting.range(next..).zip(next..).take_while(|((found, _), wanted)| *found == wanted).count();
        for micro_batch in next..place.next {
            if let Some(gradient) = place.waiting.remove(&micro_batch).flatten() {
                place.add(&gradient);
            }
        }
    }
}

impl Place {
    fn add(&mut self, gradient: &Tensor) {
        let total = self.total.as_mut().expect("gradients come between `begin` and `finish`");
        no_grad(|| {
            if self.is_written {
                let _ = total.f_add_(gradient).expect("a gradient has its parameter's shape");
            } else {
                total.copy_(gradient);
            }
        });
        self.is_written = true;
    }
}

const UNPOISONED: &str = "no thread panicked while it added a gradient";

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn leaf(value: f32, kind: Kind) -> Tensor {
        Tensor::from_slice(&[value, value]).to_kind(kind).set_requires_grad(true)
    }

    fn sum_of(leaves: &[Tensor]) -> (GradientSum, Tensor) {
        let slice = |(i, leaf): (usize, &Tensor)| Slice {
            name: format!("{i}"),
            shape: vec![2],
            range: 2 * i as i64..2 * i as i64 + 2,
            kind: leaf.kind(),
        };
        let slices: Vec<_> = leaves.iter().enumerate().map(slice).collect();
        (GradientSum::new(leaves, &slices), Tensor::zeros([2 * leaves.len() as i64], (Kind::Float, Device::Cpu)))
    }

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor).expect("an fp32 vector")
    }

    #[test]
    fn bf16_gradients_are_added_in_fp32() {
        let leaves = [leaf(1.0, Kind::BFloat16), leaf(1.0, Kind::Float)];
        let (sum, like) = sum_of(&leaves);
        sum.begin(&like);
        // 256 and 1 are bf16 numbers; their sum is not.
        for (micro_batch, factor) in [256.0, 1.0].into_iter().enumerate() {
            sum.add(micro_batch, &(&leaves[0] * factor).sum(Kind::Float)).unwrap();
        }
        assert_eq!(numbers(&sum.finish()), [257.0, 257.0, 0.0, 0.0], "and what had no gradient is 0");
        assert!(leaves.iter().all(|leaf| !leaf.grad().defined()));
    }

    #[test]
    fn the_sum_is_in_the_order_of_the_micro_batches_whoever_comes_first() {
        let leaves = [leaf(1.0, Kind::Float)];
        let (sum, like) = sum_of(&leaves);
        let factors = [1e8f64, -1e8, 1.0]; // another order loses the 1
        let mut sums = Vec::new();
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            sum.begin(&like);
            for micro_batch in order {
                sum.add(micro_batch, &(&leaves[0] * factors[micro_batch]).sum(Kind::Float)).unwrap();
            }
            sums.push(numbers(&sum.finish()));
        }
        assert_eq!(sums, vec![vec![1.0, 1.0]; 3]);
    }

    #[test]
    fn a_micro_batch_without_a_gradient_does_not_hold_up_the_others() {
        let leaves = [leaf(1.0, Kind::Float), leaf(1.0, Kind::Float)];
        let (sum, like) = sum_of(&leaves);
        sum.begin(&like);
        sum.add(1, &leaves[0].sum(Kind::Float)).unwrap();
        sum.add(0, &leaves[1].sum(Kind::Float)).unwrap();
        assert_eq!(numbers(&sum.finish()), [1.0, 1.0, 1.0, 1.0]);
    }
}
