//! A run: pictures to questions on threads, questions to answers in the client, answers to rows.
//!
//! At most `requests` questions are under way and as many wait, so memory is bounded whatever the
//! servers do: threads that open pictures stand still while the queue is full. A request counts as
//! under way until its row is in the journal.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use rectiflow_data::{
    SampleId,
    annotation::{Annotation, Kind, Status},
    caption::Text,
    captioning::CaptionSettings,
    reject::Fault,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};

use crate::{
    caption::{
        client::{Client, Outcome},
        probe::{Probed, probe},
        question::{Asking, Question},
        tally::Tally,
    },
    error::{Error, Result},
    pictures::{
        jpeg::{JpegSettings, jpeg_of},
        listed::{Listed, Pictures},
    },
    table::{answers::Answers, known::Claims},
};

/// Time between two reports of progress.
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// Time between two looks at a full queue.
const FULL_PAUSE: Duration = Duration::from_millis(2);
/// Time that requests under way have when the run is asked to stop.
const GRACE: Duration = Duration::from_secs(10);

/// What a run asks about.
#[derive(Debug)]
pub struct Job<'a> {
    /// The pictures.
    pub pictures: &'a Pictures,
    /// The `[caption]` section.
    pub settings: &'a CaptionSettings,
    /// How pictures are sent.
    pub jpeg: JpegSettings,
    /// The modes of each picture: None for the drawn one, else all of these.
    pub modes: Option<Vec<String>>,
    /// Rows with these statuses are asked for again.
    pub again: Vec<Status>,
    /// Open pictures whose address has a row, in case the file has changed.
    pub reread: bool,
    /// Most pictures of this run.
    pub limit: Option<u64>,
    /// Threads that open and encode pictures.
    pub threads: usize,
}

