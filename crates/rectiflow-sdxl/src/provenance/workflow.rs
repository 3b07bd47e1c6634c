//! ComfyUI workflows that reproduce a sample: stored in the picture and next to an export.
//!
//! ```text
//! CheckpointLoaderSimple -> ModelSamplingSD3 (flow) or ModelSamplingDiscrete (eps, v)
//!     -> RescaleCFG, PerturbedAttentionGuidance
//!     -> KSampler <- CLIPTextEncode x 2 (CLIPTextEncodeSDXL with sizes), EmptyLatentImage
//! KSampler -> VAEDecode -> SaveImage
//! ```
//!
//! Uses only nodes that come with ComfyUI. The graph always states the parameterization, since the
//! file may say another one than the user.
//!
//! Our prompts are literal, ComfyUI's are not: its server reads parentheses as weights and
//! "embedding:" behind a space as a file, its page reads braces as choices, `//` and `/*` as
//! comments and a backslash as an escape. Parentheses get a backslash and "embedding:" a tab, which
//! CLIP reads as a space. A text that the page would change is in a PrimitiveStringMultiline node,
//! which the page leaves alone. What a workflow cannot express is in [`Workflow::differences`],
//! what must be there first in [`Workflow::needs`].

use serde_json::{Value, json};

use crate::{
    flow::Parameterization,
    provenance::{
        differences::differences,
        drawing::Drawing,
        graph::{Graph, Input, Node, Output},
    },
    sample::{SampleSettings, SizeConditioning},
};

/// A graph of ComfyUI nodes.
#[derive(Debug)]
pub struct Workflow {
    graph: Graph,
    differences: Vec<String>,
    needs: Option<String>,
}

const LOADER_OUTPUTS: &[(&str, &str)] = &[("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")];
const MODEL_OUTPUT: &[(&str, &str)] = &[("MODEL", "MODEL")];
const TEXT_OUTPUT: &[(&str, &str)] = &[("STRING", "STRING")];
const CONDITIONING_OUTPUT: &[(&str, &str)] = &[("CONDITIONING", "CONDITIONING")];
const LATENT_OUTPUT: &[(&str, &str)] = &[("LATENT", "LATENT")];
const IMAGE_OUTPUT: &[(&str, &str)] = &[("IMAGE", "IMAGE")];

impl Workflow {
    /// Makes the graph that reproduces `drawing`.
    pub fn new(drawing: &Drawing<'_>) -> Self {
        let mut graph = Graph::default();
        // The model, the texts and the empty latents.
        let loader = graph.add(Node {
            class: "CheckpointLoaderSimple",
            inputs: vec![value("ckpt_name", drawing.file_name())],
            outputs: LOADER_OUTPUTS,
            place: [0, 1],
        });
        let model = add_model_nodes(&mut graph, drawing, loader);
        let clip = loader.at(1, "CLIP");
        let size = drawing.settings.size;
        let positive = add_text(&mut graph, drawing.prompt.text, size, clip, 2);
        let negative = add_text(&mut graph, drawing.negative.text, size, clip, 3);
        let latent = graph.add(Node {
            class: "EmptyLatentImage",
            inputs: size_inputs(drawing.settings),
            outputs: LATENT_OUTPUT,
            place: [1, 1],
        });
        // What samples and decodes them.
        let mut inputs = vec![
            link("model", model),
            link("positive", positive),
            link("negative", negative),
            link("latent_image", latent),
        ];
        inputs.extend(sampler_inputs(drawing.settings));
        let samples = graph.add(Node {
            class: "KSampler",
            inputs,
            outputs: LATENT_OUTPUT,
            place: [4, 1],
        });
        add_picture(&mut graph, samples, loader.at(2, "VAE"));
        Self {
            graph,
            differences: differences(drawing),
            needs: needs(drawing),
        }
    }

    /// Returns what the graph cannot reproduce of the drawing, one sentence each.
    pub fn differences(&self) -> &[String] {
        &self.differences
    }

