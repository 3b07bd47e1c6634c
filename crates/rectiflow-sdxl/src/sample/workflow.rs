//! ComfyUI workflows that reproduce a sample: stored in the picture and next to an export.
//!
//! ComfyUI has two forms of a graph. The server runs `prompt`: nodes with their inputs, by name.
//! The page opens `workflow` when a picture is dropped on it: the same nodes with positions, slots
//! and numbered links. Both are generated from one list of nodes, so they cannot disagree.
//!
//! ```text
//! CheckpointLoaderSimple -> ModelSamplingSD3 (flow) or ModelSamplingDiscrete (v)
//!     -> RescaleCFG, PerturbedAttentionGuidance
//!     -> KSampler <- CLIPTextEncode x 2 (CLIPTextEncodeSDXL with sizes), EmptyLatentImage
//! KSampler -> VAEDecode -> SaveImage
//! ```
//!
//! Uses only nodes that come with ComfyUI. Prompts are escaped, since ours are literal and ComfyUI
//! interprets parentheses (its page also braces). What a workflow cannot express is in
//! [`Workflow::differences`].

use serde_json::{Map, Value, json};

use crate::{
    flow::Parameterization,
    nets::unet::UNetPart,
    sample::{SampleSettings, SizeConditioning, infotext::Drawing, sampler::Sampler},
};

/// A graph of ComfyUI nodes.
#[derive(Debug)]
pub struct Workflow {
    nodes: Vec<Node>,
    differences: Vec<String>,
}

/// A node. Its number is its position in the list, from 1.
#[derive(Debug)]
struct Node {
    class: &'static str,
    inputs: Vec<(&'static str, Input)>,
    /// Names and types of the outputs, by slot.
    outputs: &'static [(&'static str, &'static str)],
    /// Column and row on the page.
    place: [i32; 2],
}

#[derive(Debug)]
enum Input {
    Link(Output),
    Value(Value),
    /// A text, which the page and the server escape differently.
    Text(String),
    /// An input of the page only.
    PageOnly(Value),
}

/// An output slot of a node, and its type.
#[derive(Debug, Clone, Copy)]
struct Output {
    node: usize,
    slot: usize,
    kind: &'static str,
}

const LOADER_OUTPUTS: &[(&str, &str)] = &[("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")];
const MODEL_OUTPUT: &[(&str, &str)] = &[("MODEL", "MODEL")];
const CONDITIONING_OUTPUT: &[(&str, &str)] = &[("CONDITIONING", "CONDITIONING")];
const LATENT_OUTPUT: &[(&str, &str)] = &[("LATENT", "LATENT")];
const IMAGE_OUTPUT: &[(&str, &str)] = &[("IMAGE", "IMAGE")];

impl Workflow {
    /// Makes the graph that reproduces `drawing`. `checkpoint` is the single file's name in
    /// ComfyUI's folder.
    pub fn new(drawing: &Drawing<'_>, checkpoint: &str) -> Self {
        let mut graph = Self {
            nodes: Vec::new(),
            differences: differences(drawing),
        };
        // The model, the texts and the empty latents.
        let loader = graph.add(
            "CheckpointLoaderSimple",
            LOADER_OUTPUTS,
            [0, 1],
            vec![value("ckpt_name", checkpoint)],
        );
        let model = graph.add_model_nodes(drawing, loader);
        let clip = loader.at(1, "CLIP");
        let size = drawing.settings.size;
        let positive = graph.add_text(drawing.prompt, size, clip, 1);
        let negative = graph.add_text(drawing.negative, size, clip, 2);
        let latent_inputs = size_inputs(drawing.settings);
        let latent = graph.add("EmptyLatentImage", LATENT_OUTPUT, [1, 3], latent_inputs);
        // What samples and decodes them.
        let mut sampler = vec![
            link("model", model),
            link("positive", positive),
            link("negative", negative),
            link("latent_image", latent),
        ];
        sampler.extend(sampler_inputs(drawing.settings));
        let samples = graph.add("KSampler", LATENT_OUTPUT, [4, 1], sampler);
        graph.add_picture(samples, loader.at(2, "VAE"));
        graph
    }

