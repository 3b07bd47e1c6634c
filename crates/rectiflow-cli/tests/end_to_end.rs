//! The whole path with the real command: pictures, a data set, a trained tiny SDXL, samples, both
//! exports. A killed run loses nothing: 20 steps in one go equal 10 and more, kill -9, and the
//! rest, in every byte.

#[path = "../../rectiflow-data/tests/object_server/mod.rs"]
mod object_server;

mod many_ranks;
mod mirror_kill;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use object_server::ObjectServer;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny-sdxl");

fn rectiflow(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rectiflow"));
    // One thread: sums depend on how work is split, and the number of cores varies.
    command
        .args(arguments)
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::null());
    command
}

fn succeed(arguments: &[&str]) -> Output {
    let output = rectiflow(arguments).output().expect("the command starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "rectiflow {arguments:?}: {}\n{stderr}",
        output.status
    );
    output
}

/// Twelve pictures of two shapes, each in one colour, which its caption names.
fn write_pictures(folder: &Path) {
    let colours = [
        ("red", [220, 30, 30]),
        ("green", [30, 200, 60]),
        ("blue", [40, 60, 220]),
    ];
    fs::create_dir_all(folder).expect("a folder for pictures");
    for index in 0..12u32 {
        let (name, colour) = colours[index as usize % 3];
        let (width, height) = if index % 2 == 0 {
            (128, 128)
        } else {
            (160, 96)
        };
        let mut picture = image::RgbImage::from_pixel(width, height, image::Rgb([240; 3]));
        for (x, y, pixel) in picture.enumerate_pixels_mut() {
            let (dx, dy) = (x.abs_diff(width / 2), y.abs_diff(height / 2));
            if dx * dx + dy * dy < (20 + index) * (20 + index) {
                *pixel = image::Rgb(colour);
            }
        }
        picture
            .save(folder.join(format!("{index:02}.png")))
            .expect("the picture is written");
        fs::write(
            folder.join(format!("{index:02}.txt")),
            format!("a {name} disc"),
        )
        .expect("the caption is written");
    }
}

/// A recipe of 20 steps of 4 samples, a checkpoint every 10.
fn write_recipe(folder: &Path, run: &str) -> PathBuf {
    let path = folder.join(format!("{run}.toml"));
    let text = format!(
        "[run]\ndir = '{run_dir}'\nseed = 7\n\
         [model]\nbase = '{TINY}'\nrandom = ['unet', 'text_encoder', 'text_encoder_2']\n\
         [[data]]\npath = '{data}'\n\
         [train]\nsamples = 80\nmicro_batch = 2\nmicro_batches = 2\ntext_encoders = 'trained'\n\
         [lr]\npeak = 1e-3\nwarmup_samples = 8\n\
         [test]\nevery_steps = 10\n[checkpoint]\nevery_steps = 10\nkeep = 2\n[preview]\nevery_steps = 100\n",
        run_dir = folder.join(run).display(),
        data = folder.join("dataset").display(),
    );
    fs::write(&path, text).expect("the recipe is written");
    path
}

fn prepare(folder: &Path) {
    write_pictures(&folder.join("pictures"));
    let prep = folder.join("prep.toml");
    fs::write(&prep, "[prep]\narea_px = 16384\nstep_px = 32\nbucket_min_px = 64\nbucket_max_px = 256\nmin_side_px = 32\ntest_count = 4\n")
        .expect("the settings are written");
    let (pictures, dataset, vae) = (
        folder.join("pictures"),
        folder.join("dataset"),
        Path::new(TINY).join("vae"),
    );
    let arguments = [
        "prep",
        text(&pictures),
        "--out",
        text(&dataset),
        "--vae",
        text(&vae),
        "--recipe",
        text(&prep),
    ];
    succeed(&arguments);
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Every weight file of a run's last checkpoint, and the optimiser's.
fn tensors_of(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let checkpoint = run.join("checkpoints/step-00000020");
    let files = [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "optimizer.safetensors",
    ];
    files
        .map(|name| {
            (
                name.to_owned(),
                fs::read(checkpoint.join(name)).expect("the checkpoint has this file"),
            )
        })
        .into_iter()
        .collect()
}

/// Waits until the run has written a line with `needle`, then kills it with SIGKILL.
fn kill_when(mut child: Child, metrics: &Path, needle: &str) {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        if fs::read_to_string(metrics).is_ok_and(|text| text.contains(needle)) {
            break;
        }
        assert!(
            child.try_wait().expect("the child can be asked").is_none(),
            "the run ended before it was killed"
        );
        assert!(
            Instant::now() < deadline,
            "the run did not get as far as {needle}"
        );
        thread::sleep(Duration::from_millis(2));
    }
    child.kill().expect("the child is killed");
    child.wait().expect("the child is reaped");
}

