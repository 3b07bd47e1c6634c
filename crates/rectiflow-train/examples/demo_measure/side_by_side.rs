//! The same prompts from the same noise, one column per model.

use std::path::Path;

use rectiflow_data::{contact_sheet::ContactSheet, picture::Picture};
use rectiflow_train::{Result, findings::Finding};

use crate::{Contender, settings};

const FILE: &str = "side-by-side.png";
const PROMPTS: [&str; 8] = [
    "a 3D emoji of red apple on a white background",
    "a 3D emoji of red apple on a black background",
    "a 3D emoji of grinning face on a white background",
    "a 3D emoji of grinning face on a black background",
    "a 3D emoji of blue heart on a yellow background",
    "a 3D emoji of soccer ball on a green background",
    "a 3D emoji of pizza on a black background",
    "a 3D emoji of full moon on a blue background",
];

/// A labelled column of pictures, one per prompt.
pub(crate) struct Column {
    pub(crate) label: String,
    pub(crate) pictures: Vec<Picture>,
}

pub(crate) fn finding(contenders: &[Contender], run: &Path) -> Result<Finding> {
    let prompts = PROMPTS.map(str::to_owned);
    let mut columns = Vec::new();
    for contender in contenders {
        let pictures = contender.draw(&prompts, &settings(), "side by side")?;
        columns.push(Column {
            label: contender.label.clone(),
            pictures,
        });
    }
    write_columns(&run.join(FILE), &prompts, &columns)?;
    Ok(Finding {
        title: "Before and after".into(),
        text: vec!["The same prompts from the same noise, one column per model.".into()],
        picture: Some(FILE.into()),
        table: None,
    })
}

/// Writes a grid with one row per prompt.
pub(crate) fn write_columns(path: &Path, prompts: &[String], columns: &[Column]) -> Result<()> {
    let labels: Vec<String> = columns.iter().map(|column| column.label.clone()).collect();
    let mut pictures = Vec::new();
    for row in 0..prompts.len() {
        pictures.extend(columns.iter().map(|column| column.pictures[row].clone()));
    }
    let grid = ContactSheet {
        row_labels: prompts,
        column_labels: &labels,
        columns: labels.len(),
        pictures: &pictures,
    };
    Ok(grid.draw().write_png(path, &[])?)
}
