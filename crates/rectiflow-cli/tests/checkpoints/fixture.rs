//! A run on a base of its own, and every command that reads a checkpoint.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use rectiflow_sdxl::tensor_file::write_tensors;
use tch::{Device, Kind, Tensor};

pub(crate) const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny-sdxl");
/// The checkpoint of the fixture's run.
pub(crate) const STEP: &str = "step-00000002";

pub(crate) fn rectiflow_in(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rectiflow"));
    command
        .args(arguments)
        .current_dir(folder)
        .env("OMP_NUM_THREADS", "1")
        .env_remove("RUST_LOG")
        .stdin(Stdio::null());
    command.output().expect("the command starts")
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("the folder can be read") {
        let entry = entry.expect("the folder can be read");
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).expect("copied");
        }
    }
}

/// Replaces `to` by a copy of `from`.
pub(crate) fn replace_by_copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    copy(from, to);
}

/// A folder with pictures, data sets, a base in two layouts, and a run with averaged weights that
/// trained the UNet alone.
pub(crate) struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let fixture = Self { folder };
        fixture.write_pictures();
        fixture.prep(&Path::new(TINY).join("vae"), "first-data");
        // A whole model: one run trains all parts from random weights.
        let random = "random = ['unet', 'text_encoder', 'text_encoder_2']";
        let first = fixture.write_recipe("first", Path::new(TINY), "first-data", random);
        fixture.succeed(&[
            "train",
            text(&first),
            "--set",
            "train.text_encoders=trained",
        ]);
        let first = fixture.path("first/checkpoints").join(STEP);
        for (format, out) in [("diffusers", "base"), ("single-file", "base.safetensors")] {
            let out = fixture.path(out);
            let arguments = ["export", "--model", text(&first), "--dtype", "fp32"];
            let to = ["--format", format, "--out", text(&out)];
            fixture.succeed(&[&arguments[..], &to].concat());
        }
        fixture.prep(&fixture.path("base"), "data");
        let run = fixture.write_recipe("run", &fixture.path("base"), "data", "");
        fixture.succeed(&["train", text(&run)]);
        let ids = Tensor::zeros([1, 5], (Kind::Int64, Device::Cpu));
        let input = fixture.path("ids.safetensors");
        write_tensors(&input, [("input_ids", &ids)], None, &[]).expect("written");
        fixture
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn checkpoint(&self) -> PathBuf {
        self.path("run/checkpoints").join(STEP)
    }

    pub(crate) fn rectiflow(&self, arguments: &[&str]) -> Output {
        rectiflow_in(self.folder.path(), arguments)
    }

    pub(crate) fn succeed(&self, arguments: &[&str]) -> Output {
        let output = self.rectiflow(arguments);
        let message = stderr(&output);
        assert!(output.status.success(), "{arguments:?}: {message}");
        output
    }

    fn write_pictures(&self) {
        let pictures = self.path("pictures");
        fs::create_dir_all(&pictures).expect("a folder for pictures");
        for index in 0..8u8 {
            let picture = image::RgbImage::from_pixel(64, 64, image::Rgb([index * 30, 90, 120]));
            let name = format!("{index}.png");
            picture.save(pictures.join(name)).expect("written");
            fs::write(pictures.join(format!("{index}.txt")), "a colour").expect("written");
        }
        let settings = "[prep]\narea_px = 4096\nstep_px = 32\nbucket_min_px = 64\n\
                        bucket_max_px = 64\nmin_side_px = 32\ntest_count = 2\n";
        fs::write(self.path("prep.toml"), settings).expect("written");
    }

    fn prep(&self, vae: &Path, out: &str) {
        let output = self.try_prep(vae, out, &[]);
        assert!(output.status.success(), "{}", stderr(&output));
    }

    pub(crate) fn try_prep(&self, vae: &Path, out: &str, more: &[&str]) -> Output {
        let recipe = self.path("prep.toml");
        let arguments = ["prep", "pictures", "--recipe", text(&recipe), "--out", out];
        self.rectiflow(&[&arguments[..], &["--vae", text(vae)], more].concat())
    }

    pub(crate) fn write_recipe(&self, name: &str, base: &Path, data: &str, model: &str) -> PathBuf {
        let path = self.path(&format!("{name}.toml"));
        let recipe = format!(
            "[run]\ndir = '{}'\nseed = 7\n[model]\nbase = '{}'\n{model}\n[[data]]\npath = '{}'\n\
             [train]\nsamples = 4\nmicro_batch = 2\n[lr]\npeak = 1e-4\ndecay = 'constant'\n\
             [ema]\nhalf_life_samples = 4\n[test]\nevery_steps = 1000\n\
             [preview]\nevery_steps = 1000\n[guard]\nenabled = false\n",
            self.path(name).display(),
            base.display(),
            self.path(data).display(),
        );
        fs::write(&path, recipe).expect("written");
        path
    }
}