#[test]
fn pictures_become_a_model_that_others_open_and_a_kill_loses_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    prepare(folder);

    let straight = write_recipe(folder, "straight");
    succeed(&["train", text(&straight)]);

    let killed = write_recipe(folder, "killed");
    let child = rectiflow(&["train", text(&killed)])
        .stderr(Stdio::null())
        .spawn()
        .expect("the command starts");
    kill_when(
        child,
        &folder.join("killed/metrics.jsonl"),
        "\"event\":\"step\",\"step\":12,",
    );
    assert!(
        !folder.join("killed/checkpoints/step-00000020").exists(),
        "killed too late to prove anything"
    );
    // It resumes with a copy of the data set at a URL: the same bytes, so the same run.
    let server = ObjectServer::start(&folder.join("dataset"), |_| None);
    succeed(&["inspect", &server.url(), "--verify"]);
    succeed(&[
        "train",
        text(&killed),
        "--set",
        &format!("data.path={}", server.url()),
    ]);

    let (a, b) = (
        tensors_of(&folder.join("straight")),
        tensors_of(&folder.join("killed")),
    );
    for (name, bytes) in &a {
        assert!(
            bytes == &b[name],
            "{name} differs between the straight and the killed run"
        );
    }

    let metrics =
        fs::read_to_string(folder.join("straight/metrics.jsonl")).expect("metrics are written");
    assert_eq!(
        metrics
            .lines()
            .filter(|line| line.contains("\"event\":\"step\""))
            .count(),
        20
    );
    assert_eq!(
        metrics
            .lines()
            .filter(|line| line.contains("\"event\":\"test\""))
            .count(),
        3
    );

    evaluate_and_branch(folder, &straight);
    let checkpoint = folder.join("straight/checkpoints/step-00000020");
    sample_and_export(folder, &checkpoint);
}

/// The checkpoint and the exported diffusers folder draw the same picture, and the single file
/// imports to the same folder.
fn sample_and_export(folder: &Path, checkpoint: &Path) {
    let diffusers = folder.join("export/diffusers");
    let single = folder.join("export/tiny.safetensors");
    for (format, out) in [("diffusers", &diffusers), ("single-file", &single)] {
        let model = ["export", "--model", text(checkpoint), "--dtype", "fp32"];
        succeed(&[&model[..], &["--format", format, "--out", text(out)]].concat());
    }
    let workflow = fs::read_to_string(folder.join("export/tiny.workflow.json"))
        .expect("a workflow lies beside the file");
    assert!(
        workflow.contains("\"tiny.safetensors\"") && workflow.contains("ModelSamplingSD3"),
        "{workflow}"
    );
    import_the_same(folder, &single, &diffusers);

    let pictures = [checkpoint, diffusers.as_path(), single.as_path()]
        .map(|model| first_sample(folder, model));
    assert_eq!(pictures[0].dimensions(), (128, 96));
    assert!(
        pictures[0] == pictures[1],
        "the checkpoint and its export draw different pictures"
    );
    assert!(
        pictures[0] == pictures[2],
        "the checkpoint and its single file draw different pictures"
    );
    for card in [diffusers.join("README.md"), single.with_extension("md")] {
        let card = fs::read_to_string(card).expect("an export has a model card");
        assert!(
            card.contains("| updates | 20 |") && card.contains("samples = 80"),
            "{card}"
        );
    }
    let size = ["--size", "64x64", "--steps", "2", "--rounds", "1", "--json"];
    let measured = succeed(&[&["bench", "sample", "--model", text(&single)][..], &size].concat());
    let answer = String::from_utf8(measured.stdout).expect("the answer is UTF-8");
    let answer: serde_json::Value =
        serde_json::from_str(answer.trim()).expect("the answer is one object");
    assert!(
        answer["images_per_sec"]
            .as_f64()
            .is_some_and(|speed| speed > 0.0),
        "{answer}"
    );
    sample_with_everything(folder, &diffusers);
    sample_one_prompt(folder, &diffusers);
    refuse_what_cannot_be_drawn(folder, &diffusers);
}

