//! The client: asks a question until it has an answer, or a reason why there is none.
//!
//! Each failure is of one of three kinds (`attempt`). A passing one is tried again, on the server
//! with the fewest requests, after a pause that doubles; a server that cannot be reached or asks
//! for a pause is left alone meanwhile. A failure of the picture sets the picture aside. A lasting
//! one ends the run.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rectiflow_data::{
    SampleId,
    annotation::Status,
    captioning::CaptionSettings,
    install_tls,
    rng::{Purpose, Rng},
};
use reqwest::Client as Http;
use serde_json::Value;
use tokio::time::{sleep, sleep_until};

use crate::{
    caption::{
        answer::{Answer, beginning, complaint},
        attempt::{self, Trouble},
        judge::{Ending, judge},
        question::Question,
        servers::{Server, Servers, pause_after},
        tally::Spent,
    },
    error::{Error, Result},
};

/// Time for a connection to be made.
const CONNECT: Duration = Duration::from_secs(10);
/// Time for the list of models.
const LIST_DEADLINE: Duration = Duration::from_secs(30);
/// Pictures that the servers did not take before the first that they took.
const MAX_NOT_TAKEN: u64 = 20;

/// A client of all servers.
#[derive(Debug)]
pub struct Client {
    http: Http,
    pub(crate) servers: Servers,
    key: Option<String>,
    settings: CaptionSettings,
    began: Instant,
    /// When the last answer came, in milliseconds since the client was made; 0 for never.
    last_answer: AtomicU64,
    /// Pictures that were not taken before the first answer.
    num_not_taken: AtomicU64,
    last_failure: Mutex<Option<String>>,
}

/// The end of a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// What became of it.
    pub status: Status,
    /// The last answer; empty if there was none.
    pub answer: Answer,
    /// Why it cannot be used.
    pub reason: Option<String>,
    /// The seed of the last attempt.
    pub seed: u32,
    /// The number of the last attempt, from 1.
    pub attempt: u32,
    /// What it cost.
    pub spent: Spent,
}

