//! Which server is asked next, and when: the one with the fewest requests under way that is not
//! resting, with a limit of requests a second.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// First and longest rest of a server that fails.
const FIRST_REST: Duration = Duration::from_millis(500);
const LONGEST_REST: Duration = Duration::from_secs(30);
/// Longest rest that a server can ask for with `Retry-After`.
const LONGEST_ASKED: Duration = Duration::from_secs(3600);

/// A server.
#[derive(Debug)]
pub(crate) struct Server {
    /// URL of its chat requests.
    pub(crate) chat_url: String,
    /// URL as the recipe names it.
    pub(crate) name: String,
    /// The model that it is asked for.
    pub(crate) model: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    in_flight: u32,
    rests_until: Option<Instant>,
    /// Rests in a row, without an answer between them.
    num_rests: u32,
    /// The model that answered first.
    answers_as: Option<String>,
}

impl Server {
    /// The server at `url`, asked for `model`.
    pub(crate) fn new(url: &str, model: &str) -> Self {
        let name = url.trim_end_matches('/');
        Self {
            chat_url: format!("{name}/chat/completions"),
            name: name.to_owned(),
            model: model.to_owned(),
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes an answer by the model `model`. False if another model answered before.
    pub(crate) fn answered(&self, model: &str) -> bool {
        let mut state = self.lock();
        state.num_rests = 0;
        if model.is_empty() {
            return true;
        }
        state.answers_as.get_or_insert_with(|| model.to_owned()) == model
    }

    /// The model that answered first.
    pub(crate) fn answers_as(&self) -> String {
        self.lock().answers_as.clone().unwrap_or_default()
    }

    /// Lets the server rest: for the time it asks for, or longer each time. One that rests already
    /// was asked before its rest began.
    pub(crate) fn rest(&self, asked: Option<Duration>) {
        let mut state = self.lock();
        let now = Instant::now();
        let rests = state.rests_until.is_some_and(|until| until > now);
        let pause = match asked {
            Some(asked) => asked.min(LONGEST_ASKED),
            None if rests => return,
            None => pause_after(state.num_rests),
        };
        if !rests {
            state.num_rests += 1;
        }
        state.rests_until = state.rests_until.max(Some(now + pause));
    }
}

/// The pause after `num` earlier ones: twice as long each time.
pub(crate) fn pause_after(num: u32) -> Duration {
    FIRST_REST
        .saturating_mul(1 << num.min(10))
        .min(LONGEST_REST)
}

/// All servers.
#[derive(Debug)]
pub(crate) struct Servers {
    pub(crate) list: Vec<Server>,
    rate: Option<Rate>,
}

/// A limit of requests a second.
#[derive(Debug)]
struct Rate {
    every: Duration,
    next: Mutex<Instant>,
}

/// A request under way; its end counts it off.
#[derive(Debug)]
pub(crate) struct UnderWay<'a>(pub(crate) &'a Server);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.lock().in_flight -= 1;
    }
}

impl Servers {
    /// These servers, with at most `per_sec` requests a second; 0 is no limit.
    pub(crate) fn new(list: Vec<Server>, per_sec: f64) -> Self {
        let rate = (per_sec > 0.0).then(|| Rate {
            every: Duration::from_secs_f64(1.0 / per_sec),
            next: Mutex::new(Instant::now()),
        });
        Self { list, rate }
    }

    /// The server that takes the next request.
    ///
    /// # Errors
    /// All servers rest: when the first of them ends.
    pub(crate) fn pick(&self) -> Result<UnderWay<'_>, Instant> {
        let now = Instant::now();
        let mut best: Option<(u32, &Server)> = None;
        let mut earliest: Option<Instant> = None;
        for server in &self.list {
            let state = server.lock();
            match state.rests_until.filter(|until| *until > now) {
                Some(until) => earliest = Some(earliest.map_or(until, |other| other.min(until))),
                None if best.is_none_or(|(least, _)| state.in_flight < least) => {
                    best = Some((state.in_flight, server));
                }
                None => {}
            }
        }
        match (best, earliest) {
            (Some((_, server)), _) => {
                server.lock().in_flight += 1;
                Ok(UnderWay(server))
            }
            (None, Some(earliest)) => Err(earliest),
            (None, None) => unreachable!("there is at least one server"),
        }
    }

    /// When the next request may be sent by the limit of requests a second, which counts it.
    pub(crate) fn slot(&self) -> Option<Instant> {
        let rate = self.rate.as_ref()?;
        let mut next = rate.next.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = (*next).max(Instant::now());
        *next = slot + rate.every;
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers() -> Servers {
        let server = |number| Server::new(&format!("http://{number}/v1/"), "m");
        Servers::new((0..2).map(server).collect(), 0.0)
    }

    #[test]
    fn the_one_with_the_fewest_requests_is_asked() {
        let servers = servers();
        let first = servers.pick().unwrap();
        let second = servers.pick().unwrap();
        assert_eq!(first.0.chat_url, "http://0/v1/chat/completions");
        assert_eq!(second.0.name, "http://1/v1");
        drop(second);
        assert_eq!(servers.pick().unwrap().0.name, "http://1/v1");
        // A request that is over counts no more.
        drop(first);
        assert_eq!(servers.pick().unwrap().0.name, "http://0/v1");
    }

    #[test]
    fn servers_rest_longer_each_time_and_as_long_as_they_ask() {
        assert_eq!(pause_after(0), FIRST_REST);
        assert_eq!(pause_after(1), 2 * FIRST_REST);
        assert_eq!(pause_after(99), LONGEST_REST);
        let servers = servers();
        servers.list[0].rest(None);
        assert_eq!(servers.pick().unwrap().0.name, "http://1/v1");
        // Failures of requests that were under way when the rest began make it no longer.
        servers.list[0].rest(None);
        assert_eq!(servers.list[0].lock().num_rests, 1);
        servers.list[1].rest(Some(Duration::from_secs(5)));
        let until = servers.pick().unwrap_err();
        assert!(
            until <= Instant::now() + FIRST_REST,
            "the earlier end counts"
        );
        servers.list[0].rest(Some(Duration::from_secs(1 << 30)));
        let longest = servers.list[0].lock().rests_until.unwrap();
        assert!(longest <= Instant::now() + LONGEST_ASKED);
    }

    #[test]
    fn a_server_keeps_its_model() {
        let server = Server::new("http://a", "m");
        assert!(server.answered("m-2026") && server.answered("") && server.answered("m-2026"));
        assert!(!server.answered("other"));
        assert_eq!(server.answers_as(), "m-2026");
    }

    #[test]
    fn requests_a_second_have_a_limit() {
        let servers = Servers::new(vec![Server::new("http://a", "m")], 100.0);
        let began = Instant::now();
        let mut last = began;
        for _ in 0..50 {
            last = servers.slot().unwrap();
        }
        let secs = (last - began).as_secs_f64();
        assert!((0.48..0.6).contains(&secs), "{secs}");
        assert_eq!(self::servers().slot(), None);
    }
}
