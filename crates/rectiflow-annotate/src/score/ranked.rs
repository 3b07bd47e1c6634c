//! The ranks of a finished table: of all scores of a mode, the share that is lower.

use std::{collections::BTreeMap, io::Write, path::Path};

use rectiflow_data::{
    annotation::{Annotation, Kind, Status},
    annotation_rows::AnnotationWriter,
    annotation_table,
    durable::DurableFile,
    error::Error as DataError,
};

use crate::{error::Result, score::ranks::Ranks};

/// The ranks of each scorer in a table.
pub type RanksByMode = BTreeMap<String, Ranks>;

/// Writes the ranks of all scores into the table `path`, which is replaced when the new one is
/// whole, and its rows into `lines` as JSON lines. `metadata` goes into the table's footer.
///
/// # Errors
/// Those of the files.
pub fn write_ranks(
    path: &Path,
    lines: Option<&Path>,
    metadata: &[(&str, &str)],
) -> Result<RanksByMode> {
    let ranks = read_ranks(path)?;
    let file = DurableFile::create(path)?;
    let mut table = AnnotationWriter::new(file, metadata).map_err(DataError::io(path))?;
    let mut lines = lines.map(DurableFile::create).transpose()?;
    annotation_table::read(path, &mut |mut row| {
        row.rank = score_of(&row).map(|score| ranks[&row.mode].of(score));
        if let Some(lines) = &mut lines {
            writeln!(lines, "{}", row.to_line()).map_err(DataError::io("JSON lines"))?;
        }
        table.push(row).map_err(DataError::io(path))
    })?;
    table.finish().map_err(DataError::io(path))?.commit()?;
    lines.map_or(Ok(()), DurableFile::commit)?;
    Ok(ranks)
}

/// The ranks of each scorer in a table.
fn read_ranks(path: &Path) -> Result<RanksByMode> {
    let mut scores: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    annotation_table::read(path, &mut |row| {
        if let Some(score) = score_of(&row) {
            scores.entry(row.mode).or_default().push(score);
        }
        Ok(())
    })?;
    let ranked = |(mode, scores)| (mode, Ranks::new(scores));
    Ok(scores.into_iter().map(ranked).collect())
}

/// The score of a row that is one.
fn score_of(row: &Annotation) -> Option<f64> {
    let is_score = row.kind == Kind::Score && row.status == Status::Ok;
    row.score.filter(|_| is_score)
}
