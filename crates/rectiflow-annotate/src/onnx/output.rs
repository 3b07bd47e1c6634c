//! What a model returns: a number or logits a picture. Pure.

use ort::value::TensorElementType;

use crate::onnx::input::shape;

/// The output of a model that is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its name in the model.
    pub name: String,
}

/// What a model says about an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Declared {
    pub(crate) name: String,
    /// Element and dimensions; None if it is no tensor.
    pub(crate) tensor: Option<(TensorElementType, Vec<i64>)>,
}

impl Output {
    /// The output of this name among those of a model, or the first one.
    ///
    /// # Errors
    /// Why it is no number and no logits: what it has, what is expected.
    pub(crate) fn of(declared: &[Declared], named: Option<&str>) -> Result<Self, String> {
        let found = match named {
            None => declared.first(),
            Some(name) => declared.iter().find(|output| output.name == name),
        };
        let Some(found) = found else {
            let names: Vec<&str> = declared.iter().map(|output| output.name.as_str()).collect();
            return Err(format!(
                "it has no output {:?}, only {}",
                named.unwrap_or_default(),
                names.join(", ")
            ));
        };
        let name = &found.name;
        let others = match declared.len() {
            1 => String::new(),
            count => format!("; it has {count} outputs: name another"),
        };
        let Some((element, dimensions)) = &found.tensor else {
            return Err(format!("its output {name:?} is no tensor{others}"));
        };
        if !matches!(
            element,
            TensorElementType::Float32 | TensorElementType::Float16
        ) {
            return Err(format!(
                "its output {name:?} has elements of type {element}: expected float32 or \
                 float16{others}"
            ));
        }
        // [n], [n, k], and [n, k, 1, 1] of heads that are convolutions.
        let is_row = !dimensions.is_empty() && dimensions.iter().skip(2).all(|&length| length == 1);
        if !is_row {
            return Err(format!(
                "its output {name:?} is {}: expected a number or logits a picture, [n] or \
                 [n, k]{others}",
                shape(dimensions)
            ));
        }
        Ok(Self { name: name.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn declared(name: &str, dimensions: &[i64]) -> Declared {
        Declared {
            name: name.to_owned(),
            tensor: Some((TensorElementType::Float32, dimensions.to_vec())),
        }
    }

    #[test]
    fn numbers_and_logits_are_read() {
        for dimensions in [
            &[-1][..],
            &[-1, 1],
            &[1, 10_861],
            &[-1, -1],
            &[-1, 10, 1, 1],
        ] {
            let output = Output::of(&[declared("y", dimensions)], None).unwrap();
            assert_eq!(output.name, "y", "{dimensions:?}");
        }
        let two = [declared("boxes", &[1, 22, 2100]), declared("y", &[1, 2])];
        assert_eq!(Output::of(&two, Some("y")).unwrap().name, "y");
    }

    #[test]
    fn other_outputs_are_refused_with_what_is_expected() {
        let two = [declared("boxes", &[1, 22, 2100]), declared("y", &[1, 2])];
        let problem = Output::of(&two, None).unwrap_err();
        for part in ["[1, 22, 2100]", "expected a number or logits", "2 outputs"] {
            assert!(problem.contains(part), "{problem}");
        }
        let problem = Output::of(&two, Some("z")).unwrap_err();
        assert_eq!(problem, "it has no output \"z\", only boxes, y");
        let classes = Declared {
            name: "label".to_owned(),
            tensor: Some((TensorElementType::Int64, vec![1])),
        };
        assert!(
            Output::of(&[classes], None)
                .unwrap_err()
                .contains("expected float32")
        );
        let map = Declared {
            name: "map".to_owned(),
            tensor: None,
        };
        assert!(
            Output::of(&[map], None)
                .unwrap_err()
                .contains("is no tensor")
        );
        assert!(Output::of(&[declared("y", &[])], None).is_err());
        assert!(Output::of(&[], None).is_err());
    }
}
