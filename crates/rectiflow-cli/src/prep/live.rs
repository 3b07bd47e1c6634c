//! Progress of `rectiflow prep`, a bar for each stage.

use rectiflow_data::prep::PrepEvent;

use crate::terminal::{numbers::grouped, progress::Progress};

/// Progress of a preparation, one bar per stage.
#[derive(Debug, Default)]
pub(super) struct Live {
    stage: &'static str,
    progress: Option<Progress>,
}

impl Live {
    pub(super) fn show(&mut self, event: PrepEvent) {
        match event {
            PrepEvent::Listing { done, num_samples } => {
                self.set("list", "samples", (done, num_samples), "");
            }
            PrepEvent::Waiting {
                missing,
                num_workers,
                secs,
            } => {
                let note = format!("for {} s", grouped(secs));
                let there = num_workers - missing;
                self.set("wait for facts", "workers", (there, num_workers), &note);
            }
            PrepEvent::Joining { done, num_files } => {
                self.set("join facts", "samples", (done, num_files), "");
            }
            PrepEvent::Scanning {
                done,
                num_files,
                rejected,
            } => {
                self.set("scan", "files", (done, num_files), &rejected_note(rejected));
            }
            PrepEvent::Encoding {
                width_px,
                height_px,
                done,
                num_samples,
                rejected,
            } => {
                let rejected = rejected_note(rejected);
                let note = [format!("{width_px}x{height_px}"), rejected].join(" ");
                self.set("encode", "images", (done, num_samples), note.trim_end());
            }
            PrepEvent::Rewriting { done, num_objects } => {
                self.set("rewrite text", "objects", (done, num_objects), "")
            }
            _ => {}
        }
    }

    pub(super) fn set(
        &mut self,
        stage: &'static str,
        unit: &'static str,
        (done, total): (u64, u64),
        note: &str,
    ) {
        if self.stage != stage {
            self.finish();
            self.stage = stage;
        }
        self.progress
            .get_or_insert_with(|| Progress::new(stage, unit, 0, total))
            .set(done, note);
    }

    pub(super) fn finish(&mut self) {
        if let Some(progress) = self.progress.take() {
            progress.finish();
        }
    }
}

fn rejected_note(rejected: u64) -> String {
    if rejected == 0 {
        String::new()
    } else {
        format!("({} rejected)", grouped(rejected))
    }
}
