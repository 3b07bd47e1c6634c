//! What the commands say of captions: no usable picture, sources that are no folder, and prompts
//! that are longer than the text encoders read.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny-sdxl");
/// Settings for small pictures.
const SMALL: &str = "[prep]\narea_px = 4096\nstep_px = 32\nbucket_min_px = 32\n\
                     bucket_max_px = 128\nmin_side_px = 32\ntest_fraction = 0.0\n";

fn rectiflow(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rectiflow"));
    command
        .args(arguments)
        .env_remove("RUST_LOG")
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::null());
    command.output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_str(stdout(output).lines().last().unwrap()).unwrap()
}

/// Prepares `root/set` into `root/packed`.
fn prep(root: &Path, more: &[&str]) -> Output {
    let recipe = root.join("prep.toml");
    fs::write(&recipe, SMALL).unwrap();
    let [set, packed] = ["set", "packed"].map(|name| root.join(name));
    let vae = format!("{TINY}/vae");
    let mut arguments = vec![
        "prep",
        set.to_str().unwrap(),
        "--out",
        packed.to_str().unwrap(),
    ];
    arguments.extend(["--vae", &vae, "--recipe", recipe.to_str().unwrap()]);
    arguments.extend(more);
    rectiflow(&arguments)
}

/// Writes a picture whose colour is `mark`.
fn write_picture(path: &Path, mark: u8) {
    let picture = image::RgbImage::from_pixel(64, 64, image::Rgb([mark, 100, 50]));
    picture
        .save_with_format(path, image::ImageFormat::Png)
        .unwrap();
}

/// Names and contents; a picture's contents do not matter.
type Files<'a> = &'a [(&'a str, &'a str)];

