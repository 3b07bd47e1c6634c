//! The files of `launch/`: each is parsed and its command is run. Small scripts stand in for the
//! launcher's programs: `srun` and `torchrun` start one process as rank 0 of 1. A typo in a file, a
//! variable that is never set, or a retry after a stop of the guard therefore fails here and not on
//! a rented cluster.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use granit_parser::{Event, Parser, ScalarStyle};
use serde_json::Value;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

fn launch_file(name: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join("launch").join(name)).unwrap()
}

/// A folder with a tiny data set, a recipe of two steps, and stand-ins for the launcher's programs.
struct Stage {
    folder: tempfile::TempDir,
}

/// Each stand-in appends its arguments to `calls`; `rectiflow` also appends the launcher's
/// variables.
const RECTIFLOW: &str = "#!/bin/sh\n\
    env | grep -E '^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|PYTORCH_CUDA_ALLOC_CONF)=' >\"$STAGE/environment\"\n\
    exec \"$STAGE/rectiflow\" \"$@\"\n";
/// Exits with 1 however the process ended, as torchrun does.
const TORCHRUN: &str = "#!/bin/sh\n\
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
const SRUN: &str = "#!/bin/sh\n\
    echo \"srun $*\" >>\"$STAGE/calls\"\n\
    while [ \"${1#--}\" != \"$1\" ]; do shift; done\n\
    export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0\n\
    \"$@\" || exit 143\n";
const SCONTROL: &str = "#!/bin/sh\n\
    echo \"scontrol $*\" >>\"$STAGE/calls\"\n\
    if [ \"$1\" = show ]; then printf 'node-1\\nnode-2\\n'; fi\n";