/// The single file imports to the weights of the diffusers folder.
fn import_the_same(folder: &Path, single: &Path, diffusers: &Path) {
    let imported = folder.join("imported");
    succeed(&["import", text(single), "--out", text(&imported)]);
    for part in [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder_2/model.safetensors",
    ] {
        let [a, b] = [diffusers, imported.as_path()]
            .map(|root| fs::read(root.join(part)).expect("both have the component"));
        assert!(
            a == b,
            "{part} differs after a round trip through the single file"
        );
    }
}

/// The first picture that `rectiflow sample` draws with a model.
fn first_sample(folder: &Path, model: &Path) -> image::RgbImage {
    let out = folder
        .join("sampled")
        .join(model.file_name().expect("models have names"));
    let prompt = ["sample", "--model", text(model), "--prompt", "a red disc"];
    let size = ["--steps", "3", "--size", "128x96", "--seed", "5"];
    succeed(&[&prompt[..], &size, &["--out", text(&out)]].concat());
    let first = fs::read_dir(&out)
        .expect("samples are written")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.file_name().is_some_and(|name| name != "grid.png"))
        .min()
        .expect("at least one picture");
    image::open(first)
        .expect("the sample is a picture")
        .to_rgb8()
}

/// All options of sampling at once, an empty prompt among the prompts. The pictures carry their
/// settings.
fn sample_with_everything(folder: &Path, model: &Path) {
    let out = folder.join("everything");
    let arguments = [
        &[
            "sample",
            "--model",
            text(model),
            "--prompt",
            "a red (disc)",
            "--prompt",
            "",
            "--negative",
            "grey, flou é",
        ],
        &[
            "--sampler",
            "dpmpp_2m_sde",
            "--schedule",
            "beta",
            "--steps",
            "3",
            "--cfg",
            "3",
            "--cfg-rescale",
            "0.5",
        ][..],
        &[
            "--pag-scale",
            "2",
            "--pag-parts",
            "mid,up.0",
            "--original-size",
            "200x150+4+0",
            "--size",
            "128x96",
        ],
        &["--batch", "2", "--seed", "9", "--out", text(&out)],
    ];
    succeed(&arguments.concat());
    let texts = texts_of(&out.join("002-a-red-disc.png"));
    let parameters = &texts["parameters"];
    for needle in [
        "a red \\(disc\\)\nNegative prompt: grey, flou é\n",
        "DPM++ 2M SDE",
        "PAG parts: mid up.0",
        "Batch pos: 1",
    ] {
        assert!(parameters.contains(needle), "{needle}: {parameters}");
    }
    graphs_have_all(&texts);
    assert!(
        out.join("004-picture.png").exists(),
        "an empty prompt is a prompt"
    );
    // The grid of two prompts is no picture that another program could draw.
    let grid = texts_of(&out.join("grid.png"));
    let keywords: Vec<&str> = grid.keys().map(String::as_str).collect();
    assert_eq!(keywords, ["rectiflow"]);
}

