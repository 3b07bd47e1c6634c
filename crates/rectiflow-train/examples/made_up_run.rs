//! A run folder without a run: events, previews and other ranks' seconds, made up and written as a
//! run writes them. For looking at `rectiflow watch` and for checking what other programs read.
//!
//! ```text
//! cargo run --release --example made_up_run -- FOLDER STEPS [SEED] [RANKS]
//! cargo run --release --example made_up_run -- FOLDER --live STEPS MILLISECONDS
//! cargo run --release --example made_up_run -- FOLDER --rewind
//! cargo run --release --example made_up_run -- FOLDER --resume STEP
//! ```
//!
//! The first form writes a run with one spike of the loss, a skip, clips, a rewind and a resume.
//! The others append to it: steps one by one, a rewind of the guard, a process that begins after
//! STEP.
#![allow(clippy::print_stdout, reason = "a program, not a library")]

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rectiflow_data::{contact_sheet::ContactSheet, picture::Picture};
use rectiflow_train::{
    metrics::{
        Event, GuardEvent, Lossless, RankMetrics, SigmaBin, Start, StepMetrics, TableLoss,
        TestMetrics, VitalsMetrics, Writer, tail,
    },
    straggler::Slowest,
};

/// Samples of a step.
const BATCH: u64 = 256;
/// Noise levels that are measured apart.
const BINS: u64 = 8;

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u64>().expect("a number");
    match words.as_slice() {
        [folder, "--live", steps, pause] => {
            let mut run = MadeUp::again(folder);
            for _ in 0..number(steps) {
                run.step();
                thread::sleep(Duration::from_millis(number(pause)));
            }
        }
        [folder, "--rewind"] => MadeUp::again(folder).rewind(40),
        [folder, "--resume", step] => MadeUp::again(folder).resume(number(step)),
        [folder, steps, rest @ ..] => {
            let seed = rest.first().map_or(0, |text| number(text));
            let ranks = rest.get(1).map_or(1, |text| number(text));
            MadeUp::new(folder, seed, ranks as usize).write(number(steps));
        }
        _ => println!("made_up_run FOLDER STEPS [SEED] [RANKS]"),
    }
}

/// A made-up run and where it stands.
struct MadeUp {
    folder: PathBuf,
    writers: Vec<Writer>,
    seed: u64,
    step: u64,
    samples: u64,
    update: u64,
    spent: f64,
    total: u64,
}

impl MadeUp {
    fn new(folder: &str, seed: u64, ranks: usize) -> Self {
        let folder = PathBuf::from(folder);
        fs::create_dir_all(&folder).expect("a folder");
        let mut writers = Vec::new();
        for rank in 0..ranks {
            writers.push(Writer::open(&folder, rank).expect("opens"));
        }
        Self {
            folder,
            writers,
            seed,
            step: 0,
            samples: 0,
            update: 0,
            spent: 0.0,
            total: 0,
        }
    }

    /// Goes on where the folder's run ends.
    fn again(folder: &str) -> Self {
        let mut run = Self::new(folder, 0, 1);
        for event in tail::read(&run.folder).expect("a run") {
            match event {
                Event::Start(start) => run.total = start.total_samples,
                Event::Step(step) => {
                    run.step = step.step;
                    run.samples = step.samples;
                    run.spent = step.spent.unwrap_or(0.0);
                }
                _ => {}
            }
        }
        run.update = run.samples / BATCH;
        run
    }

    fn write(&mut self, steps: u64) {
        self.total = steps * BATCH * 5 / 4;
        self.start(steps * 17 / 10);
        self.test();
        self.preview();
        let (spike, rewind, resume) = (steps * 3 / 10, steps * 11 / 20, steps * 4 / 5);
        while self.step < steps {
            let next = self.step + 1;
            if next == spike {
                self.skip();
            } else if next == rewind {
                self.rewind(steps / 50);
            } else {
                self.step();
            }
            if self.step.is_multiple_of((steps / 40).max(1)) {
                self.test();
                self.vitals();
            }
            if self.step.is_multiple_of((steps / 8).max(1)) {
                self.preview();
            }
            if self.step == resume {
                let secs = 2.5;
                let name = format!("step-{:08}", self.step);
                let step = self.step;
                self.emit(&Event::Checkpoint { step, name, secs });
                self.start(steps * 3 / 10);
            }
        }
    }