    /// Returns what the graph cannot reproduce of the drawing, one sentence each.
    pub fn differences(&self) -> &[String] {
        &self.differences
    }

    /// Adds the nodes that set the model's parameterization and its guidance; returns the patched
    /// model.
    fn add_model_nodes(&mut self, drawing: &Drawing<'_>, loader: Output) -> Output {
        let mut model = loader;
        for (column, patch) in (1..).zip(patches(drawing)) {
            let mut inputs = vec![link("model", model)];
            inputs.extend(patch.inputs);
            model = self.add(patch.class, MODEL_OUTPUT, [column, 0], inputs);
        }
        model
    }

    /// Adds the nodes that decode the latents and save the picture.
    fn add_picture(&mut self, samples: Output, vae: Output) {
        let inputs = vec![link("samples", samples), link("vae", vae)];
        let images = self.add("VAEDecode", IMAGE_OUTPUT, [5, 1], inputs);
        let prefix = value("filename_prefix", "rectiflow");
        self.add(
            "SaveImage",
            &[],
            [6, 1],
            vec![link("images", images), prefix],
        );
    }

    fn add_text(
        &mut self,
        text: &str,
        size: Option<SizeConditioning>,
        clip: Output,
        row: i32,
    ) -> Output {
        let Some(size) = size else {
            let inputs = vec![link("clip", clip), ("text", Input::Text(text.to_owned()))];
            return self.add("CLIPTextEncode", CONDITIONING_OUTPUT, [1, row], inputs);
        };
        let inputs = vec![
            link("clip", clip),
            value("width", size.original_width_px),
            value("height", size.original_height_px),
            value("crop_w", size.crop_left_px),
            value("crop_h", size.crop_top_px),
            value("target_width", size.target_width_px),
            value("target_height", size.target_height_px),
            ("text_g", Input::Text(text.to_owned())),
            ("text_l", Input::Text(text.to_owned())),
        ];
        self.add("CLIPTextEncodeSDXL", CONDITIONING_OUTPUT, [1, row], inputs)
    }