/// The graph of a picture with all options has their nodes, and names what it cannot express.
fn graphs_have_all(texts: &BTreeMap<String, String>) {
    let json = |keyword: &str| {
        serde_json::from_str::<serde_json::Value>(&texts[keyword]).expect("the chunk is JSON")
    };
    let (prompt, workflow) = (json("prompt"), json("workflow"));
    let node = |class: &str| {
        prompt
            .as_object()
            .expect("nodes")
            .values()
            .find(|node| node["class_type"] == class)
    };
    assert_eq!(
        node("KSampler").expect("a sampler")["inputs"]["sampler_name"],
        "dpmpp_2m_sde"
    );
    assert_eq!(
        node("CLIPTextEncodeSDXL").expect("a text with sizes")["inputs"]["text_g"],
        "a red \\(disc\\)"
    );
    assert_eq!(
        workflow["nodes"].as_array().map(Vec::len),
        prompt.as_object().map(serde_json::Map::len)
    );
    assert!(
        workflow["extra"]["rectiflow"]["differences"]
            .to_string()
            .contains("up.0")
    );
    let needs = &workflow["extra"]["rectiflow"]["needs"];
    assert!(
        needs.to_string().contains("export"),
        "the model is a folder: {needs}"
    );
}

/// The grid of one prompt carries the texts of its pictures, and what cannot be drawn elsewhere is
/// in the answer.
fn sample_one_prompt(folder: &Path, model: &Path) {
    let out = folder.join("one-prompt");
    let prompt = ["sample", "--model", text(model), "--prompt", "#1 {disc}"];
    let size = [
        "--size",
        "64x64",
        "--steps",
        "1",
        "--schedule",
        "kl_optimal",
    ];
    let answer = succeed(&[&prompt[..], &size, &["--json", "--out", text(&out)]].concat());
    let answer = String::from_utf8(answer.stdout).expect("the answer is text");
    let last = answer.lines().last().expect("an answer");
    let json: serde_json::Value = serde_json::from_str(last).expect("the answer is JSON");
    assert!(json["differences"].to_string().contains("kl_optimal"));
    assert!(json["remarks"].to_string().contains("comment"));
    let mut grid = texts_of(&out.join("grid.png"));
    assert!(grid.remove("rectiflow").is_some());
    assert_eq!(grid, texts_of(&out.join("001-1-disc.png")));
    assert!(grid["workflow"].contains("kl_optimal") && grid["prompt"].contains("#1 {disc}"));
}

/// Sizes that the VAE cannot decode, and weights that are NaN.
fn refuse_what_cannot_be_drawn(folder: &Path, model: &Path) {
    let refused = |arguments: &[&str], code: i32, needles: &[&str]| {
        let out = folder.join("refused");
        let all = [
            &[
                "sample",
                "--prompt",
                "a",
                "--steps",
                "2",
                "--out",
                text(&out),
            ],
            arguments,
        ]
        .concat();
        let output = rectiflow(&all).output().expect("the command starts");
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert!(
            needles.iter().all(|needle| message.contains(needle)),
            "{needles:?}: {message}"
        );
    };
    refused(
        &["--model", text(model), "--size", "100x96"],
        2,
        &["width_px is 100", "multiple of 8 such as 104"],
    );
    let no_attention = [
        "--model",
        text(model),
        "--size",
        "64x64",
        "--pag-scale",
        "1",
        "--pag-parts",
        "down.0",
    ];
    refused(&no_attention, 2, &["no attention in down.0", "mid"]);
    let weights = model.join("unet/diffusion_pytorch_model.safetensors");
    let mut bytes = fs::read(&weights).expect("the weights are there");
    let end = bytes.len();
    bytes[end - 4..].fill(0xff); // the last fp32 number becomes NaN
    fs::write(&weights, bytes).expect("the weights can be written");
    refused(
        &["--model", text(model), "--size", "64x64"],
        1,
        &["not finite", "unet"],
    );
}

