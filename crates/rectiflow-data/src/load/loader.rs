//! The loader: steps in order, read ahead by one background thread.
//!
//! `order`, `epoch`, `lanes` and `window` decide which samples a step holds; `batch` and, in
//! `window` and `owned` mode, `feed` read their bytes and text. The thread works at most two steps
//! ahead of the consumer (one is ready, one in progress) and uses rayon's threads for prompts and
//! micro-batches. In `local` mode steps of few micro-batches are read in groups (`local_reader`).
//! Timing never changes what is delivered. An error reaches the consumer at the step
//! that it belongs to; the next call tries that step again. Dropping the loader ends the thread.

use std::{
    ops::Range,
    panic::resume_unwind,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use crate::{
    error::{Error, Result},
    load::{
        batch::{Source, Step},
        feed::Feed,
        local_reader::{LocalReader, group_len},
        setup::LoaderSetup,
    },
    order::{Order, OrderSettings, RankOf, epoch::Steps, window::Windows},
};
use crossbeam_channel::{Receiver, Sender, bounded};

/// An endless sequence of steps.
#[derive(Debug)]
pub struct Loader {
    setup: Arc<LoaderSetup>,
    position: u64,
    ahead: Option<ReadAhead>,
}

impl Loader {
    /// The steps of `settings` over the training samples of `sources`, from step 0. Reads nothing
    /// yet.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the settings, the amounts or the number of ranks cannot work, or the
    /// data sets were encoded by different VAEs.
    pub fn new(sources: Vec<Source>, settings: OrderSettings, rank: RankOf) -> Result<Self> {
        let setup = LoaderSetup::new(sources, settings, rank)?;
        Ok(Self {
            setup: Arc::new(setup),
            position: 0,
            ahead: None,
        })
    }

    /// Sets the ranks that run on this machine and share its disk cache, this one included; by
    /// default this one alone. A full cache keeps what these ranks need soonest. What is delivered
    /// does not depend on it.
    #[must_use]
    pub fn on_machine_with(self, ranks: Range<usize>) -> Self {
        self.with_setup(|setup| setup.on_machine_with(ranks))
    }

    /// Limits the bytes of latents and text that `window` and `owned` mode hold at once. The
    /// default covers the windows that are open at one time and one more per lane. The limit is a
    /// hard one: bytes are reserved before they are requested. A loader also holds three steps of
    /// host batches.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the windows that are open at one time need more, with the bytes
    /// needed.
    pub fn read_ahead(self, bytes: u64) -> Result<Self> {
        let needed = self.least_read_ahead_bytes();
        if bytes < needed {
            let reason = format!(
                "expected at least {needed} bytes for the open windows of this rank's lanes, \
                 found {bytes}; allow more, or lower window_samples or lanes"
            );
            return Err(Error::Invalid {
                what: "read_ahead".to_owned(),
                reason,
            });
        }
        Ok(self.with_setup(|setup| LoaderSetup {
            read_ahead_bytes: bytes,
            ..setup
        }))
    }

    fn with_setup(self, change: impl FnOnce(LoaderSetup) -> LoaderSetup) -> Self {
        let Self {
            setup,
            position,
            ahead,
        } = self;
        // Ends the reading thread, which shares the setup.
        drop(ahead);
        let setup = Arc::into_inner(setup).expect("only the reading thread shares the setup");
        Self {
            setup: Arc::new(change(setup)),
            position,
            ahead: None,
        }
    }

    /// Checks that `owned` mode has the disk space that it needs: data sets at a URL need a cache
    /// with room for one window per lane of this rank, and should have room for the lanes' shares.
    /// [`Loader::next_step`] checks it too.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the bytes that are enough.
    pub fn check_cache(&self) -> Result<()> {
        self.setup.check_cache()
    }

    /// The smallest limit that [`Loader::read_ahead`] accepts: 0 in `local` mode, which holds
    /// nothing ahead.
    pub fn least_read_ahead_bytes(&self) -> u64 {
        self.setup.least_read_ahead_bytes()
    }

    /// Limit in bytes of what `window` and `owned` mode hold at once.
    pub fn read_ahead_bytes(&self) -> u64 {
        self.setup.read_ahead_bytes
    }

    /// The order of the samples.
    pub fn order(&self) -> &Order {
        &self.setup.order
    }

    /// Hash of everything that decides what the steps hold. A position is valid only for the hash
    /// it was saved with.
    pub fn order_hash(&self) -> String {
        self.setup.order.hash().to_owned()
    }

    /// The step that [`Loader::next_step`] returns next.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Moves to a step without reading the steps between.
    pub fn seek(&mut self, step: u64) {
        if step != self.position {
            self.ahead = None;
            self.position = step;
        }
    }

    /// The mixed and padded shares of this rank's part of the first `num_steps` steps. Draws and
    /// tokenises their prompts, reads no latents and does not move the position.
    ///
    /// # Errors
    /// The errors of reading text.
    pub fn chunk_shares(&self, num_steps: u64) -> Result<ChunkShares> {
        let setup = &self.setup;
        let mut steps = Steps::new(setup.order.clone());
        let mut windows = Windows::new(setup.order.clone());
        let mut shares = ChunkShares::default();
        for step in 0..num_steps {
            let plan = steps.plan(step);
            for slot in setup.slots_of(&plan) {
                let row_refs =
                    windows.samples(&slot, |stream, row_refs| setup.count(stream, row_refs))?;
                shares.add(&setup.count(setup.stream(&slot), &row_refs)?);
            }
        }
        Ok(shares)
    }

    /// This rank's part of the next step.
    ///
    /// # Errors
    /// The errors of reading: [`Error::Io`], [`Error::Remote`], [`Error::Damaged`] or
    /// [`Error::Malformed`]; the position does not move. Those of [`Loader::check_cache`].
    ///
    /// # Panics
    /// If the reading thread panicked.
    pub fn next_step(&mut self) -> Result<Step> {
        if self.ahead.is_none() {
            self.check_cache()?;
        }
        let ahead = self
            .ahead
            .get_or_insert_with(|| ReadAhead::start(self.setup.clone(), self.position));
        let step = ahead.next();
        match &step {
            Ok(step) => self.position = step.step + 1,
            Err(_) => self.ahead = None,
        }
        step
    }
}

/// How well windows group prompts of one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChunkShares {
    /// Micro-batches counted.
    pub micro_batches: u64,
    /// Micro-batches whose samples differ in their number of chunks.
    pub mixed: u64,
    /// Chunks that the text encoders process, padding included.
    pub chunks: u64,
    /// Chunks without text, which pad shorter samples to the longest of their micro-batch.
    pub padding: u64,
}