#[test]
fn no_usable_picture_is_a_failure_with_the_commonest_reasons() {
    let cases: [(Files, &[&str]); 5] = [
        (&[], &["has no files"]),
        (
            &[("a.png", ""), ("b.png", ""), ("c.png", "")],
            &["3 no caption, such as a.png", "there is no a.txt"],
        ),
        (
            &[("set.zip", "PK"), ("b.tar", "x")],
            &["2 archive, such as b.tar", "unpack it"],
        ),
        (
            &[
                ("a.txt", "x"),
                ("b.txt", "x"),
                ("c.yaml", "x"),
                ("d.png", ""),
                ("e.zip", "x"),
                ("f", "x"),
            ],
            &[
                "2 orphan caption, such as a.txt",
                "1 no caption, d.png",
                "1 not an image, f",
            ],
        ),
        (
            &[("a.png", ""), ("a.json", r#"{"legend": "a fox"}"#)],
            &["1 no caption", "1 bad caption, a.json", "legend"],
        ),
    ];
    for (files, parts) in cases {
        let root = tempfile::tempdir().unwrap();
        let set = root.path().join("set");
        fs::create_dir(&set).unwrap();
        for (mark, (name, text)) in (1..).zip(files) {
            if text.is_empty() {
                write_picture(&set.join(name), mark);
            } else {
                fs::write(set.join(name), text).unwrap();
            }
        }
        let output = prep(root.path(), &[]);
        let text = stdout(&output);
        assert_eq!(output.status.code(), Some(1), "{text}{}", stderr(&output));
        let (_, reasons) = text.split_once("can be used").unwrap();
        for part in parts {
            assert!(reasons.contains(part), "{part}: {reasons}");
        }
        assert!(reasons.lines().count() <= 4, "{reasons}");
        let answer = json(&prep(root.path(), &["--json"]));
        assert_eq!(answer["summary"]["train_rows"], 0);
        for (reason, count) in answer["summary"]["rejected"].as_object().unwrap() {
            assert!(count.as_u64().unwrap() > 0);
            assert!(
                answer["summary"]["examples"][reason]["path"].is_string(),
                "{answer}"
            );
        }
    }
}

#[test]
fn a_data_set_that_lost_its_pictures_is_a_failure_too() {
    let root = tempfile::tempdir().unwrap();
    let set = root.path().join("set");
    fs::create_dir(&set).unwrap();
    write_picture(&set.join("a.png"), 7);
    fs::write(set.join("a.caption"), "a red fox").unwrap();
    let output = prep(root.path(), &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    fs::remove_file(set.join("a.caption")).unwrap();
    let output = prep(root.path(), &[]);
    assert_eq!(output.status.code(), Some(1), "{}", stdout(&output));
    assert!(stdout(&output).contains("1 no caption, a.png"));
}

#[test]
fn what_is_no_folder_is_refused_with_what_to_do() {
    let root = tempfile::tempdir().unwrap();
    for (name, part) in [
        ("set.zip", "unzip"),
        ("set.tar.gz", "gunzip"),
        ("metadata.csv", "Put it into that folder"),
        ("a.png", "Name the folder that it is in"),
    ] {
        let path = root.path().join(name);
        fs::write(&path, "x").unwrap();
        let output = rectiflow(&[
            "prep",
            path.to_str().unwrap(),
            "--out",
            "o",
            "--vae",
            "nowhere",
        ]);
        assert_eq!(output.status.code(), Some(2), "{name}");
        assert!(
            stderr(&output).contains(part),
            "{name}: {}",
            stderr(&output)
        );
    }
    let output = rectiflow(&["prep", "hf://set", "--out", "o", "--vae", "nowhere"]);
    assert!(
        stderr(&output).contains("expected s3://"),
        "{}",
        stderr(&output)
    );
}

/// The tiny base of the demo, in `root/base`.
fn tiny_base(root: &Path) -> String {
    let base = root.join("base");
    fs::create_dir(&base).unwrap();
    let unpack = |arguments: &[&str]| {
        let status = Command::new("tar")
            .args(arguments)
            .arg("-C")
            .arg(&base)
            .status();
        assert!(status.unwrap().success());
    };
    unpack(&["-xzf", &format!("{TINY}/base.tar.gz")]);
    let copy = |name: &str| {
        let (from, to) = (format!("{TINY}/{name}"), base.join(name));
        assert!(
            Command::new("cp")
                .arg("-r")
                .arg(from)
                .arg(to)
                .status()
                .unwrap()
                .success()
        );
    };
    for name in ["vae", "scheduler", "model_index.json"] {
        if !base.join(name).exists() {
            copy(name);
        }
    }
    base.to_str().unwrap().to_owned()
}

#[test]
fn a_text_of_360_tokens_shows_its_cut_in_every_command() {
    let root = tempfile::tempdir().unwrap();
    let long = vec!["fox"; 360].join(" ");
    let said = "360 tokens, of which the last 135 are not read: it is cut after";
    let fits = vec!["fox"; 225].join(" ");

    // prep names the picture, inspect the prompt.
    let set = root.path().join("set");
    fs::create_dir(&set).unwrap();
    write_picture(&set.join("a.png"), 7);
    fs::write(set.join("a.txt"), &long).unwrap();
    write_picture(&set.join("b.png"), 8);
    fs::write(set.join("b.txt"), &fits).unwrap();
    let text = stdout(&prep(root.path(), &[]));
    assert!(
        text.contains("1 long caption, a.png: a caption of 360 tokens"),
        "{text}"
    );
    let packed = root.path().join("packed");
    let recipe = root.path().join("run.toml");
    let recipe_text = format!(
        "[run]\ndir = 'x'\n[model]\nbase = '{TINY}'\n[[data]]\npath = '{}'\n\
         [data.prompt]\ndropped = 0.0\n\
         [train]\nsamples = 8\nmicro_batch = 1\nmicro_batches = 1\n[lr]\npeak = 1e-3\n",
        packed.display()
    );
    fs::write(&recipe, recipe_text).unwrap();
    let mut inspect = vec!["inspect", packed.to_str().unwrap(), "--prompts", "2"];
    inspect.extend(["--recipe", recipe.to_str().unwrap()]);
    let output = rectiflow(&inspect);
    assert_eq!(
        stdout(&output).matches(said).count(),
        1,
        "{}",
        stderr(&output)
    );
    inspect.push("--json");
    let overflows = json(&rectiflow(&inspect))["overflows"].clone();
    let overflow = overflows.as_object().unwrap().values().next().unwrap();
    assert_eq!(
        (&overflow["num_tokens"], &overflow["num_cut"]),
        (&360.into(), &135.into())
    );

    // tokens and sample say it of their text.
    let output = rectiflow(&["tokens", &long]);
    assert!(stdout(&output).contains(said), "{}", stdout(&output));
    let answer = json(&rectiflow(&["tokens", &long, "--json"]));
    assert_eq!(answer["overflow"]["num_cut"], 135);
    assert_eq!(answer["overflow"]["at_byte"], 4 * 225);
    assert!(!stdout(&rectiflow(&["tokens", &fits])).contains("not read"));
    let base = tiny_base(root.path());
    let out = root.path().join("drawn");
    let mut sample = vec![
        "sample", "--model", &base, "--prompt", &long, "--prompt", "a fox",
    ];
    sample.extend([
        "--steps",
        "1",
        "--size",
        "64x64",
        "--parameterization",
        "eps",
    ]);
    sample.extend(["--out", out.to_str().unwrap()]);
    let output = rectiflow(&sample);
    let text = stdout(&output);
    assert_eq!(text.matches(said).count(), 1, "{text}{}", stderr(&output));
}

/// Stripes of a colour; `mirrored` from right to left.
fn striped(path: &Path, colour: [u8; 3], mirrored: bool) {
    let picture = image::RgbImage::from_fn(96, 64, |x, y| {
        let x = if mirrored { 95 - x } else { x };
        let is_lit = (x * x / 40 + y / 9) % 3 == 0;
        image::Rgb(if is_lit { colour } else { [10, 20, 30] })
    });
    picture.save(path).unwrap();
    fs::write(path.with_extension("txt"), "stripes").unwrap();
}

#[test]
fn near_copies_are_shown_on_a_page_and_dropped_when_asked() {
    let root = tempfile::tempdir().unwrap();
    let set = root.path().join("set");
    fs::create_dir(&set).unwrap();
    striped(&set.join("red <b>.png"), [250, 60, 40], false);
    striped(&set.join("mirrored.png"), [250, 60, 40], true);
    write_picture(&set.join("plain.png"), 200);
    fs::write(set.join("plain.txt"), "a colour").unwrap();
    assert!(prep(root.path(), &[]).status.success());

    let packed = root.path().join("packed");
    let dedupe = ["--json", "dedupe", packed.to_str().unwrap()];
    let found = json(&rectiflow(
        &[&dedupe[..], &["--pictures", set.to_str().unwrap()]].concat(),
    ));
    let clusters = found["near_copies"]["clusters"].as_array().unwrap();
    assert_eq!(
        (clusters.len(), clusters[0].as_array().unwrap().len()),
        (1, 2)
    );
    assert_eq!(found["dropped_rows"], Value::Null);
    assert!(!packed.join("near-copies.jsonl").exists());
    let page = fs::read_to_string(packed.join("near-copies.html")).unwrap();
    assert_eq!(page.matches("data:image/png;base64,").count(), 2);
    assert!(
        page.contains("red &lt;b&gt;.png") && !page.contains("<b>"),
        "names are escaped"
    );

    let dropped = json(&rectiflow(&[&dedupe[..], &["--drop"]].concat()));
    assert_eq!(dropped["dropped_rows"], 1);
    let again = prep(root.path(), &[]);
    assert!(stdout(&again).contains("1 near copy"), "{}", stdout(&again));
    let none = rectiflow(&["dedupe", root.path().join("set").to_str().unwrap()]);
    assert_eq!(none.status.code(), Some(2), "{}", stderr(&none));
    assert!(stderr(&none).contains("--work FOLDER"), "{}", stderr(&none));
    let url = rectiflow(&["dedupe", "s3://bucket/set"]);
    assert_eq!(url.status.code(), Some(2), "{}", stderr(&url));
}

#[test]
fn near_copies_of_a_source_are_listed_and_left_out() {
    let root = tempfile::tempdir().unwrap();
    let (set, work) = (root.path().join("set"), root.path().join("work"));
    fs::create_dir(&set).unwrap();
    striped(&set.join("red.png"), [250, 60, 40], false);
    striped(&set.join("mirrored.png"), [250, 60, 40], true);
    write_picture(&set.join("plain.png"), 200);
    fs::write(set.join("plain.txt"), "a colour").unwrap();
    let arguments = [set.to_str().unwrap(), "--work", work.to_str().unwrap()];
    let found = json(&rectiflow(
        &[&["--json", "dedupe"], &arguments[..]].concat(),
    ));
    let clusters = found["near_copies"]["clusters"].as_array().unwrap();
    assert_eq!(clusters.len(), 1);
    let page = fs::read_to_string(work.join("near-copies.html")).unwrap();
    assert_eq!(page.matches("data:image/png;base64,").count(), 2);
    let list = work.join("near-copies.jsonl");
    let prepared = prep(root.path(), &["--without", list.to_str().unwrap()]);
    assert!(
        stdout(&prepared).contains("1 near copy"),
        "{}",
        stdout(&prepared)
    );

    // What belongs to a data set is refused, and what belongs to a source needs a folder.
    for wrong in [
        [&arguments[..], &["--drop"]].concat(),
        [&arguments[..], &["--pictures", "x"]].concat(),
        vec![set.to_str().unwrap(), "--set", "prep.seed=1"],
    ] {
        let refused = rectiflow(&[&["dedupe"], &wrong[..]].concat());
        assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    }
}
