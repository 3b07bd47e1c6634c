//! Every schedule against the numbers of ComfyUI's own functions (scripts/golden/schedules.py).

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::io::BufRead;

use rectiflow_sdxl::{
    flow::Parameterization,
    schedule::{NoiseLevels, Schedule},
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    parameterization: Parameterization,
    shift: f64,
    schedule: Schedule,
    steps: usize,
    sigmas: Vec<f64>,
}

impl Case {
    /// Returns the largest difference from our sigmas; panics if their number differs.
    fn difference(&self) -> f64 {
        let levels = NoiseLevels::new(self.parameterization, self.shift).unwrap();
        let ours = self.schedule.sigmas(self.steps, &levels).unwrap();
        assert_eq!(ours.len(), self.sigmas.len(), "{}", self.name());
        ours.iter()
            .zip(&self.sigmas)
            .map(|(ours, theirs)| (ours - theirs).abs())
            .fold(0.0, f64::max)
    }

    fn name(&self) -> String {
        format!(
            "{} {} shift {} steps {}",
            self.parameterization, self.schedule, self.shift, self.steps
        )
    }

    /// 1e-6; above 8, where fp32 is coarser (eps and v only), two units in the last place.
    fn tolerance(&self) -> f64 {
        let largest = self.sigmas.iter().copied().fold(0.0, f64::max);
        if largest > 8.0 { 2e-6 } else { 1e-6 }
    }

    fn check(&self) {
        let difference = self.difference();
        assert!(
            difference <= self.tolerance(),
            "{}: differs by {difference:e}",
            self.name()
        );
    }
}

#[test]
fn sigmas_equal_comfyui() {
    let packed = flate2::read::GzDecoder::new(&include_bytes!("golden/schedules.json.gz")[..]);
    let golden: Golden = serde_json::from_reader(packed).unwrap();
    assert!(golden.cases.len() > 500);
    golden.cases.iter().for_each(Case::check);
    for steps in [1, 2, 1000] {
        for shift in [0.5, 1.0, 3.0, 6.0, 20.0] {
            for (name, schedule) in Schedule::ALL {
                let found = golden.cases.iter().any(|case| {
                    (case.steps, case.shift, case.schedule) == (steps, shift, schedule)
                        && case.parameterization == Parameterization::Flow
                });
                // A single step of kl_optimal is 0 / 0 in ComfyUI.
                assert!(
                    found || (name, steps) == ("kl_optimal", 1),
                    "no case of {name}, {steps} steps, shift {shift}"
                );
            }
        }
    }
}

/// v models are trained on the levels of eps models.
#[test]
fn v_visits_the_levels_of_eps() {
    for (name, schedule) in Schedule::ALL {
        let sigmas = |parameterization| {
            schedule
                .sigmas(28, &NoiseLevels::new(parameterization, 3.0).unwrap())
                .unwrap()
        };
        assert_eq!(
            sigmas(Parameterization::V),
            sigmas(Parameterization::Eps),
            "{name}"
        );
    }
}

/// Reads the lines of `scripts/golden/schedules.py CHECKOUT --sweep` (all step counts, nine shifts)
/// from the file that SCHEDULES_SWEEP names.
#[test]
#[ignore = "needs a ComfyUI checkout to make its 700 MB of input"]
fn every_step_count_equals_comfyui() {
    let path = std::env::var("SCHEDULES_SWEEP")
        .expect("SCHEDULES_SWEEP names the output of schedules.py --sweep");
    for line in std::io::BufReader::new(std::fs::File::open(path).unwrap()).lines() {
        serde_json::from_str::<Case>(&line.unwrap())
            .unwrap()
            .check();
    }
}
