//! The pulse of a rank: a thread that says what the rank is doing, and listens whether another one has failed.
//!
//! Twice a second every rank writes a beat to the store: a count, what it is doing and for how long. Nobody reads them
//! until something is wrong. A collective that fails or takes too long asks: a rank whose count stands still is dead or
//! stopped; one that has been at something other than a collective for longer than the time-out is stuck there. Whoever
//! finds out first, or fails itself, writes the reason into the store; all others find it with their next beat, so that
//! all say the same. All requests to the store are made by this thread: where rank 0, which serves it, is stopped, they
//! never return, and that is seen as well.

use std::{
    mem::replace,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rectiflow_data::order::RankOf;

use crate::ranks::c10d::Store;

const BEAT: Duration = Duration::from_millis(500);
/// Beats of a living rank come at least so often, busy machines included.
const SILENCE: Duration = Duration::from_millis(3000);
const FAILURE: &str = "failure";

/// What a rank is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Activity {
    /// In words: "reading the data of step 12".
    what: String,
    kind: Kind,
}

/// An activity that this rank has begun. It ends when this is dropped, and the rank is back at the one before.
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

/// Whether others may become impatient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Work that should be done within the time-out.
    Work,
    /// Work that may take long: files, pictures, the test loss.
    Long,
    /// Waiting for others.
    Waiting,
}

/// A rank's beat, as the others read it.
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
    /// The work that was begun last, in words; it may have ended.
    last_begun: String,
    /// What somebody has failed of.
    failure: Option<String>,
    /// What this rank has failed of, to be told to the others.
    to_tell: Option<String>,
    /// Whether all ranks' beats are to be read.
    asked: bool,
    beats: Vec<Option<Beat>>,
    /// When the store answered last.
    answered: Instant,
    ends: bool,
}

/// The thread, and this rank's end of it.
#[derive(Debug)]
pub(crate) struct Pulse {
    shared: Arc<(Mutex<Shared>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Starts beating on a connection of its own.
    pub(crate) fn start(store: Store, rank: RankOf) -> Self {
        let now = Instant::now();
        let shared = Shared {
            rank,
            doing: Activity { what: "starting".to_owned(), kind: Kind::Long },
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
        Self { shared, thread: Some(thread) }
    }

    /// Begins work that the others wait for no longer than the time-out.
    pub(crate) fn work(&self, what: String) -> Doing<'_> {
        self.lock().last_begun.clone_from(&what);
        self.begin(Activity { what, kind: Kind::Work })
    }

    /// Begins work that may take as long as it takes.
    pub(crate) fn long(&self, what: String) -> Doing<'_> {
        self.lock().last_begun.clone_from(&what);
        self.begin(Activity { what, kind: Kind::Long })
    }

    /// Begins to wait for others in a collective.
    pub(crate) fn wait_in(&self, collective: &str) -> Doing<'_> {
        let what = format!("{}, in {collective}", self.lock().doing.what);
        self.begin(Activity { what, kind: Kind::Waiting })
    }

    /// The work that this rank began last. Where it fails, that work has just ended.
    pub(crate) fn last_begun(&self) -> String {
        self.lock().last_begun.clone()
    }

    /// What some rank has failed of, as far as it is known.
    pub(crate) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Tells all ranks that this one stops, and why; gives the reason that all will know, which is the first one told.
    pub(crate) fn tell(&self, reason: String) -> String {
        let mut shared = self.lock();
        shared.to_tell = Some(reason.clone());
        self.shared.1.notify_all();
        let end = Instant::now() + SILENCE;
        while shared.failure.is_none() && Instant::now() < end {
            shared = self.shared.1.wait_timeout(shared, BEAT).unwrap_or_else(PoisonError::into_inner).0;
        }
        shared.failure.clone().unwrap_or(reason)
    }

    /// Finds out who is to blame where a collective failed or has waited for `timeout`; `None` where everybody who is
    /// waited for is alive and may still be working.
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
        Doing { pulse: self, before }
    }

    /// Replaces what this rank is doing, and returns what it was.
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
        // A thread that waits for a store that is gone ends with the process.
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
        format!("{count}\t{kind}\t{}\t{}", self.since.elapsed().as_secs(), self.doing.what)
    }

    /// Who keeps the others waiting: "rank 2 ...", or several such.
    fn culprits(&self, timeout: Duration) -> Option<String> {
        let others = (0..self.rank.ranks).filter(|&rank| rank != self.rank.rank);
        if self.answered.elapsed() > SILENCE {
            let last =
                self.beats[0].as_ref().map_or_else(String::new, |beat| format!("; it was last {}", seen(beat).2));
            return Some(format!("rank 0, or the process that serves the store, is dead or stopped{last}"));
        }
        let (mut silent, mut stuck, mut waiting) = (Vec::new(), Vec::new(), 0);
        for rank in others {
            let Some(beat) = &self.beats[rank] else {
                silent.push(format!("rank {rank} has not begun"));
                continue;
            };
            let (kind, secs, what) = seen(beat);
            if beat.since.elapsed() >= SILENCE - BEAT {
                silent.push(format!("rank {rank} is dead or stopped; it was last {what}"));
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

/// Kind, seconds and words of a beat.
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
                state.beats[rank] = known.or(Some(Beat { text, since: Instant::now() }));
            }
        }
        shared.1.notify_all();
        let is_urgent = state.ends || (is_news && state.to_tell.is_some() && state.failure.is_none());
        if !is_urgent {
            drop(shared.1.wait_timeout(state, BEAT).unwrap_or_else(PoisonError::into_inner));
        }
    }
}

/// What some rank has failed of, and the beats that were asked for.
type News = (Option<String>, Vec<(usize, String)>);

fn exchange(store: &Store, rank: RankOf, own: &str, to_tell: Option<&str>, asked: bool) -> Result<News, String> {
    let key = |rank: usize| format!("beat/{rank}");
    store.set(&key(rank.rank), own.as_bytes())?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let failure = match to_tell {
        Some(reason) => Some(text(store.set_once(FAILURE, reason.as_bytes())?)),
        None if store.has(FAILURE)? => Some(text(store.get(FAILURE, BEAT)?)),
        None => None,
    };
    // Rank 0's is always known: nobody can be asked where it is gone.
    let wanted = if asked { 0..rank.ranks } else { 0..1 };
    let mut beats = Vec::new();
    for other in wanted.filter(|&other| other != rank.rank) {
        if store.has(&key(other))? {
            beats.push((other, text(store.get(&key(other), BEAT)?)));
        }
    }
    Ok((failure, beats))
}
