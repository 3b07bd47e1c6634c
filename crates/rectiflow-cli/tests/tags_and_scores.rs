//! `rectiflow tag` and `rectiflow score` with models of scripts/golden/onnx_models.py: tables,
//! resumption, ranks, the page, and what is refused.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

const GOLDEN: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../rectiflow-annotate/tests/golden"
);
const PICTURES: [&str; 4] = ["clear.png", "high.png", "square.png", "wide.png"];

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rectiflow"));
    command
        .args(arguments)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null());
    command
}

fn rectiflow(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    let last = text.lines().last().unwrap_or_else(|| panic!("{error}"));
    serde_json::from_str(last).unwrap()
}

/// The one line of a refusal.
fn refusal(output: &Output) -> String {
    let error = String::from_utf8(output.stderr.clone()).unwrap();
    let lines: Vec<&str> = error
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(lines.len(), 1, "{error}");
    assert!(!output.status.success());
    lines[0].to_owned()
}

/// A folder with the pictures, a copy of one, and two files that are no pictures.
fn set(root: &Path) -> PathBuf {
    let set = root.join("set");
    fs::create_dir(&set).unwrap();
    for name in PICTURES {
        fs::copy(Path::new(GOLDEN).join(name), set.join(name)).unwrap();
    }
    fs::copy(set.join("wide.png"), set.join("copy.png")).unwrap();
    fs::write(
        set.join("cut.png"),
        &fs::read(set.join("high.png")).unwrap()[..900],
    )
    .unwrap();
    set
}

/// What Python's onnxruntime returns.
fn expected(model: &str) -> BTreeMap<String, Vec<f64>> {
    let text = fs::read(Path::new(GOLDEN).join("outputs.json")).unwrap();
    let all: BTreeMap<String, BTreeMap<String, Vec<f64>>> = serde_json::from_slice(&text).unwrap();
    all[model].clone()
}

fn golden(name: &str) -> String {
    format!("{GOLDEN}/{name}")
}

/// The rows of JSON lines by address.
fn rows(lines: &Path) -> BTreeMap<String, Value> {
    let mut rows = BTreeMap::new();
    for line in fs::read_to_string(lines).unwrap().lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        rows.insert(row["source"].as_str().unwrap().to_owned(), row);
    }
    rows
}

#[test]
fn tags_are_those_of_the_model_and_written_once() {
    let root = tempfile::tempdir().unwrap();
    let set = set(root.path());
    let (out, lines) = (root.path().join("t.parquet"), root.path().join("t.jsonl"));
    let (model, set, out) = (
        golden("tagger.onnx"),
        set.to_str().unwrap(),
        out.to_str().unwrap(),
    );
    let arguments = [
        "--json", "tag", set, "--model", &model, "--out", out, "--jsonl",
    ];
    let arguments = [&arguments[..], &[lines.to_str().unwrap(), "--name", "wd"]].concat();
    let answer = json(&rectiflow(&arguments));
    let counts = ["answered", "copies", "failed", "known"].map(|key| answer[key].as_u64().unwrap());
    assert_eq!(counts, [4, 1, 1, 0], "{answer}");

    let names = fs::read_to_string(golden("selected_tags.csv")).unwrap();
    let names: Vec<&str> = names
        .lines()
        .skip(1)
        .map(|line| line.split(',').nth(1).unwrap())
        .collect();
    let found = rows(&lines);
    for (picture, numbers) in expected("tagger") {
        let row = found.get(&picture).unwrap_or_else(|| &found["copy.png"]);
        let tags: Vec<&str> = row["tags"]
            .as_array()
            .unwrap()
            .iter()
            .map(|tag| tag.as_str().unwrap())
            .collect();
        // Four ratings, then general tags from 0.35 on, then two characters from 0.85 on.
        let rating = (0..4)
            .max_by(|&a, &b| numbers[a].total_cmp(&numbers[b]))
            .unwrap();
        assert_eq!(tags[0], names[rating], "{picture}");
        for (number, name) in names.iter().enumerate().skip(4) {
            let threshold = if number < 12 { 0.35 } else { 0.85 };
            let spelled = name
                .replace('_', " ")
                .replace("> <", ">_<")
                .replace("^ ^", "^_^");
            let is_there = tags.contains(&spelled.as_str());
            assert_eq!(is_there, numbers[number] > threshold, "{picture} {name}");
        }
        assert_eq!(row["tag_classes"].as_array().unwrap().len(), tags.len());
        assert_eq!((&row["kind"], &row["mode"]), (&"tags".into(), &"wd".into()));
    }
    assert_eq!(found["cut.png"]["status"], "unreadable");

    // What is known is not looked at again; a new picture is.
    image::RgbImage::from_pixel(50, 40, image::Rgb([9, 90, 200]))
        .save(Path::new(set).join("new.png"))
        .unwrap();
    let answer = json(&rectiflow(&arguments));
    let counts = ["answered", "failed", "known"].map(|key| answer[key].as_u64().unwrap());
    assert_eq!(counts, [1, 1, 4], "{answer}");
    let more = rows(&lines);
    assert_eq!(more.len(), found.len() + 1);
    for (address, row) in &found {
        assert_eq!(&more[address], row, "{address}");
    }
}

