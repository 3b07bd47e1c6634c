//! As much of Markdown as the documents use: prose, links, headings, inline code, blocks of code.

/// A document, its code apart from its prose.
#[derive(Debug, Default)]
pub(crate) struct Document {
    /// Without code.
    pub(crate) prose: String,
    /// Inline code.
    pub(crate) spans: Vec<String>,
    /// Blocks of code, fenced or indented.
    pub(crate) blocks: Vec<String>,
}

impl Document {
    pub(crate) fn parse(text: &str) -> Self {
        let mut document = Self::default();
        let mut paragraphs = String::new();
        let (mut is_fenced, mut was_block, mut is_list) = (false, false, false);
        for line in text.lines() {
            let is_fence = line.trim_start().starts_with("```");
            let is_indented = line.starts_with("    ") && !is_list;
            let is_after_gap = paragraphs.is_empty() || paragraphs.ends_with("\n\n");
            if is_fence {
                is_fenced = !is_fenced;
                was_block = false;
                if is_fenced {
                    document.blocks.push(String::new());
                }
            } else if is_fenced {
                document.add_to_block(line);
            } else if is_indented && (was_block || is_after_gap) {
                if !was_block {
                    document.blocks.push(String::new());
                }
                was_block = true;
                document.add_to_block(&line[4..]);
            } else {
                was_block = false;
                if line.starts_with(|first: char| !first.is_whitespace()) {
                    is_list = is_list_item(line);
                }
                paragraphs.push_str(line);
                paragraphs.push('\n');
            }
        }
        document.take_spans(&paragraphs);
        document
    }

    fn add_to_block(&mut self, line: &str) {
        let block = self.blocks.last_mut().expect("the caller opened a block");
        block.push_str(line);
        block.push('\n');
    }

    /// Parts paragraphs into prose and inline code, which ends with its paragraph at the latest.
    fn take_spans(&mut self, paragraphs: &str) {
        for paragraph in paragraphs.split("\n\n") {
            let mut rest = paragraph;
            while let Some(start) = rest.find('`') {
                self.prose.push_str(&rest[..start]);
                let behind = rest[start..].trim_start_matches('`');
                let fence = &rest[start..rest.len() - behind.len()];
                let Some(end) = behind.find(fence) else { break };
                self.spans
                    .push(behind[..end].replace("\\|", "|").replace('\n', " "));
                // The name of a heading; no link can start inside it.
                self.prose
                    .extend(behind[..end].chars().filter(|sign| !"[]()".contains(*sign)));
                rest = &behind[end + fence.len()..];
            }
            self.prose.push_str(rest);
            self.prose.push_str("\n\n");
        }
    }

    /// All code by lines; a line that ends with a backslash is one with the next.
    pub(crate) fn code_lines(&self) -> Vec<String> {
        let mut lines = self.spans.clone();
        for block in &self.blocks {
            lines.extend(block.replace("\\\n", " ").lines().map(str::to_owned));
        }
        lines
    }
}

fn is_list_item(line: &str) -> bool {
    let rest = line.trim_start_matches(|sign: char| sign.is_ascii_digit());
    line.starts_with("- ") || line.starts_with("* ") || (rest != line && rest.starts_with(". "))
}

/// Targets of links and pictures.
pub(crate) fn links(prose: &str) -> Vec<String> {
    let mut found = Vec::new();
    let opens = ["](", "src=\"", "href=\""];
    let closes = [")", "\"", "\""];
    for (open, close) in opens.iter().zip(closes) {
        for rest in prose.split(open).skip(1) {
            let target = rest.split(close).next().unwrap_or_default();
            // A title may follow the target.
            found.extend(target.split_whitespace().next().map(str::to_owned));
        }
    }
    found
}

/// The anchors of a document's headings, as GitHub makes them.
pub(crate) fn headings(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut is_fenced = false;
    for line in text.lines() {
        if line.starts_with("```") {
            is_fenced = !is_fenced;
        }
        let title = line.trim_start_matches('#');
        if is_fenced || title == line || !title.starts_with(' ') {
            continue;
        }
        let anchor = anchor(title.trim());
        let repeated = found
            .iter()
            .filter(|other| other.starts_with(&anchor))
            .count();
        let is_first = !found.contains(&anchor);
        found.push(if is_first {
            anchor
        } else {
            format!("{anchor}-{repeated}")
        });
    }
    found
}

fn anchor(title: &str) -> String {
    let is_kept = |sign: &char| sign.is_alphanumeric() || "_- ".contains(*sign);
    title
        .chars()
        .filter(is_kept)
        .collect::<String>()
        .to_lowercase()
        .replace(' ', "-")
}

#[test]
fn code_and_prose_are_told_apart() {
    let text = "# A `b` c\n\n- one `two\n  three`\n\n      four\n\nfive\n\n    six\n\n```\nseven \\\n  eight\n```\n";
    let document = Document::parse(text);
    assert_eq!(document.spans, ["b", "two   three"]);
    assert_eq!(document.blocks, ["six\n", "seven \\\n  eight\n"]);
    assert_eq!(document.code_lines()[2..], ["six", "seven    eight"]);
    assert!(document.prose.contains("four") && !document.prose.contains("six"));
}

#[test]
fn anchors_are_githubs() {
    assert_eq!(
        headings("# What it *does*: `a b`, and\n## Now\n## Now\n#no"),
        ["what-it-does-a-b-and", "now", "now-1"]
    );
}
