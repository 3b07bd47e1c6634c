//! The numbers of a run under the names that viewers show: `chart/curve`.
//!
//! The live page, the report and other programs' files draw these. A number that follows from two
//! events, such as samples per second, is calculated here, so that all viewers show the same.

use std::borrow::Cow;

use crate::measure::metrics::{
    Event, SigmaBin, StepMetrics, TableLoss, TestMetrics, Vitals, VitalsMetrics,
};

/// A number of an event.
#[derive(Debug, Clone, PartialEq)]
pub struct Number {
    /// Its chart and its curve, with a slash between them.
    pub name: Cow<'static, str>,
    /// Need not be finite.
    pub value: f64,
}

/// How a chart is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Logarithmic.
    Log,
    /// Linear, with 0 in the range.
    FromZero,
    /// A share from 0 to 1, shown in percent.
    Share,
    /// Bytes, with 0 in the range.
    Bytes,
}

/// A chart: all curves whose names begin with `name/`.
#[derive(Debug, Clone, Copy)]
pub struct Chart {
    /// The first part of its curves' names.
    pub name: &'static str,
    /// One line, for people.
    pub title: &'static str,
    /// Unit of the vertical axis; empty for a share or bytes.
    pub unit: &'static str,
    /// The vertical axis.
    pub scale: Scale,
    /// Whether the curves are an ordered family, as those of noise levels.
    pub is_ramp: bool,
    /// Whether a viewer with little room leaves it out: the vital signs have a curve a module.
    pub is_detail: bool,
}

/// The charts in the order of their weight.
pub const CHARTS: [Chart; 16] = [
    plain("loss", "Loss", "mean squared error", Scale::Log),
    ramp("test_loss", "Test loss by noise level"),
    ramp("training_loss", "Training loss by noise level"),
    plain(
        "gradient_norm",
        "Gradient norm before clipping",
        "norm",
        Scale::Log,
    ),
    plain("learning_rate", "Learning rate", "", Scale::FromZero),
    plain("throughput", "Samples per second", "1/s", Scale::FromZero),
    plain("waiting", "Time waiting for data", "", Scale::Share),
    plain("mfu", "MFU, share of the peak in bf16", "", Scale::Share),
    plain("arithmetic", "Arithmetic", "FLOP/s", Scale::FromZero),
    plain("memory", "Memory", "", Scale::Bytes),
    plain("spent", "Money spent", "currency", Scale::FromZero),
    plain("step_secs", "Seconds of a step", "s", Scale::FromZero),
    plain("attention", "Largest attention logit", "", Scale::Log),
    detail("module_gradient_norm", "Gradient norm after clipping"),
    detail("moment_ratio", "Gradient over its second moment"),
    detail("update_ratio", "Update over weights"),
];

const fn plain(name: &'static str, title: &'static str, unit: &'static str, scale: Scale) -> Chart {
    Chart {
        name,
        title,
        unit,
        scale,
        is_ramp: false,
        is_detail: false,
    }
}

const fn ramp(name: &'static str, title: &'static str) -> Chart {
    let chart = plain(name, title, "mean squared error", Scale::Log);
    Chart {
        is_ramp: true,
        ..chart
    }
}

const fn detail(name: &'static str, title: &'static str) -> Chart {
    let chart = plain(name, title, "ratio", Scale::Log);
    Chart {
        is_detail: true,
        ..chart
    }
}

/// Returns the numbers of a run's events, which are passed in the order of writing.
#[derive(Debug, Clone, Default)]
pub struct Curves {
    /// Samples after the last step; `None` right after a start.
    samples: Option<u64>,
    peak_flops: Option<f64>,
}

impl Curves {
    /// Returns the numbers of the next event; none for most kinds of events.
    pub fn of(&mut self, event: &Event) -> Vec<Number> {
        let mut numbers = Numbers(Vec::new());
        match event {
            Event::Start(start) => {
                self.samples = None;
                self.peak_flops = start.peak_flops;
            }
            Event::Step(step) => {
                numbers.add_step(step);
                self.add_rates(step, &mut numbers);
            }
            Event::Test(test) => numbers.add_test(test),
            Event::Vitals(vitals) => numbers.add_vitals(vitals),
            Event::Checkpoint { .. }
            | Event::SaveFailed { .. }
            | Event::Guard(_)
            | Event::Preview { .. }
            | Event::End { .. } => {}
        }
        numbers.0
    }

    fn add_rates(&mut self, step: &StepMetrics, numbers: &mut Numbers) {
        let before = self.samples.replace(step.samples);
        if step.secs <= 0.0 {
            return;
        }
        numbers.add("waiting/share", step.data_secs / step.secs);
        // A step without an update has no samples.
        if let Some(before) = before.filter(|_| step.applied) {
            let num_samples = step.samples.saturating_sub(before) as f64;
            numbers.add("throughput/samples_per_sec", num_samples / step.secs);
        }
        if step.flops > 0 {
            let flops_per_sec = step.flops_per_sec();
            numbers.add("arithmetic/flops_per_sec", flops_per_sec);
            if let Some(peak) = self.peak_flops {
                numbers.add("mfu/share", flops_per_sec / peak);
            }
        }
    }
}

struct Numbers(Vec<Number>);

impl Numbers {
    fn add(&mut self, name: impl Into<Cow<'static, str>>, value: f64) {
        let name = name.into();
        self.0.push(Number { name, value });
    }