    /// Returns what ComfyUI needs before it can run the graph, if the model is no single file.
    pub fn needs(&self) -> Option<&str> {
        self.needs.as_deref()
    }

    /// Returns the graph for the server.
    pub fn prompt(&self) -> Value {
        self.graph.prompt()
    }

    /// Returns the graph for the page. Its `extra.rectiflow` lists the differences and the needs.
    pub fn workflow(&self) -> Value {
        let mut about = json!({ "differences": self.differences });
        if let Some(needs) = &self.needs {
            about["needs"] = needs.as_str().into();
        }
        self.graph.page(&json!({ "rectiflow": about }))
    }
}

/// Returns the sentence about a model that is a folder, which ComfyUI's loader cannot open.
fn needs(drawing: &Drawing<'_>) -> Option<String> {
    if drawing.file.is_some() {
        return None;
    }
    let file = drawing.file_name();
    Some(format!(
        "the model was a folder, and the graph loads {file:?} from ComfyUI's folder of \
         checkpoints: write that file with `rectiflow export --format single-file --dtype fp32`"
    ))
}

/// Adds the nodes that set the model's parameterization and its guidance; returns the patched
/// model.
fn add_model_nodes(graph: &mut Graph, drawing: &Drawing<'_>, loader: Output) -> Output {
    let mut model = loader;
    for (column, patch) in (1..).zip(patches(drawing)) {
        let mut inputs = vec![link("model", model)];
        inputs.extend(patch.inputs);
        model = graph.add(Node {
            class: patch.class,
            inputs,
            outputs: MODEL_OUTPUT,
            place: [column, 0],
        });
    }
    model
}

/// Adds the nodes that decode the latents and save the picture.
fn add_picture(graph: &mut Graph, samples: Output, vae: Output) {
    let images = graph.add(Node {
        class: "VAEDecode",
        inputs: vec![link("samples", samples), link("vae", vae)],
        outputs: IMAGE_OUTPUT,
        place: [5, 1],
    });
    let prefix = value("filename_prefix", "rectiflow");
    graph.add(Node {
        class: "SaveImage",
        inputs: vec![link("images", images), prefix],
        outputs: &[],
        place: [6, 1],
    });
}

/// Adds the nodes of a text; returns its conditioning.
fn add_text(
    graph: &mut Graph,
    text: &str,
    size: Option<SizeConditioning>,
    clip: Output,
    row: i32,
) -> Output {
    let source = text_source(graph, text, row);
    let Some(size) = size else {
        return graph.add(Node {
            class: "CLIPTextEncode",
            inputs: vec![link("clip", clip), ("text", source)],
            outputs: CONDITIONING_OUTPUT,
            place: [1, row],
        });
    };
    let inputs = vec![
        link("clip", clip),
        value("width", size.original_width_px),
        value("height", size.original_height_px),
        value("crop_w", size.crop_left_px),
        value("crop_h", size.crop_top_px),
        value("target_width", size.target_width_px),
        value("target_height", size.target_height_px),
        ("text_g", source.clone()),
        ("text_l", source),
    ];
    graph.add(Node {
        class: "CLIPTextEncodeSDXL",
        inputs,
        outputs: CONDITIONING_OUTPUT,
        place: [1, row],
    })
}

/// Returns a text as an input: its own value, or a link to a node that the page leaves alone.
fn text_source(graph: &mut Graph, text: &str, row: i32) -> Input {
    let literal = literal(text);
    if !is_changed_by_the_page(text) {
        return Input::Value(literal.into());
    }
    Input::LinkedWidget(graph.add(Node {
        class: "PrimitiveStringMultiline",
        inputs: vec![value("value", literal)],
        outputs: TEXT_OUTPUT,
        place: [0, row],
    }))
}

/// Returns the text that ComfyUI's server reads as `text`: parentheses escaped, and a tab before
/// "embedding:", which CLIP reads as a space.
fn literal(text: &str) -> String {
    let mut literal = text.replace('(', "\\(").replace(')', "\\)");
    for space in [" ", "\n"] {
        literal = literal.replace(
            &format!("{space}{EMBEDDING}"),
            &format!("{space}\t{EMBEDDING}"),
        );
    }
    if literal.starts_with(EMBEDDING) {
        literal.insert(0, '\t');
    }
    literal
}

