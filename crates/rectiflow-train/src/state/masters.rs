//! The fp32 masters of the parameters that a rank updates, in the memory that the model computes
//! with.
//!
//! Where the model computes in fp32, its own weights are the masters. Where it computes in bf16,
//! its weights are the masters rounded to the nearest bf16, and a remainder of 16 bits beside each
//! completes the master, bit for bit (`halves`). A parameter so takes 4 bytes in either case, and
//! writing a master updates the weight.

use std::ops::Range;

use rectiflow_sdxl::write::write_to;
use tch::{Device, Kind, Tensor};

use crate::state::{
    halves::{merged, split_into},
    layout::{chunks, intersect, narrow},
    plain::is_plain,
};

/// The masters of the elements that a rank owns, `[k]`.
#[derive(Debug)]
pub struct Masters {
    /// In order and without gaps.
    stretches: Vec<Part>,
    device: Device,
}

/// Masters `[m]` that are next to each other in memory.
#[derive(Debug)]
pub(crate) struct Part {
    /// Elements among those that the rank owns.
    pub(crate) range: Range<i64>,
    pub(crate) numbers: Numbers,
}

/// fp32 numbers `[m]`.
#[derive(Debug)]
pub(crate) enum Numbers {
    /// fp32.
    Whole(Tensor),
    /// The nearest bf16 and the remainder, int16.
    Halves(Tensor, Tensor),
}

impl Masters {
    /// Returns no masters.
    pub(crate) fn empty(device: Device) -> Self {
        Self {
            stretches: Vec::new(),
            device,
        }
    }

    /// Appends `weights` `[m]`, fp32 or bf16, as masters. Remainders are zero.
    pub(crate) fn push(&mut self, weights: Tensor) {
        let start = self.len();
        let range = start..start + weights.numel() as i64;
        let numbers = if weights.kind() == Kind::BFloat16 {
            let remainder = Tensor::zeros(weights.size(), (Kind::Int16, self.device));
            Numbers::Halves(weights, remainder)
        } else {
            Numbers::Whole(weights)
        };
        self.stretches.push(Part { range, numbers });
    }

    /// Returns the vector `[k]` fp32 as masters.
    pub(crate) fn whole(vector: Tensor) -> Self {
        let mut masters = Self::empty(vector.device());
        masters.push(vector);
        masters
    }

    /// Returns the device of the masters.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// Returns the numbers of a vector `[k]` fp32 as masters in halves.
    #[cfg(test)]
    pub(crate) fn halves(vector: &Tensor) -> Self {
        let mut masters = Self::empty(vector.device());
        masters.push(Tensor::zeros(
            vector.size(),
            (Kind::BFloat16, vector.device()),
        ));
        masters.write(0, vector);
        masters
    }

    /// Returns the number of elements.
    pub fn len(&self) -> i64 {
        self.stretches.last().map_or(0, |part| part.range.end)
    }

    /// Returns whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns a vector of zeros, `[k]` fp32.
    pub fn zeros(&self) -> Tensor {
        Tensor::zeros([self.len()], (Kind::Float, self.device))
    }

    /// Returns a copy of all masters, `[k]` fp32.
    pub fn to_tensor(&self) -> Tensor {
        self.read(&(0..self.len()))
    }

    /// Returns a copy of some masters, `[m]` fp32.
    pub(crate) fn read(&self, range: &Range<i64>) -> Tensor {
        let parts = self.over(range);
        if let [part] = &parts[..] {
            return part.numbers.copy();
        }
        let length = range.end - range.start;
        let found = Tensor::empty([length], (Kind::Float, self.device));
        for part in parts {
            let inside = part.range.start - range.start..part.range.end - range.start;
            write_to(&narrow(&found, &inside), &part.numbers.fp32());
        }
        found
    }

    /// Overwrites the masters from element `start` on with `numbers` `[m]` fp32.
    pub fn write(&self, start: i64, numbers: &Tensor) {
        for part in self.over(&(start..start + numbers.numel() as i64)) {
            let inside = part.range.start - start..part.range.end - start;
            part.numbers.store(&narrow(numbers, &inside));
        }
    }

    /// Returns a range in parts, in order, as views of the masters.
    pub(crate) fn over(&self, range: &Range<i64>) -> Vec<Part> {
        let mut found = Vec::new();
        let first = self
            .stretches
            .partition_point(|stretch| stretch.range.end <= range.start);
        for stretch in &self.stretches[first..] {
            if stretch.range.start >= range.end {
                break;
            }
            let common = intersect(range, &stretch.range);
            if !common.is_empty() {
                found.push(stretch.narrow(&common));
            }
        }
        found
    }

    /// Returns all masters in parts of a size that suits the device.
    pub(crate) fn chunks(&self) -> Vec<Part> {
        let mut found = Vec::new();
        for stretch in &self.stretches {
            for range in chunks(&stretch.range, self.device) {
                found.push(stretch.narrow(&range));
            }
        }
        found
    }

    /// Returns the memory of the masters with a name for each tensor.
    pub(crate) fn tensors(&self) -> Vec<(String, &Tensor)> {
        let mut found = Vec::new();
        for (index, stretch) in self.stretches.iter().enumerate() {
            match &stretch.numbers {
                Numbers::Whole(whole) => found.push((format!("masters.{index}"), whole)),
                Numbers::Halves(nearest, remainder) => {
                    found.push((format!("masters.{index}.nearest"), nearest));
                    found.push((format!("masters.{index}.remainder"), remainder));
                }
            }
        }
        found
    }

