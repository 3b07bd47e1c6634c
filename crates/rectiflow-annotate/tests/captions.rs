//! Captions from a server that misbehaves in every way a server can: what is asked, what is asked
//! again, what is set aside, and what ends the run.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use rectiflow_annotate::{
    caption::{
        run::{CaptionEvent, Captioner, Job, run_lines},
        tally::Tally,
    },
    error::{Error, Result},
    loopback::{
        manner::{Asked, Manner, Misdeed},
        server::Loopback,
    },
    pictures::{jpeg::JpegSettings, listed::Pictures},
    table::answers::Answers,
};
use rectiflow_data::{
    annotation::{Annotation, Status},
    annotation_table,
    captioning::CaptionSettings,
    picture::Picture,
    prep::PrepSettings,
};

/// A folder of pictures of one colour each, and a table beside it.
struct Fixture {
    folder: tempfile::TempDir,
    settings: CaptionSettings,
}

impl Fixture {
    fn new(num_pictures: u8, server: &Loopback) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        fs::create_dir_all(&source).unwrap();
        for number in 0..num_pictures {
            let picture = Picture::filled(64, 48, [number, 100, 7 * (number % 30)]);
            fs::write(source.join(format!("{number:03}.png")), picture.to_png()).unwrap();
            fs::write(source.join(format!("{number:03}.tags")), "cat, mat").unwrap();
        }
        let settings = CaptionSettings {
            servers: vec![server.url()],
            requests: 8,
            answer_secs: 20.0,
            retry_secs: 20.0,
            probe: false,
            ..CaptionSettings::default()
        };
        Self { folder, settings }
    }

    fn table(&self) -> PathBuf {
        self.folder.path().join("captions.parquet")
    }

    fn run(&self) -> Result<Tally> {
        self.run_job(&mut |_| {}, &AtomicBool::new(false))
    }

    fn run_job(&self, change: &mut dyn FnMut(&mut Job<'_>), stop: &AtomicBool) -> Result<Tally> {
        let captioner = Captioner::open(&self.settings)?;
        let lines = run_lines(&self.settings, &captioner.models());
        let mut answers = Answers::open(&self.table(), &lines)?;
        let source = self.folder.path().join("source");
        let pictures = Pictures::of_source(&source, answers.work(), &PrepSettings::default())?;
        let mut job = Job {
            pictures: &pictures,
            settings: &self.settings,
            jpeg: JpegSettings {
                max_side_px: 1024,
                quality: 90,
                max_pixels: 1 << 20,
                background: [255; 3],
            },
            modes: None,
            again: Vec::new(),
            reread: false,
            limit: None,
            threads: 2,
        };
        change(&mut job);
        let tally = captioner.run(&job, &mut answers, &mut |_: CaptionEvent<'_>| {}, stop)?;
        answers.finish(None)?;
        Ok(tally)
    }
}

fn rows(table: &Path) -> Vec<Annotation> {
    let mut rows = Vec::new();
    annotation_table::read(table, &mut |row| {
        rows.push(row);
        Ok(())
    })
    .unwrap();
    rows
}

fn statuses(table: &Path) -> BTreeMap<Status, usize> {
    let mut statuses = BTreeMap::new();
    for row in rows(table) {
        *statuses.entry(row.status).or_default() += 1;
    }
    statuses
}

fn server(misdeeds: impl Fn(&Asked) -> Option<Misdeed> + Send + Sync + 'static) -> Loopback {
    let manner = Manner {
        misdeeds: Box::new(misdeeds),
        ..Manner::default()
    };
    Loopback::start(manner, || {})
}

#[test]
fn every_picture_is_asked_about_once_in_its_mode() {
    let server = server(|_| None);
    let fixture = Fixture::new(40, &server);
    let tally = fixture.run().unwrap();
    assert_eq!(
        (tally.done, tally.num(Status::Ok), tally.retries),
        (40, 40, 0)
    );
    assert_eq!(
        (tally.prompt_tokens, tally.answer_tokens),
        (40 * 276, 40 * 7)
    );
    let rows = rows(&fixture.table());
    let mut modes = BTreeMap::<String, u32>::new();
    for row in &rows {
        assert_eq!(fixture.settings.mode_of(row.id).name, row.mode);
        assert_eq!(row.seed, i64::from(fixture.settings.seed_of(row.id, 1)));
        assert_eq!(
            (row.model.as_str(), row.attempt, row.tokens),
            ("loopback", 1, Some(7))
        );
        assert!(
            row.text
                .as_ref()
                .unwrap()
                .starts_with("A picture with the number")
        );
        *modes.entry(row.mode.clone()).or_default() += 1;
    }
    assert_eq!(modes.len(), 3, "{modes:?}");
    assert!(server.most_in_flight() <= 8, "{}", server.most_in_flight());

    // A second run asks nothing; another mode is another caption.
    let tally = fixture.run().unwrap();
    assert_eq!((tally.total, tally.known, server.num_asked()), (0, 40, 40));
    let stop = AtomicBool::new(false);
    let short = &mut |job: &mut Job<'_>| job.modes = Some(vec!["short".to_owned()]);
    let tally = fixture.run_job(short, &stop).unwrap();
    assert_eq!(u64::from(modes["short"]) + tally.num(Status::Ok), 40);
    assert!(
        server
            .pictures()
            .values()
            .all(|count| count.asked == count.answered)
    );
}

#[test]
fn passing_failures_cost_no_picture() {
    // Each picture fails in its own way before it is answered.
    let server = server(|asked| {
        let faults = [
            Misdeed::Status(500, 0),
            Misdeed::Status(429, 0),
            Misdeed::Hangup,
            Misdeed::CutBody(50),
            Misdeed::NoJson,
            Misdeed::Stall,
            Misdeed::Slow(Duration::from_millis(300)),
            Misdeed::Status(503, 1),
        ];
        let which = asked.picture? % faults.len() as u64;
        (asked.repeat == 0).then(|| faults[which as usize].clone())
    });
    let mut fixture = Fixture::new(48, &server);
    fixture.settings.answer_secs = 1.0;
    let tally = fixture.run().unwrap();
    assert_eq!(tally.num(Status::Ok), 48, "{tally:?}");
    assert!(tally.retries > 20 && tally.second_seeds == 0, "{tally:?}");
    assert_eq!(
        statuses(&fixture.table()),
        BTreeMap::from([(Status::Ok, 48)])
    );
    for count in server.pictures().values() {
        assert_eq!(count.answered, 1);
    }
}

#[test]
fn a_pause_that_a_server_asks_for_is_kept() {
    let server = server(|asked| (asked.number == 0).then_some(Misdeed::Status(429, 2)));
    let mut fixture = Fixture::new(3, &server);
    fixture.settings.requests = 1;
    let began = Instant::now();
    let tally = fixture.run().unwrap();
    assert!(
        began.elapsed() >= Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    assert_eq!((tally.num(Status::Ok), tally.retries), (3, 1));
}

#[test]
fn bad_answers_are_asked_for_once_more_and_then_set_aside() {
    let says = |text: &str, finish| Some(Misdeed::Says(text.to_owned(), finish));
    let server = server(move |asked| {
        match (asked.picture? % 5, asked.repeat) {
            (0, _) => says("I'm sorry, but I can't help with that.", "stop"),
            (1, _) => says(&"blue ".repeat(40), "stop"),
            (2, _) => says("A cat on a", "length"),
            // Another seed mends it.
            (3, 0) => says("", "stop"),
            _ => None,
        }
    });
    let fixture = Fixture::new(50, &server);
    let tally = fixture.run().unwrap();
    let found = statuses(&fixture.table());
    let num = |status| found.get(&status).copied().unwrap_or_default();
    let aside = num(Status::Refused) + num(Status::Loop) + num(Status::Cut);
    assert!(num(Status::Refused) > 0 && num(Status::Loop) > 0 && num(Status::Cut) > 0);
    assert_eq!((aside + num(Status::Ok), num(Status::Empty)), (50, 0));
    assert_eq!(tally.num_set_aside(), aside as u64);
    for row in rows(&fixture.table()) {
        let expected = fixture.settings.seed_of(row.id, row.attempt);
        assert_eq!(row.seed, i64::from(expected));
        match row.status {
            Status::Ok => assert!(row.reason.is_none()),
            _ => assert!(row.attempt == 2 && row.reason.is_some(), "{row:?}"),
        }
    }
    // What was set aside is not asked for again, unless the user says so.
    let num_asked = server.num_asked();
    assert_eq!(fixture.run().unwrap().known, 50);
    assert_eq!(server.num_asked(), num_asked);
    let stop = AtomicBool::new(false);
    let again = &mut |job: &mut Job<'_>| job.again = vec![Status::Refused];
    let tally = fixture.run_job(again, &stop).unwrap();
    assert_eq!(tally.done as usize, num(Status::Refused));
    assert_eq!(
        rows(&fixture.table()).len(),
        50,
        "the later row replaces the earlier one"
    );
}

#[test]
fn a_picture_that_a_server_does_not_take_is_set_aside() {
    let server = server(|asked| {
        let is_bad = asked.picture.is_some_and(|picture| picture % 10 == 3);
        (is_bad && asked.number > 5).then_some(Misdeed::Status(400, 0))
    });
    let fixture = Fixture::new(60, &server);
    let tally = fixture.run().unwrap();
    assert_eq!(tally.num(Status::Ok) + tally.num(Status::Failed), 60);
    assert!(
        tally.num(Status::Failed) > 0 && tally.retries == 0,
        "{tally:?}"
    );
    for row in rows(&fixture.table()) {
        if row.status == Status::Failed {
            assert!(
                row.reason
                    .unwrap()
                    .contains("status 400: as the test wants")
            );
        }
    }
}

#[test]
fn lasting_failures_end_the_run_and_lose_nothing() {
    for (fault, part) in [
        (Misdeed::Status(401, 0), "the key is wrong or missing"),
        (Misdeed::Status(404, 0), "no model \"loopback\""),
        (
            Misdeed::OtherModel,
            "\"another-model\" answers now, \"loopback\" before",
        ),
    ] {
        let server = server(move |asked| (asked.number >= 10).then(|| fault.clone()));
        let mut fixture = Fixture::new(40, &server);
        fixture.settings.requests = 1;
        let error = fixture.run().unwrap_err();
        assert!(matches!(error, Error::Server { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        let work = fixture.folder.path().join("captions.parquet.work");
        let journal = fs::read_to_string(work.join("journal-000001.jsonl")).unwrap();
        assert_eq!(journal.lines().count(), 10);
    }
}

#[test]
fn servers_that_take_nothing_end_the_run_early() {
    let server = server(|_| Some(Misdeed::Status(422, 0)));
    let fixture = Fixture::new(60, &server);
    let error = fixture.run().unwrap_err().to_string();
    assert!(
        error.contains("none of the first 20 pictures was taken"),
        "{error}"
    );
    assert!(server.num_asked() < 40, "{}", server.num_asked());
}

#[test]
fn servers_that_are_gone_end_the_run_after_the_time_of_the_recipe() {
    let server = server(|asked| (asked.number >= 5).then_some(Misdeed::Hangup));
    let mut fixture = Fixture::new(30, &server);
    fixture.settings.retry_secs = 1.0;
    fixture.settings.requests = 2;
    let error = fixture.run().unwrap_err().to_string();
    assert!(
        error.contains("no answer to any request for 1 s"),
        "{error}"
    );
    // The next run needs the others alone.
    let good = self::server(|_| None);
    fixture.settings.servers = vec![good.url()];
    let tally = fixture.run().unwrap();
    assert_eq!((tally.known, tally.num(Status::Ok)), (5, 25));
    assert_eq!(good.num_asked(), 25);
}

#[test]
fn a_server_that_rests_leaves_the_work_to_the_others() {
    let good = server(|_| None);
    let mut fixture = Fixture::new(40, &good);
    let slow = server(|asked| (asked.number > 0).then_some(Misdeed::Status(503, 600)));
    fixture.settings.servers = vec![slow.url(), good.url()];
    let tally = fixture.run().unwrap();
    assert_eq!(tally.num(Status::Ok), 40);
    assert!(
        good.num_asked() >= 30 && slow.num_asked() <= 9,
        "{}",
        slow.num_asked()
    );
}

#[test]
fn wrong_settings_are_found_before_the_first_picture() {
    let manner = Manner {
        key: Some("secret".to_owned()),
        ..Manner::default()
    };
    let server = Loopback::start(manner, || {});
    let mut fixture = Fixture::new(1, &server);
    let error = fixture.run().unwrap_err().to_string();
    assert!(
        error.contains("status 401") && error.contains("caption.key_variable"),
        "{error}"
    );
    fixture.settings.key_variable = "RECTIFLOW_TEST_NO_SUCH_VARIABLE".to_owned();
    let error = fixture.run().unwrap_err().to_string();
    assert!(
        error.contains("the environment has no RECTIFLOW_TEST_NO_SUCH"),
        "{error}"
    );

    let server = self::server(|_| None);
    let mut fixture = Fixture::new(1, &server);
    fixture.settings.model = "other".to_owned();
    let error = fixture.run().unwrap_err().to_string();
    assert!(
        error.contains("status 404") && error.contains("no model \"other\""),
        "{error}"
    );
    let url = server.url();
    drop(server);
    fixture.settings.servers = vec![url];
    let error = fixture.run().unwrap_err().to_string();
    assert!(error.contains("it cannot be reached"), "{error}");
    assert!(!fixture.table().exists());
}

#[test]
fn a_server_that_does_not_look_is_found_out() {
    // A text-only model, with and without chance.
    let blind = server(|_| Some(Misdeed::Says("A lovely scene.".to_owned(), "stop")));
    let mut fixture = Fixture::new(5, &blind);
    fixture.settings.probe = true;
    let error = fixture.run().unwrap_err();
    assert!(matches!(error, Error::Blind { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("have the same answer, \"A lovely scene.\""),
        "{error}"
    );
    assert!(blind.num_asked() <= 4);
    let honest = server(|_| Some(Misdeed::Says("I don't see any image.".to_owned(), "stop")));
    fixture.settings.servers = vec![honest.url()];
    let error = fixture.run().unwrap_err().to_string();
    assert!(
        error.contains("it says \"I don't see any image.\""),
        "{error}"
    );
    // One that looks passes, and one whose user knows better.
    let good = server(|_| None);
    fixture.settings.servers = vec![good.url()];
    assert_eq!(fixture.run().unwrap().num(Status::Ok), 5);
    fs::remove_file(fixture.table()).unwrap();
    fixture.settings.servers = vec![blind.url()];
    fixture.settings.probe = false;
    assert_eq!(fixture.run().unwrap().num(Status::Ok), 5);
}

#[test]
fn requests_a_second_stay_below_the_limit() {
    let server = server(|_| None);
    let mut fixture = Fixture::new(30, &server);
    fixture.settings.requests_per_sec = 20.0;
    let began = Instant::now();
    fixture.run().unwrap();
    let secs = began.elapsed().as_secs_f64();
    assert!(secs >= 29.0 / 20.0, "{secs}");
}

#[test]
fn copies_and_broken_files_are_counted() {
    let server = server(|_| None);
    let fixture = Fixture::new(4, &server);
    let source = fixture.folder.path().join("source");
    fs::copy(source.join("000.png"), source.join("copy.png")).unwrap();
    let whole = fs::read(source.join("001.png")).unwrap();
    fs::write(source.join("cut.png"), &whole[..whole.len() / 2]).unwrap();
    let tally = fixture.run().unwrap();
    assert_eq!(
        (tally.num(Status::Ok), tally.copies, tally.unreadable),
        (4, 1, 1)
    );
    assert!(tally.unreadable_example.unwrap().starts_with("cut.png: "));
    let found = statuses(&fixture.table());
    assert_eq!(
        found,
        BTreeMap::from([(Status::Ok, 4), (Status::Unreadable, 1)])
    );
}

#[test]
fn a_run_that_is_asked_to_stop_keeps_what_it_has() {
    let server = server(|_| Some(Misdeed::Slow(Duration::from_millis(50))));
    let fixture = Fixture::new(100, &server);
    let stop = AtomicBool::new(false);
    let tally = std::thread::scope(|scope| {
        scope.spawn(|| {
            while server.num_asked() < 20 {
                std::thread::yield_now();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        fixture.run_job(&mut |_| {}, &stop).unwrap()
    });
    assert!((12..100).contains(&tally.num(Status::Ok)), "{tally:?}");
    let first = tally.num(Status::Ok);
    let tally = fixture.run().unwrap();
    assert_eq!((tally.known, tally.num(Status::Ok)), (first, 100 - first));
    assert!(server.pictures().values().all(|count| count.answered == 1));
}