    fn emit(&mut self, event: &Event) {
        self.writers[0].write(event).expect("writes");
    }

    /// A number from 0 to 1 that depends on the step and on what it is for.
    fn chance(&self, purpose: u64) -> f64 {
        let mut bits = self.seed ^ self.step.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ purpose << 48;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (bits ^ bits >> 31) as f64 / u64::MAX as f64
    }

    fn course(&self) -> f64 {
        let done = self.samples as f64 / self.total.max(1) as f64;
        0.34 + 0.5 * (-30.0 * done).exp()
            + 0.12 * (-3.0 * done).exp()
            + 0.01 * self.seed as f64 / (1.0 + 5.0 * done)
    }

    fn start(&mut self, secs_ago: u64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let start = Start {
            step: self.step,
            unix_secs: now.map_or(0, |now| now.as_secs().saturating_sub(secs_ago)),
            order_hash: "made up".to_owned(),
            num_parameters: 2_567_463_684,
            num_train: 5_680_311,
            num_test: 2048,
            buckets: vec![(1024, 1024, 4_727_000, 1900), (832, 1216, 953_311, 148)],
            threads: 16,
            branched_from: None,
            changes: Vec::new(),
            snapshot_bytes: 0,
            peak_flops: Some(9.89e14),
            ranks: self.writers.len(),
            idle_share: 0.0,
            total_samples: self.total,
        };
        self.emit(&Event::Start(start));
    }

    /// A step with its update.
    fn step(&mut self) {
        self.step += 1;
        self.update += 1;
        self.samples += BATCH;
        let noise = self.chance(1) + self.chance(2) + self.chance(3) - 1.5;
        let loss = self.course() * (1.0 + 0.09 * noise);
        if self.chance(4) > 0.997 {
            let reason = "the gradient's norm is 2.1, its limit 1".to_owned();
            self.guard("clip", reason, None);
        }
        self.emit_step(loss, true);
    }

    fn emit_step(&mut self, loss: f64, applied: bool) {
        let data_secs = if self.chance(5) > 0.995 {
            0.6
        } else {
            0.01 + 0.02 * self.chance(6)
        };
        let secs = 1.5 + 0.2 * self.chance(7) + data_secs;
        self.spent += 64.0 / 3600.0 * secs;
        let warmup = (self.update as f64 / 500.0).min(1.0);
        let done = self.samples as f64 / self.total.max(1) as f64;
        let event = StepMetrics {
            step: self.step,
            samples: self.samples,
            epoch: self.samples / 5_680_311,
            loss,
            gradient_norm: 0.4 + 0.3 * self.chance(8) + 2.0 * (loss - self.course()).abs(),
            norm_by_component: BTreeMap::new(),
            lr: 1e-4 * warmup * (1.0 - 0.5 * done),
            secs,
            data_secs,
            flops: 640_000_000_000_000,
            applied,
            spent: Some(self.spent),
            resident_bytes: Some(41_000_000_000 + self.step % 1000 * 1_000_000),
            ranks: None,
        };
        for rank in 0..self.writers.len() {
            let own = self.share(rank, &event);
            self.writers[rank].write(&Event::Step(own)).expect("writes");
        }
    }

    /// A rank's part of a step; the last rank is slow.
    fn share(&self, rank: usize, step: &StepMetrics) -> StepMetrics {
        if self.writers.len() == 1 {
            return step.clone();
        }
        let last = self.writers.len() - 1;
        let slow = if rank == last { 0.2 } else { 0.0 };
        let passes_secs = 1.05 + 0.05 * self.chance(20 + rank as u64) + slow;
        let update_secs = 0.11;
        let ranks = RankMetrics {
            passes_secs,
            communication_secs: (step.secs - step.data_secs - passes_secs - update_secs).max(0.0),
            hidden_secs: 0.3,
            update_secs,
            bytes: BTreeMap::new(),
            slowest: Some(Slowest {
                rank: last,
                lag: 0.18,
            }),
        };
        StepMetrics {
            ranks: Some(ranks),
            ..step.clone()
        }
    }

    /// A step with a spike, which the guard skips.
    fn skip(&mut self) {
        self.step += 1;
        let reason = "the loss is 7.9, the normal one 0.37: chance 1e-12".to_owned();
        let black_box = Some(format!("step-{:08}-skip.json", self.step));
        self.guard("skip", reason, black_box);
        self.emit_step(7.9, false);
    }

