//! Pictures through a model: several threads open and prepare the next batch while the model runs
//! the one before. Answers come in the order of the pictures.

use std::{
    sync::{Mutex, PoisonError},
    thread,
};

use crossbeam_channel::{Receiver, Sender, bounded};
use rayon::prelude::*;
use rectiflow_data::reject::Fault;

use crate::{
    error::Result,
    onnx::{
        input::Element,
        model::Model,
        preparation::{Elements, Memory, Preparation, Preparer},
    },
};

/// Batches that are ready at a time.
const READY: usize = 2;
/// Pictures that are opened at a time, at least: a few for each thread, since they differ in size.
const WINDOW: usize = 16;

/// What opening a picture has found.
#[derive(Debug)]
pub enum Opened<K> {
    /// A picture's file.
    File(K, Vec<u8>),
    /// It cannot be read.
    Fault(Fault),
    /// It needs no answer.
    Skip,
}

/// What is said of a picture.
#[derive(Debug)]
pub enum Answer<'a, K> {
    /// The numbers of the model.
    Numbers(K, &'a [f32]),
    /// It is no picture.
    Broken(K, Fault),
    /// It cannot be read.
    Unreadable(Fault),
    /// It needs no answer.
    Skipped,
}

/// Runs pictures through a model.
#[derive(Debug)]
pub struct Feed<'a> {
    /// The model.
    pub model: &'a mut Model,
    /// How its input is made.
    pub preparation: Preparation,
}

/// A picture on its way: open, and not prepared, or with its place in a batch.
enum Way<K> {
    Slot(K, usize),
    Broken(K, Fault),
    Unreadable(Fault),
    Skip,
}

/// Pictures in a row, of which some have slots in a batch.
struct Batch<K> {
    /// Index of the first picture.
    first: usize,
    ways: Vec<Way<K>>,
    elements: Elements,
    num_slots: usize,
}

impl Feed<'_> {
    /// Opens each of `items` with `open` on several threads, and tells `take` what the model says.
    ///
    /// # Errors
    /// Those of the model and of `take`, after which no more is opened.
    pub fn run<I: Sync, K: Send>(
        &mut self,
        items: &[I],
        open: &(dyn Fn(&I) -> Opened<K> + Sync),
        take: &mut dyn FnMut(&I, Answer<'_, K>) -> Result<()>,
    ) -> Result<()> {
        let preparer = Preparer::new(self.preparation, self.model.input());
        let filling = Filling {
            preparer: &preparer,
            batch: self.model.input().batch,
            is_fixed: self.model.input().is_fixed,
            element: self.model.input().element,
            memories: Mutex::default(),
        };
        let (ready, batches) = bounded(READY);
        let (used, unused) = bounded(READY + 1);
        thread::scope(|scope| {
            scope.spawn(|| filling.send(items, open, (ready, unused)));
            self.answer(items, take, (batches, used))
        })
    }

    fn answer<I, K>(
        &mut self,
        items: &[I],
        take: &mut dyn FnMut(&I, Answer<'_, K>) -> Result<()>,
        (batches, used): (Receiver<Batch<K>>, Sender<Elements>),
    ) -> Result<()> {
        for batch in batches {
            let rows = match batch.num_slots {
                0 => None,
                num_slots => Some(self.model.run(&batch.elements, num_slots)?),
            };
            // Its memory is used again; the other end may have ended.
            let _ = used.try_send(batch.elements);
            for (item, way) in items[batch.first..].iter().zip(batch.ways) {
                let answer = match (way, &rows) {
                    (Way::Slot(key, slot), Some(rows)) => Answer::Numbers(key, rows.row(slot)),
                    (Way::Broken(key, fault), _) => Answer::Broken(key, fault),
                    (Way::Unreadable(fault), _) => Answer::Unreadable(fault),
                    (Way::Skip | Way::Slot(..), _) => Answer::Skipped,
                };
                take(item, answer)?;
            }
        }
        Ok(())
    }
}

/// Pictures that are open and not yet in a batch.
struct Growing<K> {
    /// Index of the first one.
    first: usize,
    ways: Vec<Way<K>>,
    /// Pixels of those that have slots.
    pictures: Vec<Vec<u8>>,
}

impl<K> Default for Growing<K> {
    fn default() -> Self {
        Self {
            first: 0,
            ways: Vec::new(),
            pictures: Vec::new(),
        }
    }
}

impl<K> Growing<K> {
    /// Adds a picture, with its pixels if it gets a slot.
    fn push(&mut self, way: Way<K>, pixels: Option<Vec<u8>>) {
        self.ways.push(match way {
            Way::Slot(key, _) => Way::Slot(key, self.pictures.len()),
            other => other,
        });
        self.pictures.extend(pixels);
    }
}

/// Makes batches.
struct Filling<'a> {
    preparer: &'a Preparer,
    batch: usize,
    is_fixed: bool,
    element: Element,
    memories: Mutex<Vec<Memory>>,
}

