//! The stage of a rehearsal: a tiny data set, a recipe, and stand-ins for a launcher's programs.
//! Also a reader of YAML.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use granit_parser::{Event, Parser, ScalarStyle};
use serde_json::Value;

pub(crate) const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

pub(crate) fn launch_file(name: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join("launch").join(name)).unwrap()
}

/// A folder with a tiny data set, a recipe of two steps, and stand-ins for the launcher's programs.
pub(crate) struct Stage {
    pub(crate) folder: tempfile::TempDir,
}

/// Each stand-in appends its arguments to `calls`; `rectiflow` also appends the launcher's
/// variables.
pub(crate) const RECTIFLOW: &str = "#!/bin/sh\n\
    env | grep -E '^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|PYTORCH_CUDA_ALLOC_CONF)=' >\"$STAGE/environment\"\n\
    exec \"$STAGE/rectiflow\" \"$@\"\n";
/// Exits with 1 however the process ended, as torchrun does.
pub(crate) const TORCHRUN: &str = "#!/bin/sh\n\
    echo \"torchrun $*\" >>\"$STAGE/calls\"\n\
    export MASTER_ADDR MASTER_PORT\n\
    while [ \"$1\" != --no-python ]; do\n\
        if [ \"$1\" = --rdzv-endpoint ]; then MASTER_ADDR=${2%:*} MASTER_PORT=${2#*:}; fi\n\
        shift\n\
    done\n\
    shift\n\
    export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 TORCHELASTIC_RESTART_COUNT=0\n\
    \"$@\" || exit 1\n";
/// Exits with 143 however a process failed, as srun does if it ends the others.
pub(crate) const SRUN: &str = "#!/bin/sh\n\
    echo \"srun $*\" >>\"$STAGE/calls\"\n\
    while [ \"${1#--}\" != \"$1\" ]; do shift; done\n\
    export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0\n\
    \"$@\" || exit 143\n";
pub(crate) const SCONTROL: &str = "#!/bin/sh\n\
    echo \"scontrol $*\" >>\"$STAGE/calls\"\n\
    if [ \"$1\" = show ]; then printf 'node-1\\nnode-2\\n'; fi\n";