    fn add_step(&mut self, step: &StepMetrics) {
        self.add("loss/training", step.loss);
        self.add("gradient_norm/all", step.gradient_norm);
        for (component, norm) in &step.norm_by_component {
            self.add(format!("gradient_norm/{component}"), norm.0);
        }
        self.add("learning_rate/learning_rate", step.lr);
        if let Some(bytes) = step.resident_bytes {
            self.add("memory/resident", bytes as f64);
        }
        if let Some(spent) = step.spent {
            self.add("spent/spent", spent);
        }
        self.add("step_secs/step", step.secs);
        self.add("step_secs/data", step.data_secs);
        if let Some(ranks) = &step.ranks {
            self.add("step_secs/passes", ranks.passes_secs);
            self.add("step_secs/communication", ranks.communication_secs);
            self.add("step_secs/update", ranks.update_secs);
        }
    }

    fn add_test(&mut self, test: &TestMetrics) {
        self.add("loss/test", test.loss);
        self.add_bins("test_loss", "", &test.bins);
        if let Some(average) = &test.ema {
            self.add("loss/test_averaged_weights", average.loss);
            self.add_bins("test_loss", "averaged ", &average.bins);
        }
        if let Some(TableLoss { loss, .. }) = &test.training {
            self.add("loss/fixed_training_samples", *loss);
        }
        if let Some(TableLoss { loss, .. }) = &test.ema_training {
            self.add("loss/fixed_training_samples_averaged_weights", *loss);
        }
    }

    fn add_vitals(&mut self, vitals: &VitalsMetrics) {
        self.add_bins("training_loss", "", &vitals.training.bins);
        if let Some(logit) = vitals.largest_logit {
            self.add("attention/largest_logit", logit.0);
        }
        for module in &vitals.modules {
            let Vitals {
                module,
                gradient_norm,
                moment_ratio,
                update_ratio,
            } = module;
            self.add(format!("module_gradient_norm/{module}"), *gradient_norm);
            self.add(format!("moment_ratio/{module}"), *moment_ratio);
            self.add(format!("update_ratio/{module}"), *update_ratio);
        }
    }

    /// Adds the losses by noise level; that of a range without samples has no meaning.
    fn add_bins(&mut self, chart: &str, what: &str, bins: &[SigmaBin]) {
        for bin in bins.iter().filter(|bin| bin.count > 0) {
            let SigmaBin { from, to, loss, .. } = bin;
            self.add(format!("{chart}/{what}sigma {from:.2}-{to:.2}"), *loss);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn step(step: u64, samples: u64, applied: bool) -> Event {
        Event::Step(StepMetrics {
            step,
            samples,
            epoch: 0,
            loss: 0.5,
            gradient_norm: f64::NAN,
            norm_by_component: BTreeMap::new(),
            lr: 1e-4,
            secs: 2.0,
            data_secs: 0.5,
            flops: 1000,
            applied,
            spent: Some(3.0),
            resident_bytes: Some(4096),
            ranks: None,
        })
    }

    fn value(numbers: &[Number], name: &str) -> Option<f64> {
        let found = numbers.iter().find(|number| number.name == name);
        found.map(|number| number.value)
    }

    #[test]
    fn rates_follow_from_two_steps_and_a_rewind_has_none() {
        let mut curves = Curves::default();
        let first = curves.of(&step(1, 8, true));
        assert_eq!(value(&first, "throughput/samples_per_sec"), None);
        assert_eq!(value(&first, "waiting/share"), Some(0.25));
        assert_eq!(value(&first, "arithmetic/flops_per_sec"), Some(500.0));
        assert!(value(&first, "gradient_norm/all").is_some_and(f64::is_nan));
        let second = curves.of(&step(2, 16, true));
        assert_eq!(value(&second, "throughput/samples_per_sec"), Some(4.0));
        let rewound = curves.of(&step(3, 0, false));
        assert_eq!(value(&rewound, "throughput/samples_per_sec"), None);
        let after = curves.of(&step(4, 8, true));
        assert_eq!(value(&after, "throughput/samples_per_sec"), Some(4.0));
    }

    #[test]
    fn every_number_belongs_to_a_chart() {
        let bin = |count| SigmaBin {
            from: 0.0,
            to: 0.5,
            loss: 0.25,
            standard_error: 0.1,
            count,
        };
        let table = TableLoss {
            loss: 1.0,
            bins: vec![bin(3), bin(0)],
        };
        let test = Event::Test(TestMetrics {
            step: 1,
            samples: 8,
            loss: 1.0,
            bins: vec![bin(3)],
            training: Some(table.clone()),
            ema: Some(table.clone()),
            ema_training: Some(table.clone()),
            secs: 1.0,
        });
        let vitals = Event::Vitals(VitalsMetrics {
            step: 1,
            modules: vec![Vitals {
                module: "unet.mid_block".to_owned(),
                gradient_norm: 1.0,
                moment_ratio: 1.0,
                update_ratio: 1.0,
            }],
            training: table,
            largest_logit: None,
        });
        let mut curves = Curves::default();
        let mut num_found = 0;
        for event in [step(1, 8, true), test, vitals] {
            for number in curves.of(&event) {
                let (chart, curve) = number.name.split_once('/').expect("a chart and a curve");
                assert!(CHARTS.iter().any(|known| known.name == chart), "{chart}");
                assert!(!curve.is_empty());
                num_found += 1;
            }
        }
        assert_eq!(num_found, 9 + 6 + 4);
    }
}