    /// Adds a node; returns its first output.
    fn add(
        &mut self,
        class: &'static str,
        outputs: &'static [(&'static str, &'static str)],
        place: [i32; 2],
        inputs: Vec<(&'static str, Input)>,
    ) -> Output {
        self.nodes.push(Node {
            class,
            inputs,
            outputs,
            place,
        });
        Output {
            node: self.nodes.len(),
            slot: 0,
            kind: outputs.first().map_or("", |(_, kind)| kind),
        }
    }

    /// Returns the graph for the server: `{"1": {"class_type": ..., "inputs": {...}}, ...}`.
    pub fn prompt(&self) -> Value {
        let mut nodes = Map::new();
        for (index, node) in self.nodes.iter().enumerate() {
            let mut inputs = Map::new();
            for (name, input) in &node.inputs {
                if let Some(value) = input.on_server() {
                    inputs.insert((*name).to_owned(), value);
                }
            }
            let node = json!({ "class_type": node.class, "inputs": inputs });
            nodes.insert((index + 1).to_string(), node);
        }
        Value::Object(nodes)
    }

    /// Returns the graph for the page: nodes with slots and positions, and links
    /// `[number, from, its slot, to, its slot, type]`.
    pub fn workflow(&self) -> Value {
        let links = self.links();
        let nodes: Vec<Value> = (1..=self.nodes.len())
            .map(|number| self.page_node(number, &links))
            .collect();
        let mut rows = Vec::new();
        for (index, link) in links.iter().enumerate() {
            rows.push(link.row(index + 1));
        }
        json!({
            "last_node_id": nodes.len(),
            "last_link_id": rows.len(),
            "nodes": nodes,
            "links": rows,
            "groups": [],
            "config": {},
            "extra": { "rectiflow": { "differences": self.differences } },
            "version": 0.4,
        })
    }

    fn links(&self) -> Vec<Link> {
        let mut links = Vec::new();
        for (node, to) in self.nodes.iter().zip(1..) {
            let mut to_slot = 0;
            for (name, input) in &node.inputs {
                if let Input::Link(from) = input {
                    links.push(Link {
                        from: *from,
                        to,
                        to_slot,
                        input: name,
                    });
                    to_slot += 1;
                }
            }
        }
        links
    }

    fn page_node(&self, number: usize, links: &[Link]) -> Value {
        let node = &self.nodes[number - 1];
        let [column, row] = node.place;
        let outputs: Vec<Value> = (0..node.outputs.len())
            .map(|slot| self.page_output(number, slot, links))
            .collect();
        let mut widgets = Vec::new();
        for (_, input) in &node.inputs {
            widgets.extend(input.on_page());
        }
        json!({
            "id": number,
            "type": node.class,
            "pos": [40 + 350 * column, 40 + 280 * row],
            "size": [320, 60 + 30 * node.inputs.len()],
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": page_inputs(number, links),
            "outputs": outputs,
            "properties": { "Node name for S&R": node.class },
            "widgets_values": widgets,
        })
    }

    /// Returns an output slot of a node, with the numbers of the links that start there.
    fn page_output(&self, number: usize, slot: usize, links: &[Link]) -> Value {
        let (name, kind) = self.nodes[number - 1].outputs[slot];
        let mut ids = Vec::new();
        for (link, id) in links.iter().zip(1usize..) {
            if link.from.node == number && link.from.slot == slot {
                ids.push(id);
            }
        }
        json!({ "name": name, "type": kind, "links": ids, "slot_index": slot })
    }
}

/// Returns a node's input slots, each with the number of the link that ends there.
fn page_inputs(number: usize, links: &[Link]) -> Vec<Value> {
    let mut slots = Vec::new();
    for (link, id) in links.iter().zip(1usize..) {
        if link.to == number {
            slots.push(json!({ "name": link.input, "type": link.from.kind, "link": id }));
        }
    }
    slots
}

/// A node that changes how the model samples.
struct Patch {
    class: &'static str,
    /// Its widgets.
    inputs: Vec<(&'static str, Input)>,
}

/// Returns the nodes between the loader and the sampler: parameterization, then guidance.
fn patches(drawing: &Drawing<'_>) -> Vec<Patch> {
    let mut patches = Vec::new();
    patches.extend(parameterization_patch(drawing));
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

/// Returns the node that sets the parameterization; ComfyUI's default is eps.
fn parameterization_patch(drawing: &Drawing<'_>) -> Option<Patch> {
    match drawing.parameterization {
        Parameterization::Flow => Some(Patch {
            class: "ModelSamplingSD3",
            inputs: vec![value("shift", drawing.settings.shift)],
        }),
        Parameterization::V | Parameterization::VZtsnr => {
            let zsnr = drawing.parameterization == Parameterization::VZtsnr;
            Some(Patch {
                class: "ModelSamplingDiscrete",
                inputs: vec![value("sampling", "v_prediction"), value("zsnr", zsnr)],
            })
        }
        Parameterization::Eps => None,
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

/// A link between two nodes of the page.
struct Link {
    from: Output,
    to: usize,
    to_slot: usize,
    /// The name of the input where it ends.
    input: &'static str,
}

impl Link {
    /// Returns the page's form of the link with this number.
    fn row(&self, number: usize) -> Value {
        let from = self.from;
        json!([
            number,
            from.node,
            from.slot,
            self.to,
            self.to_slot,
            from.kind
        ])
    }
}

impl Output {
    /// Returns another output of the same node.
    fn at(self, slot: usize, kind: &'static str) -> Self {
        Self { slot, kind, ..self }
    }
}

impl Input {
    /// Returns its value for the server; `None` for inputs of the page only.
    fn on_server(&self) -> Option<Value> {
        match self {
            Self::Link(from) => Some(json!([from.node.to_string(), from.slot])),
            Self::Value(value) => Some(value.clone()),
            Self::Text(text) => Some(escaped(text, &['(', ')']).into()),
            Self::PageOnly(_) => None,
        }
    }

    /// Returns the value of its widget; `None` for links.
    fn on_page(&self) -> Option<Value> {
        match self {
            Self::Link(_) => None,
            Self::Value(value) | Self::PageOnly(value) => Some(value.clone()),
            Self::Text(text) => Some(escaped(text, &['(', ')', '{', '}']).into()),
        }
    }
}

fn value(name: &'static str, value: impl Into<Value>) -> (&'static str, Input) {
    (name, Input::Value(value.into()))
}

fn link(name: &'static str, from: Output) -> (&'static str, Input) {
    (name, Input::Link(from))
}

/// Puts a backslash before each of the `special` characters.
fn escaped(text: &str, special: &[char]) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        if special.contains(&letter) {
            escaped.push('\\');
        }
        escaped.push(letter);
    }
    escaped
}

fn differences(drawing: &Drawing<'_>) -> Vec<String> {
    let guidance = drawing.settings.guidance();
    let mut found = Vec::new();
    if guidance.is_perturbed() && guidance.pag_parts != [UNetPart::Mid] {
        let parts: Vec<String> = guidance.pag_parts.iter().map(ToString::to_string).collect();
        found.push(format!(
            "attention was perturbed in {}; ComfyUI's node does it in mid",
            parts.join(", ")
        ));
    }
    // Numbers on the page are JavaScript numbers.
    if drawing.settings.seed > 1 << 53 {
        found.push(
            "the page rounds seeds above 2^53: send `prompt` to the server instead".to_owned(),
        );
    }
    if drawing.settings.sampler == Sampler::EulerAncestral {
        found.push(
            "ComfyUI on a GPU draws the noise of euler_ancestral's steps from the GPU's generator"
                .to_owned(),
        );
    }
    found
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

    use super::*;
    use crate::sample::{SampleSettings, schedule::Schedule};

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
            prompt: "a fox (red) {x}",
            negative: "blurry",
            model: "fox",
        };
        Workflow::new(&drawing, "fox.safetensors")
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
        let text =
            |input: &str| &prompt[sampler["inputs"][input][0].as_str().unwrap()]["inputs"]["text"];
        assert_eq!(
            (text("positive"), text("negative")),
            (&json!("a fox \\(red\\) {x}"), &json!("blurry"))
        );
        assert_eq!(
            node(&prompt, "VAEDecode")["inputs"]["vae"],
            json!(["1", 2]),
            "the loader's third output"
        );
    }