/// A command that reads a checkpoint.
#[derive(Clone, Copy)]
pub(crate) struct Reader {
    pub(crate) name: &'static str,
    /// What it reads of a checkpoint's own files.
    pub(crate) reads: Reads,
    pub(crate) run: fn(&Fixture, &Path, &[&str]) -> Output,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    Everything,
    /// The UNet.
    Model,
    /// Its state, for a part that it references.
    State,
}

pub(crate) const READERS: [Reader; 11] = [
    Reader {
        name: "sample",
        reads: Reads::Model,
        run: |fixture, model, more| {
            let arguments = ["sample", "--model", text(model), "--prompt", "a"];
            let size = ["--size", "64x64", "--steps", "1"];
            fixture.rectiflow(&[&arguments[..], &size, more].concat())
        },
    },
    Reader {
        name: "bench sample",
        reads: Reads::Model,
        run: |fixture, model, more| {
            let arguments = ["bench", "sample", "--model", text(model), "--rounds", "1"];
            let size = ["--size", "64x64", "--steps", "1"];
            fixture.rectiflow(&[&arguments[..], &size, more].concat())
        },
    },
    Reader {
        name: "export, single file",
        reads: Reads::Model,
        run: |fixture, model, more| export(fixture, model, "single-file", more),
    },
    Reader {
        name: "export, diffusers",
        reads: Reads::Model,
        run: |fixture, model, more| export(fixture, model, "diffusers", more),
    },
    Reader {
        name: "eval",
        reads: Reads::Model,
        run: |fixture, model, more| {
            let arguments = ["eval", "run.toml", "--checkpoint", text(model)];
            fixture.rectiflow(&[&arguments[..], more].concat())
        },
    },
    Reader {
        name: "forward clip-g",
        reads: Reads::State,
        run: |fixture, model, more| {
            let files = ["--input", "ids.safetensors", "--output", "out.safetensors"];
            let arguments = ["forward", "clip-g", "--model", text(model)];
            fixture.rectiflow(&[&arguments[..], &files, more].concat())
        },
    },
    Reader {
        name: "prep --vae",
        reads: Reads::State,
        run: |fixture, model, more| {
            let _ = fs::remove_dir_all(fixture.path("again"));
            fixture.try_prep(model, "again", more)
        },
    },
    Reader {
        name: "inspect --vae",
        reads: Reads::State,
        run: |fixture, model, more| {
            let arguments = ["inspect", "data", "--sheet", "sheet.png", "--vae"];
            fixture.rectiflow(&[&arguments[..], &[text(model)], more].concat())
        },
    },
    Reader {
        name: "model.base",
        reads: Reads::Model,
        run: |fixture, model, more| {
            let _ = fs::remove_dir_all(fixture.path("based"));
            let base = format!("model.base='{}'", model.display());
            let set = ["--set", "run.dir='based'", "--set", &base];
            fixture.rectiflow(&[&["train", "run.toml"], &set[..], more].concat())
        },
    },
    Reader {
        name: "--branch-from",
        reads: Reads::Everything,
        run: |fixture, model, more| {
            let _ = fs::remove_dir_all(fixture.path("branch"));
            let set = ["--set", "run.dir='branch'", "--set", "train.samples=8"];
            let from = ["train", "run.toml", "--branch-from", text(model)];
            fixture.rectiflow(&[&from[..], &set, more].concat())
        },
    },
    Reader {
        name: "resume",
        reads: Reads::Everything,
        run: |fixture, model, more| {
            let run = fixture.path("resumed");
            let _ = fs::remove_dir_all(&run);
            replace_by_copy(model, &run.join("checkpoints").join(STEP));
            let set = ["--set", "run.dir='resumed'", "--set", "train.samples=8"];
            fixture.rectiflow(&[&["train", "run.toml"], &set[..], more].concat())
        },
    },
];

fn export(fixture: &Fixture, model: &Path, format: &str, more: &[&str]) -> Output {
    let out = format!("out/{format}");
    let arguments = ["export", "--model", text(model), "--format", format];
    fixture.rectiflow(&[&arguments[..], &["--out", &out], more].concat())
}

/// What is wrong with the outputs of the readers: collected, so that one run shows all.
#[derive(Default)]
pub(crate) struct Wrong(Vec<String>);

impl Wrong {
    pub(crate) fn expect_success(&mut self, what: &str, output: &Output) {
        if !output.status.success() {
            let message = stderr(output);
            self.0.push(format!("{what}: {}: {message}", output.status));
        }
    }

    /// The last line of the messages is an error that has all words.
    pub(crate) fn expect_refusal(&mut self, what: &str, output: &Output, words: &[&str]) {
        let message = stderr(output);
        let last = message.lines().last().unwrap_or_default();
        let is_error = matches!(output.status.code(), Some(1 | 2)) && last.starts_with("error: ");
        let missing: Vec<&&str> = words.iter().filter(|word| !last.contains(**word)).collect();
        if !is_error || !missing.is_empty() {
            let status = output.status;
            self.0
                .push(format!("{what}: {status}, without {missing:?}: {message}"));
        }
    }

    pub(crate) fn assert_none(&self) {
        assert!(self.0.is_empty(), "{}", self.0.join("\n"));
    }
}