/// Names a file for ComfyUI at the start of a text, or behind a space or a line break.
const EMBEDDING: &str = "embedding:";

/// Whether the page's choices, comments and escapes apply to a text.
fn is_changed_by_the_page(text: &str) -> bool {
    ["{", "}", "\\", "//", "/*"]
        .iter()
        .any(|special| text.contains(special))
}

/// A node that changes how the model samples.
struct Patch {
    class: &'static str,
    /// Its widgets.
    inputs: Vec<(&'static str, Input)>,
}

/// Returns the nodes between the loader and the sampler: parameterization, then guidance.
fn patches(drawing: &Drawing<'_>) -> Vec<Patch> {
    let mut patches = vec![parameterization_patch(drawing)];
    let guidance = drawing.settings.guidance();
    if guidance.is_guided() && guidance.cfg_rescale > 0.0 {
        patches.push(Patch {
            class: "RescaleCFG",
            inputs: vec![value("multiplier", guidance.cfg_rescale)],
        });
    }
    if guidance.is_perturbed() {
        patches.push(Patch {
            class: "PerturbedAttentionGuidance",
            inputs: vec![value("scale", guidance.pag_scale)],
        });
    }
    patches
}

/// Returns the node that sets the parameterization, whatever the file says.
fn parameterization_patch(drawing: &Drawing<'_>) -> Patch {
    let discrete = |sampling: &str, zsnr: bool| Patch {
        class: "ModelSamplingDiscrete",
        inputs: vec![value("sampling", sampling), value("zsnr", zsnr)],
    };
    match drawing.parameterization {
        Parameterization::Flow => Patch {
            class: "ModelSamplingSD3",
            inputs: vec![value("shift", drawing.settings.shift)],
        },
        Parameterization::V => discrete("v_prediction", false),
        Parameterization::VZtsnr => discrete("v_prediction", true),
        Parameterization::Eps => discrete("eps", false),
    }
}

/// Returns the widgets of `EmptyLatentImage`.
fn size_inputs(settings: &SampleSettings) -> Vec<(&'static str, Input)> {
    vec![
        value("width", settings.width_px),
        value("height", settings.height_px),
        value("batch_size", settings.batch),
    ]
}

/// Returns the widgets of `KSampler`.
fn sampler_inputs(settings: &SampleSettings) -> Vec<(&'static str, Input)> {
    vec![
        value("seed", settings.seed),
        ("control_after_generate", Input::PageOnly("fixed".into())),
        value("steps", settings.steps),
        value("cfg", settings.cfg),
        value("sampler_name", settings.sampler.to_string()),
        value("scheduler", settings.schedule.to_string()),
        value("denoise", 1.0),
    ]
}

fn value(name: &'static str, value: impl Into<Value>) -> (&'static str, Input) {
    (name, Input::Value(value.into()))
}

fn link(name: &'static str, from: Output) -> (&'static str, Input) {
    (name, Input::Link(from))
}

/// Returns JSON in ASCII, as Python writes it; older readers of PNG texts support nothing else.
pub fn ascii_json(value: &Value) -> String {
    let mut ascii = String::new();
    for letter in value.to_string().chars() {
        if letter.is_ascii() {
            ascii.push(letter);
        } else {
            for unit in letter.encode_utf16(&mut [0; 2]) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    ascii
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tch::Kind;

    use super::*;
    use crate::{
        provenance::drawing::DrawnText,
        sample::{sampler::Sampler, schedule::Schedule},
    };

    fn settings() -> SampleSettings {
        SampleSettings {
            steps: 20,
            cfg: 3.5,
            seed: 7,
            width_px: 832,
            height_px: 1216,
            batch: 2,
            ..Default::default()
        }
    }

    fn workflow(settings: &SampleSettings, parameterization: Parameterization) -> Workflow {
        let drawing = Drawing {
            settings,
            parameterization,
            prompt: DrawnText::whole("a fox (red) {x}"),
            negative: DrawnText::whole("blurry"),
            model: "fox",
            file: Some("fox.safetensors"),
            computed_in: Kind::Float,
        };
        Workflow::new(&drawing)
    }

    /// Returns the workflow of a prompt.
    fn of_prompt(prompt: &str) -> Workflow {
        let settings = SampleSettings::default();
        Workflow::new(&Drawing {
            settings: &settings,
            parameterization: Parameterization::Flow,
            prompt: DrawnText::whole(prompt),
            negative: DrawnText::default(),
            model: "fox",
            file: Some("fox.safetensors"),
            computed_in: Kind::Float,
        })
    }

    fn everything() -> SampleSettings {
        let size = SizeConditioning {
            original_width_px: 1000,
            original_height_px: 1500,
            crop_left_px: 3,
            crop_top_px: 5,
            target_width_px: 832,
            target_height_px: 1216,
        };
        SampleSettings {
            cfg_rescale: 0.7,
            pag_scale: 3.0,
            size: Some(size),
            ..settings()
        }
    }

    /// Returns the only node of a class.
    fn node<'a>(prompt: &'a Value, class: &str) -> &'a Value {
        let mut found = prompt
            .as_object()
            .unwrap()
            .values()
            .filter(|node| node["class_type"] == class);
        let node = found.next().unwrap_or_else(|| panic!("no {class}"));
        assert!(found.next().is_none(), "one {class}");
        node
    }

    /// Returns the class of the node that an input comes from.
    fn source<'a>(prompt: &'a Value, node: &Value, input: &str) -> &'a str {
        prompt[node["inputs"][input][0].as_str().unwrap()]["class_type"]
            .as_str()
            .unwrap()
    }

    #[test]
    fn the_sampler_gets_the_settings_and_the_shifted_model() {
        let prompt = workflow(&settings(), Parameterization::Flow).prompt();
        let sampler = node(&prompt, "KSampler");
        for (name, expected) in [
            ("seed", json!(7)),
            ("steps", json!(20)),
            ("cfg", json!(3.5)),
            ("sampler_name", json!("euler")),
            ("scheduler", json!("simple")),
            ("denoise", json!(1.0)),
        ] {
            assert_eq!(sampler["inputs"][name], expected, "{name}");
        }
        assert!(
            sampler["inputs"].get("control_after_generate").is_none(),
            "the server knows no such input"
        );
        assert_eq!(source(&prompt, sampler, "model"), "ModelSamplingSD3");
        assert_eq!(node(&prompt, "ModelSamplingSD3")["inputs"]["shift"], 6.0);
        assert_eq!(
            node(&prompt, "EmptyLatentImage")["inputs"],
            json!({"width": 832, "height": 1216, "batch_size": 2})
        );
        assert_eq!(source(&prompt, sampler, "positive"), "CLIPTextEncode");
        assert_eq!(
            node(&prompt, "PrimitiveStringMultiline")["inputs"]["value"],
            "a fox \\(red\\) {x}"
        );
        let negative = &prompt[sampler["inputs"]["negative"][0].as_str().unwrap()];
        assert_eq!(negative["inputs"]["text"], "blurry");
        assert_eq!(
            node(&prompt, "VAEDecode")["inputs"]["vae"],
            json!(["1", 2]),
            "the loader's third output"
        );
    }

    #[test]
    fn models_that_are_not_flow_are_not_shifted() {
        for (parameterization, sampling, zsnr) in [
            (Parameterization::Eps, "eps", false),
            (Parameterization::V, "v_prediction", false),
            (Parameterization::VZtsnr, "v_prediction", true),
        ] {
            let prompt = workflow(&settings(), parameterization).prompt();
            let inputs = &node(&prompt, "ModelSamplingDiscrete")["inputs"];
            assert_eq!(inputs["sampling"], sampling);
            assert_eq!(inputs["zsnr"], zsnr);
            assert_eq!(
                source(&prompt, node(&prompt, "KSampler"), "model"),
                "ModelSamplingDiscrete"
            );
        }
    }

    /// Texts as ComfyUI's server reads them literally: what it weighs is escaped, and what names a
    /// file is not at its place.
    #[test]
    fn what_the_server_would_interpret_is_made_literal() {
        for (text, expected) in [
            ("a (red:1.2) fox", "a \\(red:1.2\\) fox"),
            ("\\(x\\)", "\\\\(x\\\\)"),
            ("embedding:x", "\tembedding:x"),
            ("a embedding:x", "a \tembedding:x"),
            (
                "a\nembedding:x, embedding:y",
                "a\n\tembedding:x, \tembedding:y",
            ),
            ("an-embedding:x", "an-embedding:x"),
            ("", ""),
        ] {
            let prompt = literal(text);
            assert_eq!(prompt, expected, "{text:?}");
        }
    }

    /// The page reads choices, comments and escapes out of the texts of `CLIPTextEncode`, not out
    /// of those of `PrimitiveStringMultiline`.
    #[test]
    fn what_the_page_would_interpret_is_in_a_node_that_it_leaves_alone() {
        for (text, is_apart) in [
            ("a fox", false),
            ("a (red) fox, 50/50 a|b", false),
            ("{a|b}", true),
            ("}", true),
            ("see https://x", true),
            ("/* a", true),
            ("a\\", true),
            ("\\{", true),
        ] {
            let workflow = of_prompt(text);
            let (prompt, page) = (workflow.prompt(), workflow.workflow());
            let positive = node(&prompt, "KSampler")["inputs"]["positive"][0]
                .as_str()
                .unwrap();
            let input = &prompt[positive]["inputs"]["text"];
            assert_eq!(input.is_array(), is_apart, "{text}: {input}");
            let slots = page["nodes"].as_array().unwrap().iter();
            let widgets = slots.flat_map(|node| node["inputs"].as_array().unwrap());
            let num_linked = widgets
                .filter(|slot| slot["widget"]["name"] == "text")
                .count();
            assert_eq!(num_linked, usize::from(is_apart), "{text}");
        }
    }

    /// A model that is a folder was never exported: the workflow says so and names the file.
    #[test]
    fn a_folder_has_to_be_exported_first() {
        let settings = settings();
        let drawing = |file| Drawing {
            settings: &settings,
            parameterization: Parameterization::Flow,
            prompt: DrawnText::default(),
            negative: DrawnText::default(),
            model: "step-8\nb",
            file,
            computed_in: Kind::Float,
        };
        let folder = Workflow::new(&drawing(None));
        let loader = &folder.prompt()["1"]["inputs"]["ckpt_name"];
        assert_eq!(loader, "step-8\nb.safetensors");
        let needs = folder.workflow()["extra"]["rectiflow"]["needs"].to_string();
        assert!(
            needs.contains("export") && needs.contains("step-8"),
            "{needs}"
        );
        let file = Workflow::new(&drawing(Some("fox.sft")));
        assert_eq!(file.prompt()["1"]["inputs"]["ckpt_name"], "fox.sft");
        assert_eq!((file.needs(), folder.needs().is_some()), (None, true));
    }

    #[test]
    fn guidance_and_sizes_become_nodes() {
        let prompt = workflow(&everything(), Parameterization::Flow).prompt();
        let sampler = node(&prompt, "KSampler");
        assert_eq!(
            source(&prompt, sampler, "model"),
            "PerturbedAttentionGuidance"
        );
        assert_eq!(
            source(
                &prompt,
                node(&prompt, "PerturbedAttentionGuidance"),
                "model"
            ),
            "RescaleCFG"
        );
        assert_eq!(
            source(&prompt, node(&prompt, "RescaleCFG"), "model"),
            "ModelSamplingSD3"
        );
        let positive = &prompt[sampler["inputs"]["positive"][0].as_str().unwrap()];
        assert_eq!(positive["class_type"], "CLIPTextEncodeSDXL");
        assert_eq!(positive["inputs"]["height"], 1500);
        assert_eq!(
            (&positive["inputs"]["crop_w"], &positive["inputs"]["crop_h"]),
            (&json!(3), &json!(5))
        );
        let plain = SampleSettings {
            cfg: 1.0,
            ..everything()
        };
        let text = workflow(&plain, Parameterization::Flow)
            .prompt()
            .to_string();
        assert!(
            !text.contains("RescaleCFG"),
            "without CFG there is nothing to rescale"
        );
    }

    /// Every link of the page connects two slots of one type, and the page's graph equals the
    /// server's.
    #[test]
    fn links_are_consistent_and_both_forms_agree() {
        for parameterization in [
            Parameterization::Flow,
            Parameterization::Eps,
            Parameterization::V,
        ] {
            for settings in [settings(), everything()] {
                let graph = workflow(&settings, parameterization);
                let (prompt, page) = (graph.prompt(), graph.workflow());
                let nodes: BTreeMap<u64, &Value> = page["nodes"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|node| (node["id"].as_u64().unwrap(), node))
                    .collect();
                assert_eq!(nodes.len(), prompt.as_object().unwrap().len());
                let links = page["links"].as_array().unwrap();
                assert_eq!(page["last_link_id"], links.len());
                for link in links {
                    let [id, from, slot, to, to_slot] =
                        [0, 1, 2, 3, 4].map(|i| link[i].as_u64().unwrap());
                    let output = &nodes[&from]["outputs"][slot as usize];
                    let input = &nodes[&to]["inputs"][to_slot as usize];
                    assert!(
                        output["links"].as_array().unwrap().contains(&json!(id)),
                        "{link}: {output}"
                    );
                    assert_eq!(
                        (&input["link"], &input["type"], &output["type"]),
                        (&json!(id), &link[5], &link[5])
                    );
                    let name = input["name"].as_str().unwrap();
                    assert_eq!(
                        prompt[to.to_string()]["inputs"][name],
                        json!([from.to_string(), slot]),
                        "{name}"
                    );
                    assert!(from < to, "a node comes after what it needs");
                }
                let linked: usize = nodes
                    .values()
                    .map(|node| node["inputs"].as_array().unwrap().len())
                    .sum();
                assert_eq!(linked, links.len(), "no input without a link");
            }
        }
    }

    #[test]
    fn widgets_are_in_the_order_of_comfyuis_nodes() {
        let settings = SampleSettings {
            sampler: Sampler::UniPc,
            schedule: Schedule::Beta,
            ..everything()
        };
        let page = workflow(&settings, Parameterization::Flow).workflow();
        let widgets = |class: &str| {
            let nodes = page["nodes"].as_array().unwrap();
            nodes.iter().find(|node| node["type"] == class).unwrap()["widgets_values"].clone()
        };
        assert_eq!(
            widgets("KSampler"),
            json!([7, "fixed", 20, 3.5, "uni_pc", "beta", 1.0])
        );
        // The prompt's widgets are empty: their text comes from a node of its own.
        assert_eq!(
            widgets("CLIPTextEncodeSDXL"),
            json!([1000, 1500, 3, 5, 832, 1216, "", ""])
        );
        assert_eq!(
            widgets("PrimitiveStringMultiline"),
            json!(["a fox \\(red\\) {x}"])
        );
        assert_eq!(
            widgets("CheckpointLoaderSimple"),
            json!(["fox.safetensors"])
        );
    }

    #[test]
    fn json_is_ascii_and_the_same() {
        let value = json!({ "text": "forêt 猫 🐈 \"x\"\n" });
        let ascii = ascii_json(&value);
        assert!(
            ascii.is_ascii() && ascii.contains("\\ud83d\\udc08"),
            "{ascii}"
        );
        assert_eq!(serde_json::from_str::<Value>(&ascii).unwrap(), value);
    }
}
