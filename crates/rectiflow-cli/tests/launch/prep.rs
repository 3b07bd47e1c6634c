//! The files of `launch/` for preparations: their workers, run without a cluster, make the data set
//! that one process makes.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
    thread,
};

use serde_json::Value;

use crate::fixture::{ROOT, Stage, launch_file, list, text, variables, yaml};

/// The variables of a container or a task.
fn environment(pairs: &Value) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    for pair in list(pairs) {
        let value = text(&pair["value"]).to_owned();
        variables.insert(text(&pair["name"]).to_owned(), value);
    }
    variables
}

impl Stage {
    /// Puts a shell script in the place of a program.
    fn program(&self, name: &str, script: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// The variables of a preparation of the pictures into `out` on the CPU.
    fn preparation(&self, out: &str) -> BTreeMap<String, String> {
        let tiny = Path::new(ROOT).join("assets/tiny-sdxl/vae");
        let paths = [self.path("pictures"), self.path(out), tiny];
        let mut variables = variables(&[("DEVICE", "cpu"), ("PATIENCE", "0.2")]);
        for (name, path) in ["SOURCE", "OUT", "VAE"].into_iter().zip(paths) {
            variables.insert(name.to_owned(), path.display().to_string());
        }
        // The settings of the recipe, which the files of launch/ do not name.
        self.program(
            "rectiflow",
            "exec \"$STAGE/rectiflow\" \"$@\" --recipe \"$STAGE/recipe.toml\"",
        );
        variables
    }

    /// The data set in `out` is the one that a single preparation makes.
    fn assert_prepared(&self, out: &str) {
        let manifest = |name: &str| self.read(&format!("{name}/manifest.json"));
        assert!(!manifest(out).is_empty(), "{}", self.read("calls"));
        assert_eq!(manifest(out), manifest("dataset"));
    }
}

#[test]
fn workers_on_kubernetes_prepare_what_one_process_does() {
    let documents = yaml(&launch_file("prep-kubernetes.yaml"));
    let [work, join] = &documents[..] else {
        panic!("a Job of workers and one that joins")
    };
    let (spec, labels) = (
        &work["spec"],
        [work, join].map(|job| &job["metadata"]["labels"]["stage"]),
    );
    assert_eq!(labels.map(text), ["work", "join"]);
    assert_eq!(text(&spec["completionMode"]), "Indexed");
    assert_eq!(spec["completions"], spec["parallelism"]);
    let rule = &spec["podFailurePolicy"]["rules"][0]["onExitCodes"];
    let container = |job: &Value| job["spec"]["template"]["spec"]["containers"][0].clone();
    let (worker, joiner) = (container(work), container(join));
    assert_eq!(rule["containerName"], worker["name"]);
    let named = environment(&worker["env"]);
    assert_eq!(named["NUM_WORKERS"], spec["completions"].to_string());
    let stage = Stage::new();
    let mut given = stage.preparation("together");
    let mut names: Vec<&String> = named.keys().collect();
    names.retain(|name| *name != "NUM_WORKERS");
    assert_eq!(names, ["DEVICE", "OUT", "SOURCE", "VAE"].each_ref());

    given.insert("NUM_WORKERS".into(), "2".into());
    thread::scope(|scope| {
        for index in ["0", "1"] {
            let mut given = given.clone();
            given.insert("JOB_COMPLETION_INDEX".into(), index.into());
            let (stage, script) = (&stage, text(&worker["args"][0]));
            scope.spawn(move || {
                let done = stage.run(script, &given);
                assert!(done.status.success(), "{done:?}");
            });
        }
    });
    let done = stage.run(text(&joiner["args"][0]), &given);
    assert!(done.status.success(), "{done:?}");
    stage.assert_prepared("together");
}

#[test]
fn workers_on_slurm_are_three_jobs_in_a_row() {
    let script = launch_file("prep-slurm.sh");
    let stage = Stage::new();
    let mut given = stage.preparation("together");
    stage.program(
        "sbatch",
        "echo \"sbatch $PREP_STAGE $*\" >>\"$STAGE/calls\"\necho 4711",
    );
    let submitted = stage.run(&script, &given);
    assert!(
        !submitted.status.success(),
        "the number of workers is needed"
    );
    let submitted = stage.run(&format!("set -- 2 --repack\n{script}"), &given);
    assert!(submitted.status.success(), "{submitted:?}");
    let calls = stage.read("calls");
    for (line, parts) in calls.lines().zip([
        ["sbatch facts", "--array=0-1", "--repack"],
        [
            "sbatch objects",
            "--dependency=afterok:4711",
            "--gpus-per-task=1",
        ],
        ["sbatch join", "--dependency=afterok:4711", "--repack"],
    ]) {
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
    }
    assert_eq!(calls.lines().count(), 3);
    for (job, task) in [
        ("facts", "0"),
        ("facts", "1"),
        ("objects", "1"),
        ("objects", "0"),
        ("join", ""),
    ] {
        given.insert("PREP_STAGE".into(), job.into());
        given.insert("SLURM_ARRAY_TASK_ID".into(), task.into());
        given.insert("SLURM_ARRAY_TASK_COUNT".into(), "2".into());
        let done = stage.run(&script, &given);
        assert!(done.status.success(), "{done:?}");
    }
    stage.assert_prepared("together");
    // A failure goes back into the queue, one of the settings does not.
    for (code, requeued) in [(1, true), (2, false)] {
        stage.program("rectiflow", &format!("exit {code}"));
        given.insert("PREP_STAGE".into(), "objects".into());
        given.insert("SLURM_ARRAY_TASK_ID".into(), "1".into());
        given.insert("SLURM_ARRAY_JOB_ID".into(), "77".into());
        let done = stage.run(&script, &given);
        assert_eq!(done.status.code(), Some(code), "{done:?}");
        let calls = stage.read("calls");
        assert_eq!(calls.contains("scontrol requeue 77_1"), requeued, "{calls}");
    }
}

#[test]
fn workers_on_skypilot_prepare_and_the_first_machine_joins() {
    let documents = yaml(&launch_file("prep-skypilot.yaml"));
    let [task] = &documents[..] else {
        panic!("one task")
    };
    let stage = Stage::new();
    let mut given = stage.preparation("together");
    for name in task["envs"].as_object().unwrap().keys() {
        assert!(given.contains_key(name), "{name}");
    }
    given.insert("SKYPILOT_NUM_NODES".into(), "2".into());
    given.insert("SKYPILOT_NUM_GPUS_PER_NODE".into(), "1".into());
    thread::scope(|scope| {
        for rank in ["0", "1"] {
            let mut given = given.clone();
            given.insert("SKYPILOT_NODE_RANK".into(), rank.into());
            let (stage, script) = (&stage, text(&task["run"]));
            scope.spawn(move || {
                let done = stage.run(script, &given);
                assert!(done.status.success(), "{done:?}");
            });
        }
    });
    stage.assert_prepared("together");
}

impl Stage {
    /// Runs `rectiflow prep` on the pictures with these options.
    fn prep(&self, out: &str, options: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_rectiflow"))
            .arg("prep")
            .arg(self.path("pictures"))
            .arg("--out")
            .arg(self.path(out))
            .arg("--recipe")
            .arg(self.path("recipe.toml"))
            .args(options)
            .env("OMP_NUM_THREADS", "1")
            .output()
            .unwrap()
    }
}

#[test]
fn one_command_starts_workers_and_joins_what_they_write() {
    let stage = Stage::new();
    let vae = Path::new(ROOT).join("assets/tiny-sdxl/vae");
    let vae = vae.to_str().unwrap();
    let done = stage.prep("together", &["--vae", vae, "--workers", "2"]);
    assert!(done.status.success(), "{done:?}");
    stage.assert_prepared("together");
    assert!(stage.path("together/prep/logs/worker-1.log").is_file());
    assert!(!stage.path("together/prep/workers").exists());

    // A worker that fails ends the others, and says why.
    fs::create_dir_all(stage.path("broken/prep/workers/facts-1-of-2.part.jsonl")).unwrap();
    let failed = stage.prep("broken", &["--vae", vae, "--workers", "2"]);
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(failed.status.code(), Some(1), "{said}");
    assert!(said.contains("worker 1/2 ended"), "{said}");
    assert!(said.contains("facts-1-of-2.part.jsonl"), "{said}");
}

#[test]
fn options_of_stages_that_do_not_go_together_are_refused() {
    let stage = Stage::new();
    for (options, part) in [
        (&["--stage", "facts"][..], "say which, as --worker 0/8"),
        (
            &["--stage", "join", "--worker", "0/2"],
            "leave --worker out",
        ),
        (&["--stage", "join"], "--vae is needed"),
        (&["--worker", "0/2"], "--vae"),
        (&["--stage", "list", "--worker", "9/8"], "from 0 to N - 1"),
    ] {
        let refused = stage.prep("nothing", options);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{said}");
        assert!(said.contains(part), "{said}");
        assert!(!stage.path("nothing").exists(), "{options:?}");
    }
    let listed = stage.prep("nothing", &["--stage", "list", "--workers", "2"]);
    assert!(listed.status.success(), "{listed:?}");
    let said = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(said.contains("4 samples, 0 with a size"), "{said}");
    let facts = stage.prep("nothing", &["--stage", "facts", "--worker", "1/2"]);
    assert!(facts.status.success(), "{facts:?}");
    let vae = Path::new(ROOT).join("assets/tiny-sdxl/vae");
    let joined = stage.prep(
        "nothing",
        &["--stage", "join", "--vae", vae.to_str().unwrap()],
    );
    let said = String::from_utf8_lossy(&joined.stderr).into_owned();
    assert_eq!(joined.status.code(), Some(1), "{said}");
    assert!(said.contains("0/2 has none yet"), "{said}");
}
