//! Templates of prompts for captioning models: text with fields, and parts that are left out where
//! a field is empty. Pure.
//!
//! `Describe this picture.[ It has the tags {tags}.]`: a field stands in braces; a part in brackets
//! is left out if one of its fields is empty. Doubled signs, `{{` and `[[`, are the signs
//! themselves. Parts do not nest.

/// The names of fields.
pub const FIELDS: [&str; 3] = ["tags", "caption", "quality"];

/// The texts of a picture's fields, in the order of [`FIELDS`].
pub type Values<'a> = [&'a str; FIELDS.len()];

/// A template, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Part>);

/// Text that is there whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Part {
    pieces: Vec<Piece>,
    is_optional: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    /// Index in [`FIELDS`].
    Field(usize),
}

impl Part {
    fn push(&mut self, sign: char) {
        if let Some(Piece::Text(text)) = self.pieces.last_mut() {
            text.push(sign);
        } else {
            self.pieces.push(Piece::Text(sign.into()));
        }
    }
}

impl Template {
    /// Parses a template.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = vec![Part::default()];
        let mut signs = text.chars().peekable();
        while let Some(sign) = signs.next() {
            let last = parts.len() - 1;
            let part = &mut parts[last];
            match sign {
                '{' | '}' | '[' | ']' if signs.peek() == Some(&sign) => {
                    signs.next();
                    part.push(sign);
                }
                '{' => {
                    let name: String = signs.by_ref().take_while(|&sign| sign != '}').collect();
                    part.pieces.push(Piece::Field(field(&name)?));
                }
                '[' if part.is_optional => return Err("parts in [ ] do not nest".to_owned()),
                '[' => parts.push(Part {
                    is_optional: true,
                    ..Part::default()
                }),
                ']' if part.is_optional => parts.push(Part::default()),
                '}' | ']' => {
                    return Err(format!("{sign} without its beginning: write {sign}{sign}"));
                }
                _ => part.push(sign),
            }
        }
        match parts.last() {
            Some(part) if part.is_optional => Err("a part begins with [ and has no ]".to_owned()),
            _ => Ok(Self(parts)),
        }
    }

    /// The text with these values in its fields.
    pub fn fill(&self, values: &Values<'_>) -> String {
        let mut text = String::new();
        for part in &self.0 {
            let is_empty =
                |piece: &Piece| matches!(piece, Piece::Field(field) if values[*field].is_empty());
            if part.is_optional && part.pieces.iter().any(is_empty) {
                continue;
            }
            for piece in &part.pieces {
                text += match piece {
                    Piece::Text(text) => text.as_str(),
                    Piece::Field(field) => values[*field],
                };
            }
        }
        text
    }

    /// Whether the template has the field `name`.
    pub fn has(&self, name: &str) -> bool {
        let mut pieces = self.0.iter().flat_map(|part| &part.pieces);
        pieces.any(|piece| matches!(piece, Piece::Field(field) if FIELDS[*field] == name))
    }
}

fn field(name: &str) -> Result<usize, String> {
    let found = FIELDS.iter().position(|field| *field == name);
    found.ok_or_else(|| {
        let fields = FIELDS.map(|field| format!("{{{field}}}")).join(", ");
        format!("unknown field {{{name}}}: expected {fields}, or {{{{ for a brace")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_filled_and_empty_parts_left_out() {
        for (template, values, filled) in [
            ("Describe it.", ["", "", ""], "Describe it."),
            ("a {tags} b {tags}", ["x", "", ""], "a x b x"),
            ("a[ with {tags}].", ["x, y", "", ""], "a with x, y."),
            ("a[ with {tags}].", ["", "", ""], "a."),
            ("a[ {tags} {caption}]", ["x", "", ""], "a"),
            ("[{quality}][ {caption}]", ["", "c", "q"], "q c"),
            ("{{tags}} [[x]]", ["x", "", ""], "{tags} [x]"),
            ("", ["", "", ""], ""),
            ("{caption}", ["", "{tags}", ""], "{tags}"),
        ] {
            let template = Template::parse(template).unwrap();
            assert_eq!(template.fill(&values), filled);
        }
        let template = Template::parse("a[ {tags}]").unwrap();
        assert!(template.has("tags") && !template.has("caption"));
    }

    #[test]
    fn mistakes_are_named() {
        for (template, reason) in [
            (
                "{tag}",
                "unknown field {tag}: expected {tags}, {caption}, {quality}",
            ),
            ("{tags", ""),
            ("a}", "} without its beginning"),
            ("a]", "] without its beginning"),
            ("a[b", "has no ]"),
            ("a[b[c]]", "do not nest"),
        ] {
            let parsed = Template::parse(template);
            match reason {
                "" => assert!(parsed.is_ok(), "the end closes a brace"),
                _ => assert!(parsed.unwrap_err().contains(reason), "{template}"),
            }
        }
    }
}