    /// Returns another handle of the same memory.
    pub(crate) fn shallow_clone(&self) -> Self {
        Self {
            device: self.device,
            ..self.on_host(Tensor::shallow_clone)
        }
    }

    /// Returns masters in host memory, in the tensors that `take` returns for these.
    pub(crate) fn on_host(&self, take: impl Fn(&Tensor) -> Tensor) -> Self {
        let mut host = Self::empty(Device::Cpu);
        for stretch in &self.stretches {
            let numbers = match &stretch.numbers {
                Numbers::Whole(whole) => Numbers::Whole(take(whole)),
                Numbers::Halves(nearest, remainder) => {
                    Numbers::Halves(take(nearest), take(remainder))
                }
            };
            let range = stretch.range.clone();
            host.stretches.push(Part { range, numbers });
        }
        host
    }
}

impl Part {
    /// Returns a view of the masters in `range`, which is inside of this part's.
    pub(crate) fn narrow(&self, range: &Range<i64>) -> Self {
        let inside = range.start - self.range.start..range.end - self.range.start;
        Self {
            range: range.clone(),
            numbers: self.numbers.narrow(&inside),
        }
    }
}

impl Numbers {
    /// Returns a view of some of the numbers.
    pub(crate) fn narrow(&self, range: &Range<i64>) -> Self {
        match self {
            Self::Whole(whole) => Self::Whole(narrow(whole, range)),
            Self::Halves(nearest, remainder) => {
                Self::Halves(narrow(nearest, range), narrow(remainder, range))
            }
        }
    }

    /// Whether loops can read and write them.
    pub(crate) fn is_plain(&self) -> bool {
        match self {
            Self::Whole(whole) => is_plain(whole, Kind::Float),
            Self::Halves(nearest, remainder) => {
                is_plain(nearest, Kind::BFloat16) && is_plain(remainder, Kind::Int16)
            }
        }
    }

    /// Returns the numbers as fp32: a view, or a copy of halves.
    pub(crate) fn fp32(&self) -> Tensor {
        match self {
            Self::Whole(whole) => whole.shallow_clone(),
            Self::Halves(nearest, remainder) => merged(nearest, remainder),
        }
    }

    /// Returns a copy of the numbers as fp32.
    pub(crate) fn copy(&self) -> Tensor {
        match self {
            Self::Whole(whole) => whole.copy(),
            Self::Halves(nearest, remainder) => merged(nearest, remainder),
        }
    }

    /// Overwrites the numbers with `new` `[m]` fp32. Nothing is done if `new` is [`Self::fp32`]'s
    /// view, which was changed in place.
    pub(crate) fn store(&self, new: &Tensor) {
        match self {
            Self::Whole(whole) if whole.data_ptr() == new.data_ptr() => {}
            Self::Whole(whole) => write_to(whole, new),
            Self::Halves(nearest, remainder) => split_into(nearest, remainder, new),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Masters of 3 elements in fp32, 70,000 in bf16 and 2 in fp32, and their numbers.
    fn masters() -> (Masters, Tensor) {
        let weights = [(3, Kind::Float), (70_000, Kind::BFloat16), (2, Kind::Float)]
            .map(|(length, kind)| Tensor::zeros([length], (kind, Device::Cpu)));
        let mut masters = Masters::empty(Device::Cpu);
        weights
            .into_iter()
            .for_each(|weights| masters.push(weights));
        let numbers = (Tensor::arange(70_005, (Kind::Float, Device::Cpu)) * 0.37).sin();
        masters.write(0, &numbers);
        (masters, numbers)
    }

    #[test]
    fn what_is_written_across_stretches_is_read() {
        let (masters, numbers) = masters();
        assert_eq!(masters.len(), 70_005);
        assert!(masters.to_tensor().equal(&numbers));
        assert!(
            masters
                .read(&(1..70_004))
                .equal(&narrow(&numbers, &(1..70_004)))
        );
        masters.write(2, &Tensor::from_slice(&[0.1f32, 0.2, 0.3]));
        let wanted = Tensor::from_slice(&[0.1f32, 0.2, 0.3]);
        assert!(masters.read(&(2..5)).equal(&wanted));
        assert!(masters.read(&(5..6)).equal(&narrow(&numbers, &(5..6))));
    }

    #[test]
    fn chunks_are_views_of_all_masters_in_order() {
        let (masters, numbers) = masters();
        let parts = masters.chunks();
        assert_eq!(parts.len(), 4, "65,536 and the rest of the long stretch");
        assert!(
            parts
                .windows(2)
                .all(|pair| pair[0].range.end == pair[1].range.start)
        );
        for part in parts {
            let found = part.numbers.fp32();
            assert!(found.equal(&narrow(&numbers, &part.range)));
            part.numbers.store(&(found * 2.0));
        }
        assert!(masters.to_tensor().equal(&(numbers * 2.0)));
    }

    #[test]
    fn a_copy_does_not_change_with_the_original() {
        let (masters, numbers) = masters();
        let copy = masters.on_host(Tensor::copy);
        masters.write(0, &masters.zeros());
        assert!(copy.to_tensor().equal(&numbers));
        assert!(masters.to_tensor().equal(&masters.zeros()));
        let names: Vec<String> = copy.tensors().into_iter().map(|(name, _)| name).collect();
        let wanted = [
            "masters.0",
            "masters.1.nearest",
            "masters.1.remainder",
            "masters.2",
        ];
        assert_eq!(names, wanted);
    }
}
