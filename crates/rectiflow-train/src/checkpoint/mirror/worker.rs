//! The thread that keeps a mirror up to date, and the end of a run, which waits for it.
//!
//! After a failed pass the thread pauses, longer each time, and tries again for as long as the run
//! takes. The end waits while files are sent, and stops after `checkpoint.mirror_wait_secs`
//! without one.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    checkpoint::mirror::{
        pass::{Known, Pass},
        sides::Sides,
    },
    error::{Error, Result},
};

/// Time between two passes without news.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Least time between two passes.
const LEAST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause after failed passes.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Time between two warnings about a mirror that fails.
const WARN_EVERY: Duration = Duration::from_secs(600);
/// Failed passes in a row after which bytes that are sent no longer count as progress.
const HOPELESS: u32 = 3;
/// Names of missing files in a message.
const MOST_NAMES: usize = 8;

/// News for the thread.
enum News {
    /// Something was written.
    Look,
    /// The run has ended: one more pass, until it succeeds.
    Last,
}

/// The mirror of a run, kept by a thread.
#[derive(Debug)]
pub(crate) struct Mirror {
    sides: Sides,
    known: Arc<Known>,
    /// Failed passes in a row.
    failures: Arc<AtomicU32>,
    news: Sender<News>,
    /// Closed when the thread has ended.
    ended: Receiver<()>,
}

impl Mirror {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn start(sides: Sides) -> Result<Self> {
        let (news, heard) = channel();
        let (end, ended) = channel::<()>();
        let (known, failures) = (Arc::<Known>::default(), Arc::<AtomicU32>::default());
        let worker = Worker {
            sides: sides.clone(),
            known: Arc::clone(&known),
            failures: Arc::clone(&failures),
            trouble: Trouble::default(),
        };
        let body = move || {
            worker.work(&heard);
            drop(end);
        };
        let thread = thread::Builder::new().name("rectiflow-mirror".to_owned());
        let run_dir = sides.run_dir.clone();
        thread.spawn(body).map_err(Error::io(run_dir))?;
        Ok(Self {
            sides,
            known,
            failures,
            news,
            ended,
        })
    }

    /// Returns the mirror's address.
    pub(crate) fn url(&self) -> &str {
        self.sides.bucket.url()
    }

    /// Says that something was written. Never waits.
    pub(crate) fn look(&self) {
        // A thread that has ended by a panic has said so.
        let _ = self.news.send(News::Look);
    }

    /// Adds a checkpoint outside of the folder, which is sent as if it was there.
    pub(crate) fn add_spare(&self, place: PathBuf) {
        self.known.add_spare(place);
        self.look();
    }

    /// Waits until the mirror has everything, or for `patience` without progress. Returns what it
    /// lacks.
    pub(crate) fn leave(self, patience: Duration) -> Vec<String> {
        let _ = self.news.send(News::Last);
        let mut progress = self.progress();
        let (began, mut moved) = (Instant::now(), Instant::now());
        let mut is_told = false;
        while self.ended.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout)
        {
            let now = self.progress();
            if now != progress {
                (progress, moved) = (now, Instant::now());
            }
            if moved.elapsed() >= patience {
                break;
            }
            if !is_told && began.elapsed() > Duration::from_secs(3) {
                is_told = true;
                tracing::info!(
                    "waiting for the last files to reach the mirror {}; a second signal leaves \
                     them out",
                    self.url()
                );
            }
        }
        self.known.missing(&self.sides)
    }

    /// Returns numbers that change while files are sent.
    fn progress(&self) -> (u64, u64) {
        let is_hopeless = self.failures.load(Ordering::Relaxed) >= HOPELESS;
        let bytes = if is_hopeless {
            0
        } else {
            self.sides.bucket.sent_bytes()
        };
        (self.known.num_sent(), bytes)
    }

    /// Says what the mirror lacks at the end of a run.
    pub(crate) fn say_missing(url: &str, missing: &[String]) {
        if missing.is_empty() {
            return;
        }
        let mut names = missing[..missing.len().min(MOST_NAMES)].join(", ");
        if missing.len() > MOST_NAMES {
            names += &format!(" and {} more", missing.len() - MOST_NAMES);
        }
        tracing::error!(
            "the mirror {url} lacks: {names}. The run folder has them; the same command sends them \
             when it is run again"
        );
    }
}

