//! Who is told of a run's events beside the event file: each has a thread and a bounded queue of
//! its own, so that none can slow or stop the run.
//!
//! A full queue drops the event and counts it. At the end the run waits a bounded time for what is
//! queued.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, channel, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    error::Error,
    measure::{
        metrics::Event,
        trackers::{self, About, Tracker},
    },
    recipe::{Checked, report::Destination},
    run::alerts::Alerts,
};

/// Events that wait for a watcher at most: a few minutes of short steps.
const QUEUE: usize = 4096;
/// Time after which an empty queue is looked at again.
const PAUSE: Duration = Duration::from_millis(100);
/// Time for what is queued when the run ends.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// What a watcher is sent.
enum Message {
    Event(Arc<Event>),
    /// The run ends with this error.
    Failed(String),
}

/// A watcher with its thread.
struct Watcher {
    name: &'static str,
    queue: SyncSender<Message>,
    /// Closed when the thread has ended.
    ended: Receiver<()>,
    num_dropped: u64,
    /// Time for what is queued when the run ends.
    last_words: Duration,
}

/// The watchers of a run; none on ranks other than 0.
#[derive(Default)]
pub(super) struct Watchers {
    watchers: Vec<Watcher>,
    /// Time that the step's thread has spent here.
    spent: Duration,
}

impl Watchers {
    /// Starts the watchers of the recipe.
    pub(super) fn start(checked: &Checked, rank: usize) -> Self {
        let mut started = Self::default();
        if rank != 0 {
            return started;
        }
        let recipe = &checked.recipe;
        for &to in &recipe.report.to {
            let about = About {
                run_dir: recipe.run.dir.clone(),
                recipe: recipe.to_toml(),
                is_past: false,
            };
            started.add_tracker(to, about);
        }
        if recipe.report.alert.is_set() {
            let mut alerts = Alerts::new(&recipe.report.alert, &recipe.run.dir);
            let last_words = alerts.longest();
            let watch = move |message| match message {
                Message::Event(event) => alerts.take(&event),
                Message::Failed(reason) => alerts.take_failure(&reason),
            };
            started.add("alerts", last_words, watch);
        }
        started
    }

    fn add_tracker(&mut self, to: Destination, about: About) {
        let name = trackers::folder(to);
        let mut tracker = Tracker::new(to, about);
        let mut is_broken = false;
        let watch = move |message| {
            let written = match message {
                Message::Event(event) => tracker.write(&event),
                Message::Failed(reason) => tracker.fail(&reason),
            };
            if let (Err(error), false) = (&written, is_broken) {
                tracing::warn!("the files of {name}: {error}; the run continues");
            }
            is_broken = written.is_err();
        };
        self.add(name, LAST_WORDS, watch);
    }

    fn add(
        &mut self,
        name: &'static str,
        last_words: Duration,
        mut watch: impl FnMut(Message) + Send + 'static,
    ) {
        let (queue, messages) = sync_channel(QUEUE);
        let (end, ended) = channel::<()>();
        let body = move || {
            // A thread that waits for the queue would be woken by each event, and where all cores
            // are busy it takes the place of the step's thread: tenths of a millisecond each time.
            loop {
                match messages.try_recv() {
                    Ok(message) => watch(message),
                    Err(TryRecvError::Empty) => thread::sleep(PAUSE),
                    Err(TryRecvError::Disconnected) => break,
                }
            }
            // A tracker closes its files before the run stops waiting.
            drop(watch);
            drop(end);
        };
        if let Err(error) = thread::Builder::new().name(name.to_owned()).spawn(body) {
            tracing::warn!("{name}: no thread could be started: {error}; the run continues");
            return;
        }
        self.watchers.push(Watcher {
            name,
            queue,
            ended,
            num_dropped: 0,
            last_words,
        });
    }

    /// Offers an event to all watchers, without waiting for any.
    pub(super) fn offer(&mut self, event: &Event) {
        if self.watchers.is_empty() {
            return;
        }
        let began = Instant::now();
        let shared = Arc::new(event.clone());
        for watcher in &mut self.watchers {
            let message = Message::Event(Arc::clone(&shared));
            if let Err(TrySendError::Full(_)) = watcher.queue.try_send(message) {
                watcher.num_dropped += 1;
            }
        }
        self.spent += began.elapsed();
    }

    /// Returns the seconds that the steps' thread has spent here; `None` without watchers.
    pub(super) fn spent_secs(&self) -> Option<f64> {
        (!self.watchers.is_empty()).then_some(self.spent.as_secs_f64())
    }

    /// Tells the watchers of the error that ends the run, if any, and waits a bounded time for what
    /// is queued.
    pub(super) fn leave(self, error: Option<&Error>, run_secs: f64) {
        if self.watchers.is_empty() {
            return;
        }
        let spent = self.spent.as_secs_f64();
        tracing::debug!("watchers took {spent:.4} s of {run_secs:.1} s of the steps' thread");
        for watcher in self.watchers {
            let Watcher {
                name,
                queue,
                ended,
                num_dropped,
                last_words,
            } = watcher;
            if let Some(error) = error {
                let _ = queue.try_send(Message::Failed(error.to_string()));
            }
            drop(queue);
            let is_late =
                ended.recv_timeout(last_words) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            if is_late {
                let secs = last_words.as_secs();
                tracing::warn!("{name}: what was queued is lost after {secs} s of waiting");
            }
            if num_dropped > 0 {
                tracing::warn!("{name}: {num_dropped} events came too quickly and were dropped");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    fn event(step: u64) -> Event {
        Event::SaveFailed {
            step,
            reason: "no space".to_owned(),
        }
    }

    #[test]
    fn a_watcher_that_hangs_costs_events_and_no_time() {
        let gate = Arc::new(Mutex::new(()));
        let held = gate.lock().expect("nobody else holds it");
        let seen = Arc::new(AtomicUsize::new(0));
        let mut watchers = Watchers::default();
        let (waits, counts) = (Arc::clone(&gate), Arc::clone(&seen));
        let watch = move |_| {
            drop(waits.lock());
            counts.fetch_add(1, Ordering::Relaxed);
        };
        watchers.add("hangs", Duration::from_millis(50), watch);
        let began = Instant::now();
        for step in 0..QUEUE as u64 + 100 {
            watchers.offer(&event(step));
        }
        assert!(began.elapsed() < Duration::from_secs(5));
        let dropped = watchers.watchers[0].num_dropped;
        assert!((99..=100).contains(&dropped), "{dropped}");
        watchers.leave(None, 1.0);
        assert!(began.elapsed() < Duration::from_secs(10));
        assert_eq!(seen.load(Ordering::Relaxed), 0);
        drop(held);
    }

    #[test]
    fn what_is_queued_at_the_end_is_waited_for() {
        let seen = Arc::new(AtomicUsize::new(0));
        let counts = Arc::clone(&seen);
        let mut watchers = Watchers::default();
        let watch = move |_| {
            thread::sleep(Duration::from_millis(1));
            counts.fetch_add(1, Ordering::Relaxed);
        };
        watchers.add("slow", Duration::from_secs(60), watch);
        for step in 0..50 {
            watchers.offer(&event(step));
        }
        let spent = watchers.spent_secs().expect("there is a watcher");
        assert!(spent > 0.0 && spent < 1.0, "{spent} s");
        watchers.leave(Some(&Error::Interrupted), 1.0);
        assert_eq!(seen.load(Ordering::Relaxed), 51);
        assert_eq!(Watchers::default().spent_secs(), None);
    }
}
