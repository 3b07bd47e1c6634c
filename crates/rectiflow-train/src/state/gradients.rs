//! The sum of a step's gradients in fp32, accumulated during the backward passes, bucket by bucket
//! of the flat vector.
//!
//! A sink takes each parameter's gradient (bf16 if its compute copy is) the moment it is complete,
//! adds it and frees it, so the gradients of a micro-batch are never in memory all at once.
//! Micro-batches run concurrently on a CPU, and a floating-point sum depends on its order: a
//! gradient that arrives before those of earlier micro-batches waits for them.
//!
//! Each bucket has its own memory, allocated at its first gradient. If one rank owns all
//! parameters, the buckets form the vector. If several do, a bucket is laid out in equal pieces,
//! ready to be sent, and freed once it has been reduced; a listener is notified of each bucket that
//! is complete, while the backward pass continues.

use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::Sender,
    },
    thread::{self, ThreadId},
};

use rectiflow_sdxl::{autograd::Sink, write::write_to};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    error::{Error, Result},
    state::{
        gradient_vector::GradientVector,
        layout::{Slice, narrow, shaped},
        partition::{Bucket, Partition},
    },
};

/// Sums the gradients of the parameters of one flat vector.
#[derive(Debug)]
pub(crate) struct GradientSum {
    shared: Arc<Shared>,
    _sinks: Vec<Sink>,
}

#[derive(Debug)]
struct Shared {
    device: Device,
    /// Whether one rank owns all parameters. If so, buckets are kept until `finish`.
    is_whole: bool,
    buckets: Vec<Mutex<Sum>>,
    places: Vec<Mutex<ParameterSum>>,
    /// Number of micro-batches in the sum.
    expected: AtomicUsize,
    /// Receives the index of each bucket that is complete.
    listener: Mutex<Option<Sender<usize>>>,
    /// Takes gradients instead of the sum.
    taker: Mutex<Option<Taker>>,
    under_way: UnderWay,
}

/// Takes the gradient of a parameter, by its index.
struct Taker(Box<dyn FnMut(usize, Tensor) + Send>);

impl fmt::Debug for Taker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Taker")
    }
}

/// The running backward passes: the thread that requested each, and its micro-batch.
///
/// On a CPU, libtorch delivers a gradient on the thread that requested the pass. On a GPU it does
/// so on a thread of its own, and only one pass runs at a time.
#[derive(Debug, Default)]
struct UnderWay(Mutex<Vec<(ThreadId, usize)>>);

