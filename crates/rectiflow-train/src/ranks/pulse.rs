//! The pulse of a rank: a thread that reports what the rank is doing, and watches for the failure
//! of another one.
//!
//! Twice a second every rank writes a beat to the store: a count, its activity and for how long.
//! Beats are read only when something is wrong: a rank whose collective fails or takes too long
//! asks for them. A rank whose count does not change is dead or stopped. A rank that has been in an
//! activity other than a collective for longer than the time-out is stuck there. The first rank
//! that detects a failure, or fails itself, writes the reason into the store. All others read it
//! with their next beat, so all report the same reason. Only this thread sends requests to the
//! store: if rank 0, which serves it, is stopped, they never return, and that is detected too.

use std::{
    mem::replace,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rectiflow_data::order::RankOf;

use crate::ranks::c10d::Store;

const BEAT: Duration = Duration::from_millis(500);
/// Longest time between beats of a living rank, even on a busy machine.
const SILENCE: Duration = Duration::from_millis(3000);
const FAILURE: &str = "failure";

/// What a rank is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Activity {
    /// In words, for example "reading the data of step 12".
    what: String,
    kind: Kind,
}

/// An activity of this rank. It ends when this value is dropped, and the previous one continues.
#[derive(Debug)]
#[must_use = "the activity ends when this is dropped"]
pub(crate) struct Doing<'a> {
    pulse: &'a Pulse,
    before: Activity,
}

impl Drop for Doing<'_> {
    fn drop(&mut self) {
        self.pulse.set(self.before.clone());
    }
}

/// How long the other ranks wait for an activity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Work that must end within the time-out.
    Work,
    /// Work without a time limit: files, pictures, the test loss.
    Long,
    /// Waiting for others.
    Waiting,
}

/// A rank's beat, as read by another rank.
#[derive(Debug, Clone)]
struct Beat {
    text: String,
    /// When it was first seen.
    since: Instant,
}

#[derive(Debug)]
struct Shared {
    rank: RankOf,
    doing: Activity,
    since: Instant,
    /// The work that began last, in words. It may have ended.
    last_begun: String,
    /// The reason of the first failure on any rank.
    failure: Option<String>,
    /// The reason of this rank's failure, to be sent to the others.
    to_tell: Option<String>,
    /// Whether to read the beats of all ranks.
    asked: bool,
    beats: Vec<Option<Beat>>,
    /// Time of the store's last answer.
    answered: Instant,
    ends: bool,
}

/// Handle of the thread.
#[derive(Debug)]
pub(crate) struct Pulse {
    shared: Arc<(Mutex<Shared>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Starts the thread, with its own connection to the store.
    pub(crate) fn start(store: Store, rank: RankOf) -> Self {
        let now = Instant::now();
        let shared = Shared {
            rank,
            doing: Activity {
                what: "starting".to_owned(),
                kind: Kind::Long,
            },
            since: now,
            last_begun: "starting".to_owned(),
            failure: None,
            to_tell: None,
            asked: false,
            beats: vec![None; rank.ranks],
            answered: now,
            ends: false,
        };
        let shared = Arc::new((Mutex::new(shared), Condvar::new()));
        let own = shared.clone();
        let thread = thread::Builder::new()
            .name("rectiflow-pulse".to_owned())
            .spawn(move || beat(&own, &store))
            .expect("the system can start one more thread");
        Self {
            shared,
            thread: Some(thread),
        }
    }

    /// Begins work that must end within the time-out.
    pub(crate) fn work(&self, what: String) -> Doing<'_> {
        self.lock().last_begun.clone_from(&what);
        self.begin(Activity {
            what,
            kind: Kind::Work,
        })
    }

