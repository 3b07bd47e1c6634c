//! Our graphs against what ComfyUI's server says of its nodes.
//!
//! `golden/object_info.json` is the answer of ComfyUI 0.3.64 (commit `a125cd8`) about the nodes
//! that we use, recorded by `make peers-comfy`, which also draws the graphs. Here every node must
//! have the inputs that it needs and no others, of the right types and within limits, unless the
//! graph names a difference.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use rectiflow_sdxl::{
    drawing::{Drawing, DrawnText},
    flow::Parameterization,
    sample::{SampleSettings, SizeConditioning},
    sampler::Sampler,
    schedule::Schedule,
    workflow::Workflow,
};
use serde_json::{Map, Value, json};
use tch::Kind;

const PARAMETERIZATIONS: [Parameterization; 4] = [
    Parameterization::Flow,
    Parameterization::Eps,
    Parameterization::V,
    Parameterization::VZtsnr,
];
/// Texts that are values of their nodes, and one that has a node of its own.
const TEXTS: [&str; 3] = ["a fox", "", "{a} // fox"];

fn object_info() -> Map<String, Value> {
    serde_json::from_str(include_str!("golden/object_info.json")).unwrap()
}

/// Settings of every kind, and beyond ComfyUI's limits.
fn all_settings() -> Vec<SampleSettings> {
    let default = SampleSettings::default;
    let sized = |original_width_px| SampleSettings {
        size: Some(SizeConditioning {
            original_width_px,
            original_height_px: 64,
            crop_left_px: 3,
            crop_top_px: 5,
            target_width_px: 64,
            target_height_px: 64,
        }),
        ..default()
    };
    let guided = |cfg, cfg_rescale, pag_scale| SampleSettings {
        cfg,
        cfg_rescale,
        pag_scale,
        ..default()
    };
    let shifted = |shift| SampleSettings { shift, ..default() };
    let of_size = |width_px, batch, seed| SampleSettings {
        width_px,
        batch,
        seed,
        ..default()
    };
    let mut all = vec![
        sized(1000),
        sized(16385),
        guided(1.0, 0.5, 3.0),
        guided(4.5, 0.7, 100.0),
        guided(-1.0, 0.0, 0.0),
        guided(4.0, 1.0, 101.0),
        shifted(0.01),
        shifted(101.0),
        of_size(8, 1, 0),
        of_size(16, 4096, u64::MAX),
    ];
    for (_, sampler) in Sampler::ALL {
        for (_, schedule) in Schedule::ALL {
            all.push(SampleSettings {
                sampler,
                schedule,
                ..default()
            });
        }
    }
    all
}

fn all_workflows() -> Vec<Workflow> {
    let mut workflows = Vec::new();
    for settings in all_settings() {
        for parameterization in PARAMETERIZATIONS {
            for text in TEXTS {
                workflows.push(Workflow::new(&Drawing {
                    settings: &settings,
                    parameterization,
                    prompt: DrawnText::whole(text),
                    negative: DrawnText::whole(text),
                    model: "fox",
                    file: Some("fox.safetensors"),
                    computed_in: Kind::Float,
                }));
            }
        }
    }
    workflows
}

/// Returns what is wrong with a value for an input; `None` if nothing is.
fn problem(
    value: &Value,
    input: &Value,
    prompt: &Value,
    info: &Map<String, Value>,
) -> Option<String> {
    let kind = &input["type"];
    let is_right = match (value, kind) {
        // A link: the output's type is the input's.
        (Value::Array(link), Value::String(kind)) => {
            let source = prompt[link[0].as_str().unwrap()]["class_type"]
                .as_str()
                .unwrap();
            let slot = usize::try_from(link[1].as_u64().unwrap()).unwrap();
            info[source]["output"][slot] == *kind
        }
        // Choices; those of checkpoints are files.
        (Value::String(chosen), Value::Array(choices)) => {
            choices.is_empty() || choices.contains(&json!(chosen))
        }
        (Value::Number(number), Value::String(kind)) => {
            let is_whole = kind == "INT" && number.is_u64();
            let number = number.as_f64().unwrap();
            let bound = |key: &str| input[key].as_f64().unwrap();
            (is_whole || kind == "FLOAT") && (bound("min")..=bound("max")).contains(&number)
        }
        (Value::Bool(_), kind) => kind == "BOOLEAN",
        (Value::String(_), kind) => kind == "STRING",
        _ => false,
    };
    (!is_right).then(|| format!("{value} for {input}"))
}

#[test]
fn every_node_has_its_inputs_of_the_right_types_and_within_limits() {
    let info = object_info();
    let mut num_refused = 0;
    for workflow in all_workflows() {
        let prompt = workflow.prompt();
        let mut problems = Vec::new();
        for node in prompt.as_object().unwrap().values() {
            let class = node["class_type"].as_str().unwrap();
            let described = info[class]["inputs"].as_object().unwrap();
            let given = node["inputs"].as_object().unwrap();
            let names = |map: &Map<String, Value>| {
                let mut names: Vec<String> = map.keys().cloned().collect();
                names.sort();
                names
            };
            assert_eq!(names(given), names(described), "{class}");
            for (name, value) in given {
                let found = problem(value, &described[name], &prompt, &info);
                problems.extend(found.map(|text| format!("{class}.{name}: {text}")));
            }
        }
        let refusals = workflow.differences().iter();
        let is_named = refusals.clone().any(|text| text.contains("refuses"));
        assert_eq!(is_named, !problems.is_empty(), "{problems:?} {refusals:?}");
        num_refused += usize::from(is_named);
    }
    assert!(num_refused > 0);
}

/// The page has no names of widgets: their order is that of ComfyUI's inputs, and a seed has one
/// more behind it.
#[test]
fn widgets_of_the_page_are_in_the_order_of_the_nodes_inputs() {
    let info = object_info();
    for workflow in all_workflows() {
        let (prompt, page) = (workflow.prompt(), workflow.workflow());
        for node in page["nodes"].as_array().unwrap() {
            let class = node["type"].as_str().unwrap();
            let given = &prompt[node["id"].to_string()]["inputs"];
            let mut expected = Vec::new();
            for name in info[class]["order"].as_array().unwrap() {
                let input = &info[class]["inputs"][name.as_str().unwrap()];
                let is_widget = matches!(
                    input["type"].as_str(),
                    None | Some("INT" | "FLOAT" | "STRING" | "BOOLEAN")
                );
                let value = &given[name.as_str().unwrap()];
                if is_widget && value.is_array() {
                    expected.push(json!(""));
                } else if is_widget {
                    expected.push(value.clone());
                }
                if input["control_after_generate"] == true {
                    expected.push(json!("fixed"));
                }
            }
            assert_eq!(node["widgets_values"], json!(expected), "{class}");
        }
    }
}

/// The page connects by slots: each output of ours is the node's own of that name.
#[test]
fn outputs_of_the_page_are_those_of_the_nodes() {
    let info = object_info();
    for workflow in all_workflows() {
        for node in workflow.workflow()["nodes"].as_array().unwrap() {
            let class = node["type"].as_str().unwrap();
            let outputs = node["outputs"].as_array().unwrap();
            let kinds: Vec<&Value> = outputs.iter().map(|output| &output["type"]).collect();
            assert_eq!(json!(kinds), info[class]["output"], "{class}");
        }
    }
}