impl ChunkShares {
    /// Fraction of micro-batches that are mixed, 0 to 1.
    pub fn mixed_share(&self) -> f64 {
        self.mixed as f64 / self.micro_batches.max(1) as f64
    }

    /// Fraction of chunks that are padding, 0 to 1.
    pub fn padded_share(&self) -> f64 {
        self.padding as f64 / self.chunks.max(1) as f64
    }

    fn add(&mut self, counts: &[u8]) {
        let longest = counts.iter().copied().max().unwrap_or(0);
        let sum: u64 = counts.iter().copied().map(u64::from).sum();
        let chunks = counts.len() as u64 * u64::from(longest);
        self.micro_batches += 1;
        self.mixed += u64::from(counts.iter().any(|&count| count != longest));
        self.chunks += chunks;
        self.padding += chunks - sum;
    }
}

/// The thread that reads ahead, and the channel that its steps arrive on.
#[derive(Debug)]
struct ReadAhead {
    steps: Option<Receiver<Result<Step>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ReadAhead {
    fn start(setup: Arc<LoaderSetup>, from: u64) -> Self {
        let (sender, steps) = bounded(group_len(&setup));
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = thread::Builder::new()
            .name("rectiflow-loader".to_owned())
            .spawn(move || read(&setup, from, &sender, &flag))
            .expect("the system can start a thread");
        Self {
            steps: Some(steps),
            stop,
            thread: Some(thread),
        }
    }

    fn next(&mut self) -> Result<Step> {
        let steps = self.steps.as_ref().expect("only `drop` takes the receiver");
        if let Ok(step) = steps.recv() {
            return step;
        }
        let thread = self
            .thread
            .take()
            .expect("a thread ends without an error only once");
        let panic = thread
            .join()
            .expect_err("the thread returns only after an error or a panic");
        resume_unwind(panic)
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Dropping the receiver wakes a thread that waits to send.
        self.steps = None;
        if let Some(thread) = self.thread.take() {
            // The steps are no longer wanted, so a panic of the thread is ignored.
            let _ = thread.join();
        }
    }
}

fn read(setup: &LoaderSetup, from: u64, sender: &Sender<Result<Step>>, stop: &AtomicBool) {
    if setup.order.settings().mode.has_windows() {
        let mut feed = Feed::new(setup, from, stop);
        send_steps(from, sender, |step| feed.step(step));
    } else {
        LocalReader::new(setup, from, stop).send(sender);
    }
}

/// Sends the steps that `read` returns, until it returns an error or no receiver is left.
fn send_steps(from: u64, sender: &Sender<Result<Step>>, mut read: impl FnMut(u64) -> Result<Step>) {
    for step in from.. {
        let read = read(step);
        let has_failed = read.is_err();
        if sender.send(read).is_err() || has_failed {
            return;
        }
    }
}
