//! Each picture of a set once through a model, and a row for each: what tagging and scoring share.

use rectiflow_data::{
    SampleId,
    annotation::{Annotation, Kind, Status},
    reject::Fault,
};

use crate::{
    error::Result,
    onnx::feed::{Answer, Feed, Opened},
    pictures::listed::{Listed, Pictures},
    table::{answers::Answers, known::Known},
};

/// Rows with these are written again by the next run.
pub(crate) const AGAIN: [Status; 2] = [Status::Unreadable, Status::Failed];

/// What the rows of a pass say.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Tags or scores.
    pub kind: Kind,
    /// Name of the tagger or scorer.
    pub mode: String,
    /// Name of the model's file.
    pub model: String,
}

impl Subject {
    /// A row about a picture, without an answer.
    pub(crate) fn row(&self, id: SampleId, listed: &Listed) -> Annotation {
        Annotation {
            model: self.model.clone(),
            ..Annotation::new(id, &listed.address, self.kind, &self.mode)
        }
    }
}

/// What came of a pass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Passed {
    /// Rows that earlier runs have written.
    pub num_known: u64,
    /// Pictures with an answer.
    pub num_answered: u64,
    /// Pictures that are another one's copy, byte by byte.
    pub num_copies: u64,
    /// Pictures that cannot be read, or for which the model returned no finite number.
    pub num_failed: u64,
    /// The first of these, with the reason.
    pub first_failed: Option<String>,
}

/// How far a pass is: pictures done, and all of them.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Makes a row of the numbers of a model, or says why they are none.
pub type MakeRow<'a> = &'a dyn Fn(&mut Annotation, &[f32]) -> std::result::Result<(), String>;

/// A pass over pictures.
#[derive(Debug)]
pub struct Pass<'a> {
    /// The pictures.
    pub pictures: &'a Pictures,
    /// The table.
    pub answers: &'a mut Answers,
    /// What its rows say.
    pub subject: &'a Subject,
}

impl<'a> Pass<'a> {
    /// Runs the pictures that have no answer yet through a model.
    ///
    /// # Errors
    /// Those of the model and of the table.
    pub fn run(
        mut self,
        mut feed: Feed<'_>,
        make: MakeRow<'_>,
        progress: Progress<'_>,
    ) -> Result<Passed> {
        let (items, mut passed) = self.wanted();
        let total = self.pictures.listed().len() as u64;
        let mut done = total - items.len() as u64;
        let (pictures, claims) = (self.pictures, self.answers.claims());
        let Subject { kind, mode, .. } = self.subject;
        let open = |listed: &&Listed| match pictures.open(listed) {
            Ok(opened) if !claims.claim(opened.id, *kind, mode, &AGAIN) => Opened::Skip,
            Ok(opened) => Opened::File(opened.id, opened.bytes),
            Err(fault) => Opened::Fault(fault),
        };
        feed.run(&items, &open, &mut |listed, answer| {
            done += 1;
            progress(done, total);
            self.take(listed, answer, make, &mut passed)
        })?;
        self.answers.flush()?;
        Ok(passed)
    }

    /// The pictures without an answer. One that could not be read is tried again.
    pub(crate) fn wanted(&self) -> (Vec<&'a Listed>, Passed) {
        let claims = self.answers.claims();
        let known = claims.lock();
        let mut items = Vec::new();
        for listed in self.pictures.listed() {
            let id = listed.id.or_else(|| known.picture_at(&listed.address));
            if !id.is_some_and(|id| self.has_answer(&known, id)) {
                items.push(listed);
            }
        }
        let passed = Passed {
            num_known: (self.pictures.listed().len() - items.len()) as u64,
            ..Passed::default()
        };
        (items, passed)
    }

    fn has_answer(&self, known: &Known, id: SampleId) -> bool {
        let Subject { kind, mode, .. } = self.subject;
        known.status(id, *kind, mode) == Some(Status::Ok)
    }

    /// Adds the row of a picture.
    fn take(
        &mut self,
        listed: &Listed,
        answer: Answer<'_, SampleId>,
        make: MakeRow<'_>,
        passed: &mut Passed,
    ) -> Result<()> {
        let (id, result) = match answer {
            Answer::Skipped => {
                passed.num_copies += 1;
                return Ok(());
            }
            Answer::Numbers(id, numbers) => (Some(id), Ok(numbers)),
            Answer::Broken(id, fault) => (Some(id), Err(fault_text(&fault))),
            Answer::Unreadable(fault) => (listed.id, Err(fault_text(&fault))),
        };
        // Without its bytes a picture of a source has no id, and so no row.
        let Some(id) = id else {
            passed.fail(listed, result.err().unwrap_or_default());
            return Ok(());
        };
        let mut row = self.subject.row(id, listed);
        let status = match &result {
            Ok(_) => Status::Failed,
            Err(_) => Status::Unreadable,
        };
        match result.and_then(|numbers| make(&mut row, numbers)) {
            Ok(()) => passed.num_answered += 1,
            Err(reason) => {
                passed.fail(listed, reason.clone());
                row.status = status;
                row.reason = Some(reason);
            }
        }
        self.answers.add(row)
    }
}

impl Passed {
    /// Counts a picture without an answer.
    pub(crate) fn fail(&mut self, listed: &Listed, reason: String) {
        self.num_failed += 1;
        let text = || format!("{}: {reason}", listed.address);
        self.first_failed.get_or_insert_with(text);
    }
}

fn fault_text(fault: &Fault) -> String {
    fault.detail.clone()
}
