//! `rectiflow score`: scores of pictures by an ONNX model or from a table, their ranks over the
//! whole set, and a page with pictures of each quality word.

use std::path::PathBuf;

use rectiflow_annotate::{
    onnx::{
        feed::Feed,
        model::{Model, hash},
        preparation::Preset,
    },
    pass::{Pass, Passed, Subject},
    pictures::listed::Pictures,
    score::{
        assign::assign,
        by_word::{WordGroup, groups},
        given::{Column, GivenScores},
        head::{Activation, Counts, Head},
        ranked::write_ranks,
    },
    table::answers::{Answers, RUN_KEY},
};
use rectiflow_data::annotation::{Annotation, Kind};
use rectiflow_sdxl::durable::write_bytes;
use serde_json::json;

use crate::{
    annotating::{TableArgs, as_json, describe, file_name, shown},
    picture_model::{LookArgs, named},
    ranks_page,
    terminal::{
        answer::{Answer, Misuse},
        numbers::{grouped, short},
    },
};

/// Pictures of each word on the page.
const NUM_EXAMPLES: usize = 10;

/// Score pictures with an ONNX model, or from a table of scores, and rank them over the whole set.
///
/// Models of any scale can be used: `prep.quality_ranks` turns ranks, the share of the set that
/// scores lower, into quality words. Writes TABLE.html, a page with ten pictures of each word. A
/// killed run goes on where it was. Needs ONNX Runtime for a model: scripts/onnx_runtime.py.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    table: TableArgs,
    /// The model, an ONNX file that returns a number or logits.
    #[arg(long, value_name = "FILE", required_unless_present = "scores")]
    model: Option<PathBuf>,
    /// Scores that another program has computed: CSV, Parquet, JSON lines or SQLite with the
    /// columns score, and id (16 hexadecimal digits) or source (the picture's address).
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    scores: Option<PathBuf>,
    /// The column of --scores. Of `text`, the answers of `rectiflow caption`, the first number in
    /// each counts.
    #[arg(long, value_name = "NAME", default_value = "score")]
    column: String,
    /// The mode of the rows of --scores that count, if it is a table of annotations. Default: all.
    #[arg(long, value_name = "MODE")]
    mode: Option<String>,
    /// What is done to the model's numbers first. Default: softmax with --weights, otherwise none.
    #[arg(long, value_parser = named(&Activation::ALL))]
    activation: Option<Activation>,
    /// Which of the model's numbers is the score, from 0.
    #[arg(long, value_name = "N", conflicts_with = "weights")]
    class: Option<usize>,
    /// The weight of each of the model's numbers, as 1,2,3: the score is the expected value.
    #[arg(
        long,
        value_delimiter = ',',
        allow_hyphen_values = true,
        value_name = "NUMBERS"
    )]
    weights: Vec<f64>,
    /// The page. Default: beside the table, ending in .html.
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    #[command(flatten)]
    look: LookArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<Answer> {
    let settings = args.table.settings()?;
    let Some(source) = args.model.as_ref().or(args.scores.as_ref()) else {
        return Err(Misuse("--model or --scores is needed".to_owned()).into());
    };
    let subject = Subject {
        kind: Kind::Score,
        mode: args.table.name(source),
        model: file_name(source),
    };
    let scorer = args.scorer(&subject)?;
    let run = scorer.run.clone();
    let pictures = args.table.pictures(&settings)?;
    let mut answers = args.table.answers(&run)?;
    let passed = scorer.score(&pictures, &mut answers, &subject)?;
    answers.finish(None)?;

    // Ranks are over all scores of the table, those of earlier runs included.
    let out = &args.table.out;
    write_ranks(out, args.table.jsonl.as_deref(), &[(RUN_KEY, &run)])?;
    let words = &settings.quality_ranks;
    let groups = groups(out, &subject.mode, words, NUM_EXAMPLES)?;
    let page = args
        .page
        .clone()
        .unwrap_or_else(|| out.with_extension("html"));
    let html = ranks_page::page(&subject, &groups, &pictures);
    write_bytes(&page, html.as_bytes())?;

    let num_ranked: u64 = groups.iter().map(|group| group.count).sum();
    let mut text = describe(&subject, &passed, &args.table);
    text += &format!(
        "\n{} scores are ranked; {}",
        grouped(num_ranked),
        page.display()
    );
    for group in &groups {
        text += &format!("\n{}", line(group));
    }
    let mut answer = as_json(&subject, &passed, &args.table);
    answer["ranked"] = json!(num_ranked);
    answer["page"] = json!(page);
    answer["words"] = groups.iter().map(as_object).collect();
    Ok(Answer::done(text, answer))
}