/// What a run tells while it goes.
#[derive(Debug)]
pub enum CaptionEvent<'a> {
    /// The servers were probed.
    Probed(&'a [Probed]),
    /// Progress.
    Progress(&'a Tally),
}

/// The lines that decide a run's answers, for [`Answers::open`].
pub fn run_lines(settings: &CaptionSettings, models: &[String]) -> String {
    let mut names: Vec<&str> = models.iter().map(String::as_str).collect();
    names.sort_unstable();
    names.dedup();
    let mut lines = format!(
        "model = {}\nseed = {}\nmax_side_px = {}\njpeg_quality = {}\nextra = {}\n",
        names.join(", "),
        settings.seed,
        settings.max_side_px,
        settings.jpeg_quality,
        settings.extra
    );
    for mode in &settings.modes {
        lines += &format!(
            "mode {} weight {} temperature {} max_tokens {} system {:?} prompt {:?}\n",
            mode.name, mode.weight, mode.temperature, mode.max_tokens, mode.system, mode.prompt
        );
    }
    lines
}

/// A question on its way to a server.
#[derive(Debug)]
struct Posed {
    id: SampleId,
    address: String,
    mode: String,
    question: Question,
}

/// What happened to a picture.
#[derive(Debug)]
enum Event {
    /// A question has ended.
    Ended(Box<Ended>),
    /// It cannot be read.
    Unread(Unread),
    /// It has its answers, of which there are as many, or is a copy of one that has.
    Known(u64),
}

/// A question that has ended.
#[derive(Debug)]
struct Ended {
    posed: Posed,
    outcome: Result<Outcome>,
    /// Its place among the requests, which is free when the row is in the journal.
    permit: OwnedSemaphorePermit,
}

/// A picture that cannot be read.
#[derive(Debug)]
struct Unread {
    /// None without bytes.
    id: Option<SampleId>,
    address: String,
    modes: Vec<String>,
    fault: Fault,
}

/// The network's thread and the client, open before a table is begun.
#[derive(Debug)]
pub struct Captioner {
    runtime: Runtime,
    client: Arc<Client>,
}

impl Captioner {
    /// Opens a client of the servers of the settings.
    ///
    /// # Errors
    /// Those of [`Client::open`].
    pub fn open(settings: &CaptionSettings) -> Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("rectiflow-caption")
            .enable_all()
            .build()
            .map_err(rectiflow_data::Error::io("threads of the network"))?;
        let client = runtime.block_on(Client::open(settings))?;
        Ok(Self {
            runtime,
            client: Arc::new(client),
        })
    }

    /// The models that the servers are asked for.
    pub fn models(&self) -> Vec<String> {
        self.client.models()
    }

    /// Asks about all pictures that have no row yet. `stop` ends the run early, without an error.
    ///
    /// # Errors
    /// Those of the client, after the rows at hand are written; those of the table.
    pub fn run(
        self,
        job: &Job<'_>,
        answers: &mut Answers,
        show: &mut dyn FnMut(CaptionEvent<'_>),
        stop: &AtomicBool,
    ) -> Result<Tally> {
        let todo = Todo::new(job, &answers.claims())?;
        let mut tally = Tally {
            total: todo.numbers.len() as u64 * num_modes(job),
            known: todo.num_known,
            ..Tally::default()
        };
        if todo.numbers.is_empty() {
            return Ok(tally);
        }
        if job.settings.probe {
            let probed = self.runtime.block_on(probe(&self.client, job.settings))?;
            show(CaptionEvent::Probed(&probed));
        }
        let num_requests = job.settings.requests as usize;
        let (posed, queue) = mpsc::channel(num_requests);
        let (events, ended) = channel();
        let halt = Arc::new(AtomicBool::new(false));
        let dispatch = dispatch(self.client.clone(), queue, events.clone(), halt.clone());
        self.runtime.spawn(dispatch);
        let posing = Posing {
            job,
            todo: &todo,
            claims: answers.claims(),
            halt: &halt,
            next: AtomicUsize::new(0),
        };
        let result = thread::scope(|scope| {
            for _ in 0..job.threads.max(1) {
                let (posing, posed, events) = (&posing, posed.clone(), events.clone());
                scope.spawn(move || posing.run(&posed, &events));
            }
            drop((posed, events));
            let result = self.collect(&ended, answers, &mut tally, show, (stop, &*halt));
            // Threads that pose questions stop at a closed queue.
            halt.store(true, Ordering::Relaxed);
            result
        });
        answers.flush()?;
        self.runtime.shutdown_background();
        result.map(|()| tally)
    }

    /// Writes the rows of questions that end, until all have.
    fn collect(
        &self,
        ended: &Receiver<Event>,
        answers: &mut Answers,
        tally: &mut Tally,
        show: &mut dyn FnMut(CaptionEvent<'_>),
        (stop, halt): (&AtomicBool, &AtomicBool),
    ) -> Result<()> {
        let began = Instant::now();
        let mut last_report = began;
        let mut stops_at: Option<Instant> = None;
        let mut failure = None;
        loop {
            let event = match ended.recv_timeout(REPORT_EVERY) {
                Ok(event) => Some(event),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let result = event.map_or(Ok(()), |event| record(event, answers, tally));
            tally.secs = began.elapsed().as_secs_f64();
            if let Err(error) = result {
                failure.get_or_insert(error);
            }
            if last_report.elapsed() >= REPORT_EVERY {
                last_report = Instant::now();
                tally.last_failure = self.client.last_failure();
                show(CaptionEvent::Progress(tally));
            }
            // A stop, or a failure of all: what is under way may end.
            if stop.load(Ordering::Relaxed) || failure.is_some() {
                halt.store(true, Ordering::Relaxed);
                let grace = if failure.is_some() {
                    Duration::from_secs(1)
                } else {
                    GRACE
                };
                let end = *stops_at.get_or_insert_with(|| Instant::now() + grace);
                if Instant::now() >= end {
                    break;
                }
            }
        }
        tally.last_failure = self.client.last_failure();
        show(CaptionEvent::Progress(tally));
        failure.map_or(Ok(()), Err)
    }
}

/// Writes what an event says.
fn record(event: Event, answers: &mut Answers, tally: &mut Tally) -> Result<()> {
    match event {
        Event::Known(num_answers) => {
            tally.copies += 1;
            tally.done += num_answers;
            Ok(())
        }
        Event::Unread(unread) => record_unread(unread, answers, tally),
        Event::Ended(ended) => {
            let Ended {
                posed,
                outcome,
                permit,
            } = *ended;
            let outcome = outcome?;
            tally.add(outcome.status, outcome.spent);
            let row = Annotation::new(posed.id, &posed.address, Kind::Caption, &posed.mode);
            answers.add(Annotation {
                model: outcome.answer.model,
                text: Some(outcome.answer.text).filter(|text| !text.is_empty()),
                status: outcome.status,
                reason: outcome.reason,
                seed: outcome.seed.into(),
                attempt: outcome.attempt,
                tokens: outcome.answer.answer_tokens,
                ..row
            })?;
            drop(permit);
            Ok(())
        }
    }
}

fn record_unread(unread: Unread, answers: &mut Answers, tally: &mut Tally) -> Result<()> {
    let Unread {
        id,
        address,
        modes,
        fault,
    } = unread;
    tally.unreadable += 1;
    tally.done += modes.len().max(1) as u64;
    if tally.unreadable_example.is_none() {
        tally.unreadable_example = Some(format!("{address}: {}", fault.detail));
    }
    // A table knows pictures by their bytes.
    let Some(id) = id else { return Ok(()) };
    for mode in modes {
        answers.add(Annotation {
            status: Status::Unreadable,
            reason: Some(fault.detail.clone()),
            ..Annotation::new(id, &address, Kind::Caption, &mode)
        })?;
    }
    Ok(())
}

/// Sends each question of the queue as soon as there is room.
async fn dispatch(
    client: Arc<Client>,
    mut queue: mpsc::Receiver<Posed>,
    events: Sender<Event>,
    halt: Arc<AtomicBool>,
) {
    let room = Arc::new(Semaphore::new(queue.max_capacity()));
    loop {
        let permit = room
            .clone()
            .acquire_owned()
            .await
            .expect("nothing closes it");
        let posed = loop {
            if halt.load(Ordering::Relaxed) {
                return;
            }
            match timeout(REPORT_EVERY, queue.recv()).await {
                Ok(Some(posed)) => break posed,
                Ok(None) => return,
                Err(_) => {}
            }
        };
        let (client, events) = (client.clone(), events.clone());
        tokio::spawn(async move {
            let outcome = client.ask(posed.id, &posed.question).await;
            let ended = Ended {
                posed,
                outcome,
                permit,
            };
            // A run that has ended takes no more rows.
            let _ = events.send(Event::Ended(Box::new(ended)));
        });
    }
}

/// The pictures that a run opens, by number.
#[derive(Debug)]
struct Todo {
    numbers: Vec<usize>,
    num_known: u64,
    askings: Vec<Asking>,
}

impl Todo {
    fn new(job: &Job<'_>, claims: &Claims) -> Result<Self> {
        let mut askings = Vec::new();
        for mode in &job.settings.modes {
            let asking = Asking::new(mode, job.settings);
            askings.push(asking.map_err(|reason| Error::invalid("caption.modes", reason))?);
        }
        let mut numbers = Vec::new();
        let mut num_known = 0;
        let known = claims.lock();
        for (number, listed) in job.pictures.listed().iter().enumerate() {
            let id = listed
                .id
                .or_else(|| known.picture_at(&listed.address).filter(|_| !job.reread));
            let is_done = id.is_some_and(|id| {
                modes_of(job, id).iter().all(|mode| {
                    let status = known.status(id, Kind::Caption, mode);
                    status.is_some_and(|status| !job.again.contains(&status))
                })
            });
            if is_done {
                num_known += 1;
            } else {
                numbers.push(number);
            }
        }
        if let Some(limit) = job.limit {
            numbers.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        }
        Ok(Self {
            numbers,
            num_known,
            askings,
        })
    }
}

/// How many captions each picture gets.
fn num_modes(job: &Job<'_>) -> u64 {
    job.modes.as_ref().map_or(1, Vec::len) as u64
}

/// The names of a picture's modes.
fn modes_of<'a>(job: &'a Job<'_>, id: SampleId) -> Vec<&'a str> {
    match &job.modes {
        Some(modes) => modes.iter().map(String::as_str).collect(),
        None => vec![job.settings.mode_of(id).name.as_str()],
    }
}

/// What threads need that open pictures and pose questions.
#[derive(Debug)]
struct Posing<'a> {
    job: &'a Job<'a>,
    todo: &'a Todo,
    claims: Claims,
    halt: &'a AtomicBool,
    /// The next picture of [`Todo::numbers`].
    next: AtomicUsize,
}

impl Posing<'_> {
    /// Poses questions until no picture is left or the run ends.
    fn run(&self, posed: &mpsc::Sender<Posed>, events: &Sender<Event>) {
        while !self.halt.load(Ordering::Relaxed) {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(&number) = self.todo.numbers.get(at) else {
                return;
            };
            let listed = &self.job.pictures.listed()[number];
            let is_taken = match self.questions(listed) {
                Ok(questions) => self.hand_on(questions, posed, events),
                Err(unread) => events.send(Event::Unread(unread)).is_ok(),
            };
            if !is_taken {
                return;
            }
        }
    }

    /// Passes questions on. False if the run has ended.
    fn hand_on(
        &self,
        questions: Vec<Posed>,
        posed: &mpsc::Sender<Posed>,
        events: &Sender<Event>,
    ) -> bool {
        if questions.is_empty() {
            return events.send(Event::Known(num_modes(self.job))).is_ok();
        }
        for question in questions {
            let mut question = question;
            // Nothing empties a queue that is full when the run ends.
            loop {
                match posed.try_send(question) {
                    Ok(()) => break,
                    Err(mpsc::error::TrySendError::Closed(_)) => return false,
                    Err(mpsc::error::TrySendError::Full(back)) => {
                        if self.halt.load(Ordering::Relaxed) {
                            return false;
                        }
                        question = back;
                        thread::sleep(FULL_PAUSE);
                    }
                }
            }
        }
        true
    }

    /// The questions about a picture; none if it has its answers.
    fn questions(&self, listed: &Listed) -> std::result::Result<Vec<Posed>, Unread> {
        let job = self.job;
        let unreadable = |id: Option<SampleId>, fault| {
            let modes = id.map(|id| modes_of(job, id)).unwrap_or_default();
            Unread {
                id,
                address: listed.address.clone(),
                modes: modes.into_iter().map(str::to_owned).collect(),
                fault,
            }
        };
        let opened = job
            .pictures
            .open(listed)
            .map_err(|fault| unreadable(listed.id, fault))?;
        let mut modes = modes_of(job, opened.id);
        modes.retain(|mode| {
            self.claims
                .claim(opened.id, Kind::Caption, mode, &job.again)
        });
        if modes.is_empty() {
            return Ok(Vec::new());
        }
        let jpeg = jpeg_of(opened.bytes, &job.jpeg);
        let jpeg = jpeg.map_err(|fault| unreadable(Some(opened.id), fault))?;
        let askings = self
            .todo
            .askings
            .iter()
            .filter(|asking| modes.contains(&asking.name.as_str()));
        let askings: Vec<&Asking> = askings.collect();
        let text = match askings.iter().any(|asking| asking.needs_text()) {
            true => job.pictures.text(listed),
            false => Text::default(),
        };
        let mut questions = Vec::with_capacity(askings.len());
        for asking in askings {
            questions.push(Posed {
                id: opened.id,
                address: listed.address.clone(),
                mode: asking.name.clone(),
                question: asking.about(Some(&jpeg), &text),
            });
        }
        Ok(questions)
    }
}
