//! One model drawn with different inference settings: a small grid for each question.

use std::path::Path;

use rectiflow_sdxl::{sample::SampleSettings, schedule::Schedule};
use rectiflow_train::{Result, findings::Finding};

use crate::{
    Contender, settings,
    side_by_side::{Column, write_columns},
};

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
    choices: Vec<Choice>,
}

/// Settings under their label.
struct Choice {
    label: String,
    settings: SampleSettings,
}

pub(crate) fn findings(contender: &Contender, run: &Path) -> Result<Vec<Finding>> {
    let questions = [shift(), schedule(), perturbed_attention(), guidance()];
    questions
        .into_iter()
        .map(|question| answer(&question, contender, run))
        .collect()
}

fn shift() -> Question {
    let choices = [1.0, 3.0, 6.0].map(|shift| Choice {
        label: format!("shift {shift}"),
        settings: SampleSettings {
            shift,
            ..settings()
        },
    });
    Question {
        file: "inference-shift.png",
        title: "Shift",
        text: "The share of steps at high noise, where the composition is decided: few at shift 1, \
               most at shift 6. Observed on 2026-11-24: with latents this small and 20 steps the \
               three pictures are nearly the same.",
        choices: choices.into(),
    }
}

fn schedule() -> Question {
    let choices = [Schedule::Simple, Schedule::Normal, Schedule::Beta].map(|schedule| Choice {
        label: schedule.to_string(),
        settings: SampleSettings {
            schedule,
            ..settings()
        },
    });
    Question {
        file: "inference-schedule.png",
        title: "Schedule",
        text: "The distribution of the steps between noise and picture; their number is the same. \
               Observed on 2026-11-24: no visible difference.",
        choices: choices.into(),
    }
}

fn perturbed_attention() -> Question {
    let scales = [(1.0, 0.0), (1.0, 3.0), (3.0, 0.0), (3.0, 3.0)];
    let choices = scales.map(|(cfg, pag_scale)| Choice {
        label: format!("CFG {cfg}, PAG {pag_scale}"),
        settings: SampleSettings {
            cfg,
            pag_scale,
            ..settings()
        },
    });
    Question {
        file: "inference-pag.png",
        title: "Perturbed-attention guidance (PAG)",
        text: "Steers away from what the model draws with the attention of its middle block off; \
               with CFG and without. Observed on 2026-11-24: almost no effect, since the middle of \
               this UNet is 4x4 latents and one transformer block; edges are a little firmer \
               without CFG.",
        choices: choices.into(),
    }
}

fn guidance() -> Question {
    let choices = [1.0, 2.0, 3.0, 4.5, 7.0].map(|cfg| Choice {
        label: format!("CFG {cfg}"),
        settings: SampleSettings { cfg, ..settings() },
    });
    Question {
        file: "inference-cfg.png",
        title: "Guidance (CFG)",
        text: "How strongly the picture follows the prompt; 1 is no guidance. Observed on \
               2026-11-24: 1 is soft and lacks a stalk or a spot, 2 to 3 is right, from 4.5 on \
               colours are too strong and plain backgrounds have stains.",
        choices: choices.into(),
    }
}

fn answer(question: &Question, contender: &Contender, run: &Path) -> Result<Finding> {
    let prompts = PROMPTS.map(str::to_owned);
    let mut columns = Vec::new();
    for choice in &question.choices {
        let pictures = contender.draw(&prompts, &choice.settings, question.title)?;
        columns.push(Column {
            label: choice.label.clone(),
            pictures,
        });
    }
    write_columns(&run.join(question.file), &prompts, &columns)?;
    Ok(Finding {
        title: question.title.into(),
        text: vec![question.text.into()],
        picture: Some(question.file.into()),
        table: None,
    })
}