impl Filling<'_> {
    /// Sends all items in batches, until the other end hangs up.
    fn send<I: Sync, K: Send>(
        &self,
        items: &[I],
        open: &(dyn Fn(&I) -> Opened<K> + Sync),
        (ready, unused): (Sender<Batch<K>>, Receiver<Elements>),
    ) {
        let mut growing = Growing::default();
        let size = self.batch.max(WINDOW);
        for window in items.chunks(size) {
            let opened = window.par_iter().map(|item| self.open(item, open));
            let opened: Vec<_> = opened.collect();
            for (way, pixels) in opened {
                growing.push(way, pixels);
                // Skipped pictures in great number need no batch to be counted.
                let is_full =
                    growing.pictures.len() == self.batch || growing.ways.len() >= 8 * size;
                if is_full && ready.send(self.batch_of(&mut growing, &unused)).is_err() {
                    return;
                }
            }
        }
        if !growing.ways.is_empty() {
            // The other end may have failed, and says so itself.
            let _ = ready.send(self.batch_of(&mut growing, &unused));
        }
    }

    /// The batch of what is open; the next one begins behind it.
    fn batch_of<K>(&self, growing: &mut Growing<K>, unused: &Receiver<Elements>) -> Batch<K> {
        let num_slots = match growing.pictures.len() {
            0 => 0,
            _ if self.is_fixed => self.batch,
            num_pictures => num_pictures,
        };
        let kept = unused.try_recv();
        let mut elements = kept.unwrap_or_else(|_| Elements::empty(self.element));
        if num_slots > 0 {
            self.preparer
                .fill(&growing.pictures, num_slots, &mut elements);
        }
        let ways = std::mem::take(&mut growing.ways);
        let first = growing.first;
        growing.first += ways.len();
        growing.pictures.clear();
        Batch {
            first,
            ways,
            elements,
            num_slots,
        }
    }

    /// Opens a picture, and prepares it if it has a file.
    fn open<I, K>(
        &self,
        item: &I,
        open: &(dyn Fn(&I) -> Opened<K> + Sync),
    ) -> (Way<K>, Option<Vec<u8>>) {
        match open(item) {
            Opened::Skip => (Way::Skip, None),
            Opened::Fault(fault) => (Way::Unreadable(fault), None),
            Opened::File(key, bytes) => match self.pixels(&bytes) {
                // Its number is given when it joins a batch.
                Ok(pixels) => (Way::Slot(key, 0), Some(pixels)),
                Err(fault) => (Way::Broken(key, fault), None),
            },
        }
    }

    fn pixels(&self, bytes: &[u8]) -> std::result::Result<Vec<u8>, Fault> {
        let mut memory = self.memories().pop().unwrap_or_default();
        let pixels = self.preparer.pixels(bytes, &mut memory);
        self.memories().push(memory);
        pixels
    }

    fn memories(&self) -> std::sync::MutexGuard<'_, Vec<Memory>> {
        self.memories.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