#[test]
fn scores_are_ranked_over_the_whole_set_and_shown() {
    let root = tempfile::tempdir().unwrap();
    let set = set(root.path());
    let (out, lines) = (root.path().join("s.parquet"), root.path().join("s.jsonl"));
    let recipe = root.path().join("words.toml");
    let words = "[prep]\nquality_ranks = [{ word = \"<good>\", from = 0.5 }, \
                 { word = \"bad\", from = 0.0 }]\n";
    fs::write(&recipe, words).unwrap();
    let (model, set) = (golden("quality.onnx"), set.to_str().unwrap());
    let arguments = [
        "--json",
        "score",
        set,
        "--model",
        &model,
        "--out",
        out.to_str().unwrap(),
    ];
    let look = ["--preset", "imagenet", "--crop-share", "0.875", "--recipe"];
    let more = [recipe.to_str().unwrap(), "--jsonl", lines.to_str().unwrap()];
    let arguments = [&arguments[..], &look, &more].concat();
    let answer = json(&rectiflow(&arguments));
    assert_eq!(
        (&answer["answered"], &answer["ranked"]),
        (&4.into(), &4.into()),
        "{answer}"
    );
    let expected = expected("quality");
    let found = rows(&lines);
    for (picture, numbers) in &expected {
        let row = found.get(picture).unwrap_or_else(|| &found["copy.png"]);
        assert!(
            (row["score"].as_f64().unwrap() - numbers[0]).abs() < 1e-4,
            "{picture}"
        );
        let num_lower = expected
            .values()
            .filter(|other| other[0] < numbers[0])
            .count();
        assert_eq!(
            row["rank"].as_f64().unwrap(),
            num_lower as f64 / 4.0,
            "{picture}"
        );
    }
    let words = answer["words"].as_array().unwrap();
    assert_eq!(
        (&words[0]["word"], &words[0]["pictures"]),
        (&"<good>".into(), &2.into())
    );
    let page = fs::read_to_string(root.path().join("s.html")).unwrap();
    assert_eq!(page.matches("data:image/png;base64,").count(), 4);
    assert!(
        page.contains("&lt;good&gt;") && !page.contains("<good>"),
        "words are escaped"
    );
    // A second run has nothing to do, and the same ranks.
    let answer = json(&rectiflow(&arguments));
    assert_eq!(
        (&answer["answered"], &answer["known"]),
        (&0.into(), &4.into()),
        "{answer}"
    );
    assert_eq!(rows(&lines), found);
}