impl Stage {
    fn new() -> Self {
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

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Four pictures, and a recipe of two steps of two samples.
    fn prepare(&self) {
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
    fn run(&self, script: &str, variables: &BTreeMap<String, String>) -> Output {
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

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// The script trains to the end with every variable set. After a stop of the guard it exits
    /// with 3; returns the calls that were made.
    fn rehearse(&self, script: &str, variables: &BTreeMap<String, String>, master: &str) -> String {
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

fn variables(all: &[(&str, &str)]) -> BTreeMap<String, String> {
    all.iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

/// The documents of a YAML file. An unquoted scalar that is a number or a boolean becomes one.
#[track_caller]
fn yaml(text: &str) -> Vec<Value> {
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
fn value<'a>(events: &mut impl Iterator<Item = Event<'a>>) -> Option<Value> {
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

fn list(value: &Value) -> &[Value] {
    value
        .as_array()
        .unwrap_or_else(|| panic!("expected a list, found {value}"))
}

fn text(value: &Value) -> &str {
    value
        .as_str()
        .unwrap_or_else(|| panic!("expected text, found {value}"))
}

#[test]
fn slurm_runs_stops_and_tries_again() {
    let script = launch_file("slurm.sbatch");
    for option in [
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--requeue",
        "--signal=TERM@120",
    ] {
        assert!(script.contains(&format!("#SBATCH {option}\n")), "{option}");
    }
    let stage = Stage::new();
    let job = [
        ("SLURM_JOB_NODELIST", "node-[1-2]"),
        ("SLURM_JOB_ID", "4321"),
        ("SLURM_JOB_NUM_NODES", "1"),
        ("SLURM_NTASKS_PER_NODE", "1"),
        ("SLURM_CPUS_PER_TASK", "12"),
    ];
    let calls = stage.rehearse(&script, &variables(&job), "node-1");
    assert!(
        !calls.contains("requeue"),
        "a run that is done is not tried again: {calls}"
    );
    for option in ["--wait=0", "--kill-on-bad-exit=1", "--cpus-per-task=12"] {
        assert!(calls.contains(option), "{option} is not in {calls}");
    }
    // What fails before a new checkpoint would fail again: the data set is gone.
    fs::remove_dir_all(stage.path("dataset")).unwrap();
    fs::remove_dir_all(stage.path("run")).unwrap();
    assert_eq!(stage.run(&script, &variables(&job)).status.code(), Some(1));
    assert!(!stage.read("calls").contains("requeue"));
    // So would a recipe that cannot run.
    fs::write(stage.path("recipe.toml"), "[run]\n").unwrap();
    assert_eq!(stage.run(&script, &variables(&job)).status.code(), Some(2));
    assert!(!stage.read("calls").contains("requeue"));
}

#[test]
fn slurm_requeues_what_a_retry_can_mend() {
    let script = launch_file("slurm.sbatch");
    let stage = Stage::new();
    let job = |starts: &str| {
        variables(&[
            ("SLURM_JOB_NODELIST", "node-1"),
            ("SLURM_JOB_ID", "4321"),
            ("SLURM_JOB_NUM_NODES", "1"),
            ("SLURM_NTASKS_PER_NODE", "1"),
            ("SLURM_CPUS_PER_TASK", "12"),
            ("SLURM_RESTART_COUNT", starts),
            ("MAX_RESTARTS", "2"),
        ])
    };
    // (what the rank does, how the script ends, whether the job is requeued)
    let new = "mkdir -p \"$STAGE/run/checkpoints/step-0000000$SLURM_RESTART_COUNT\"";
    let fails = format!("{new}; exit 1");
    let again = format!("{new}; kill -9 $$");
    for (start, (rank, code, is_requeued)) in [
        ("exit 143", 0, true),
        ("exit 126", 126, false),
        ("exit 130", 130, false),
        ("exit 1", 1, false),
        (&*fails, 0, true),
        ("kill -9 $$", 0, true),
        ("exit 143", 0, true),
        (&*again, 137, false),
    ]
    .into_iter()
    .enumerate()
    {
        let program = stage.path("bin/rectiflow");
        fs::write(&program, format!("#!/bin/sh\n{rank}\n")).unwrap();
        let output = stage.run(&script, &job(&start.to_string()));
        let calls = stage.read("calls");
        assert_eq!(output.status.code(), Some(code), "{rank}: {output:?}");
        let requeued = calls.contains("scontrol requeue 4321");
        assert_eq!(requeued, is_requeued, "{rank}: {calls}");
    }
}

#[test]
fn kubernetes_runs_and_a_stop_fails_the_job() {
    let documents = yaml(&launch_file("kubernetes.yaml"));
    let [service, job] = &documents[..] else {
        panic!("a Service and a Job")
    };
    let spec = &job["spec"];
    let pod = &spec["template"]["spec"];
    let container = &pod["containers"][0];
    assert_eq!(
        (text(&service["kind"]), text(&job["kind"])),
        ("Service", "Job")
    );
    assert_eq!(text(&spec["completionMode"]), "Indexed");
    // Pods find each other by names that consist of these.
    assert_eq!(service["metadata"]["name"], pod["subdomain"]);
    assert_eq!(
        service["spec"]["selector"]["job-name"],
        job["metadata"]["name"]
    );
    assert_eq!(text(&service["spec"]["clusterIP"]), "None");
    // Kubernetes requires this with a failure policy.
    assert_eq!(text(&pod["restartPolicy"]), "Never");
    let rule = &spec["podFailurePolicy"]["rules"][0];
    assert_eq!(
        (text(&rule["action"]), &rule["onExitCodes"]["containerName"]),
        ("FailJob", &container["name"])
    );
    assert!(
        list(&rule["onExitCodes"]["values"]).contains(&Value::from(3)),
        "exit code 3 is final"
    );

    let env = list(&container["env"]).iter();
    let mut variables: BTreeMap<_, _> = env
        .map(|pair| {
            (
                text(&pair["name"]).to_owned(),
                text(&pair["value"]).to_owned(),
            )
        })
        .collect();
    assert_eq!(
        variables["NUM_NODES"],
        spec["completions"].as_i64().unwrap().to_string()
    );
    assert_eq!(spec["completions"], spec["parallelism"]);
    assert_eq!(
        variables["GPUS_PER_NODE"],
        container["resources"]["limits"]["nvidia.com/gpu"]
            .as_i64()
            .unwrap()
            .to_string()
    );
    let mounts: Vec<&str> = list(&container["volumeMounts"])
        .iter()
        .map(|m| text(&m["name"]))
        .collect();
    let volumes: Vec<&str> = list(&pod["volumes"])
        .iter()
        .map(|volume| text(&volume["name"]))
        .collect();
    assert_eq!(mounts, volumes);

    assert_eq!(container["command"], serde_json::json!(["bash", "-c"]));
    variables.insert("JOB_COMPLETION_INDEX".into(), "0".into());
    let (stage, script) = (Stage::new(), text(&container["args"][0]));
    let calls = stage.rehearse(script, &variables, "rectiflow-0.rectiflow");
    let grace = pod["terminationGracePeriodSeconds"].as_i64().unwrap();
    for option in [
        "--nnodes 4 --nproc-per-node 8",
        "--max-restarts",
        "--local-addr rectiflow-0.rectiflow",
        &format!("--shutdown-timeout {}", grace - 20),
    ] {
        assert!(calls.contains(option), "{option} is not in {calls}");
    }
    // The pod ends as its rank did, though torchrun says 1.
    for code in [1, 2, 137] {
        let program = stage.path("bin/rectiflow");
        fs::write(program, format!("#!/bin/sh\nexit {code}\n")).unwrap();
        let output = stage.run(script, &variables);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
    }
}

#[test]
fn skypilot_runs_and_a_stop_rents_nothing_again() {
    let documents = yaml(&launch_file("skypilot.yaml"));
    let [task] = &documents[..] else {
        panic!("one task")
    };
    assert_eq!(
        task["resources"]["job_recovery"]["max_restarts_on_errors"].as_i64(),
        Some(0)
    );
    let envs = task["envs"].as_object().unwrap().iter();
    let mut variables: BTreeMap<_, _> = envs
        .map(|(name, value)| (name.clone(), text(value).to_owned()))
        .collect();
    assert!(
        Path::new(ROOT).join(&variables["RECIPE"]).is_file(),
        "the recipe that it names is there"
    );
    let mounts = task["file_mounts"].as_object().unwrap();
    assert!(
        mounts
            .keys()
            .any(|mount| variables["RUN_DIR"].starts_with(mount.as_str())),
        "checkpoints outlive machines"
    );
    let setup = Command::new("bash")
        .args(["-n", "-c", text(&task["setup"])])
        .status()
        .unwrap();
    assert!(setup.success());
    for (name, value) in [
        ("SKYPILOT_NODE_IPS", "10.0.0.1\n10.0.0.2"),
        ("SKYPILOT_NUM_NODES", "2"),
        ("SKYPILOT_NUM_GPUS_PER_NODE", "8"),
        ("SKYPILOT_NODE_RANK", "0"),
    ] {
        variables.insert(name.into(), value.into());
    }
    let calls = Stage::new().rehearse(text(&task["run"]), &variables, "10.0.0.1");
    assert!(
        calls.contains("--nnodes 2 --nproc-per-node 8 --max-restarts"),
        "{calls}"
    );
}
