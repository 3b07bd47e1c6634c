//! Scores of a table to the pictures of a set: a row for each, without a model.

use rayon::prelude::*;
use rectiflow_data::{SampleId, annotation::Annotation};

use crate::{
    error::Result,
    pass::{AGAIN, Pass, Passed, Progress, Subject},
    pictures::listed::{Listed, Pictures},
    score::given::GivenScores,
};

/// Pictures that are looked at between two signs of progress.
const WINDOW: usize = 1024;

/// Writes a row for each picture that has a score in the table. The others are counted as failed.
///
/// # Errors
/// Those of the table.
pub fn assign(pass: Pass<'_>, given: &GivenScores, progress: Progress<'_>) -> Result<Passed> {
    let (items, mut passed) = pass.wanted();
    let total = pass.pictures.listed().len() as u64;
    let mut done = total - items.len() as u64;
    for window in items.chunks(WINDOW) {
        for (listed, id) in window.iter().zip(ids(pass.pictures, window)) {
            match id.and_then(|id| scored(&pass, listed, id, given)) {
                Err(reason) => passed.fail(listed, reason),
                Ok(None) => passed.num_copies += 1,
                Ok(Some(row)) => {
                    pass.answers.add(row)?;
                    passed.num_answered += 1;
                }
            }
        }
        done += window.len() as u64;
        progress(done, total);
    }
    pass.answers.flush()?;
    Ok(passed)
}

/// The ids of pictures. That of a picture of a source is in its bytes.
fn ids(pictures: &Pictures, window: &[&Listed]) -> Vec<std::result::Result<SampleId, String>> {
    let id_of = |listed: &&Listed| match listed.id {
        Some(id) => Ok(id),
        None => pictures
            .open(listed)
            .map(|opened| opened.id)
            .map_err(|fault| fault.detail),
    };
    window.par_iter().map(id_of).collect()
}

/// The row of a picture. None if another one with the same bytes has it.
fn scored(
    pass: &Pass<'_>,
    listed: &Listed,
    id: SampleId,
    given: &GivenScores,
) -> std::result::Result<Option<Annotation>, String> {
    let Some(score) = given.of(Some(id), &listed.address) else {
        return Err("the table has no score for it".to_owned());
    };
    let Subject { kind, mode, .. } = pass.subject;
    if !pass.answers.claims().claim(id, *kind, mode, &AGAIN) {
        return Ok(None);
    }
    Ok(Some(Annotation {
        score: Some(score),
        ..pass.subject.row(id, listed)
    }))
}
