//! `rectiflow tag`: tags of pictures by an ONNX model, such as the WD taggers.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use rectiflow_annotate::{
    onnx::{feed::Feed, model, preparation::Preset},
    pass::{Pass, Subject},
    score::head::Activation,
    tag::{
        choice::Thresholds,
        labels::{self, CLASSES, Class, Label},
    },
};
use rectiflow_data::annotation::{Annotation, Kind};

use crate::{
    annotating::{TableArgs, as_json, describe, file_name, shown},
    picture_model::{LookArgs, named},
    terminal::answer::Answer,
};

/// Tag pictures with an ONNX model, such as the WD taggers, into a table of annotations.
///
/// The model's input says the size, its CSV names the outputs. Tags above the threshold of their
/// class are kept, of ratings the surest one. A killed run goes on where it was; pictures with tags
/// of this name are not looked at again. Needs ONNX Runtime: scripts/onnx_runtime.py.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    table: TableArgs,
    /// The model, an ONNX file.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Names of the model's outputs: a CSV with name and category in each row. Default:
    /// selected_tags.csv beside the model.
    #[arg(long, value_name = "CSV")]
    labels: Option<PathBuf>,
    /// Probability above which a tag is kept.
    #[arg(long, default_value_t = Thresholds::default().others, value_name = "P")]
    threshold: f32,
    /// Probability for one class, as copyright=0.5. Repeatable. Default: character=0.85.
    #[arg(long = "threshold-of", value_name = "CLASS=P", value_parser = threshold_of)]
    thresholds: Vec<(Class, f32)>,
    /// Keep underscores. Default: they become spaces, except in faces such as ^_^.
    #[arg(long)]
    keep_underscores: bool,
    /// What makes probabilities of the model's numbers. WD taggers return probabilities.
    #[arg(long, default_value = "none", value_parser = named(&Activation::ALL))]
    activation: Activation,
    #[command(flatten)]
    look: LookArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let settings = args.table.settings()?;
    let preparation = args.look.preparation(Preset::Wd)?;
    let thresholds = args.thresholds();
    let beside = args.model.with_file_name("selected_tags.csv");
    let list = args.labels.as_ref().unwrap_or(&beside);
    let labels = labels::read(list, args.keep_underscores)?;
    let mut opened = args.look.open(&args.model)?;
    labels::check(list, &labels, &args.model, opened.width())?;

    let subject = Subject {
        kind: Kind::Tags,
        mode: args.table.name(&args.model),
        model: file_name(&args.model),
    };
    let run = args.run_text(&subject, list)?;
    let pictures = args.table.pictures(&settings)?;
    let mut answers = args.table.answers(&run)?;
    let pass = Pass {
        pictures: &pictures,
        answers: &mut answers,
        subject: &subject,
    };
    let feed = Feed {
        model: &mut opened,
        preparation,
    };
    let make = |row: &mut Annotation, numbers: &[f32]| {
        fill(row, (&labels, &thresholds), numbers, args.activation)
    };
    let passed = pass.run(feed, &make, &mut shown("tag"))?;
    answers.finish(args.table.jsonl.as_deref())?;
    let text = describe(&subject, &passed, &args.table);
    Ok(Answer::done(text, as_json(&subject, &passed, &args.table)))
}

impl Args {
    fn thresholds(&self) -> Thresholds {
        let of = match self.thresholds.is_empty() {
            true => Thresholds::default().of,
            false => self.thresholds.iter().copied().collect::<BTreeMap<_, _>>(),
        };
        Thresholds {
            others: self.threshold,
            of,
        }
    }

    /// The settings that decide the tags.
    fn run_text(&self, subject: &Subject, list: &Path) -> anyhow::Result<String> {
        Ok(format!(
            "tags {}\nmodel {} {}\nlabels {}\ninput {}\npreparation {:?}\nactivation {:?}\n\
             thresholds {:?}\nunderscores {}",
            subject.mode,
            subject.model,
            model::hash(&self.model)?,
            model::hash(list)?,
            self.look.settings(),
            self.look.preparation(Preset::Wd)?,
            self.activation,
            self.thresholds(),
            self.keep_underscores
        ))
    }
}

/// The tags of a picture.
fn fill(
    row: &mut Annotation,
    (labels, thresholds): (&[Label], &Thresholds),
    numbers: &[f32],
    activation: Activation,
) -> Result<(), String> {
    if !numbers.iter().all(|number| number.is_finite()) {
        return Err("the model returned a number that is not finite".to_owned());
    }
    let probabilities: Vec<f32> = match activation {
        Activation::None => numbers.to_vec(),
        other => other
            .of(numbers)
            .iter()
            .map(|&number| number as f32)
            .collect(),
    };
    let chosen = thresholds.choose(labels, &probabilities);
    row.tags = Some(chosen.tags);
    row.tag_classes = Some(chosen.classes);
    Ok(())
}

/// CLASS=P.
fn threshold_of(text: &str) -> Result<(Class, f32), String> {
    let names = || CLASSES.map(Class::as_str).join(", ");
    let expected = || {
        format!(
            "expected CLASS=P, such as character=0.85; classes are {}",
            names()
        )
    };
    let (name, threshold) = text.split_once('=').ok_or_else(expected)?;
    let class = Class::parse(name.trim()).ok_or_else(expected)?;
    Ok((class, threshold.trim().parse().map_err(|_| expected())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_of_classes_are_read() {
        assert_eq!(threshold_of("character=0.7"), Ok((Class::Character, 0.7)));
        for text in ["character", "hair=0.7", "general=much"] {
            let problem = threshold_of(text).unwrap_err();
            assert!(problem.contains("such as character=0.85"), "{problem}");
        }
    }
}