    /// A step after which the guard goes back some updates.
    fn rewind(&mut self, updates: u64) {
        self.step += 1;
        self.update = self.update.saturating_sub(updates);
        self.samples = self.samples.saturating_sub(updates * BATCH);
        let reason =
            "the loss has been above the normal one for 5 updates <b>of 1e-9</b>".to_owned();
        let black_box = Some(format!("step-{:08}-rewind.json", self.step));
        self.guard("rewind", reason, black_box);
        self.emit_step(1.9, false);
    }

    fn resume(&mut self, step: u64) {
        let before = self.step;
        self.step = step;
        self.samples = step * BATCH;
        self.update = step;
        self.start(0);
        println!("resumed at step {step}, was at {before}");
        for _ in 0..5 {
            self.step();
        }
    }

    fn guard(&mut self, action: &str, reason: String, black_box: Option<String>) {
        let act = GuardEvent {
            step: self.step,
            action: action.to_owned(),
            reason,
            update: self.update,
            black_box,
        };
        self.emit(&Event::Guard(act));
    }

    fn bins(&self, purpose: u64) -> Vec<SigmaBin> {
        let mut bins = Vec::new();
        for bin in 0..BINS {
            let from = bin as f64 / BINS as f64;
            let depth = 1.9 - 1.7 * from + 0.9 * (from - 0.5).powi(2);
            bins.push(SigmaBin {
                from,
                to: from + 1.0 / BINS as f64,
                loss: self.course() * depth * (1.0 + 0.02 * self.chance(purpose + bin)),
                standard_error: 0.01,
                count: 256,
            });
        }
        bins
    }

    fn test(&mut self) {
        let test = TestMetrics {
            step: self.step,
            samples: self.samples,
            loss: self.course() * (1.01 + 0.004 * self.chance(40)),
            bins: self.bins(50),
            training: None,
            ema: Some(TableLoss {
                loss: self.course() * 0.985,
                bins: Vec::new(),
            }),
            ema_training: None,
            secs: 20.0,
        };
        self.emit(&Event::Test(test));
    }

    fn vitals(&mut self) {
        let vitals = VitalsMetrics {
            step: self.step,
            modules: Vec::new(),
            training: TableLoss {
                loss: self.course(),
                bins: self.bins(70),
            },
            largest_logit: Some(Lossless(18.0 + 4.0 * self.chance(90))),
        };
        self.emit(&Event::Vitals(vitals));
    }

    fn preview(&mut self) {
        let name = format!("step-{:08}.png", self.step);
        let path = self.folder.join("previews");
        fs::create_dir_all(&path).expect("a folder");
        draw(
            &path.join(&name),
            self.samples as f64 / self.total.max(1) as f64,
        );
        let step = self.step;
        self.emit(&Event::Preview {
            step,
            name,
            secs: 9.0,
        });
    }
}

/// Four pictures that become sharper.
fn draw(path: &Path, done: f64) {
    const SIDE: u32 = 128;
    let labels = [
        "a red fox in the snow",
        "a lighthouse at night",
        "<b>tea</b> & cake",
        "an old map",
    ]
    .map(str::to_owned);
    let mut pictures = Vec::new();
    for index in 0..4_u32 {
        let mut pixels = Vec::new();
        for place in 0..SIDE * SIDE {
            let (x, y) = (
                f64::from(place % SIDE) / 64.0 - 1.0,
                f64::from(place / SIDE) / 64.0 - 1.0,
            );
            let noise = f64::from((place * 7919 + index * 104_729) % 251) / 251.0;
            let ring = (6.0 * (x * x + y * y).sqrt() + f64::from(index)).sin() * 0.5 + 0.5;
            for channel in 0..3 {
                let tint = f64::from((index + channel) % 3) / 2.0;
                let value = done * (0.7 * ring + 0.3 * tint) + (1.0 - done) * noise;
                pixels.push((255.0 * value) as u8);
            }
        }
        pictures.push(Picture::new(SIDE, SIDE, pixels));
    }
    let sheet = ContactSheet {
        row_labels: &[],
        column_labels: &labels,
        columns: 4,
        pictures: &pictures,
    };
    sheet.draw().write_png(path, &[]).expect("writes");
}