/// The text chunks of a PNG, by keyword.
fn texts_of(png: &Path) -> BTreeMap<String, String> {
    let bytes = fs::read(png).expect("the picture is there");
    let (mut texts, mut rest) = (BTreeMap::new(), &bytes[8..]);
    while let [a, b, c, d, tail @ ..] = rest {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        let (kind, data) = (&tail[..4], &tail[4..4 + length]);
        if kind == b"tEXt" {
            let (keyword, latin1) = data.split_at(
                data.iter()
                    .position(|&byte| byte == 0)
                    .expect("a keyword ends"),
            );
            let letters = latin1[1..].iter().map(|&byte| char::from(byte));
            texts.insert(
                String::from_utf8_lossy(keyword).into_owned(),
                letters.collect(),
            );
        }
        rest = &tail[8 + length..];
    }
    texts
}

#[test]
fn a_signal_saves_and_exits_with_its_number() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    prepare(folder);
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let recipe = write_recipe(folder, signal);
        let mut child = rectiflow(&["train", text(&recipe), "--set", "train.samples=100000"])
            .stderr(Stdio::null())
            .spawn()
            .expect("the command starts");
        let run = folder.join(signal);
        let metrics = run.join("metrics.jsonl");
        let deadline = Instant::now() + Duration::from_secs(120);
        while !fs::read_to_string(&metrics)
            .is_ok_and(|text| text.contains("\"event\":\"step\",\"step\":3,"))
        {
            assert!(
                Instant::now() < deadline,
                "the run did not reach its third step"
            );
            thread::sleep(Duration::from_millis(2));
        }
        let kill = Command::new("kill")
            .args([&format!("-{signal}"), &child.id().to_string()])
            .status();
        assert!(kill.expect("kill runs").success());
        assert_eq!(
            child.wait().expect("the child ends").code(),
            Some(code),
            "SIG{signal}"
        );
        let text = fs::read_to_string(&metrics).expect("metrics are written");
        assert!(
            text.lines()
                .last()
                .is_some_and(|line| line.contains("interrupted")),
            "{text}"
        );
        let saved = fs::read_dir(run.join("checkpoints"))
            .expect("checkpoints")
            .count();
        assert!(saved >= 1, "SIG{signal} saves");
    }
}

/// The last line of standard output as JSON.
fn json(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().expect("an answer")).expect("the answer is JSON")
}

/// The test loss of a checkpoint equals the run's own. A branch starts from the checkpoint, and a
/// recipe that changes a fixed key is refused.
fn evaluate_and_branch(folder: &Path, recipe: &Path) {
    let checkpoint = folder.join("straight/checkpoints/step-00000020");
    let evaluated = json(&succeed(&[
        "eval",
        text(recipe),
        "--checkpoint",
        text(&checkpoint),
        "--json",
    ]));
    let metrics =
        fs::read_to_string(folder.join("straight/metrics.jsonl")).expect("metrics are written");
    let last = metrics
        .lines()
        .rfind(|line| line.contains("\"event\":\"test\""))
        .expect("a test loss");
    let own: serde_json::Value = serde_json::from_str(last).expect("an event");
    let (own, evaluated) = (
        own["loss"].as_f64(),
        evaluated["trained"]["test"]["loss"].as_f64(),
    );
    let (own, evaluated) = (own.expect("a number"), evaluated.expect("a number"));
    assert!(
        (own / evaluated - 1.0).abs() < 1e-6,
        "{own} and {evaluated}"
    );

    let changed = rectiflow(&["train", text(recipe), "--set", "lr.peak=1e-4"])
        .output()
        .expect("the command starts");
    let message = String::from_utf8_lossy(&changed.stderr).into_owned();
    assert_eq!(changed.status.code(), Some(2), "{message}");
    assert!(
        message.contains("lr.peak: 0.001 -> 0.0001") && message.contains("--branch-from"),
        "{message}"
    );

    let branch = write_recipe(folder, "branch");
    let sets = [
        "--set",
        "lr.peak=1e-4",
        "--set",
        "train.micro_batch=4",
        "--set",
        "train.samples=88",
    ];
    let from = [
        "train",
        text(&branch),
        "--branch-from",
        text(&checkpoint),
        "--json",
    ];
    let answer = json(&succeed(&[&from[..], &sets].concat()));
    assert_eq!(
        (answer["finished"].as_bool(), answer["samples"].as_u64()),
        (Some(true), Some(88))
    );
}