#[test]
fn scores_of_a_table_are_ranked_too() {
    let root = tempfile::tempdir().unwrap();
    let set = set(root.path());
    let (out, lines) = (root.path().join("s.parquet"), root.path().join("s.jsonl"));
    let table = root.path().join("points.csv");
    fs::write(
        &table,
        "source,points\nwide.png,-3\nhigh.png,1e3\nsquare.png,1e3\n",
    )
    .unwrap();
    let set = set.to_str().unwrap();
    // Without ONNX Runtime: a table needs none.
    let mut scoring = command(&["--json", "score", set, "--scores", table.to_str().unwrap()]);
    scoring.args(["--column", "points", "--out", out.to_str().unwrap()]);
    scoring
        .args(["--jsonl", lines.to_str().unwrap()])
        .env("ORT_DYLIB_PATH", "/gone");
    let answer = json(&scoring.output().unwrap());
    assert_eq!(answer["answered"], 3, "{answer}");
    assert!(
        answer["first_failed"]
            .as_str()
            .unwrap()
            .contains("the table has no score for it")
    );
    let ranks: Vec<_> = rows(&lines)
        .into_values()
        .map(|row| row["rank"].as_f64())
        .collect();
    assert_eq!(ranks, [Some(1.0 / 3.0), Some(1.0 / 3.0), Some(0.0)]);
}

#[test]
fn what_cannot_work_is_refused_in_one_line() {
    let root = tempfile::tempdir().unwrap();
    let set = set(root.path());
    let out = root.path().join("t.parquet");
    let (set, out) = (set.to_str().unwrap(), out.to_str().unwrap());
    let other = root.path().join("other.csv");
    fs::write(&other, "name,category\ncat,0\n").unwrap();
    let list = golden("selected_tags.csv");
    for (verb, model, more, expected) in [
        (
            "tag",
            "gone.onnx",
            &["--labels", list.as_str()][..],
            "there is no such file",
        ),
        ("tag", "text.onnx", &[], "expected a picture, [n, 3, h, w]"),
        ("tag", "detector.onnx", &[], "expected a number or logits"),
        ("tag", "selected_tags.csv", &[], "cannot open it as a model"),
        ("tag", "quality.onnx", &[], "names 14 tags, but"),
        (
            "tag",
            "tagger.onnx",
            &["--labels", other.to_str().unwrap()],
            "names 1 tags, but",
        ),
        ("tag", "tagger.onnx", &["--labels", set], "set"),
        (
            "tag",
            "tagger.onnx",
            &["--device", "cuda"],
            "--features cuda",
        ),
        ("tag", "tagger.onnx", &["--std", "0"], "must not be 0"),
        (
            "score",
            "classes.onnx",
            &[],
            "10 numbers a picture: name the one",
        ),
        (
            "score",
            "classes.onnx",
            &["--class", "10"],
            "no class 10: 0 to 9",
        ),
        ("score", "classes.onnx", &["--weights", "1,2"], "2 weights"),
        (
            "score",
            "open.onnx",
            &["--class", "0"],
            "its size in pixels is open",
        ),
    ] {
        let model = golden(model);
        let arguments = [verb, set, "--model", &model, "--out", out];
        let refused = refusal(&rectiflow(&[&arguments[..], more].concat()));
        assert!(refused.contains(expected), "{verb} {model}: {refused}");
        assert!(!Path::new(out).exists());
    }
    let model = golden("quality.onnx");
    let mut without = command(&["score", set, "--model", &model, "--out", out]);
    let refused = refusal(
        &without
            .env("ORT_DYLIB_PATH", "/gone/lib.so")
            .output()
            .unwrap(),
    );
    assert!(
        refused.contains("/gone/lib.so: there is no such file"),
        "{refused}"
    );
    let mut without = command(&["score", set, "--model", &model, "--out", out]);
    without
        .env_remove("ORT_DYLIB_PATH")
        .env("XDG_CACHE_HOME", root.path());
    let refused = refusal(&without.output().unwrap());
    assert!(
        refused.contains("run python3 scripts/onnx_runtime.py"),
        "{refused}"
    );
}
