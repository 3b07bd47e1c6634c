//! How often the guard acts where nothing is wrong, on recorded runs and on traces that are like
//! them: numbers that are the same on every processor. `examples/guard_curves.rs` has the same at
//! length, docs/guard.md the result.

use rectiflow_train::guard::{GuardConfig, GuardState, Observation, Verdict};

use crate::clean_runs::{Half, TRACE, Traces, acts, recorded};

/// Judged traces of each half: a million updates in total.
const TRACES: u64 = 1000;

/// The default guard, and one that judges from the tenth update on.
fn guards() -> [GuardConfig; 2] {
    [50, 10].map(|warmup_updates| GuardConfig {
        warmup_updates,
        ..GuardConfig::default()
    })
}

#[test]
fn recorded_clean_runs_raise_no_alarm() {
    for half in [Half::Fitted, Half::HeldOut] {
        let runs = recorded(half);
        assert!(runs.len() >= 20, "{}", runs.len());
        for config in guards() {
            for run in &runs {
                let acts = acts(&config, run.observations());
                assert_eq!(
                    acts, 0,
                    "{half:?} {} seed {}, warm-up {}",
                    run.kind, run.seed, config.warmup_updates
                );
            }
        }
    }
}

#[test]
fn traces_like_them_raise_less_than_one_alarm_in_a_hundred_thousand_updates() {
    for half in [Half::Fitted, Half::HeldOut] {
        let traces = Traces::like(&recorded(half));
        for config in guards() {
            let found: usize = (0..TRACES)
                .map(|number| acts(&config, traces.trace(number)))
                .sum();
            let updates = TRACES as f64 * TRACE as f64;
            assert!(
                (found as f64) < 1e-5 * updates,
                "{half:?}, warm-up {}: {found} acts",
                config.warmup_updates
            );
        }
    }
}

#[test]
fn what_is_no_number_or_ten_thousand_times_too_large_is_found_in_its_step() {
    let traces = Traces::like(&recorded(Half::HeldOut));
    let spoil: [fn(&mut Observation); 4] = [
        |seen| seen.loss = f64::NAN,
        |seen| seen.gradient_norm = f64::INFINITY,
        |seen| seen.loss *= 1e4,
        |seen| seen.gradient_norm *= 1e4,
    ];
    for config in guards() {
        for number in 0..200 {
            let trace = traces.trace(number);
            let at = 60 + number as usize;
            let mut guard = GuardState::default();
            for seen in &trace[..at] {
                guard.judge(&config, *seen);
            }
            for spoil in spoil {
                let mut seen = trace[at];
                spoil(&mut seen);
                let verdict = guard.clone().judge(&config, seen);
                assert!(
                    matches!(verdict, Verdict::Skip { .. }),
                    "trace {number}, {seen:?}: {verdict:?}"
                );
            }
        }
    }
}
