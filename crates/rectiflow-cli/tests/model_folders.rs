//! Every command that takes a model, with every kind of model folder and file: a table of which
//! cells work and what the others say. And the names of exports, and what stops none.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use rectiflow_sdxl::tensor_file::{TensorFile, write_tensors};
use tch::{Device, Kind, Tensor};

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny-sdxl");

fn rectiflow(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rectiflow"));
    command
        .args(arguments)
        .env("OMP_NUM_THREADS", "1")
        .env_remove("RUST_LOG")
        .stdin(Stdio::null());
    command.output().expect("the command starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeed(arguments: &[&str]) -> Output {
    let output = rectiflow(arguments);
    assert!(
        output.status.success(),
        "rectiflow {arguments:?}: {}",
        stderr(&output)
    );
    output
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// A folder with a data set, a run with averaged weights, its exports, and what is no model.
struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let fixture = Self { folder };
        fixture.prepare();
        // A whole model: one run trains all parts from random weights.
        let random = "random = ['unet', 'text_encoder', 'text_encoder_2']";
        let first = fixture.write_recipe("first", Path::new(TINY), "first-data", random);
        succeed(&[
            "train",
            text(&first),
            "--set",
            "train.text_encoders=trained",
        ]);
        let first = fixture.path("first/checkpoints/step-00000002");
        let (base, file) = (
            fixture.path("diffusers"),
            fixture.path("single.safetensors"),
        );
        fixture.export(&first, "diffusers", &base);
        fixture.export(&first, "single-file", &file);
        let output = fixture.prep(&base, "data");
        assert!(output.status.success(), "{}", stderr(&output));
        // A second run trains the UNet alone: the other parts of its checkpoint are elsewhere.
        let second = fixture.write_recipe("run", &base, "data", "");
        succeed(&["train", text(&second)]);
        fixture.write_others();
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn prepare(&self) {
        let pictures = self.path("pictures");
        fs::create_dir_all(&pictures).expect("a folder for pictures");
        for index in 0..8u8 {
            let picture = image::RgbImage::from_pixel(64, 64, image::Rgb([index * 30, 90, 120]));
            picture
                .save(pictures.join(format!("{index}.png")))
                .expect("written");
            fs::write(pictures.join(format!("{index}.txt")), "a colour").expect("written");
        }
        let prep = self.path("prep.toml");
        let settings = "[prep]\narea_px = 4096\nstep_px = 32\nbucket_min_px = 64\n\
                        bucket_max_px = 64\nmin_side_px = 32\ntest_count = 2\n";
        fs::write(&prep, settings).expect("written");
        let output = self.prep(&Path::new(TINY).join("vae"), "first-data");
        assert!(output.status.success(), "{}", stderr(&output));
    }

    fn prep(&self, vae: &Path, out: &str) -> Output {
        let (pictures, out) = (self.path("pictures"), self.path(out));
        let recipe = self.path("prep.toml");
        rectiflow(&[
            "prep",
            text(&pictures),
            "--out",
            text(&out),
            "--vae",
            text(vae),
            "--recipe",
            text(&recipe),
        ])
    }

    fn write_recipe(&self, name: &str, base: &Path, data: &str, model: &str) -> PathBuf {
        let path = self.path(&format!("{name}.toml"));
        let recipe = format!(
            "[run]\ndir = '{}'\nseed = 7\n[model]\nbase = '{}'\n{model}\n[[data]]\npath = '{}'\n\
             [train]\nsamples = 4\nmicro_batch = 2\n[lr]\npeak = 1e-4\n\
             [ema]\nhalf_life_samples = 4\n[test]\nevery_steps = 1000\n\
             [preview]\nevery_steps = 1000\n[guard]\nenabled = false\n",
            self.path(name).display(),
            base.display(),
            self.path(data).display(),
        );
        fs::write(&path, recipe).expect("written");
        path
    }

    fn export(&self, model: &Path, format: &str, out: &Path) {
        let arguments = [
            "export",
            "--model",
            text(model),
            "--dtype",
            "fp32",
            "--format",
            format,
        ];
        succeed(&[&arguments[..], &["--out", text(out)]].concat());
    }

    /// A folder in the fp16 variant, and what is no model.
    fn write_others(&self) {
        let variant = self.path("variant");
        for part in ["unet", "text_encoder", "text_encoder_2", "vae", "scheduler"] {
            let (from, to) = (self.path("diffusers").join(part), variant.join(part));
            fs::create_dir_all(&to).expect("a folder");
            for entry in fs::read_dir(from).expect("a folder") {
                let entry = entry.expect("an entry");
                let name = entry
                    .file_name()
                    .to_string_lossy()
                    .replace(".safetensors", ".fp16.safetensors");
                fs::copy(entry.path(), to.join(name)).expect("copied");
            }
        }
        fs::create_dir(self.path("empty")).expect("a folder");
        fs::write(self.path("old.ckpt"), b"PK\x03\x04pickle").expect("written");
    }

    /// The kinds of model: name, path, and the word of the message where no model is taken from it.
    fn kinds(&self) -> [(&'static str, PathBuf, Option<&'static str>); 10] {
        [
            ("diffusers folder", self.path("diffusers"), None),
            ("fp16 variant", self.path("variant"), None),
            (
                "checkpoint",
                self.path("run/checkpoints/step-00000002"),
                None,
            ),
            (
                "averaged weights",
                self.path("run/checkpoints/step-00000002/ema"),
                None,
            ),
            ("single file", self.path("single.safetensors"), None),
            ("run", self.path("run"), Some("folder of a run")),
            (
                "one part",
                self.path("diffusers/text_encoder_2"),
                Some("text_encoder_2"),
            ),
            ("empty folder", self.path("empty"), Some("empty: ")),
            ("nothing", self.path("nowhere"), Some("nowhere: ")),
            ("pickle", self.path("old.ckpt"), Some("pickle")),
        ]
    }
}

/// A command that takes a model, and the cells of its row that differ from the rule.
struct Row {
    name: &'static str,
    /// Kinds that this command refuses or accepts against the rule, with a word of the message;
    /// empty if it accepts.
    exceptions: &'static [(&'static str, &'static str)],
    run: fn(&Fixture, &Path) -> Output,
}

fn sample(fixture: &Fixture, model: &Path) -> Output {
    let out = fixture.path("samples");
    let arguments = [
        "sample",
        "--model",
        text(model),
        "--prompt",
        "a",
        "--size",
        "64x64",
    ];
    rectiflow(&[&arguments[..], &["--steps", "1", "--out", text(&out)]].concat())
}

fn bench_sample(_: &Fixture, model: &Path) -> Output {
    let arguments = ["bench", "sample", "--model", text(model), "--size", "64x64"];
    rectiflow(&[&arguments[..], &["--steps", "1", "--rounds", "1"]].concat())
}

fn export_single(fixture: &Fixture, model: &Path) -> Output {
    let out = fixture.path("out/exported.safetensors");
    rectiflow(&[
        "export",
        "--model",
        text(model),
        "--format",
        "single-file",
        "--out",
        text(&out),
    ])
}

fn export_folder(fixture: &Fixture, model: &Path) -> Output {
    let out = fixture.path("out/exported");
    rectiflow(&[
        "export",
        "--model",
        text(model),
        "--format",
        "diffusers",
        "--out",
        text(&out),
    ])
}

fn import(fixture: &Fixture, model: &Path) -> Output {
    let out = fixture.path("out/imported");
    rectiflow(&["import", text(model), "--out", text(&out)])
}

fn eval(fixture: &Fixture, model: &Path) -> Output {
    let recipe = fixture.path("run.toml");
    rectiflow(&["eval", text(&recipe), "--checkpoint", text(model)])
}

fn plan(fixture: &Fixture, model: &Path) -> Output {
    let recipe = fixture.path("run.toml");
    let base = format!("model.base='{}'", model.display());
    rectiflow(&[
        "plan",
        text(&recipe),
        "--hardware",
        "h100-sxm",
        "--set",
        &base,
    ])
}

fn train(fixture: &Fixture, model: &Path) -> Output {
    // A run of its own, of one step.
    let run = fixture.path("based");
    let _ = fs::remove_dir_all(&run);
    let recipe = fixture.write_recipe("based", model, "data", "");
    let output = rectiflow(&["train", text(&recipe)]);
    if output.status.success() {
        // What was trained is a model like any other.
        let single = run.join("x.safetensors");
        let checkpoint = run.join("checkpoints/step-00000002");
        return rectiflow(&[
            "export",
            "--model",
            text(&checkpoint),
            "--format",
            "single-file",
            "--out",
            text(&single),
        ]);
    }
    output
}

fn prep(fixture: &Fixture, model: &Path) -> Output {
    let _ = fs::remove_dir_all(fixture.path("again"));
    fixture.prep(model, "again")
}

fn inspect(fixture: &Fixture, model: &Path) -> Output {
    let (data, sheet) = (fixture.path("data"), fixture.path("sheet.png"));
    rectiflow(&[
        "inspect",
        text(&data),
        "--sheet",
        text(&sheet),
        "--vae",
        text(model),
    ])
}

fn forward(fixture: &Fixture, model: &Path) -> Output {
    let (input, output) = (
        fixture.path("ids.safetensors"),
        fixture.path("states.safetensors"),
    );
    let ids = Tensor::zeros([1, 5], (Kind::Int64, Device::Cpu));
    write_tensors(&input, [("input_ids", &ids)], None, &[]).expect("written");
    let arguments = ["forward", "clip-g", "--model", text(model)];
    rectiflow(
        &[
            &arguments[..],
            &["--input", text(&input), "--output", text(&output)],
        ]
        .concat(),
    )
}

const FOLDERS: &[(&str, &str)] = &[
    (
        "diffusers folder",
        "is a folder, not a single-file checkpoint",
    ),
    ("fp16 variant", "is a folder, not a single-file checkpoint"),
    ("checkpoint", "is a folder, not a single-file checkpoint"),
    (
        "averaged weights",
        "is a folder, not a single-file checkpoint",
    ),
    ("run", "is a folder, not a single-file checkpoint"),
    ("one part", "is a folder, not a single-file checkpoint"),
    ("empty folder", "is a folder, not a single-file checkpoint"),
];

const TABLE: [Row; 11] = [
    Row {
        name: "sample",
        exceptions: &[],
        run: sample,
    },
    Row {
        name: "bench sample",
        exceptions: &[],
        run: bench_sample,
    },
    Row {
        name: "export, single file",
        exceptions: &[],
        run: export_single,
    },
    Row {
        name: "export, diffusers",
        exceptions: &[],
        run: export_folder,
    },
    Row {
        name: "import",
        exceptions: FOLDERS,
        run: import,
    },
    Row {
        name: "eval",
        exceptions: &[],
        run: eval,
    },
    // A plan needs no model: SDXL is assumed.
    Row {
        name: "plan",
        exceptions: &[("nothing", "")],
        run: plan,
    },
    Row {
        name: "train",
        exceptions: &[],
        run: train,
    },
    Row {
        name: "prep --vae",
        exceptions: &[],
        run: prep,
    },
    Row {
        name: "inspect --vae",
        exceptions: &[],
        run: inspect,
    },
    // Its own folder is enough for a forward pass of a part.
    Row {
        name: "forward clip-g",
        exceptions: &[("one part", "")],
        run: forward,
    },
];

#[test]
fn every_command_takes_every_kind_of_model_or_says_why_not() {
    let fixture = Fixture::new();
    let mut wrong = Vec::new();
    for row in TABLE {
        for (kind, path, refused) in fixture.kinds() {
            let exception = row.exceptions.iter().find(|(known, _)| *known == kind);
            let expected = match exception {
                Some((_, "")) => None,
                Some((_, word)) => Some(*word),
                None => refused,
            };
            let output = (row.run)(&fixture, &path);
            let message = stderr(&output);
            let is_right = match expected {
                None => output.status.success(),
                Some(word) => {
                    let code = output.status.code();
                    let last = message.lines().last().unwrap_or_default();
                    matches!(code, Some(1 | 2))
                        && last.contains(word)
                        && last.starts_with("error: ")
                }
            };
            if !is_right {
                let name = row.name;
                wrong.push(format!(
                    "{name}, {kind}: expected {expected:?}, {}: {message}",
                    output.status
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    names_of_exports(&fixture);
    exports_of_averaged_weights(&fixture);
    a_single_file_stands_for_the_folder(&fixture);
}

/// Exports the folder as a single file named `out`.
fn export(fixture: &Fixture, out: &str) -> Output {
    let (model, out) = (fixture.path("diffusers"), fixture.path(out));
    let arguments = [
        "export",
        "--model",
        text(&model),
        "--format",
        "single-file",
        "--json",
    ];
    rectiflow(&[&arguments[..], &["--out", text(&out)]].concat())
}

/// A name without ending is completed, and folders are made.
fn names_of_exports(fixture: &Fixture) {
    for (out, written) in [
        ("names/noext", "names/noext.safetensors"),
        (
            "names/deeper/still/x.safetensors",
            "names/deeper/still/x.safetensors",
        ),
        ("names/model-v1.5", "names/model-v1.5.safetensors"),
        ("names/X.SAFETENSORS", "names/X.SAFETENSORS"),
        ("names/x.sft", "names/x.sft"),
    ] {
        let output = export(fixture, out);
        assert!(output.status.success(), "{out}: {}", stderr(&output));
        let answer = String::from_utf8_lossy(&output.stdout).into_owned();
        let answer: serde_json::Value = serde_json::from_str(answer.trim()).expect("JSON");
        let written = fixture.path(written);
        assert_eq!(answer["out"], text(&written), "{out}");
        assert!(TensorFile::open(&written).is_ok(), "{out}");
        let is_renamed = written != fixture.path(out);
        assert_eq!(
            stderr(&output).contains("so that programs list it"),
            is_renamed,
            "{out}"
        );
    }
    names_that_are_refused(fixture);
}

/// A name that cannot be right is refused, with what to write instead.
fn names_that_are_refused(fixture: &Fixture) {
    let model = fixture.path("diffusers");
    fs::write(fixture.path("a-file"), b"x").expect("written");
    for (out, code, words) in [
        ("names/x.ckpt", 2, &["x.safetensors", ".ckpt"][..]),
        ("names/x.PT", 2, &["x.safetensors"]),
        ("names/folder/", 2, &["is a folder", "model.safetensors"]),
        ("names", 2, &["is a folder"]),
        ("a-file/x", 1, &["a-file"]),
    ] {
        let output = export(fixture, out);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{out}: {message}");
        for word in words {
            assert!(message.contains(word), "{out}: {word}: {message}");
        }
        assert!(
            !message.contains(".tmp-"),
            "no temporary file is named: {message}"
        );
    }
    // The same of a folder, and of other files that are written.
    let file = fixture.path("a-file");
    let output = rectiflow(&[
        "export",
        "--model",
        text(&model),
        "--format",
        "diffusers",
        "--out",
        text(&file),
    ]);
    assert!(
        stderr(&output).contains("this is a file; name a folder"),
        "{}",
        stderr(&output)
    );
    let (input, output) = (
        fixture.path("ids.safetensors"),
        fixture.path("missing/states"),
    );
    let forward = [
        "forward",
        "clip-l",
        "--model",
        text(&model),
        "--input",
        text(&input),
    ];
    let output = rectiflow(&[&forward[..], &["--output", text(&output)]].concat());
    let message = stderr(&output);
    assert!(
        message.contains("missing not found; create it"),
        "{message}"
    );
}

/// Averaged weights are exported in both layouts, with the card of their checkpoint; nothing about
/// a card stops an export.
fn exports_of_averaged_weights(fixture: &Fixture) {
    let checkpoint = fixture.path("run/checkpoints/step-00000002");
    let ema = checkpoint.join("ema");
    let single = fixture.path("ema.safetensors");
    fixture.export(&ema, "single-file", &single);
    let card = fs::read_to_string(single.with_extension("md")).expect("a card");
    assert!(
        card.starts_with("# run step-00000002 ema\n") && card.contains("samples = 4"),
        "{card}"
    );
    assert!(
        card.contains("averaged weights") && card.contains("use_karras_sigmas"),
        "{card}"
    );
    let own =
        TensorFile::open(&ema.join("unet/diffusion_pytorch_model.safetensors")).expect("opens");
    let written = TensorFile::open(&single).expect("opens");
    let [own, written] = [
        (own, "conv_in.weight"),
        (written, "model.diffusion_model.input_blocks.0.0.weight"),
    ]
    .map(|(file, name)| file.tensor(name).expect("the tensor is there"));
    assert!(own.equal(&written), "these are the averaged weights");
    // A card that cannot be written, or whose sources are gone.
    let blocked = fixture.path("blocked.safetensors");
    fs::create_dir_all(blocked.with_extension("md")).expect("a folder in the card's place");
    fixture.export(&ema, "single-file", &blocked);
    assert!(blocked.is_file());
}

/// A single file has the VAE of the folder that it came from: data sets made with either fit both.
fn a_single_file_stands_for_the_folder(fixture: &Fixture) {
    let _ = fs::remove_dir_all(fixture.path("again"));
    let file = fixture.path("single.safetensors");
    let output = fixture.prep(&file, "again");
    assert!(output.status.success(), "{}", stderr(&output));
    let manifest = |name: &str| {
        let text =
            fs::read_to_string(fixture.path(name).join("manifest.json")).expect("a manifest");
        serde_json::from_str::<serde_json::Value>(&text).expect("JSON")["codec"].clone()
    };
    let (file_codec, folder_codec) = (manifest("again"), manifest("data"));
    assert_eq!(file_codec["hash"], folder_codec["hash"]);
    assert_eq!(file_codec["vae"], "single.safetensors");
    // What the file is taken for is said in one line.
    let line = stderr(&import(fixture, &file));
    assert!(
        line.contains("taken for a model that predicts velocity")
            && line.contains("rectiflow.parameterization"),
        "{line}"
    );
}
