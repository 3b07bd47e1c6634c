//! A graph of ComfyUI nodes in its two forms.
//!
//! The server runs `prompt`: nodes with their inputs, by name. The page opens `workflow` when a
//! picture is dropped on it: the same nodes with positions, slots and numbered links. Both are
//! written from one list of nodes, so they cannot disagree. Which nodes there are is decided in
//! [`crate::provenance::workflow`].

use serde_json::{Map, Value, json};

/// Nodes, each after those that it needs.
#[derive(Debug, Default)]
pub(super) struct Graph {
    nodes: Vec<Node>,
}

/// A node. Its number is its position in the list, from 1.
#[derive(Debug)]
pub(super) struct Node {
    pub class: &'static str,
    pub inputs: Vec<(&'static str, Input)>,
    /// Names and types of the outputs, by slot.
    pub outputs: &'static [(&'static str, &'static str)],
    /// Column and row on the page.
    pub place: [i32; 2],
}

/// What a node's input is given.
#[derive(Debug, Clone)]
pub(super) enum Input {
    /// An output of another node.
    Link(Output),
    /// An output of another node in place of a widget, which stays on the page.
    LinkedWidget(Output),
    /// The value of a widget.
    Value(Value),
    /// The value of a widget that the page alone has.
    PageOnly(Value),
}

/// An output slot of a node, and its type.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    node: usize,
    slot: usize,
    kind: &'static str,
}

impl Graph {
    /// Adds a node; returns its first output.
    pub(super) fn add(&mut self, node: Node) -> Output {
        let kind = node.outputs.first().map_or("", |(_, kind)| kind);
        self.nodes.push(node);
        Output {
            node: self.nodes.len(),
            slot: 0,
            kind,
        }
    }

    /// Returns the graph for the server: `{"1": {"class_type": ..., "inputs": {...}}, ...}`.
    pub(super) fn prompt(&self) -> Value {
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
    pub(super) fn page(&self, extra: &Value) -> Value {
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
            "extra": extra,
            "version": 0.4,
        })
    }

    fn links(&self) -> Vec<Link> {
        let mut links = Vec::new();
        for (node, to) in self.nodes.iter().zip(1..) {
            let mut to_slot = 0;
            for (name, input) in &node.inputs {
                if let Input::Link(from) | Input::LinkedWidget(from) = input {
                    links.push(Link {
                        from: *from,
                        to,
                        to_slot,
                        input: name,
                        is_widget: matches!(input, Input::LinkedWidget(_)),
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
            let mut slot = json!({ "name": link.input, "type": link.from.kind, "link": id });
            if link.is_widget {
                slot["widget"] = json!({ "name": link.input });
            }
            slots.push(slot);
        }
    }
    slots
}

/// A link between two nodes of the page.
struct Link {
    from: Output,
    to: usize,
    to_slot: usize,
    /// The name of the input where it ends.
    input: &'static str,
    /// Whether that input is a widget too.
    is_widget: bool,
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
    pub(super) fn at(self, slot: usize, kind: &'static str) -> Self {
        Self { slot, kind, ..self }
    }
}

impl Input {
    /// Returns its value for the server; `None` for inputs of the page only.
    fn on_server(&self) -> Option<Value> {
        match self {
            Self::Link(from) | Self::LinkedWidget(from) => {
                Some(json!([from.node.to_string(), from.slot]))
            }
            Self::Value(value) => Some(value.clone()),
            Self::PageOnly(_) => None,
        }
    }

    /// Returns the value of its widget; `None` for inputs that are none.
    fn on_page(&self) -> Option<Value> {
        match self {
            Self::Link(_) => None,
            Self::LinkedWidget(_) => Some("".into()),
            Self::Value(value) | Self::PageOnly(value) => Some(value.clone()),
        }
    }
}
