//! How often the guard acts in clean runs, and how soon where something is wrong: the numbers of
//! docs/guard.md.
//!
//! ```text
//! cargo run --release --example guard_curves -- [UPDATES] > FILE
//! ```
//!
//! Judges the recorded clean runs and traces that are like them (`tests/runs/clean_runs.rs`), of
//! UPDATES updates in all (1e7), with the defaults, with a warm-up of 10, and a tenth of them with
//! other accepted chances; then traces with a fault from update 250 on. Prints comma-separated
//! lines: which guard, what was done to the trace, updates until the guard acts, the share of
//! traces in which it has acted by then. Of clean ones it prints acts, and acts per 100,000
//! updates.
#![allow(clippy::print_stdout, reason = "a program, not a library")]

#[allow(dead_code, reason = "made for tests")]
#[path = "../tests/runs/clean_runs.rs"]
mod clean_runs;

use std::env;

use clean_runs::{Half, TRACE, Traces, acts, first_act, recorded};
use rectiflow_train::guard::{GuardConfig, Observation};

/// Update of the first faulty step.
const START: usize = 250;
/// Traces with each fault.
const FAULTY: u64 = 2000;
/// Delays, in updates, at which the share of detected faults is printed.
const DELAYS: [usize; 10] = [0, 1, 2, 5, 10, 20, 50, 100, 150, 249];

fn main() {
    let updates: f64 = env::args()
        .nth(1)
        .map_or(1e7, |text| text.parse().expect("a number of updates"));
    let clean = (updates / TRACE as f64).ceil() as u64;
    println!("guard,fault,delay,share");
    for half in [Half::Fitted, Half::HeldOut] {
        let traces = Traces::like(&recorded(half));
        for (name, config) in guards() {
            let recorded: usize = recorded(half)
                .iter()
                .map(|run| acts(&config, run.observations()))
                .sum();
            // A tenth of the updates is enough for a curve.
            let judged = if config.spike_chance == GuardConfig::default().spike_chance {
                clean
            } else {
                clean / 10
            };
            let synthetic: usize = (0..judged)
                .map(|number| acts(&config, traces.trace(number)))
                .sum();
            let rate = 1e5 * synthetic as f64 / (judged as f64 * TRACE as f64);
            println!("{name},recorded {half:?},acts,{recorded}");
            println!("{name},clean {half:?},per 100000,{rate}");
        }
    }
    let traces = Traces::like(&recorded(Half::HeldOut));
    for (name, config) in guards() {
        for fault in faults() {
            delays(&traces, &name, &config, &fault);
        }
    }
}

/// The guards that are compared, by name.
fn guards() -> Vec<(String, GuardConfig)> {
    let short = GuardConfig {
        warmup_updates: 10,
        ..GuardConfig::default()
    };
    let mut guards = vec![
        ("defaults".to_owned(), GuardConfig::default()),
        ("warmup 10".to_owned(), short),
    ];
    for spike_chance in [1e-3, 1e-4, 1e-5, 1e-6, 1e-7] {
        guards.push((
            format!("chance {spike_chance:e}"),
            GuardConfig {
                spike_chance,
                ..GuardConfig::default()
            },
        ));
    }
    guards
}

/// A fault, applied to a trace from `START` on.
struct Fault {
    name: String,
    /// Factor of loss and norm.
    factors: [f64; 2],
    /// Further factor, applied once more in each step.
    growth: f64,
    /// Duration in steps.
    steps: usize,
}

fn faults() -> Vec<Fault> {
    let mut faults = Vec::new();
    for factor in [3.0, 10.0, 30.0, 100.0, 1e4] {
        for (name, factors, steps) in [
            ("one step", [factor; 2], 1),
            ("one norm", [1.0, factor], 1),
            ("from here on", [factor; 2], TRACE),
            ("norm from here on", [1.0, factor], TRACE),
        ] {
            faults.push(Fault {
                name: format!("{name} x{factor}"),
                factors,
                growth: 1.0,
                steps,
            });
        }
    }
    for percent in [0.3, 1.0, 3.0] {
        let growth = 1.0 + percent / 100.0;
        faults.push(Fault {
            name: format!("{percent}% a step"),
            factors: [1.0; 2],
            growth,
            steps: TRACE,
        });
    }
    faults
}

impl Fault {
    fn spoil(&self, at: usize, seen: Observation) -> Observation {
        if !(START..START + self.steps).contains(&at) {
            return seen;
        }
        let grown = self.growth.powi((at - START) as i32 + 1);
        let [loss, norm] = self.factors.map(|factor| factor * grown);
        Observation {
            loss: seen.loss * loss,
            gradient_norm: seen.gradient_norm * norm,
        }
    }
}

fn delays(traces: &Traces, guard: &str, config: &GuardConfig, fault: &Fault) {
    let (mut found, mut judged) = (Vec::new(), 0);
    for number in 0..FAULTY {
        let trace = traces.trace(number);
        let spoilt = trace
            .into_iter()
            .enumerate()
            .map(|(at, seen)| fault.spoil(at, seen));
        let acted = first_act(config, spoilt);
        // An act before the fault is a false alarm, which is counted elsewhere.
        if acted.is_none_or(|at| at >= START) {
            judged += 1;
            found.extend(acted.map(|at| at - START));
        }
    }
    for delay in DELAYS {
        let by_then = found.iter().filter(|at| **at <= delay).count();
        println!(
            "{guard},{},{delay},{}",
            fault.name,
            by_then as f64 / f64::from(judged)
        );
    }
}