/// What the thread has.
struct Worker {
    sides: Sides,
    known: Arc<Known>,
    failures: Arc<AtomicU32>,
    trouble: Trouble,
}

impl Worker {
    fn work(mut self, news: &Receiver<News>) {
        let mut is_last = false;
        loop {
            let pass = Pass {
                sides: &self.sides,
                known: &self.known,
                is_last,
            };
            let passed = pass.run();
            let pause = match passed {
                Ok(()) => {
                    self.failures.store(0, Ordering::Relaxed);
                    self.trouble.end(self.sides.bucket.url());
                    if is_last {
                        return;
                    }
                    LEAST_PAUSE
                }
                Err(error) => {
                    self.failures.fetch_add(1, Ordering::Relaxed);
                    self.trouble.note(self.sides.bucket.url(), &error)
                }
            };
            let has_failed = self.trouble.num_failed > 0;
            match rest(news, pause, has_failed) {
                Some(News::Last) => is_last = true,
                Some(News::Look) => {}
                None => return,
            }
        }
    }
}

/// Waits for `pause`, and unless a pass has failed for news after that. Returns `Look` when it is
/// time for a pass, `None` if the run is gone.
fn rest(news: &Receiver<News>, pause: Duration, has_failed: bool) -> Option<News> {
    let began = Instant::now();
    let longest = if has_failed { pause } else { LOOK_EVERY };
    let mut is_news = false;
    loop {
        let least = if is_news { pause } else { longest };
        let left = least.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Some(News::Look);
        }
        match news.recv_timeout(left) {
            Ok(News::Last) => return Some(News::Last),
            // A pause after a failure is not cut short by the next checkpoint.
            Ok(News::Look) => is_news = !has_failed,
            Err(RecvTimeoutError::Timeout) => return Some(News::Look),
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}

/// Failed passes in a row.
#[derive(Debug, Default)]
struct Trouble {
    num_failed: u32,
    since: Option<Instant>,
    warned: Option<Instant>,
}

impl Trouble {
    /// Counts a failed pass, warns if it is time, and returns the pause before the next one.
    fn note(&mut self, url: &str, error: &Error) -> Duration {
        self.since.get_or_insert_with(Instant::now);
        let pause = pause_after(self.num_failed);
        self.num_failed += 1;
        if self
            .warned
            .is_none_or(|warned| warned.elapsed() >= WARN_EVERY)
        {
            self.warned = Some(Instant::now());
            tracing::warn!(
                "the mirror {url} could not be brought up to date: {error}. Training continues, \
                 and the mirror is tried again"
            );
        }
        pause
    }

    /// Says that a pass has succeeded after others had failed.
    fn end(&mut self, url: &str) {
        if let Some(since) = self.since {
            tracing::info!(
                "the mirror {url} is up to date again after {} failed tries in {} s",
                self.num_failed,
                since.elapsed().as_secs()
            );
        }
        *self = Self::default();
    }
}

/// Returns the pause after a number of earlier failures in a row.
fn pause_after(num_failed: u32) -> Duration {
    let full = Duration::from_secs(1 << num_failed.min(10));
    full.min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_minute() {
        let secs = |failed| pause_after(failed).as_secs();
        assert_eq!([0, 1, 2, 5, 6, 100].map(secs), [1, 2, 4, 32, 60, 60]);
    }

    #[test]
    fn news_end_a_rest_but_not_one_after_a_failure() {
        let (sender, news) = channel();
        let short = Duration::from_millis(20);
        sender.send(News::Look).expect("the thread listens");
        let began = Instant::now();
        assert!(matches!(rest(&news, short, false), Some(News::Look)));
        assert!(began.elapsed() < LOOK_EVERY / 2);

        sender.send(News::Look).expect("the thread listens");
        let began = Instant::now();
        assert!(matches!(rest(&news, short, true), Some(News::Look)));
        assert!(began.elapsed() >= short);

        sender.send(News::Last).expect("the thread listens");
        assert!(matches!(rest(&news, LOOK_EVERY, true), Some(News::Last)));
        drop(sender);
        assert!(rest(&news, short, true).is_none());
    }
}
