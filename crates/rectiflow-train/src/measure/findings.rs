//! Findings about a run for its report: titles, sentences, pictures and tables.
//!
//! A program that evaluates a run writes `findings.json` to the run folder and pictures beside it;
//! `rectiflow report` shows them at the top of the page, in the same order.

use std::path::{Path, PathBuf};

use rectiflow_data::text_file;
use rectiflow_sdxl::durable::write_bytes;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One section of the report.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Finding {
    /// Heading of the section.
    pub title: String,
    /// Paragraphs above the picture.
    #[serde(default)]
    pub text: Vec<String>,
    /// Path of a PNG, relative to the run folder.
    #[serde(default)]
    pub picture: Option<PathBuf>,
    /// Table below the picture.
    #[serde(default)]
    pub table: Option<Table>,
}

/// A table of numbers or words.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Headings of the columns; the first is that of the row names.
    pub columns: Vec<String>,
    /// Rows, with one cell per column.
    pub rows: Vec<Vec<String>>,
}

const FILE: &str = "findings.json";

/// Writes the findings of a run, in place of earlier ones.
///
/// # Errors
/// [`Error::Model`] if the file cannot be written.
pub fn write(run_dir: &Path, findings: &[Finding]) -> Result<()> {
    let json =
        serde_json::to_vec_pretty(findings).expect("findings are plain data that JSON can hold");
    Ok(write_bytes(&run_dir.join(FILE), &json)?)
}

/// Returns the findings of a run; none if it has no file of findings.
///
/// # Errors
/// [`Error::Data`]; [`Error::Io`] for a file with other contents.
pub fn read(run_dir: &Path) -> Result<Vec<Finding>> {
    let path = run_dir.join(FILE);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = text_file::read(&path)?;
    serde_json::from_str(&text).map_err(|error| Error::io(&path)(error.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn findings_come_back_as_written() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        assert_eq!(read(dir.path()).expect("there are none"), []);
        let table = Table {
            columns: vec!["model".into(), "KID".into()],
            rows: vec![vec!["base".into(), "0.1".into()]],
        };
        let finding = Finding {
            title: "Shift".into(),
            table: Some(table),
            ..Finding::default()
        };
        write(dir.path(), std::slice::from_ref(&finding)).expect("writes");
        assert_eq!(read(dir.path()).expect("reads"), [finding]);
        fs::write(dir.path().join(FILE), r#"[{"titel": "x"}]"#).expect("writes");
        assert!(
            read(dir.path())
                .expect_err("a wrong key")
                .to_string()
                .contains("titel")
        );
    }
}
