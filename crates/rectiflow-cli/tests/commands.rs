//! The command line from outside: its answers, the mistakes that it refuses, their messages and
//! exit codes.
//!
//! One table of arguments and expectations. Tests that need a data set, a model or a run are in
//! `end_to_end.rs`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    io::Read,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

fn rectiflow(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rectiflow"));
    command
        .args(arguments)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null());
    command.output().expect("the command starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("standard output is UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("standard error is UTF-8")
}

/// The JSON answer: the last line of standard output.
fn json(output: &Output) -> Value {
    let text = stdout(output);
    serde_json::from_str(text.lines().last().expect("something is printed"))
        .expect("the last line is JSON")
}

/// The published run; neither its data nor its model is here.
const ARTICLE: &str = "../../recipes/article/sdxl-flow-32xh100.toml";

/// Arguments, exit code, and what standard error must hold. Each is a mistake that a newcomer
/// makes.
const MISTAKES: &[(&[&str], i32, &[&str])] = &[
    (&[], 2, &["Usage: rectiflow", "train", "sample"]),
    (&["trian"], 2, &["unrecognized subcommand 'trian'", "train"]),
    (&["tokens"], 2, &["<TEXT>"]),
    (
        &["schedule", "simpel"],
        2,
        &["simpel", "did you mean simple?", "kl_optimal"],
    ),
    (
        &["schedule", "simple", "--steps", "0"],
        2,
        &["steps", "1 to 1000"],
    ),
    (
        &["schedule", "simple", "--shift", "-1"],
        2,
        &["shift", "positive"],
    ),
    (
        &[
            "forward", "vae", "--model", "m", "--input", "i", "--output", "o",
        ],
        2,
        &["vae-encode", "vae-decode"],
    ),
    (
        &[
            "forward",
            "unet",
            "--model",
            "nowhere",
            "--input",
            "absent.safetensors",
            "--output",
            "o",
        ],
        1,
        &["absent.safetensors"],
    ),
    (&["prep", "pictures", "--out", "o"], 2, &["--vae"]),
    (
        &["prep", "pictures", "--out", "o", "--vae", "nowhere"],
        1,
        &["nowhere"],
    ),
    (
        &[
            "prep",
            "pictures",
            "--out",
            "o",
            "--vae",
            "v",
            "--set",
            "prep.are_px=1",
        ],
        2,
        &["are_px", "area_px"],
    ),
    (
        &[
            "prep", "pictures", "--out", "o", "--work", "w", "--vae", "nowhere",
        ],
        2,
        &["--work is for a data set that goes to a URL"],
    ),
    (
        &["inspect", "no/such/dataset"],
        1,
        &["no/such/dataset", "manifest.json"],
    ),
    (&["inspect", "d", "--sheet", "x.png"], 2, &["--vae"]),
    (
        &["inspect", "ftp://host/data"],
        2,
        &["ftp://host/data", "s3://"],
    ),
    (
        &["bench", "loader", "no/such/dataset"],
        1,
        &["no/such/dataset", "manifest.json"],
    ),
    (&["bench", "prep", "no/such/folder"], 1, &["no/such/folder"]),
    (&["bench", "prep", "d", "--secs", "0"], 2, &["--secs"]),
    (
        &["plan", "no-such-recipe.toml", "--hardware", "h100-sxm"],
        1,
        &["no-such-recipe.toml"],
    ),
    (
        &["plan", ARTICLE, "--hardware", "h100sxm"],
        2,
        &["h100sxm", "did you mean h100-sxm?"],
    ),
    (
        &["plan", ARTICLE, "--network", "ib"],
        2,
        &["network", "ib-400", "eth-100"],
    ),
    (
        &["plan", ARTICLE, "--mfu", "1.5"],
        2,
        &["--mfu", "at most 1"],
    ),
    (
        &["plan", ARTICLE, "--within", "0"],
        2,
        &["--within", "above 0"],
    ),
    (&["plan", ARTICLE, "--gpus", "0"], 2, &["--gpus"]),
    (
        &["plan", ARTICLE, "--gpus", "65"],
        2,
        &["65 ranks cannot share 64 lanes", "lanes = 128"],
    ),
    (
        &["plan", "../../recipes/demo.toml"],
        2,
        &["--hardware", "run.hardware", "h100-sxm"],
    ),
    (
        &["bench", "loader", "d", "--mode", "owne"],
        2,
        &["owned", "window"],
    ),
    (
        &["train", "no-such-recipe.toml"],
        1,
        &["no-such-recipe.toml"],
    ),
    (&["eval", "no-such-recipe.toml"], 2, &["--checkpoint"]),
    (
        &["eval", "no-such-recipe.toml", "--checkpoint", "c"],
        1,
        &["no-such-recipe.toml"],
    ),
    (&["replay", "absent.json"], 1, &["absent.json"]),
    (
        &["replay", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")],
        1,
        &["Cargo.toml", "not a black box"],
    ),
    (&["sample", "--model", "nowhere"], 2, &["--prompt"]),
    (
        &[
            "sample", "--model", "nowhere", "--prompt", "a", "--size", "96",
        ],
        2,
        &["1024x1024", "\"96\""],
    ),
    (
        &[
            "sample", "--model", "nowhere", "--prompt", "a", "--device", "tpu",
        ],
        2,
        &["cpu, cuda or cuda:N", "tpu"],
    ),
    (
        &[
            "sample", "--model", "nowhere", "--prompt", "a", "--device", "cuda:99",
        ],
        2,
        &["\"cuda:99\" cannot be used: "],
    ),
    (
        &["sample", "--model", "nowhere", "--prompt", "a"],
        1,
        &["nowhere"],
    ),
    (
        &["sample", "--model", "nowhere", "--prompt", ""],
        1,
        &["nowhere"],
    ),
    (
        &[
            "sample",
            "--model",
            "nowhere",
            "--prompt",
            "a",
            "--sampler",
            "dpm2m",
        ],
        2,
        &["did you mean dpmpp_2m?", "uni_pc"],
    ),
    (
        &[
            "sample",
            "--model",
            "nowhere",
            "--prompt",
            "a",
            "--schedule",
            "krras",
        ],
        2,
        &["did you mean karras?"],
    ),
    (
        &[
            "sample", "--model", "nowhere", "--prompt", "a", "--steps", "0",
        ],
        2,
        &["steps is 0", "1 to 1000"],
    ),
    (
        &[
            "sample", "--model", "nowhere", "--prompt", "a", "--batch", "0",
        ],
        2,
        &["batch is 0"],
    ),
    (
        &[
            "sample",
            "--model",
            "nowhere",
            "--prompt",
            "a",
            "--cfg-rescale",
            "2",
        ],
        2,
        &["cfg_rescale is 2", "0 (none) to 1"],
    ),
    (
        &[
            "sample",
            "--model",
            "nowhere",
            "--prompt",
            "a",
            "--pag-parts",
            "midle",
        ],
        2,
        &["midle", "did you mean mid?"],
    ),
    (
        &[
            "sample",
            "--model",
            "nowhere",
            "--prompt",
            "a",
            "--original-size",
            "9+1",
        ],
        2,
        &["1536x1024+128+0", "9+1"],
    ),
    (
        &["export", "--model", "m", "--format", "ckpt", "--out", "o"],
        2,
        &["single-file", "diffusers"],
    ),
    (
        &[
            "export",
            "--model",
            "nowhere",
            "--format",
            "diffusers",
            "--out",
            "o",
        ],
        1,
        &["nowhere"],
    ),
    (
        &["import", "absent.safetensors", "--out", "o"],
        1,
        &["absent.safetensors"],
    ),
    (&["bench"], 2, &["sample"]),
    (&["bench", "sample", "--model", "nowhere"], 1, &["nowhere"]),
    (
        &["bench", "sample", "--model", "nowhere", "--rounds", "0"],
        2,
        &["--rounds"],
    ),
    (
        &["bench", "sample", "--model", "nowhere", "--dtype", "fp16"],
        2,
        &["fp32", "bf16"],
    ),
    (
        &["report", "no/such/run"],
        1,
        &["no/such/run", "metrics.jsonl"],
    ),
    (&["watch", "no/such/run"], 1, &["no/such/run"]),
    (
        &["watch", "ftp://host/run"],
        2,
        &["ftp://host/run", "s3://"],
    ),
];

/// 150 million samples in 139 hours on 32 H100s, $16k, with the 31 GB per GPU that `once` needs.
#[test]
fn a_plan_comes_to_what_the_published_run_took() {
    let output = rectiflow(&["plan", ARTICLE, "--gpus", "32", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let plan = json(&output);
    let number = |pointer: &str| {
        plan.pointer(pointer)
            .and_then(Value::as_f64)
            .unwrap_or_else(|| panic!("{pointer}"))
    };
    let near = |pointer: &str, expected: f64| {
        let found = number(pointer);
        assert!(
            (found / expected - 1.0).abs() < 0.005,
            "{pointer}: found {found}, expected {expected}"
        );
    };
    near("/time/hours", 138.5);
    near("/time/gpu_hours", 4433.0);
    near("/time/money", 16_620.0);
    near("/time/mfu", 0.1937);
    near("/time/hfu", 0.2548);
    near("/flops/recomputed", 6.43e12);
    near("/setups/recipe/time/hours", number("/time/hours"));
    near("/setups/cheapest/time/hours", 105.3);
    near("/setups/cheapest/micro_batch", 8.0);
    near("/time/samples_per_sec", 300.8);
    near("/time/steps", 36_622.0);
    near("/storage/bytes_per_sec", 300.8 * 132_072.0);
    near("/memory_bytes", 30.05e9);
    assert!(number("/time/simulated_hours") < number("/time/hours"));
    let text = stdout(&rectiflow(&["plan", ARTICLE, "--gpus", "32"]));
    for said in [
        "datasets/photos cannot be read",
        "models/sdxl-base-1.0 does not exist",
        "published run",
        "--mfu",
        "the cheapest that fits",
        "that a smaller micro-batch spends the same share of the peak has not been measured",
    ] {
        assert!(text.contains(said), "{said} is not in\n{text}");
    }
}

#[test]
fn every_recipe_can_be_planned() {
    let mut recipes = Vec::new();
    for folder in ["../../recipes", "../../recipes/article"] {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|ending| ending == "toml") {
                recipes.push(path);
            }
        }
    }
    assert!(recipes.len() >= 6, "{recipes:?}");
    for recipe in recipes {
        let output = rectiflow(&[
            "plan",
            recipe.to_str().unwrap(),
            "--hardware",
            "a100-80gb",
            "--json",
        ]);
        assert!(
            output.status.success(),
            "{}: {}",
            recipe.display(),
            stderr(&output)
        );
        assert!(json(&output)["time"]["hours"].as_f64().unwrap() > 0.0);
    }
}

/// More of the same GPUs take less time, never less money; a slower network costs both.
#[test]
fn a_plan_follows_what_it_is_asked() {
    let hours = |more: &[&str]| {
        let output = rectiflow(&[&["plan", ARTICLE, "--json", "--mfu", "0.3"], more].concat());
        let time = json(&output)["time"].clone();
        (
            time["hours"].as_f64().unwrap(),
            time["gpu_hours"].as_f64().unwrap(),
        )
    };
    let (alone, eight, many) = (
        hours(&["--gpus", "1"]),
        hours(&["--gpus", "8"]),
        hours(&["--gpus", "64"]),
    );
    assert!(alone.0 > eight.0 && eight.0 > many.0 && alone.1 <= eight.1 && eight.1 <= many.1);
    let slow = hours(&["--gpus", "64", "--network", "eth-100"]);
    assert!(slow.0 > many.0);
    let each = hours(&[
        "--gpus",
        "64",
        "--network",
        "eth-100",
        "--set",
        "ranks.sharding='each'",
    ]);
    assert!(
        each.0 > slow.0,
        "gradients that cross a slow network once a step cost less"
    );
    let small = rectiflow(&["plan", ARTICLE, "--hardware", "rtx-4090", "--json"]);
    let warnings = json(&small)["warnings"].to_string();
    assert!(
        warnings.contains("does not fit") && warnings.contains("train.micro_batch"),
        "{warnings}"
    );
}

#[test]
fn mistakes_are_explained_and_have_the_right_exit_code() {
    for &(arguments, code, needles) in MISTAKES {
        let output = rectiflow(arguments);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        for needle in needles {
            assert!(
                message.contains(needle),
                "{arguments:?} does not mention {needle}: {message}"
            );
        }
        assert!(
            !message.contains("backtrace") && !message.contains("panicked"),
            "{arguments:?}: {message}"
        );
        assert_eq!(stdout(&output), "", "{arguments:?} answers nothing");
    }
}

#[test]
fn every_command_explains_itself() {
    let output = rectiflow(&["--help"]);
    assert!(output.status.success());
    let overview = stdout(&output);
    assert!(overview.contains("Exit codes"), "{overview}");
    let commands = [
        "prep", "inspect", "train", "eval", "replay", "sample", "export", "import", "report",
        "watch", "schedule", "tokens", "forward", "bench",
    ];
    for command in commands {
        let line = overview
            .lines()
            .find(|line| line.trim_start().starts_with(command));
        let line = line.unwrap_or_else(|| panic!("{command} is not in the overview"));
        assert!(
            line.split_whitespace().count() > 5,
            "a sentence about {command}: {line}"
        );
        let help = rectiflow(&[command, "--help"]);
        assert!(help.status.success(), "{command} --help");
        // Every argument has a description: clap prints it on the line after the argument or beside
        // it.
        let text = stdout(&help);
        let bare = text.lines().zip(text.lines().skip(1)).find(|(line, next)| {
            line.trim_start().starts_with("--") && !line.contains("   ") && next.trim().is_empty()
        });
        assert!(bare.is_none(), "{command}: no description for {bare:?}");
    }
}

#[test]
fn a_failure_is_an_object_for_machines_too() {
    let output = rectiflow(&["inspect", "no/such/dataset", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        json(&output)["error"]
            .as_str()
            .is_some_and(|message| message.contains("no/such/dataset"))
    );
    assert_eq!(json(&output)["exit"], 1);
}

#[test]
fn tokens_are_those_of_hugging_face() {
    let output = rectiflow(&["tokens", "A photo of a cat", "--json"]);
    let answer = json(&output);
    assert_eq!(
        answer
            .as_object()
            .expect("an object")
            .keys()
            .collect::<Vec<_>>(),
        ["clip_g", "clip_l"]
    );
    for (encoder, padding) in [("clip_l", 49407), ("clip_g", 0)] {
        let ids: Vec<i64> =
            serde_json::from_value(answer[encoder][0].clone()).expect("a list of ids");
        assert_eq!(
            ids[..7],
            [49406, 320, 1125, 539, 320, 2368, 49407],
            "{encoder}"
        );
        assert_eq!(ids[7..], [padding; 70], "{encoder}");
        assert_eq!(answer[encoder].as_array().map(Vec::len), Some(1));
    }
    let text = stdout(&rectiflow(&["tokens", "A photo of a cat"]));
    assert_eq!(
        text,
        "CLIP-L, chunk 1 of 1: 49406 320 1125 539 320 2368 49407 + 70 x 49407\n\
         bigG, chunk 1 of 1: 49406 320 1125 539 320 2368 49407 + 70 x 0\n"
    );
    assert!(stdout(&rectiflow(&["tokens", ""])).contains("49406 49407 + 75 x 49407"));
    let long = "cat ".repeat(300);
    assert_eq!(
        json(&rectiflow(&["tokens", &long, "--json"]))["clip_l"]
            .as_array()
            .map(Vec::len),
        Some(3)
    );
    assert!(
        stdout(&rectiflow(&["tokens", &long]))
            .lines()
            .all(|line| !line.contains(" x ")),
        "full chunks have no padding"
    );
}

#[test]
fn schedules_are_lists_of_sigmas_and_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("beta.svg");
    let output = rectiflow(&[
        "schedule",
        "beta",
        "--steps",
        "10",
        "--json",
        "--plot",
        plot.to_str().unwrap(),
    ]);
    let answer = json(&output);
    let sigmas: Vec<f64> = serde_json::from_value(answer["sigmas"].clone()).unwrap();
    assert_eq!((sigmas.len(), sigmas[0], sigmas[10]), (11, 1.0, 0.0));
    assert_eq!(
        (answer["steps"].as_u64(), answer["shift"].as_f64()),
        (Some(10), Some(6.0))
    );
    let svg = fs::read_to_string(plot).unwrap();
    assert!(
        svg.starts_with("<?xml") && svg.ends_with("</svg>\n") && svg.contains("kl_optimal"),
        "{svg}"
    );
    assert_eq!(
        stdout(&rectiflow(&[
            "schedule", "simple", "--steps", "4", "--shift", "1"
        ]))
        .lines()
        .count(),
        5
    );
}

#[test]
fn an_option_that_is_appended_overrides_the_one_before() {
    for (arguments, num_sigmas) in [
        (&["--steps", "4", "--steps", "6"][..], 7),
        (
            &["--steps", "6", "--shift", "3", "--steps", "4", "--shift=6"],
            5,
        ),
        (&["--steps=9", "--json", "--json", "--steps=9"], 10),
    ] {
        let output = rectiflow(&[&["schedule", "simple", "--json"][..], arguments].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(
            json(&output)["sigmas"].as_array().unwrap().len(),
            num_sigmas
        );
    }
    let plan = |set: &[&str]| {
        let gpus = ["plan", ARTICLE, "--json", "--gpus", "8", "--gpus", "32"];
        let output = rectiflow(&[&gpus[..], set].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        json(&output)
    };
    // Those that may stand several times still add up, and the later of the same key wins.
    let fewer = [
        "--set",
        "train.samples=4096000",
        "--set",
        "train.micro_batch=2",
    ];
    let found = plan(&fewer);
    assert_eq!(found["gpus"], 32);
    let later = [&fewer[..], &["--set", "train.samples=8192000"]].concat();
    let (found, later) = (
        found["time"]["steps"].as_u64(),
        plan(&later)["time"]["steps"].as_u64(),
    );
    assert_eq!(later, found.map(|steps| 2 * steps));
}

#[test]
fn what_is_no_text_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let long = folder.path().join("long");
    fs::File::create(&long).unwrap().set_len(1 << 40).unwrap();
    let pipe = folder.path().join("pipe");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let began = std::time::Instant::now();
    for path in [Path::new("/dev/zero"), &long, &pipe, folder.path()] {
        let path = path.to_str().unwrap();
        for arguments in [
            &["plan", path][..],
            &["train", path],
            &["eval", path, "--checkpoint", "c"],
            &["prep", "p", "--out", "o", "--vae", "v", "--recipe", path],
            &["inspect", "d", "--recipe", path],
            &["sample", "--model", "m", "--prompts", path],
            &["replay", path],
        ] {
            let output = rectiflow(arguments);
            let message = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
            assert!(
                message.contains(path) && message.contains("it is"),
                "{message}"
            );
        }
    }
    assert!(began.elapsed().as_secs() < 60);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_rectiflow"))
        .args(["schedule", "simple", "--steps", "1000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Closed before anything is written: every write fails.
    drop(child.stdout.take());
    let mut message = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut message)
        .unwrap();
    assert_eq!(
        (child.wait().unwrap().code(), message.as_str()),
        (Some(0), "")
    );
}

#[test]
fn a_broken_recipe_shows_all_its_problems_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let train = |text: &str, more: &[&str]| {
        let recipe = folder.path().join("broken.toml");
        fs::write(&recipe, text).unwrap();
        rectiflow(&[&["train", recipe.to_str().unwrap()], more].concat())
    };
    let sound = "[run]\ndir = 'run'\n[model]\nbase = 'm'\n[[data]]\npath = 'd'\n[train]\nsamples = 8\nmicro_batch = 2\n";

    let unknown = train(&format!("{sound}clip_nrom = 1.0\n[lr]\npaek = 1e-4\n"), &[]);
    let message = stderr(&unknown);
    assert_eq!(unknown.status.code(), Some(2), "{message}");
    for needle in [
        "broken.toml",
        "clip_nrom",
        "clip_norm",
        "paek",
        "peak",
        "2 problems",
    ] {
        assert!(message.contains(needle), "{needle}: {message}");
    }

    let impossible = train(
        &sound.replace("samples = 8", "samples = 0"),
        &["--set", "checkpoint.keep=0"],
    );
    let message = stderr(&impossible);
    assert_eq!(impossible.status.code(), Some(2), "{message}");
    assert!(
        message.contains("train.samples") && message.contains("checkpoint.keep"),
        "{message}"
    );

    let syntax = train("[run\n", &[]);
    assert_eq!(syntax.status.code(), Some(2), "{}", stderr(&syntax));
    assert!(
        !Path::new("run").exists(),
        "nothing is made for a broken recipe"
    );
}

/// The run folder of a run of three steps that was killed once.
fn write_run(folder: &Path) {
    let start = |step: u64| {
        format!(
            r#"{{"event":"start","step":{step},"unix_secs":1,"order_hash":"x","num_parameters":2500000,"num_train":40,"num_test":4,"buckets":[[128,128,30,3],[160,96,10,1]],"threads":2}}"#
        )
    };
    let step = |step: u64, loss: &str| {
        format!(
            r#"{{"event":"step","step":{step},"samples":{},"epoch":0,"loss":{loss},"gradient_norm":1.0,"lr":0.001,"secs":0.5,"data_secs":0.0}}"#,
            step * 8
        )
    };
    let test = r#"{"event":"test","step":2,"samples":16,"loss":0.5,"bins":[{"from":0.0,"to":1.0,"loss":0.5,"standard_error":0.1,"count":4}],"secs":0.1}"#;
    let end = r#"{"event":"end","step":3,"reason":"finished","secs":9.0}"#;
    // The first process lost its second and third step.
    let lines = [
        start(0),
        step(1, "1.0"),
        step(2, "77.0"),
        step(3, "88.0"),
        start(1),
        step(2, "0.8"),
        test.to_owned(),
    ];
    let text = [&lines[..], &[step(3, r#""NaN""#), end.to_owned()]]
        .concat()
        .join("\n");
    fs::create_dir_all(folder.join("samples")).unwrap();
    fs::write(folder.join("metrics.jsonl"), text).unwrap();
    let samples = r#"[{"prompt":"a <b>bold</b> cat","images":["1.png","gone.png"]}]"#;
    fs::write(folder.join("samples/samples.json"), samples).unwrap();
    fs::write(
        folder.join("samples/1.png"),
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x80\0\0\0\x60",
    )
    .unwrap();
    fs::write(
        folder.join("timeline.jsonl"),
        "{\"part\":\"train\",\"secs\":61.0}\nnot json\n",
    )
    .unwrap();
}

#[test]
fn a_run_of_the_past_is_written_for_other_programs_once() {
    let folder = tempfile::tempdir().unwrap();
    write_run(folder.path());
    let run = folder.path().to_str().unwrap();
    for format in ["tensorboard", "trackio", "wandb"] {
        let arguments = ["report", run, "--to", format, "--json"];
        let output = rectiflow(&arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(json(&output)["events"], 9);
        assert!(folder.path().join(format).is_dir());
        let again = rectiflow(&arguments);
        assert_eq!(again.status.code(), Some(2), "{}", stderr(&again));
    }
}

#[test]
fn a_report_is_one_page_that_needs_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    write_run(folder.path());
    let output = rectiflow(&["report", folder.path().to_str().unwrap(), "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let page = fs::read_to_string(folder.path().join("report.html")).unwrap();
    assert_eq!(json(&output)["bytes"].as_u64(), Some(page.len() as u64));
    for needle in [
        "2.5 million",
        "24 samples",
        "once",
        "128×128",
        "1 min 1 s",
        "a &lt;b&gt;bold&lt;/b&gt; cat",
    ] {
        assert!(page.contains(needle), "{needle} is not in the page");
    }
    assert!(
        page.contains("width=\"128\" height=\"96\""),
        "a picture has its size"
    );
    assert_eq!(
        page.matches("<img").count(),
        1,
        "pictures that are gone are left out"
    );
    let foreign = [
        "http://",
        "https://",
        "src=\"/",
        "url(",
        "<script src",
        "@import",
        "<link",
    ];
    let found: Vec<_> = foreign
        .iter()
        .filter(|text| {
            page.replace("http://www.w3.org/2000/svg", "")
                .contains(**text)
        })
        .collect();
    assert!(found.is_empty(), "{found:?}");
    assert!(
        page.matches("<img").count() == page.matches(" alt=\"").count(),
        "every picture has a text"
    );
}

#[test]
fn a_stopped_run_exits_with_3_before_it_looks_at_anything_else() {
    let folder = tempfile::tempdir().unwrap();
    let (recipe, run) = (folder.path().join("recipe.toml"), folder.path().join("run"));
    fs::create_dir(&run).unwrap();
    fs::write(run.join("STOPPED"), "the loss is NaN\n").unwrap();
    let text = format!(
        "[run]\ndir = '{}'\n[model]\nbase = 'nowhere'\n[[data]]\npath = 'no/such/dataset'\n\
         [train]\nsamples = 10\nmicro_batch = 1\n",
        run.display()
    );
    fs::write(&recipe, text).unwrap();
    let recipe = recipe.to_str().unwrap();
    for _ in 0..2 {
        let output = rectiflow(&["train", recipe, "--json"]);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(3), "{message}");
        assert!(
            message.contains("the loss is NaN") && message.contains("--acknowledge-stop"),
            "{message}"
        );
        assert_eq!(json(&output)["exit"], 3);
    }
    let output = rectiflow(&["train", recipe, "--acknowledge-stop"]);
    assert_eq!(output.status.code(), Some(1), "now the data set is missing");
    assert!(
        stderr(&output).contains("no/such/dataset"),
        "{}",
        stderr(&output)
    );
}
