//! The same prompts from the same noise, a column for each model.

use std::path::Path;

use rectiflow_data::{grid::Grid, picture::Picture};
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
    let columns = contenders.iter().map(|contender| contender.draw(&prompts, &settings(), "side by side"));
    let columns: Vec<Vec<Picture>> = columns.collect::<Result<_>>()?;
    let pictures: Vec<Picture> =
        (0..prompts.len()).flat_map(|row| columns.iter().map(move |column| column[row].clone())).collect();
    let labels: Vec<String> = contenders.iter().map(|contender| contender.label.clone()).collect();
    let grid = Grid { row_labels: &prompts, column_labels: &labels, columns: contenders.len(), pictures: &pictures };
    grid.draw().write_png(&run.join(FILE), &[])?;
    Ok(Finding {
        title: "Before and after".into(),
        text: vec!["The same prompts from the same noise, a column for each model.".into()],
        picture: Some(FILE.into()),
        table: None,
    })
}