/// What scores pictures.
enum Scorer<'a> {
    Model(Box<Model>, Head, &'a LookArgs),
    Table(GivenScores),
}

/// A scorer, and the settings that decide its scores.
struct Opened<'a> {
    scorer: Scorer<'a>,
    run: String,
}

impl Args {
    fn scorer(&self, subject: &Subject) -> anyhow::Result<Opened<'_>> {
        let name = &subject.mode;
        if let Some(table) = &self.scores {
            let column = Column {
                name: self.column.to_lowercase(),
                mode: self.mode.clone(),
            };
            return Ok(Opened {
                scorer: Scorer::Table(GivenScores::read(table, &column)?),
                run: format!(
                    "scores {name}\ntable {} {}\n{column:?}",
                    subject.model,
                    hash(table)?
                ),
            });
        }
        let path = self
            .model
            .as_ref()
            .expect("clap needs --model without --scores");
        let head = self.head();
        let preparation = self.look.preparation(Preset::Siglip)?;
        let opened = self.look.open(path)?;
        if let Err(reason) = head.check(opened.width()) {
            return Err(Misuse(format!("{}: {reason}", path.display())).into());
        }
        let run = format!(
            "scores {name}\nmodel {} {}\ninput {}\npreparation {preparation:?}\nhead {head:?}",
            subject.model,
            hash(path)?,
            self.look.settings(),
        );
        Ok(Opened {
            scorer: Scorer::Model(Box::new(opened), head, &self.look),
            run,
        })
    }

    fn head(&self) -> Head {
        let counts = match (self.class, self.weights.is_empty()) {
            (Some(class), _) => Counts::One(class),
            (None, false) => Counts::Weighted(self.weights.clone()),
            (None, true) => Counts::Only,
        };
        let usual = match counts {
            Counts::Weighted(_) => Activation::Softmax,
            _ => Activation::None,
        };
        Head {
            activation: self.activation.unwrap_or(usual),
            counts,
        }
    }
}

impl Opened<'_> {
    fn score(
        self,
        pictures: &Pictures,
        answers: &mut Answers,
        subject: &Subject,
    ) -> anyhow::Result<Passed> {
        let pass = Pass {
            pictures,
            answers,
            subject,
        };
        let mut shown = shown("score");
        match self.scorer {
            Scorer::Table(given) => Ok(assign(pass, &given, &mut shown)?),
            Scorer::Model(mut model, head, look) => {
                let feed = Feed {
                    model: &mut model,
                    preparation: look.preparation(Preset::Siglip)?,
                };
                let make = |row: &mut Annotation, numbers: &[f32]| fill(row, &head, numbers);
                Ok(pass.run(feed, &make, &mut shown)?)
            }
        }
    }
}

fn fill(row: &mut Annotation, head: &Head, numbers: &[f32]) -> Result<(), String> {
    let score = head.score(numbers);
    if !score.is_finite() {
        return Err("the model returned a number that is not finite".to_owned());
    }
    row.score = Some(score);
    Ok(())
}

/// A word, its pictures and their scores in a line.
fn line(group: &WordGroup) -> String {
    format!(
        "{}: {} pictures, scores {} to {}",
        group.word.as_deref().unwrap_or("no word"),
        grouped(group.count),
        short(group.lowest, 4),
        short(group.highest, 4)
    )
}

fn as_object(group: &WordGroup) -> serde_json::Value {
    json!({
        "word": group.word,
        "pictures": group.count,
        "lowest": group.lowest,
        "highest": group.highest,
    })
}
