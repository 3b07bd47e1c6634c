//! Which of a tagger's outputs are the tags of a picture. Pure.

use std::collections::BTreeMap;

use crate::tag::labels::{CLASSES, Class, Label};

/// Thresholds by class: a tag needs a larger probability. Of ratings the largest counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Thresholds {
    /// Of classes that are not in `of`.
    pub others: f32,
    /// By class.
    pub of: BTreeMap<Class, f32>,
}

impl Default for Thresholds {
    /// Those of the WD taggers' own page.
    fn default() -> Self {
        Self {
            others: 0.35,
            of: BTreeMap::from([(Class::Character, 0.85)]),
        }
    }
}

/// The tags of a picture and the class of each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chosen {
    /// The tags, class by class, the surest first.
    pub tags: Vec<String>,
    /// The class of each.
    pub classes: Vec<String>,
}

impl Thresholds {
    fn of(&self, class: Class) -> f32 {
        self.of.get(&class).copied().unwrap_or(self.others)
    }

    /// The tags of a picture with these probabilities, one for each label.
    pub fn choose(&self, labels: &[Label], probabilities: &[f32]) -> Chosen {
        let mut chosen = Chosen::default();
        for class in CLASSES {
            let mut found = Vec::new();
            for (label, &probability) in labels.iter().zip(probabilities) {
                if label.class == class {
                    found.push((probability, label.tag.as_str()));
                }
            }
            // Stable, so that equal ones stay in the order of the list.
            found.sort_by(|a, b| b.0.total_cmp(&a.0));
            match class {
                Class::Rating => found.truncate(1),
                class => found.retain(|&(probability, _)| probability > self.of(class)),
            }
            for (_, tag) in found {
                chosen.tags.push(tag.to_owned());
                chosen.classes.push(class.as_str().to_owned());
            }
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(tag: &str, class: Class) -> Label {
        Label {
            tag: tag.to_owned(),
            class,
        }
    }

    #[test]
    fn each_class_has_its_threshold_and_one_rating_counts() {
        let labels = [
            label("safe", Class::Rating),
            label("explicit", Class::Rating),
            label("solo", Class::General),
            label("cat", Class::General),
            label("dog", Class::General),
            label("miku", Class::Character),
            label("rin", Class::Character),
            label("series", Class::Copyright),
        ];
        let probabilities = [0.01, 0.02, 0.5, 0.9, 0.35, 0.85, 0.86, 0.4];
        let chosen = Thresholds::default().choose(&labels, &probabilities);
        assert_eq!(chosen.tags, ["explicit", "rin", "series", "cat", "solo"]);
        let classes = ["rating", "character", "copyright", "general", "general"];
        assert_eq!(chosen.classes, classes);
        let all = Thresholds {
            others: -1.0,
            of: BTreeMap::new(),
        };
        assert_eq!(all.choose(&labels, &probabilities).tags.len(), 7);
        assert_eq!(
            Thresholds::default().choose(&labels[2..4], &[0.1; 2]),
            Chosen::default()
        );
    }
}