impl UnderWay {
    /// Registers this thread's pass over a micro-batch until the returned value is dropped.
    fn begin(&self, micro_batch: usize) -> BackwardPass<'_> {
        self.lock().push((thread::current().id(), micro_batch));
        BackwardPass(self)
    }

    /// Returns the micro-batch of the gradient that has just been delivered.
    fn micro_batch(&self) -> usize {
        let passes = self.lock();
        let own = thread::current().id();
        if let Some((_, micro_batch)) = passes.iter().find(|(thread, _)| *thread == own) {
            return *micro_batch;
        }
        match passes[..] {
            [(_, only)] => only,
            _ => unreachable!("a thread of libtorch's own runs one backward pass at a time"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(ThreadId, usize)>> {
        // A panic leaves the list intact.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct BackwardPass<'a>(&'a UnderWay);

impl Drop for BackwardPass<'_> {
    fn drop(&mut self) {
        let own = thread::current().id();
        self.0.lock().retain(|(thread, _)| *thread != own);
    }
}

/// One bucket's sum.
#[derive(Debug)]
struct Sum {
    /// Number of elements of its parameters, without padding.
    filled: i64,
    /// Number of elements of its memory, with padding to equal pieces.
    len: i64,
    /// Indices of its parameters.
    places: Range<usize>,
    /// Number of parameters whose part of the sum is incomplete.
    missing: usize,
    /// Whether it has been taken, so that no more gradients may be added.
    is_taken: bool,
    memory: Option<Tensor>,
}

/// One parameter's part of its bucket's sum.
#[derive(Debug)]
struct ParameterSum {
    bucket: usize,
    /// Elements in the bucket.
    range: Range<i64>,
    shape: Vec<i64>,
    /// Its part of the sum, in the parameter's shape, once it has been written.
    total: Option<Tensor>,
    /// The micro-batch whose gradient is added next.
    next: usize,
    /// Gradients of later micro-batches; `None` if the loss does not depend on the parameter.
    waiting: BTreeMap<usize, Option<Tensor>>,
}

impl GradientSum {
    /// Takes all future gradients of `leaves`, whose places in the vector are described by `slices`
    /// and `partition`.
    pub(crate) fn new(leaves: &[Tensor], slices: &[Slice], partition: &Partition) -> Self {
        let device = leaves.first().map_or(Device::Cpu, Tensor::device);
        let shared = Arc::new(Shared::new(device, slices, partition));
        let mut sinks = Vec::new();
        for (index, leaf) in leaves.iter().enumerate() {
            let own = shared.clone();
            let take = move |gradient| own.take_or_add(index, gradient);
            let sink = Sink::new(leaf, take);
            sinks.push(sink.expect("parameters are leaves that require gradients"));
        }
        Self {
            shared,
            _sinks: sinks,
        }
    }

    /// Begins a new sum over `micro_batches`. Its memory is allocated as gradients arrive.
    /// `listener` receives the index of every bucket that is complete.
    pub(crate) fn begin(&self, micro_batches: usize, listener: Option<Sender<usize>>) {
        let Shared {
            buckets,
            places,
            expected,
            ..
        } = &*self.shared;
        expected.store(micro_batches, Ordering::SeqCst);
        for place in places {
            let mut place = place.lock().expect(UNPOISONED);
            place.total = None;
            place.next = 0;
            place.waiting.clear();
        }
        for bucket in buckets {
            let mut sum = bucket.lock().expect(UNPOISONED);
            sum.memory = None;
            sum.missing = sum.places.len();
            sum.is_taken = false;
        }
        *self.shared.listener.lock().expect(UNPOISONED) = listener;
        if micro_batches == 0 {
            for bucket in 0..buckets.len() {
                self.shared.tell(bucket);
            }
        }
    }

    /// Passes each gradient to `take` when it is complete, with its parameter's index, and adds
    /// none to a sum, until [`Self::end_taking`].
    pub(crate) fn begin_taking(&self, take: impl FnMut(usize, Tensor) + Send + 'static) {
        *self.shared.taker.lock().expect(UNPOISONED) = Some(Taker(Box::new(take)));
    }

    /// Drops what takes gradients.
    pub(crate) fn end_taking(&self) {
        // A panic in it has failed the backward pass, with its message.
        *self
            .shared
            .taker
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Drops the listener; a receiver waiting for a bucket gets an error.
    pub(crate) fn stop_notifying(&self) {
        *self.shared.listener.lock().expect(UNPOISONED) = None;
    }

    /// Returns a handle with which another thread takes complete buckets.
    pub(crate) fn complete_buckets(&self) -> Buckets {
        Buckets(self.shared.clone())
    }

    /// Returns a handle with which concurrent threads add gradients.
    pub(crate) fn adder(&self) -> Adder {
        Adder(self.shared.clone())
    }

    /// Returns the sum `[n]` of all micro-batches since [`Self::begin`]. One rank must own all
    /// parameters.
    pub(crate) fn finish(&self) -> GradientVector {
        let Shared {
            is_whole, buckets, ..
        } = &*self.shared;
        assert!(is_whole, "one rank owns all parameters");
        let mut sums = Vec::new();
        for (index, bucket) in buckets.iter().enumerate() {
            sums.push(self.shared.take(index));
            bucket.lock().expect(UNPOISONED).memory = None;
        }
        GradientVector::new(sums)
    }
}

/// Adds gradients to a sum.
#[derive(Debug)]
pub(crate) struct Adder(Arc<Shared>);

impl Adder {
    /// Adds the gradient of a micro-batch's loss; `micro_batch` is its index in the sum, from 0.
    /// Other threads may add other micro-batches at the same time.
    pub(crate) fn add(&self, micro_batch: usize, loss: &Tensor) -> Result<()> {
        let pass = self.0.under_way.begin(micro_batch);
        loss.f_backward()
            .map_err(Error::torch("the backward pass"))?;
        drop(pass);
        for index in 0..self.0.places.len() {
            self.0.arrive(index, micro_batch, None);
        }
        Ok(())
    }
}

/// The buckets of a sum.
#[derive(Debug)]
pub(crate) struct Buckets(Arc<Shared>);

impl Buckets {
    /// Takes a bucket of the sum, `[R c]`. No more gradients may be added to it.
    pub(crate) fn take(&self, bucket: usize) -> Tensor {
        self.0.take(bucket)
    }
}

impl Sum {
    /// Returns an empty sum for the bucket of these parameters, split over `ranks`.
    fn new(bucket: &Bucket, places: Range<usize>, ranks: usize) -> Self {
        Self {
            filled: bucket.range.end - bucket.range.start,
            len: bucket.piece * ranks as i64,
            places,
            missing: 0,
            is_taken: false,
            memory: None,
        }
    }
}

impl ParameterSum {
    /// Returns the place of a parameter in its bucket, which has the index `index`.
    fn new(slice: &Slice, bucket: &Bucket, index: usize) -> Self {
        let start = bucket.range.start;
        Self {
            bucket: index,
            range: slice.range.start - start..slice.range.end - start,
            shape: slice.shape.clone(),
            total: None,
            next: 0,
            waiting: BTreeMap::new(),
        }
    }

    /// Returns the micro-batch whose gradient is added after those that wait without a gap.
    fn next_missing(&self) -> usize {
        let mut next = self.next;
        while self.waiting.contains_key(&next) {
            next += 1;
        }
        next
    }
}

impl Shared {
    fn new(device: Device, slices: &[Slice], partition: &Partition) -> Self {
        let mut buckets = Vec::new();
        let mut places = Vec::new();
        for (index, bucket) in partition.buckets().iter().enumerate() {
            let first = places.len();
            let end = slices.partition_point(|slice| slice.range.start < bucket.range.end);
            for slice in &slices[first..end] {
                places.push(Mutex::new(ParameterSum::new(slice, bucket, index)));
            }
            let sum = Sum::new(bucket, first..end, partition.ranks());
            buckets.push(Mutex::new(sum));
        }
        Self {
            device,
            is_whole: partition.ranks() == 1,
            buckets,
            places,
            expected: AtomicUsize::new(0),
            listener: Mutex::default(),
            taker: Mutex::default(),
            under_way: UnderWay::default(),
        }
    }

    /// Hands a gradient that is complete to what takes it, or adds it.
    fn take_or_add(&self, index: usize, gradient: Tensor) {
        if let Some(Taker(take)) = &mut *self.taker.lock().expect(UNPOISONED) {
            return take(index, gradient);
        }
        self.arrive(index, self.under_way.micro_batch(), Some(gradient));
    }

    /// Records that a parameter's gradient of a micro-batch is complete, or that it has none. Only
    /// the first call for each micro-batch counts.
    fn arrive(&self, index: usize, micro_batch: usize, gradient: Option<Tensor>) {
        let mut place = self.places[index].lock().expect(UNPOISONED);
        if micro_batch < place.next || place.waiting.contains_key(&micro_batch) {
            return;
        }
        place.waiting.insert(micro_batch, gradient);
        let next = place.next;
        place.next = place.next_missing();
        for micro_batch in next..place.next {
            if let Some(gradient) = place.waiting.remove(&micro_batch).flatten() {
                self.add(&mut place, &gradient);
            }
        }
        if place.next > next && place.next == self.expected.load(Ordering::SeqCst) {
            let bucket = place.bucket;
            drop(place);
            self.parameter_done(bucket);
        }
    }

    /// Records that one more parameter of a bucket is complete.
    fn parameter_done(&self, bucket: usize) {
        let is_complete = {
            let mut sum = self.buckets[bucket].lock().expect(UNPOISONED);
            sum.missing -= 1;
            sum.missing == 0
        };
        if is_complete {
            self.tell(bucket);
        }
    }

    fn tell(&self, bucket: usize) {
        if let Some(listener) = &*self.listener.lock().expect(UNPOISONED) {
            // A closed receiver has already reported its error.
            let _ = listener.send(bucket);
        }
    }

    fn add(&self, place: &mut ParameterSum, gradient: &Tensor) {
        if let Some(total) = &mut place.total {
            let _ =
                no_grad(|| total.f_add_(gradient)).expect("a gradient has its parameter's shape");
            return;
        }
        let total = shaped(&self.memory(place.bucket), &place.range, &place.shape);
        write_to(&total, gradient);
        place.total = Some(total);
    }

    /// Returns the memory of a bucket's sum. Its contents are arbitrary until written.
    fn memory(&self, bucket: usize) -> Tensor {
        let mut sum = self.buckets[bucket].lock().expect(UNPOISONED);
        let len = sum.len;
        sum.memory
            .get_or_insert_with(|| Tensor::empty([len], (Kind::Float, self.device)))
            .shallow_clone()
    }

    fn take(&self, bucket: usize) -> Tensor {
        let memory = self.memory(bucket);
        let (places, filled, len) = {
            let mut sum = self.buckets[bucket].lock().expect(UNPOISONED);
            if !self.is_whole {
                sum.memory = None;
            }
            if std::mem::replace(&mut sum.is_taken, true) {
                return memory;
            }
            (sum.places.clone(), sum.filled, sum.len)
        };
        for place in &self.places[places] {
            let mut place = place.lock().expect(UNPOISONED);
            if place.total.take().is_none() {
                let _ = no_grad(|| narrow(&memory, &place.range).zero_());
            }
        }
        let _ = no_grad(|| narrow(&memory, &(filled..len)).zero_());
        memory
    }
}

const UNPOISONED: &str = "no thread panicked while it added a gradient";

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, TryRecvError};

    use super::*;

    fn leaf(value: f32, kind: Kind) -> Tensor {
        Tensor::from_slice(&[value, value])
            .to_kind(kind)
            .set_requires_grad(true)
    }

    fn sum_of(leaves: &[Tensor], ranks: usize) -> GradientSum {
        let slice = |(i, leaf): (usize, &Tensor)| Slice {
            name: format!("{i}"),
            shape: vec![2],
            range: 2 * i as i64..2 * i as i64 + 2,
            kind: leaf.kind(),
        };
        let slices: Vec<_> = leaves.iter().enumerate().map(slice).collect();
        // The first two tensors share a bucket, each other one has its own.
        let lengths = [4]
            .into_iter()
            .chain(vec![2; leaves.len().saturating_sub(2)]);
        let partition = Partition::of_buckets(lengths.take(leaves.len()), ranks);
        GradientSum::new(leaves, &slices, &partition)
    }

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor).expect("an fp32 vector")
    }

    #[test]
    fn bf16_gradients_are_added_in_fp32() {
        let leaves = [leaf(1.0, Kind::BFloat16), leaf(1.0, Kind::Float)];
        let sum = sum_of(&leaves, 1);
        sum.begin(2, None);
        // 256 and 1 can be represented in bf16; their sum cannot.
        for (micro_batch, factor) in [256.0, 1.0].into_iter().enumerate() {
            sum.adder()
                .add(micro_batch, &(&leaves[0] * factor).sum(Kind::Float))
                .unwrap();
        }
        assert_eq!(
            numbers(&sum.finish().joined()),
            [257.0, 257.0, 0.0, 0.0],
            "parameters without a gradient are 0"
        );
        assert!(leaves.iter().all(|leaf| !leaf.grad().defined()));
    }

    #[test]
    fn the_sum_is_in_the_order_of_the_micro_batches_whoever_comes_first() {
        let leaves = [leaf(1.0, Kind::Float), leaf(1.0, Kind::Float)];
        let sum = sum_of(&leaves, 1);
        let factors = [1e8f64, -1e8, 1.0]; // another order would lose the 1
        let mut sums = Vec::new();
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            sum.begin(3, None);
            for micro_batch in order {
                sum.adder()
                    .add(
                        micro_batch,
                        &(&leaves[0] * factors[micro_batch]).sum(Kind::Float),
                    )
                    .unwrap();
            }
            sums.push(numbers(&sum.finish().joined()));
        }
        assert_eq!(sums, vec![vec![1.0, 1.0, 0.0, 0.0]; 3]);
    }

    #[test]
    fn a_micro_batch_without_a_gradient_does_not_hold_up_the_others() {
        let leaves = [leaf(1.0, Kind::Float), leaf(1.0, Kind::Float)];
        let sum = sum_of(&leaves, 1);
        sum.begin(2, None);
        sum.adder().add(1, &leaves[0].sum(Kind::Float)).unwrap();
        sum.adder().add(0, &leaves[1].sum(Kind::Float)).unwrap();
        assert_eq!(numbers(&sum.finish().joined()), [1.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn of_several_ranks_each_bucket_is_taken_alone_in_equal_pieces() {
        let leaves = [
            leaf(1.0, Kind::Float),
            leaf(1.0, Kind::Float),
            leaf(1.0, Kind::Float),
        ];
        let sum = sum_of(&leaves, 3);
        let buckets = sum.complete_buckets();
        for factor in [2.0, 3.0] {
            let (listener, told) = mpsc::channel();
            sum.begin(2, Some(listener));
            let loss = |factor: f64| ((&leaves[0] * factor) + &leaves[2]).sum(Kind::Float);
            sum.adder().add(0, &loss(factor)).unwrap();
            assert_eq!(
                told.try_recv(),
                Err(TryRecvError::Empty),
                "the second micro-batch is missing"
            );
            sum.adder().add(1, &loss(factor)).unwrap();
            sum.stop_notifying();
            let mut told: Vec<usize> = told.iter().collect();
            told.sort_unstable();
            assert_eq!(told, [0, 1], "each bucket is reported once");
            assert_eq!(numbers(&buckets.take(1)), [2.0, 2.0, 0.0]);
            let twice = 2.0 * factor as f32;
            assert_eq!(
                numbers(&buckets.take(0)),
                [twice, twice, 0.0, 0.0, 0.0, 0.0]
            );
        }
        let (listener, told) = mpsc::channel();
        sum.begin(0, Some(listener));
        assert_eq!(
            told.try_iter().count(),
            2,
            "without micro-batches all buckets are complete"
        );
        assert_eq!(
            numbers(&buckets.take(1)),
            [0.0; 3],
            "a bucket without gradients is 0"
        );
    }

    #[test]
    fn a_taker_has_each_gradient_once_and_the_sum_has_none() {
        let leaves = [leaf(1.0, Kind::BFloat16), leaf(1.0, Kind::Float)];
        let sum = sum_of(&leaves, 1);
        let (send, taken) = mpsc::channel();
        sum.begin_taking(move |index, gradient| {
            send.send((index, gradient.kind(), gradient.double_value(&[1])))
                .expect("somebody listens");
        });
        let loss = |factor: f64| (&leaves[0] * factor + &leaves[1] * 3.0).sum(Kind::Float);
        loss(2.0).backward();
        sum.end_taking();
        let mut taken: Vec<_> = taken.iter().collect();
        taken.sort_by_key(|(index, ..)| *index);
        let wanted = [(0, Kind::BFloat16, 2.0), (1, Kind::Float, 3.0)];
        assert_eq!(taken, wanted);
        // The next sum is not missing anything.
        sum.begin(1, None);
        sum.adder().add(0, &loss(5.0)).unwrap();
        assert_eq!(numbers(&sum.finish().joined()), [5.0, 5.0, 3.0, 3.0]);
    }
}
