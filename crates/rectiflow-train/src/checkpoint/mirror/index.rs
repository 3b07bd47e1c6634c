//! What a mirror has, from the list of its objects: which checkpoints are whole, which are not, and
//! which may be removed. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use rectiflow_data::Stored;

use crate::checkpoint::{Checkpoints, SUMS, name_of, step_of};

const CHECKPOINTS: &str = "checkpoints/";

/// The objects of a mirror.
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// Lengths of all objects by name.
    pub(crate) bytes: BTreeMap<String, u64>,
    /// The names of each checkpoint's objects, the list of hashes first, as they are removed.
    checkpoints: BTreeMap<u64, Vec<String>>,
    whole: BTreeSet<u64>,
}

impl Index {
    /// Sorts the objects of a mirror.
    pub(crate) fn of(listed: Vec<Stored>) -> Self {
        let mut index = Self::default();
        for Stored { name, bytes } in listed {
            if let Some(step) = step_of_object(&name) {
                let names = index.checkpoints.entry(step).or_default();
                if name == sums_of_step(step) {
                    names.insert(0, name.clone());
                    index.whole.insert(step);
                } else {
                    names.push(name.clone());
                }
            }
            index.bytes.insert(name, bytes);
        }
        index
    }

    /// Returns the steps of whole checkpoints, oldest first.
    pub(crate) fn whole(&self) -> Vec<u64> {
        self.whole.iter().copied().collect()
    }

    /// Whether the checkpoint of a step is whole.
    pub(crate) fn has(&self, step: u64) -> bool {
        self.whole.contains(&step)
    }

    /// Whether a whole checkpoint besides that of a step is there.
    pub(crate) fn has_besides(&self, step: u64) -> bool {
        self.whole.iter().any(|&other| other != step)
    }

    /// Returns the names of a checkpoint's objects in the order in which they are removed.
    pub(crate) fn objects(&self, step: u64) -> &[String] {
        self.checkpoints.get(&step).map_or(&[], Vec::as_slice)
    }

    /// Returns the steps that are too old by the rule of the folder if the mirror had all
    /// checkpoints of the folder, whose steps are `here`.
    pub(crate) fn old_with(&self, here: &[u64], rule: &Checkpoints) -> Vec<u64> {
        let newest = here.iter().max().copied().unwrap_or(0);
        let mut all: BTreeSet<u64> = here.iter().copied().collect();
        all.extend(self.whole.iter().filter(|&&step| step <= newest));
        let all: Vec<u64> = all.into_iter().collect();
        rule.old_ones(&all)
    }

    /// Returns the steps of the checkpoints to remove, where that of `newest` is the newest of the
    /// folder that the mirror has whole: those that are too old by the rule of the folder, those
    /// that are newer and thus of a course that the run has left, and remains of others that
    /// neither side has whole. `here` are the steps of the folder.
    pub(crate) fn to_remove(&self, newest: u64, here: &[u64], rule: &Checkpoints) -> Vec<u64> {
        if !self.has(newest) {
            return Vec::new();
        }
        let mut kept = self.whole();
        kept.retain(|&step| step <= newest);
        let mut removed = rule.old_ones(&kept);
        for &step in self.checkpoints.keys() {
            let is_left = step > newest && self.has(step) && !here.contains(&step);
            let is_remains = !self.has(step) && !here.contains(&step);
            if is_left || is_remains {
                removed.push(step);
            }
        }
        removed.retain(|&step| step != newest);
        removed
    }
}

/// Returns the name of the object that makes a checkpoint whole.
pub(crate) fn sums_of_step(step: u64) -> String {
    object_of(step, SUMS)
}

/// Returns the name of the object of a checkpoint's file.
pub(crate) fn object_of(step: u64, name: &str) -> String {
    format!("{CHECKPOINTS}{}/{name}", name_of(step))
}

