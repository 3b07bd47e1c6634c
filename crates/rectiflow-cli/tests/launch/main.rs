//! The files of `launch/`: each is parsed and its command is run. Small scripts stand in for the
//! launcher's programs: `srun` and `torchrun` start one process as rank 0 of 1. A typo in a file, a
//! variable that is never set, or a retry after a stop of the guard therefore fails here and not on
//! a rented cluster.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod fixture;
mod prep;

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use fixture::{ROOT, Stage, launch_file, list, text, variables, yaml};
use serde_json::Value;

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
