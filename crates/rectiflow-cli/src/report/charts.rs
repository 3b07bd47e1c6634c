//! The charts of a report: which curves a run has, and how they are drawn.

use std::fmt::Write;

use rectiflow_train::metrics::{StepMetrics, TestMetrics};

use crate::{
    report::{
        plot::{Axis, Plot, Series, Style, escape},
        run_record::RunRecord,
    },
    terminal::numbers::short,
};

/// Curves are smoothed over this share of a run.
const SMOOTHED: f64 = 0.02;

/// Every chart that the run has numbers for, as a section of the page.
pub(crate) fn section(record: &RunRecord) -> String {
    if record.steps.is_empty() {
        return String::new();
    }
    let (steps, tests) = (&record.steps, &record.tests);
    let mut charts = vec![loss(steps, tests)];
    charts.extend(by_noise(tests));
    charts.push(speed(steps));
    charts.push(gradient(steps));
    charts.push(learning_rate(steps));
    let mut section = "<section><h2>Curves</h2>\n<div class=\"charts\">\n".to_owned();
    for chart in charts {
        let _ = writeln!(
            section,
            "<figure><figcaption>{}</figcaption>{}</figure>",
            escape(&chart.title),
            chart.svg()
        );
    }
    section + "</div></section>\n"
}

fn loss(steps: &[StepMetrics], tests: &[TestMetrics]) -> Plot {
    let raw = curve(steps, |step| step.loss);
    let tests: Vec<_> = tests
        .iter()
        .map(|test| (test.samples as f64, test.loss))
        .collect();
    let mut series = vec![
        Series {
            name: "each step".into(),
            points: raw.clone(),
            style: Style::Faint(0),
        },
        Series {
            name: "smoothed".into(),
            points: smoothed(&raw),
            style: Style::Line(0),
        },
    ];
    if !tests.is_empty() {
        series.push(Series {
            name: "held-out pictures".into(),
            points: tests,
            style: Style::Dots(1),
        });
    }
    chart("Loss", "mean squared error", series, Axis::log)
}

/// The test loss by range of noise levels; `None` without test samples.
fn by_noise(tests: &[TestMetrics]) -> Option<Plot> {
    let bins = &tests.first()?.bins;
    // The loss of a bin without samples has no meaning.
    let series = bins
        .iter()
        .enumerate()
        .filter(|(_, bin)| bin.count > 0)
        .map(|(index, bin)| Series {
            name: format!("{}–{}", short(bin.from, 2), short(bin.to, 2)),
            points: tests
                .iter()
                .filter_map(|t| Some((t.samples as f64, t.bins.get(index)?.loss)))
                .collect(),
            style: Style::Ramp(index as f64 / (bins.len() - 1).max(1) as f64),
        });
    let title = "Loss on held-out pictures, by noise level (0 picture, 1 noise)";
    Some(chart(
        title,
        "mean squared error",
        series.collect(),
        Axis::log,
    ))
}

fn speed(steps: &[StepMetrics]) -> Plot {
    let mut before = steps.first().map_or(0, |first| first.samples);
    let rates: Vec<(f64, f64)> = steps
        .iter()
        .skip(1)
        .map(|step| {
            let samples = step.samples.saturating_sub(before);
            before = step.samples;
            (step.samples as f64, samples as f64 / step.secs.max(1e-9))
        })
        .collect();
    let series = Series {
        name: String::new(),
        points: smoothed(&rates),
        style: Style::Line(2),
    };
    chart("Samples a second", "samples/s", vec![series], |label| {
        Axis::linear(label).with_zero()
    })
}

fn gradient(steps: &[StepMetrics]) -> Plot {
    let raw = curve(steps, |step| step.gradient_norm);
    let series = vec![
        Series {
            name: "each step".into(),
            points: raw.clone(),
            style: Style::Faint(3),
        },
        Series {
            name: "smoothed".into(),
            points: smoothed(&raw),
            style: Style::Line(3),
        },
    ];
    chart(
        "Norm of the gradient, before clipping",
        "norm",
        series,
        Axis::log,
    )
}

fn learning_rate(steps: &[StepMetrics]) -> Plot {
    let series = Series {
        name: String::new(),
        points: curve(steps, |step| step.lr),
        style: Style::Line(4),
    };
    chart("Learning rate", "rate", vec![series], |label| {
        Axis::linear(label).with_zero()
    })
}

fn chart(
    title: &str,
    y: &'static str,
    series: Vec<Series>,
    axis: impl Fn(&'static str) -> Axis,
) -> Plot {
    Plot {
        title: title.to_owned(),
        x: Axis::linear("samples"),
        y: axis(y),
        series,
    }
}

fn curve(steps: &[StepMetrics], value: impl Fn(&StepMetrics) -> f64) -> Vec<(f64, f64)> {
    steps
        .iter()
        .map(|step| (step.samples as f64, value(step)))
        .collect()
}

/// An exponential moving average over [`SMOOTHED`] of the points, with bias correction. Points that
/// are not finite are left out.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let share = 1.0 / (points.len() as f64 * SMOOTHED).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let finite = points.iter().filter(|point| point.1.is_finite());
    let average = finite.map(|&(x, y)| {
        sum += share * (y - sum);
        weight += share * (1.0 - weight);
        (x, sum / weight)
    });
    average.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothing_keeps_a_constant_and_passes_over_what_is_not_finite() {
        let mut points: Vec<_> = (0..1000).map(|i| (f64::from(i), 2.5)).collect();
        points[500].1 = f64::NAN;
        let smooth = smoothed(&points);
        assert_eq!(smooth.len(), 999);
        assert!(smooth.iter().all(|point| (point.1 - 2.5).abs() < 1e-12));
    }

    #[test]
    fn smoothing_starts_at_the_first_value_and_follows_a_step() {
        let points: Vec<_> = (0..1000)
            .map(|i| (f64::from(i), if i < 500 { 1.0 } else { 3.0 }))
            .collect();
        let smooth = smoothed(&points);
        assert!((smooth[0].1 - 1.0).abs() < 1e-12 && (smooth[499].1 - 1.0).abs() < 1e-12);
        assert!(smooth[500].1 < 1.2 && smooth[999].1 > 2.99);
    }
}