impl Client {
    /// A client of the servers of the settings. Asks each for its models.
    ///
    /// # Errors
    /// [`Error::Invalid`] for settings that cannot work; [`Error::Server`] for a server that cannot
    /// be reached, has another model or another key.
    pub async fn open(settings: &CaptionSettings) -> Result<Self> {
        let problems = settings.problems();
        if !problems.is_empty() {
            return Err(Error::invalid("the recipe", problems.join("; ")));
        }
        install_tls();
        let key = key_of(settings)?;
        let http = Http::builder()
            .connect_timeout(CONNECT)
            .pool_max_idle_per_host(settings.requests as usize)
            .user_agent(concat!("rectiflow/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| Error::invalid("caption.servers", error.to_string()))?;
        let mut list = Vec::new();
        for url in &settings.servers {
            let model = model_of(&http, url, key.as_deref(), &settings.model).await?;
            list.push(Server::new(url, &model));
        }
        Ok(Self {
            http,
            servers: Servers::new(list, settings.requests_per_sec),
            key,
            settings: settings.clone(),
            began: Instant::now(),
            last_answer: AtomicU64::new(0),
            num_not_taken: AtomicU64::new(0),
            last_failure: Mutex::default(),
        })
    }

    /// The models that the servers are asked for, in the order of the servers.
    pub fn models(&self) -> Vec<String> {
        self.servers
            .list
            .iter()
            .map(|server| server.model.clone())
            .collect()
    }

    /// The last failure of any request.
    pub fn last_failure(&self) -> Option<String> {
        self.last_failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Asks about a picture: once, and once more with another seed if the answer cannot be used.
    ///
    /// # Errors
    /// [`Error::Server`] if no request can work.
    pub async fn ask(&self, id: SampleId, question: &Question) -> Result<Outcome> {
        let mut spent = Spent::default();
        let mut attempt = 1;
        loop {
            let seed = self.settings.seed_of(id, attempt);
            let ended = self.ask_once(id, question, seed, &mut spent).await?;
            let outcome = |status, answer, reason| Outcome {
                status,
                answer,
                reason,
                seed,
                attempt,
                spent,
            };
            let answer = match ended {
                Ok(answer) => answer,
                Err(reason) => {
                    return Ok(outcome(Status::Failed, Answer::default(), Some(reason)));
                }
            };
            let ending = Ending {
                finish: &answer.finish,
                refusal: answer.refusal.as_deref(),
            };
            match judge(&answer.text, ending, &self.settings.refusals) {
                None => return Ok(outcome(Status::Ok, answer, None)),
                Some((status, reason)) if attempt == 2 => {
                    return Ok(outcome(status, answer, Some(reason)));
                }
                Some(_) => {}
            }
            attempt = 2;
            spent.second_seed = true;
        }
    }

    /// Asks until there is an answer. The inner error is why this picture has none.
    async fn ask_once(
        &self,
        id: SampleId,
        question: &Question,
        seed: u32,
        spent: &mut Spent,
    ) -> Result<std::result::Result<Answer, String>> {
        let mut first_failure = None;
        let mut num_failures = 0;
        loop {
            let trouble = match self.send(question, seed).await {
                Ok(answer) => {
                    spent.prompt_tokens += u64::from(answer.prompt_tokens.unwrap_or_default());
                    spent.answer_tokens += u64::from(answer.answer_tokens.unwrap_or_default());
                    return Ok(Ok(answer));
                }
                Err(trouble) => trouble,
            };
            let (server, reason) = match trouble {
                (server, Trouble::Passing { reason, .. }) => (server, reason),
                (server, Trouble::Picture { reason }) => {
                    return self.not_taken(&server, reason).map(Err);
                }
                (server, Trouble::Lasting { reason }) => {
                    return Err(Error::Server { server, reason });
                }
            };
            self.note(&format!("{server}: {reason}"));
            let since = *first_failure.get_or_insert_with(Instant::now);
            if since.elapsed().as_secs_f64() >= self.settings.retry_secs {
                return self.give_up(&server, reason, since).map(Err);
            }
            spent.retries += 1;
            sleep(jittered(id, num_failures)).await;
            num_failures += 1;
        }
    }

    /// Sends a question once, to the server whose turn it is.
    async fn send(
        &self,
        question: &Question,
        seed: u32,
    ) -> std::result::Result<Answer, (String, Trouble)> {
        if let Some(slot) = self.servers.slot() {
            sleep_until(slot.into()).await;
        }
        let under_way = loop {
            match self.servers.pick() {
                Ok(under_way) => break under_way,
                Err(until) => sleep_until(until.into()).await,
            }
        };
        let server = under_way.0;
        let body = question.body(&server.model, seed);
        let deadline = Duration::from_secs_f64(self.settings.answer_secs);
        let sent = attempt::send(&self.http, server, self.key.as_deref(), body, deadline).await;
        let trouble = match sent {
            Ok(answer) if server.answered(&answer.model) => {
                let millis = self.began.elapsed().as_millis() as u64;
                self.last_answer.fetch_max(millis.max(1), Ordering::Relaxed);
                return Ok(answer);
            }
            Ok(answer) => Trouble::Lasting {
                reason: format!(
                    "the model \"{}\" answers now, \"{}\" before: captions of two models would \
                     be mixed; start the first again, or go on with the second in another table",
                    answer.model,
                    server.answers_as()
                ),
            },
            Err(trouble) => trouble,
        };
        if let Trouble::Passing { rests, wait, .. } = &trouble
            && (*rests || wait.is_some())
        {
            server.rest(*wait);
        }
        Err((server.name.clone(), trouble))
    }

    /// The end of a picture that a server did not take. If it takes none, that is no fault of the
    /// picture.
    fn not_taken(&self, server: &str, reason: String) -> Result<String> {
        self.note(&format!("{server}: {reason}"));
        if self.last_answer.load(Ordering::Relaxed) > 0 {
            return Ok(reason);
        }
        let num = self.num_not_taken.fetch_add(1, Ordering::Relaxed) + 1;
        if num < MAX_NOT_TAKEN {
            return Ok(reason);
        }
        let reason = format!("none of the first {num} pictures was taken; the last one: {reason}");
        Err(Error::Server {
            server: server.to_owned(),
            reason,
        })
    }

    /// The end of a picture after failures for `retry_secs`. If no picture was answered meanwhile,
    /// the servers are at fault.
    fn give_up(&self, server: &str, reason: String, since: Instant) -> Result<String> {
        let failing_from = since.duration_since(self.began).as_millis() as u64;
        if self.last_answer.load(Ordering::Relaxed) > failing_from {
            return Ok(format!(
                "{reason}; given up after {} s",
                self.settings.retry_secs
            ));
        }
        let reason = format!(
            "no answer to any request for {} s (caption.retry_secs); the last failure: {reason}; \
             see that it runs and start this command again: it goes on where it was",
            self.settings.retry_secs
        );
        Err(Error::Server {
            server: server.to_owned(),
            reason,
        })
    }

    fn note(&self, failure: &str) {
        let mut last = self
            .last_failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *last = Some(failure.to_owned());
    }

    /// Sends a question to one server, for the probe.
    ///
    /// # Errors
    /// Why there is no answer.
    pub(crate) async fn send_to(
        &self,
        server: &Server,
        question: &Question,
    ) -> std::result::Result<Answer, String> {
        let deadline = Duration::from_secs_f64(self.settings.answer_secs);
        let mut num_failures = 0;
        loop {
            let body = question.body(&server.model, 1);
            let sent = attempt::send(&self.http, server, self.key.as_deref(), body, deadline).await;
            match sent {
                Ok(answer) => return Ok(answer),
                Err(Trouble::Passing { reason, wait, .. }) if num_failures == 4 => {
                    let asks = wait.map_or(String::new(), |wait| {
                        format!("; it asks for a pause of {} s", wait.as_secs())
                    });
                    return Err(format!("{reason}{asks}"));
                }
                Err(Trouble::Passing { wait, .. }) => {
                    let longest = Duration::from_secs(10);
                    sleep(wait.unwrap_or(pause_after(num_failures)).min(longest)).await;
                }
                Err(Trouble::Picture { reason } | Trouble::Lasting { reason }) => {
                    return Err(reason);
                }
            }
            num_failures += 1;
        }
    }
}

/// A pause before a picture is sent again, between half and all of the time that is due.
fn jittered(id: SampleId, num_failures: u32) -> Duration {
    let words = [id.0, u64::from(num_failures)];
    let part = Rng::keyed(0, Purpose::Jitter, &words).f64();
    pause_after(num_failures).mul_f64(0.5 + 0.5 * part)
}

/// The key in the variable that the settings name.
fn key_of(settings: &CaptionSettings) -> Result<Option<String>> {
    let name = settings.key_variable.as_str();
    if name.is_empty() {
        return Ok(None);
    }
    match std::env::var(name) {
        Ok(key) if !key.trim().is_empty() => Ok(Some(key.trim().to_owned())),
        _ => {
            let reason = format!(
                "the environment has no {name}: set it to the key of the servers, or leave \
                 key_variable out if they take none"
            );
            Err(Error::invalid("caption.key_variable", reason))
        }
    }
}

/// The model that a server is asked for: the one that the recipe names, or its only one.
async fn model_of(http: &Http, url: &str, key: Option<&str>, wanted: &str) -> Result<String> {
    let name = url.trim_end_matches('/');
    let fault = |reason: String| Error::Server {
        server: name.to_owned(),
        reason,
    };
    let listed = attempt::get(http, &format!("{name}/models"), key, LIST_DEADLINE).await;
    let (status, body) = listed.map_err(|reason| {
        let advice = "start the server, or name another with caption.servers";
        fault(format!("it cannot be reached: {reason}; {advice}"))
    })?;
    if matches!(status.as_u16(), 401 | 403) {
        let reason = format!(
            "status {}: {}: the key is wrong or missing; caption.key_variable names the \
             environment variable that holds it",
            status.as_u16(),
            complaint(&body)
        );
        return Err(fault(reason));
    }
    let Some(models) = models_in(&body).filter(|_| status.is_success()) else {
        // Not every server lists its models.
        return match wanted.is_empty() {
            false => Ok(wanted.to_owned()),
            true => Err(fault(format!(
                "it lists no models (status {}, {}): name one with caption.model, and see that the \
                 URL is what stands before /chat/completions",
                status.as_u16(),
                beginning(&body)
            ))),
        };
    };
    match models.as_slice() {
        // Lists can be of other models than those that are served: a request will tell.
        _ if !wanted.is_empty() => Ok(wanted.to_owned()),
        [only] => Ok(only.clone()),
        several => {
            let shown: Vec<&str> = several.iter().take(10).map(String::as_str).collect();
            let shown = shown.join(", ");
            Err(fault(format!(
                "name a model with caption.model; it lists: {shown}"
            )))
        }
    }
}

/// The models of a list.
fn models_in(body: &[u8]) -> Option<Vec<String>> {
    let parsed: Value = serde_json::from_slice(body).ok()?;
    let list = parsed.get("data").and_then(Value::as_array)?;
    let ids = list.iter().filter_map(|model| model.get("id")?.as_str());
    Some(ids.map(str::to_owned).collect())
}
