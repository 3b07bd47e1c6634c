//! When each stage of a preparation works, thread by thread: whether the encoder waits for
//! pictures.
//!
//! Sums are exact. Of the single stretches the first are kept, enough for a picture of the first
//! thousands of samples.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use serde::Serialize;

/// Stretches that are kept: 1.5 MB.
const MOST_STRETCHES: usize = 1 << 16;

/// A stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// The first pass: hashes and headers of all pictures.
    Facts,
    /// Reading a picture, from memory, a disk or a URL.
    Read,
    /// Decoding it.
    Decode,
    /// Its signature, for near-copies.
    Sign,
    /// Resize and crop.
    Resize,
    /// Reading its text.
    Text,
    /// The encoder waits for pictures.
    Wait,
    /// The encoder works.
    Encode,
    /// Writing latents and texts.
    Write,
}

/// A stretch of time in which a thread did one thing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Stretch {
    /// What it did.
    pub work: Work,
    /// 0 is the thread that encodes and writes; the others prepare pictures.
    pub thread: usize,
    /// Begin, in seconds from that of the preparation.
    pub from_secs: f64,
    /// End.
    pub to_secs: f64,
}

/// How the thread of the encoder spent its time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct EncoderSecs {
    /// Encoding.
    pub encode: f64,
    /// Waiting for the first picture.
    pub first_wait: f64,
    /// Waiting for later pictures.
    pub wait: f64,
    /// Writing.
    pub write: f64,
}

/// The stretches of a preparation.
#[derive(Debug)]
pub(crate) struct Timeline {
    began: Instant,
    done: Mutex<Done>,
}

#[derive(Debug, Default)]
struct Done {
    stretches: Vec<Stretch>,
    secs: EncoderSecs,
    has_waited: bool,
}

impl Timeline {
    /// One that begins now.
    pub(crate) fn new() -> Self {
        Self {
            began: Instant::now(),
            done: Mutex::default(),
        }
    }

    /// Runs `run` and notes when.
    pub(crate) fn time<T>(&self, work: Work, run: impl FnOnce() -> T) -> T {
        let from_secs = self.began.elapsed().as_secs_f64();
        let result = run();
        let to_secs = self.began.elapsed().as_secs_f64();
        // Threads of a pool have a number; that of the caller has none.
        let thread = rayon::current_thread_index().map_or(0, |index| index + 1);
        self.note(Stretch {
            work,
            thread,
            from_secs,
            to_secs,
        });
        result
    }

    fn note(&self, stretch: Stretch) {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let secs = stretch.to_secs - stretch.from_secs;
        match stretch.work {
            Work::Encode => done.secs.encode += secs,
            Work::Write => done.secs.write += secs,
            Work::Wait if done.has_waited => done.secs.wait += secs,
            Work::Wait => {
                done.secs.first_wait = secs;
                done.has_waited = true;
            }
            _ => {}
        }
        if done.stretches.len() < MOST_STRETCHES {
            done.stretches.push(stretch);
        }
    }

    /// The stretches so far, and how the encoder's thread spent its time.
    pub(crate) fn take(&self) -> (Vec<Stretch>, EncoderSecs) {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let Done {
            stretches, secs, ..
        } = std::mem::take(&mut *done);
        (stretches, secs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_all_stretches_and_the_first_wait_is_apart() {
        let timeline = Timeline::new();
        let stretch = |work, from_secs, to_secs| Stretch {
            work,
            thread: 0,
            from_secs,
            to_secs,
        };
        timeline.note(stretch(Work::Wait, 0.0, 2.0));
        for turn in 0..MOST_STRETCHES {
            let from = 2.0 + turn as f64;
            timeline.note(stretch(Work::Encode, from, from + 0.5));
            timeline.note(stretch(Work::Wait, from + 0.5, from + 0.75));
            timeline.note(stretch(Work::Write, from + 0.75, from + 1.0));
        }
        let (stretches, secs) = timeline.take();
        assert_eq!(stretches.len(), MOST_STRETCHES);
        let turns = MOST_STRETCHES as f64;
        let expected = EncoderSecs {
            encode: turns / 2.0,
            first_wait: 2.0,
            wait: turns / 4.0,
            write: turns / 4.0,
        };
        assert_eq!(secs, expected);
    }

    #[test]
    fn a_stretch_has_its_thread() {
        let timeline = Timeline::new();
        timeline.time(Work::Encode, || {});
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        pool.unwrap().install(|| timeline.time(Work::Decode, || {}));
        let (stretches, _) = timeline.take();
        let threads: Vec<_> = stretches.iter().map(|it| (it.work, it.thread)).collect();
        assert_eq!(threads, [(Work::Encode, 0), (Work::Decode, 1)]);
        assert!(stretches.iter().all(|it| it.from_secs <= it.to_secs));
    }
}