impl Stage {
    pub(crate) fn new() -> Self {
        let stage = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        symlink(env!("CARGO_BIN_EXE_rectiflow"), stage.path("rectiflow")).unwrap();
        fs::create_dir(stage.path("bin")).unwrap();
        for (name, script) in [
            ("rectiflow", RECTIFLOW),
            ("torchrun", TORCHRUN),
            ("srun", SRUN),
            ("scontrol", SCONTROL),
        ] {
            let path = stage.path("bin").join(name);
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        stage.prepare();
        stage
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Four pictures, and a recipe of two steps of two samples.
    pub(crate) fn prepare(&self) {
        fs::create_dir(self.path("pictures")).unwrap();
        for index in 0..4u8 {
            let picture = image::RgbImage::from_pixel(64, 64, image::Rgb([60 * index, 200, 100]));
            picture
                .save(self.path("pictures").join(format!("{index}.png")))
                .unwrap();
            fs::write(
                self.path("pictures").join(format!("{index}.txt")),
                "a colour",
            )
            .unwrap();
        }
        let tiny = Path::new(ROOT).join("assets/tiny-sdxl");
        let recipe = format!(
            "[run]\ndir = 'another'\n[model]\nbase = '{}'\nrandom = ['unet', 'text_encoder', 'text_encoder_2']\n\
             [prep]\narea_px = 4096\nstep_px = 32\nbucket_min_px = 64\nbucket_max_px = 64\nmin_side_px = 32\n\
             test_fraction = 0.0\n\
             [[data]]\npath = '{}'\n[train]\nsamples = 4\nmicro_batch = 2\ntext_encoders = 'trained'\n\
             [lr]\nwarmup_samples = 0\n",
            tiny.display(),
            self.path("dataset").display(),
        );
        fs::write(self.path("recipe.toml"), recipe).unwrap();
        let prepared = Command::new(env!("CARGO_BIN_EXE_rectiflow"))
            .args([
                "prep".as_ref(),
                self.path("pictures").as_os_str(),
                "--out".as_ref(),
            ])
            .args([
                self.path("dataset").as_os_str(),
                "--vae".as_ref(),
                tiny.join("vae").as_os_str(),
            ])
            .args(["--recipe".as_ref(), self.path("recipe.toml").as_os_str()])
            .env("OMP_NUM_THREADS", "1")
            .output()
            .unwrap();
        assert!(
            prepared.status.success(),
            "{}",
            String::from_utf8_lossy(&prepared.stderr)
        );
    }

    /// Runs a script as its launcher would, with `variables` and PATH as its only environment.
    pub(crate) fn run(&self, script: &str, variables: &BTreeMap<String, String>) -> Output {
        let _ = fs::remove_file(self.path("calls"));
        let _ = fs::remove_file(self.path("environment"));
        Command::new("bash")
            .args(["-c", script])
            .env_clear()
            .env(
                "PATH",
                format!("{}:/usr/bin:/bin", self.path("bin").display()),
            )
            .env("HOME", self.folder.path())
            .env("STAGE", self.folder.path())
            .env("OMP_NUM_THREADS", "1")
            .envs(variables)
            .env("RECIPE", self.path("recipe.toml"))
            .env("RUN_DIR", self.path("run"))
            .current_dir(self.folder.path())
            .output()
            .unwrap()
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// The script trains to the end with every variable set. After a stop of the guard it exits
    /// with 3; returns the calls that were made.
    pub(crate) fn rehearse(
        &self,
        script: &str,
        variables: &BTreeMap<String, String>,
        master: &str,
    ) -> String {
        let done = self.run(script, variables);
        assert!(
            done.status.success(),
            "{}\n{}",
            done.status,
            String::from_utf8_lossy(&done.stderr)
        );
        let checkpoint = self.path("run/checkpoints/step-00000002/state.json");
        assert!(
            checkpoint.is_file(),
            "the run folder is the launcher's, not the recipe's"
        );
        let environment = self.read("environment");
        let settings = [
            "RANK=0",
            "WORLD_SIZE=1",
            "LOCAL_RANK=0",
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        ];
        for setting in settings
            .into_iter()
            .chain([&*format!("MASTER_ADDR={master}"), "MASTER_PORT=2"])
        {
            assert!(
                environment.contains(setting),
                "{setting} is not in\n{environment}"
            );
        }
        let calls = self.read("calls");
        fs::write(self.path("run/STOPPED"), "the loss is lost\n").unwrap();
        assert_eq!(
            self.run(script, variables).status.code(),
            Some(3),
            "a stop stays a stop"
        );
        assert!(
            !self.read("calls").contains("requeue"),
            "and is not tried again"
        );
        fs::remove_file(self.path("run/STOPPED")).unwrap();
        calls
    }
}

pub(crate) fn variables(all: &[(&str, &str)]) -> BTreeMap<String, String> {
    all.iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

/// The documents of a YAML file. An unquoted scalar that is a number or a boolean becomes one.
#[track_caller]
pub(crate) fn yaml(text: &str) -> Vec<Value> {
    let mut events = Parser::new_from_str(text).map(|event| event.unwrap().0);
    let mut documents = Vec::new();
    while let Some(event) = events.next() {
        if matches!(event, Event::DocumentStart(..)) {
            documents.push(value(&mut events).unwrap());
        }
    }
    documents
}

/// The next value; `None` at the end of a sequence or mapping.
pub(crate) fn value<'a>(events: &mut impl Iterator<Item = Event<'a>>) -> Option<Value> {
    Some(match events.next()? {
        Event::Scalar(text, ScalarStyle::Plain, ..) => {
            serde_json::from_str(&text).unwrap_or_else(|_| Value::String(text.into_owned()))
        }
        Event::Scalar(text, ..) => Value::String(text.into_owned()),
        Event::SequenceStart(..) => std::iter::from_fn(|| value(events)).collect(),
        Event::MappingStart(..) => {
            let mut fields = serde_json::Map::new();
            while let Some(name) = value(events) {
                fields.insert(name.as_str().unwrap().to_owned(), value(events).unwrap());
            }
            Value::Object(fields)
        }
        Event::SequenceEnd | Event::MappingEnd => return None,
        other => panic!("the files of launch/ have no {other:?}"),
    })
}

pub(crate) fn list(value: &Value) -> &[Value] {
    value
        .as_array()
        .unwrap_or_else(|| panic!("expected a list, found {value}"))
}

pub(crate) fn text(value: &Value) -> &str {
    value
        .as_str()
        .unwrap_or_else(|| panic!("expected text, found {value}"))
}
