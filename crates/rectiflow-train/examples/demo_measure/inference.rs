//! One model, drawn with other settings at inference: a small grid for each question.

use std::path::Path;

use rectiflow_sdxl::{sample::SampleSettings, schedule::Schedule};
use rectiflow_train::{Result, findings::Finding};

use crate::{Contender, settings, side_by_side::write_columns};

const PROMPTS: [&str; 4] = [
    "a 3D emoji of red apple on a white background",
    "a 3D emoji of smiling face with sunglasses on a black background",
    "a 3D emoji of green heart on a white background",
    "a 3D emoji of soccer ball on a green background",
];

/// A question and the settings that answer it.
struct Question {
    file: &'static str,
    title: &'static str,
    text: &'static str,
    columns: Vec<(String, SampleSettings)>,
}

pub(crate) fn findings(contender: &Contender, run: &Path) -> Result<Vec<Finding>> {
    questions().into_iter().map(|question| answer(question, contender, run)).collect()
}

fn questions() -> Vec<Question> {
    let columns = |name: &str, values: &[f64], set: fn(&mut SampleSettings, f64)| {
        let column = |&value: &f64| {
            let mut changed = settings();
            set(&mut changed, value);
            (format!("{name} {value}"), changed)
        };
        values.iter().map(column).collect()
    };
    let schedules = [Schedule::Simple, Schedule::Normal, Schedule::Beta];
    vec![
        Question {
            file: "inference-shift.png",
            title: "Shift",
            text: "How many of the steps are spent at high noise, where the composition is decided: few at shift 1, most \
                   at shift 6. Seen on 2026-11-24: with latents as small as these and 20 steps the three are nearly the \
                   same picture.",
            columns: columns("shift", &[1.0, 3.0, 6.0], |settings, shift| settings.shift = shift),
        },
        Question {
            file: "inference-schedule.png",
            title: "Schedule",
            text: "Where the steps lie between noise and picture; the number of steps is the same. Seen on 2026-11-24: no \
                   difference that an eye can find.",
            columns: schedules
                .map(|schedule| (schedule.to_string(), SampleSettings { schedule, ..settings() }))
                .to_vec(),
        },
        Question {
            file: "inference-pag.png",
            title: "Perturbed-attention guidance (PAG)",
            text: "Steers away from what the model draws when its attention in the middle is switched off; with CFG and \
                   without. Seen on 2026-11-24: next to nothing, since the middle of this UNet is 4x4 latents and one \
                   transformer block; edges are a little firmer without CFG.",
            columns: guided([(1.0, 0.0), (1.0, 3.0), (3.0, 0.0), (3.0, 3.0)]),
        },
        Question {
            file: "inference-cfg.png",
            title: "Guidance (CFG)",
            text: "How strongly the prompt is followed; 1 is no guidance. Seen on 2026-11-24: 1 is soft and a stalk or a \
                   spot is missing, 2 to 3 is right, from 4.5 on colours are overdone and plain backgrounds get stains.",
            columns: columns("CFG", &[1.0, 2.0, 3.0, 4.5, 7.0], |settings, cfg| settings.cfg = cfg),
        },
    ]
}

fn guided(scales: [(f64, f64); 4]) -> Vec<(String, SampleSettings)> {
    let column =
        |(cfg, pag_scale)| (format!("CFG {cfg}, PAG {pag_scale}"), SampleSettings { cfg, pag_scale, ..settings() });
    scales.map(column).to_vec()
}

fn answer(question: Question, contender: &Contender, run: &Path) -> Result<Finding> {
    let prompts = PROMPTS.map(str::to_owned);
    let draw =
        |(label, settings): (String, SampleSettings)| Ok((label, contender.draw(&prompts, &settings, question.title)?));
    let columns = question.columns.into_iter().map(draw).collect::<Result<Vec<_>>>()?;
    write_columns(&run.join(question.file), &prompts, columns)?;
    Ok(Finding {
        title: question.title.into(),
        text: vec![question.text.into()],
        picture: Some(question.file.into()),
        table: None,
    })
}