    /// Begins work without a time limit.
    pub(crate) fn long(&self, what: String) -> Doing<'_> {
        self.lock().last_begun.clone_from(&what);
        self.begin(Activity {
            what,
            kind: Kind::Long,
        })
    }

    /// Begins to wait for other ranks in a collective.
    pub(crate) fn wait_in(&self, collective: &str) -> Doing<'_> {
        let what = format!("{}, in {collective}", self.lock().doing.what);
        self.begin(Activity {
            what,
            kind: Kind::Waiting,
        })
    }

    /// Returns the work that this rank began last. When the rank fails, that work has just ended.
    pub(crate) fn last_begun(&self) -> String {
        self.lock().last_begun.clone()
    }

    /// Returns the reason of a failure on any rank, if one is known.
    pub(crate) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Tells all ranks that this one stops because of `reason`. Returns the reason that all ranks
    /// report, which is the first one told.
    pub(crate) fn tell(&self, reason: String) -> String {
        let mut shared = self.lock();
        shared.to_tell = Some(reason.clone());
        self.shared.1.notify_all();
        let end = Instant::now() + SILENCE;
        while shared.failure.is_none() && Instant::now() < end {
            shared = self
                .shared
                .1
                .wait_timeout(shared, BEAT)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        shared.failure.clone().unwrap_or(reason)
    }

    /// Finds the ranks at fault when a collective has failed or waited for `timeout`. Returns
    /// `None` if all ranks are alive and may still be working.
    pub(crate) fn investigate(&self, timeout: Duration) -> Option<String> {
        let began = Instant::now();
        self.lock().asked = true;
        self.shared.1.notify_all();
        while began.elapsed() < SILENCE + BEAT {
            thread::sleep(BEAT / 5);
            if let Some(failure) = self.failure() {
                return Some(failure);
            }
        }
        let mut shared = self.lock();
        shared.asked = false;
        shared.culprits(timeout)
    }

    fn begin(&self, activity: Activity) -> Doing<'_> {
        let before = self.set(activity);
        Doing {
            pulse: self,
            before,
        }
    }

    /// Sets the current activity and returns the previous one.
    fn set(&self, activity: Activity) -> Activity {
        let mut shared = self.lock();
        shared.since = Instant::now();
        replace(&mut shared.doing, activity)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        let answers = {
            let mut shared = self.lock();
            shared.ends = true;
            shared.answered.elapsed() < SILENCE
        };
        self.shared.1.notify_all();
        // A thread that waits for a lost store ends with the process.
        if let Some(thread) = self.thread.take().filter(|_| answers) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn own_beat(&self, count: u64) -> String {
        let kind = match self.doing.kind {
            Kind::Work => "work",
            Kind::Long => "long",
            Kind::Waiting => "waiting",
        };
        format!(
            "{count}\t{kind}\t{}\t{}",
            self.since.elapsed().as_secs(),
            self.doing.what
        )
    }

    /// Returns the ranks that keep the others waiting, as "rank 2 ...", separated by commas.
    fn culprits(&self, timeout: Duration) -> Option<String> {
        let others = (0..self.rank.ranks).filter(|&rank| rank != self.rank.rank);
        if self.answered.elapsed() > SILENCE {
            let last = self.beats[0].as_ref().map_or_else(String::new, |beat| {
                format!("; it was last {}", seen(beat).2)
            });
            return Some(format!(
                "rank 0, or the process that serves the store, is dead or stopped{last}"
            ));
        }
        let (mut silent, mut stuck, mut waiting) = (Vec::new(), Vec::new(), 0);
        for rank in others {
            let Some(beat) = &self.beats[rank] else {
                silent.push(format!("rank {rank} has not started"));
                continue;
            };
            let (kind, secs, what) = seen(beat);
            if beat.since.elapsed() >= SILENCE - BEAT {
                silent.push(format!(
                    "rank {rank} is dead or stopped; it was last {what}"
                ));
            } else if kind == "work" && secs >= timeout.as_secs() {
                stuck.push(format!("rank {rank} has been {what} for {secs} s"));
            } else if kind == "waiting" {
                waiting += 1;
            }
        }
        let found = if silent.is_empty() { stuck } else { silent };
        if !found.is_empty() {
            return Some(found.join(", "));
        }
        (waiting == self.rank.ranks - 1)
            .then(|| "all ranks are alive and wait for each other: the network between them does not work".to_owned())
    }
}

/// Returns the kind, seconds and words of a beat.
fn seen(beat: &Beat) -> (&str, u64, &str) {
    let mut fields = beat.text.splitn(4, '\t').skip(1);
    let mut next = || fields.next().unwrap_or_default();
    (next(), next().parse().unwrap_or(0), next())
}

fn beat(shared: &(Mutex<Shared>, Condvar), store: &Store) {
    let lock = || shared.0.lock().unwrap_or_else(PoisonError::into_inner);
    let rank = lock().rank;
    for count in 0u64.. {
        let (own, to_tell, asked) = {
            let shared = lock();
            if shared.ends {
                return;
            }
            (shared.own_beat(count), shared.to_tell.clone(), shared.asked)
        };
        let answer = exchange(store, rank, &own, to_tell.as_deref(), asked);
        let mut state = lock();
        let is_news = answer.is_ok();
        if let Ok((failure, beats)) = answer {
            state.answered = Instant::now();
            state.failure = state.failure.take().or(failure);
            for (rank, text) in beats {
                let known = state.beats[rank].take().filter(|known| known.text == text);
                state.beats[rank] = known.or(Some(Beat {
                    text,
                    since: Instant::now(),
                }));
            }
        }
        shared.1.notify_all();
        let is_urgent =
            state.ends || (is_news && state.to_tell.is_some() && state.failure.is_none());
        if !is_urgent {
            drop(
                shared
                    .1
                    .wait_timeout(state, BEAT)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
    }
}

/// The reason of a failure on any rank, and the requested beats as (rank, text).
type News = (Option<String>, Vec<(usize, String)>);

fn exchange(
    store: &Store,
    rank: RankOf,
    own: &str,
    to_tell: Option<&str>,
    asked: bool,
) -> Result<News, String> {
    let key = |rank: usize| format!("beat/{rank}");
    store.set(&key(rank.rank), own.as_bytes())?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let failure = match to_tell {
        Some(reason) => Some(text(store.set_once(FAILURE, reason.as_bytes())?)),
        None if store.has(FAILURE)? => Some(text(store.get(FAILURE, BEAT)?)),
        None => None,
    };
    // The beat of rank 0 is always read: once rank 0 is lost, the store no longer answers.
    let wanted = if asked { 0..rank.ranks } else { 0..1 };
    let mut beats = Vec::new();
    for other in wanted.filter(|&other| other != rank.rank) {
        if store.has(&key(other))? {
            beats.push((other, text(store.get(&key(other), BEAT)?)));
        }
    }
    Ok((failure, beats))
}