/// Returns the step of the checkpoint that an object belongs to.
fn step_of_object(name: &str) -> Option<u64> {
    let (folder, _) = name.strip_prefix(CHECKPOINTS)?.split_once('/')?;
    step_of(Path::new(folder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::sections::CheckpointConfig;

    fn index(names: &[&str]) -> Index {
        let mut listed = Vec::new();
        for name in names {
            listed.push(Stored {
                name: (*name).to_owned(),
                bytes: 1,
            });
        }
        Index::of(listed)
    }

    /// A mirror with whole checkpoints of these steps and remains of others.
    fn mirror(whole: &[u64], remains: &[u64]) -> Index {
        let mut names = Vec::new();
        for &step in whole {
            names.push(object_of(step, "state.json"));
            names.push(sums_of_step(step));
        }
        for &step in remains {
            names.push(object_of(step, "unet/config.json"));
        }
        index(&names.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn rule(keep: usize, keep_every_steps: u64) -> Checkpoints {
        let config = CheckpointConfig {
            keep,
            keep_every_steps,
            ..CheckpointConfig::default()
        };
        Checkpoints::at(Path::new("run"), &config)
    }

    #[test]
    fn a_partial_upload_is_not_found() {
        let index = index(&[
            "checkpoints/step-00000004/BLAKE3SUMS",
            "checkpoints/step-00000004/state.json",
            "checkpoints/step-00000008/state.json",
            "checkpoints/step-00000008/unet/BLAKE3SUMS",
            // Copies that a user made are no checkpoints.
            "checkpoints/step-9/BLAKE3SUMS",
            "checkpoints/best/BLAKE3SUMS",
            "step-00000012/BLAKE3SUMS",
            "metrics.jsonl",
        ]);
        assert_eq!(index.whole(), [4]);
        assert!(index.has(4) && !index.has(8) && !index.has_besides(4));
    }

    #[test]
    fn the_list_of_hashes_is_removed_first() {
        let index = index(&[
            "checkpoints/step-00000004/.early",
            "checkpoints/step-00000004/BLAKE3SUMS",
            "checkpoints/step-00000004/state.json",
        ]);
        assert_eq!(index.objects(4)[0], sums_of_step(4));
        assert_eq!(index.objects(4).len(), 3);
        assert_eq!(index.objects(8), [""; 0]);
    }

    #[test]
    fn rotation_follows_the_folder_and_never_takes_the_newest_whole_one() {
        let (keep_1, keep_2) = (rule(1, 0), rule(2, 0));
        assert_eq!(
            mirror(&[4, 8, 12], &[]).to_remove(12, &[8, 12], &keep_2),
            [4]
        );
        assert_eq!(
            mirror(&[4, 8, 12], &[]).to_remove(12, &[12], &keep_1),
            [4, 8]
        );
        // The newest of the folder is not whole there yet: nothing is removed.
        assert_eq!(mirror(&[4, 8], &[12]).to_remove(12, &[12], &keep_1), [0; 0]);
        // Multiples stay for ever.
        let every_8 = rule(1, 8);
        assert_eq!(
            mirror(&[4, 8, 12], &[]).to_remove(12, &[8, 12], &every_8),
            [4]
        );
    }

    #[test]
    fn what_would_be_removed_at_once_is_old() {
        let keep = rule(2, 0);
        // One that was being copied is still in the folder.
        assert_eq!(mirror(&[8], &[]).old_with(&[4, 8, 12], &keep), [4]);
        // The folder has lost step 8.
        assert_eq!(mirror(&[8, 12], &[]).old_with(&[4, 12], &keep), [4]);
        // What is newer than the folder is of another course.
        assert_eq!(mirror(&[12, 16], &[]).old_with(&[4, 8], &keep), [0; 0]);
    }

    #[test]
    fn remains_and_a_course_that_was_left_are_removed() {
        let keep = rule(3, 0);
        // Step 6 was cut off and is gone here; step 10 is being sent.
        let cut = mirror(&[4, 8], &[6, 10]);
        assert_eq!(cut.to_remove(8, &[4, 8, 10], &keep), [6]);
        // The run went on from step 4, and is at step 8 again.
        let left = mirror(&[4, 8, 12], &[16]);
        assert_eq!(left.to_remove(8, &[4, 8], &keep), [12, 16]);
    }
}
