//! The same prompts from the same noise, a column for each model.

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

pub(crate) fn finding(contenders: &[Contender], run: &Path) -> Result<Finding> {
    let prompts = PROMPTS.map(str::to_owned);
    let draw =
        |contender: &Contender| Ok((contender.label.clone(), contender.draw(&prompts, &settings(), "side by side")?));
    let columns = contenders.iter().map(draw).collect::<Result<Vec<_>>>()?;
    write_columns(&run.join(FILE), &prompts, columns)?;
    Ok(Finding {
        title: "Before and after".into(),
        text: vec!["The same prompts from the same noise, a column for each model.".into()],
        picture: Some(FILE.into()),
        table: None,
    })
}

/// A grid of labelled columns, each with one picture a prompt.
pub(crate) fn write_columns(path: &Path, prompts: &[String], columns: Vec<(String, Vec<Picture>)>) -> Result<()> {
    let (labels, columns): (Vec<String>, Vec<Vec<Picture>>) = columns.into_iter().unzip();
    let pictures: Vec<Picture> =
        (0..prompts.len()).flat_map(|row| columns.iter().map(move |column| column[row].clone())).collect();
    let grid = ContactSheet { row_labels: prompts, column_labels: &labels, columns: labels.len(), pictures: &pictures };
    Ok(grid.draw().write_png(path, &[])?)
}