    #[test]
    fn models_that_are_not_flow_are_not_shifted() {
        let eps = workflow(&settings(), Parameterization::Eps).prompt();
        assert_eq!(
            source(&eps, node(&eps, "KSampler"), "model"),
            "CheckpointLoaderSimple"
        );
        let v = workflow(&settings(), Parameterization::V).prompt();
        assert_eq!(
            node(&v, "ModelSamplingDiscrete")["inputs"]["sampling"],
            "v_prediction"
        );
        assert_eq!(
            source(&v, node(&v, "KSampler"), "model"),
            "ModelSamplingDiscrete"
        );
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
        let text = "a fox \\(red\\) \\{x\\}";
        assert_eq!(
            widgets("CLIPTextEncodeSDXL"),
            json!([1000, 1500, 3, 5, 832, 1216, text, text])
        );
        assert_eq!(
            widgets("CheckpointLoaderSimple"),
            json!(["fox.safetensors"])
        );
    }

    #[test]
    fn what_a_workflow_cannot_say_is_said() {
        let differences =
            |settings: &SampleSettings| workflow(settings, Parameterization::Flow).differences;
        assert!(differences(&everything()).is_empty());
        let odd = SampleSettings {
            pag_parts: vec![UNetPart::Down(2)],
            seed: u64::MAX,
            sampler: Sampler::EulerAncestral,
            ..everything()
        };
        let found = differences(&odd).join("\n");
        assert!(
            found.contains("down.2") && found.contains("2^53") && found.contains("GPU"),
            "{found}"
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
