//! Line charts as SVG, for a file that needs no script and no other file.
//!
//! Colours are CSS variables (`--c0` to `--c7`, `--ink`, `--faint`, `--grid`), which the file sets
//! for light and dark. The drawing is 480 units wide, small enough that its text can be read on a
//! phone.

use std::fmt::Write;

use crate::terminal::numbers;

const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 290.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 12.0;
const BOTTOM: f64 = 42.0;
/// Height of a line of the legend.
const LEGEND_LINE: f64 = 18.0;
/// Width of a character of the legend, on average.
const LETTER: f64 = 7.0;
/// Largest number of points of a curve, more than twice the chart's width in pixels.
const MAX_POINTS: usize = 1000;

/// The colours, light and dark, for pages that hold charts.
pub(crate) const COLOURS_LIGHT: &str = "--ink:#1d2733;--faint:#6a7785;--grid:#dfe4ea;--c0:#c2410c;--c1:#1d6fb8;\
    --c2:#2f855a;--c3:#8b5cb8;--c4:#b7791f;--c5:#0e7c86;--c6:#b83280;--c7:#5a6673";
/// As [`COLOURS_LIGHT`], on a dark ground.
pub(crate) const COLOURS_DARK: &str = "--ink:#e6ebf0;--faint:#93a1b0;--grid:#2c3742;--c0:#fb8c5a;--c1:#63b3ed;\
    --c2:#68d391;--c3:#c4a1ea;--c4:#f0c05a;--c5:#5fd4dd;--c6:#f29ac6;--c7:#a9b5c1";

/// An axis of a chart.
#[derive(Debug, Clone)]
pub(crate) struct Axis {
    label: String,
    log: bool,
    zero: bool,
}

impl Axis {
    /// A linear axis.
    pub(crate) fn linear(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            log: false,
            zero: false,
        }
    }

    /// The same axis, with 0 in its range.
    pub(crate) fn with_zero(self) -> Self {
        Self { zero: true, ..self }
    }
}

/// The look of a curve; the number is its colour.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Style {
    /// A line.
    Line(usize),
    /// A thick line.
    Bold(usize),
}

/// A curve.
#[derive(Debug, Clone)]
pub(crate) struct Series {
    /// Name in the legend; an empty name is not listed.
    pub(crate) name: String,
    /// From left to right. Points that are not finite are left out.
    pub(crate) points: Vec<(f64, f64)>,
    /// Its look.
    pub(crate) style: Style,
}

/// A chart.
#[derive(Debug, Clone)]
pub(crate) struct Plot {
    /// Title, and the alternative text for screen readers.
    pub(crate) title: String,
    /// The horizontal axis.
    pub(crate) x: Axis,
    /// The vertical axis.
    pub(crate) y: Axis,
    /// The curves, the last on top.
    pub(crate) series: Vec<Series>,
}

impl Plot {
    /// A complete SVG file.
    pub(crate) fn standalone_svg(&self) -> String {
        let style = format!(
            "<style>svg{{{COLOURS_LIGHT};background:#fff}}\
             @media (prefers-color-scheme:dark){{svg{{{COLOURS_DARK};background:#14191f}}}}</style>"
        );
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{}\n",
            self.element(&style)
        )
    }

    fn element(&self, style: &str) -> String {
        let title = escape(&self.title);
        let (legend, top) = self.legend();
        let frame = Frame::new(self, top);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             role=\"img\" \
             aria-label=\"{title}\" font-family=\"system-ui,sans-serif\" \
             font-size=\"13\">{style}<title>{title}</title>"
        );
        svg += &frame.axes(&self.x.label, &self.y.label);
        for series in &self.series {
            svg += &curve(series, &frame);
        }
        svg + &legend + "</svg>"
    }

    /// The names of the curves in lines above the chart, and where the chart begins below them.
    fn legend(&self) -> (String, f64) {
        let (mut text, mut x, mut y) = (String::new(), LEFT, 14.0);
        let named: Vec<&Series> = self
            .series
            .iter()
            .filter(|series| !series.name.is_empty())
            .collect();
        if named.is_empty() {
            return (text, 10.0);
        }
        for series in named {
            let width = 24.0 + LETTER * series.name.chars().count() as f64;
            if x + width > WIDTH && x > LEFT {
                (x, y) = (LEFT, y + LEGEND_LINE);
            }
            let (colour, opacity, thickness) = look(series.style);
            let _ = write!(
                text,
                "<path d=\"M{x:.1} {:.1}h14\" stroke=\"{colour}\" stroke-width=\"{}\" \
                 stroke-opacity=\"{opacity}\"/>\
                 <text x=\"{:.1}\" y=\"{y:.1}\" fill=\"var(--ink)\">{}</text>",
                y - 4.0,
                thickness + 1.0,
                x + 18.0,
                escape(&series.name)
            );
            x += width + 8.0;
        }
        (text, y + 12.0)
    }
}

/// The colour, opacity and thickness of a style.
fn look(style: Style) -> (String, f64, f64) {
    let variable = |colour: usize| format!("var(--c{})", colour % 8);
    match style {
        Style::Line(colour) => (variable(colour), 1.0, 1.6),
        Style::Bold(colour) => (variable(colour), 1.0, 3.0),
    }
}

fn curve(series: &Series, frame: &Frame) -> String {
    let finite: Vec<_> = series
        .points
        .iter()
        .filter_map(|&point| frame.place(point))
        .collect();
    let points = thinned(&finite);
    let (colour, opacity, thickness) = look(series.style);
    let mut path = String::new();
    for (index, (x, y)) in points.iter().enumerate() {
        let _ = write!(path, "{}{x:.1} {y:.1}", if index == 0 { "M" } else { "L" });
    }
    let mut svg = format!(
        "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{thickness}\" \
         stroke-opacity=\"{opacity}\" stroke-linejoin=\"round\"/>"
    );
    if points.len() == 1 {
        for (x, y) in &points {
            let _ = write!(
                svg,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\" fill=\"{colour}\"/>"
            );
        }
    }
    svg
}

/// At most [`MAX_POINTS`] points: of each run of neighbours the lowest and the highest, so that no
/// spike is lost.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    let run = points.len().div_ceil(MAX_POINTS / 2);
    let mut kept = Vec::new();
    for neighbours in points.chunks(run) {
        let by_height = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let mut ends = [
            neighbours.iter().min_by(by_height),
            neighbours.iter().max_by(by_height),
        ]
        .map(|end| *end.expect("a chunk has at least one point"));
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        kept.extend(ends);
    }
    kept
}

/// The drawn rectangle and the ranges it shows.
struct Frame {
    x: Scale,
    y: Scale,
    top: f64,
}

impl Frame {
    fn new(plot: &Plot, top: f64) -> Self {
        let points = || plot.series.iter().flat_map(|series| &series.points);
        let x = Scale::new(points().map(|point| point.0), &plot.x);
        let y = Scale::new(points().map(|point| point.1), &plot.y);
        Self { x, y, top }
    }

    /// Position of a point in the drawing; `None` if it is not finite.
    fn place(&self, (x, y): (f64, f64)) -> Option<(f64, f64)> {
        let (x, y) = (self.x.fraction(x)?, self.y.fraction(y)?);
        Some((
            LEFT + x * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y * (HEIGHT - BOTTOM - self.top),
        ))
    }

    fn axes(&self, x_label: &str, y_label: &str) -> String {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        let mut svg = String::new();
        for tick in self.y.ticks(5) {
            let Some((_, y)) = self.place((self.x.from, tick)) else {
                continue;
            };
            let _ = write!(
                svg,
                "<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"var(--grid)\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"var(--faint)\">{}</text>",
                LEFT - 6.0,
                y + 4.5,
                numbers::tick(tick)
            );
        }
        for tick in self.x.ticks(5) {
            let Some((x, _)) = self.place((tick, self.y.from)) else {
                continue;
            };
            let _ = write!(
                svg,
                "<path d=\"M{x:.1} {bottom}v5\" stroke=\"var(--faint)\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" \
                 fill=\"var(--faint)\">{}</text>",
                bottom + 18.0,
                numbers::tick(tick)
            );
        }
        let _ = write!(
            svg,
            "<path d=\"M{LEFT} {bottom}H{right}\" stroke=\"var(--faint)\"/>\
             <text x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"var(--faint)\">{}</text>\
             <text transform=\"translate(13 {:.1})rotate(-90)\" text-anchor=\"end\" \
             fill=\"var(--faint)\">{}</text>",
            HEIGHT - 6.0,
            escape(x_label),
            self.top,
            escape(y_label)
        );
        svg
    }
}

/// The range of an axis.
struct Scale {
    from: f64,
    to: f64,
    log: bool,
}

impl Scale {
    fn new(values: impl Iterator<Item = f64>, axis: &Axis) -> Self {
        let drawable = values.filter(|value| value.is_finite() && (!axis.log || *value > 0.0));
        let (mut from, mut to) = drawable.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| {
            (a.min(v), b.max(v))
        });
        if from > to {
            (from, to) = if axis.log { (0.1, 1.0) } else { (0.0, 1.0) };
        }
        if axis.zero && !axis.log {
            from = from.min(0.0);
        }
        if from == to {
            to = if axis.log {
                to * 2.0
            } else {
                to + to.abs().max(1.0)
            };
            // Twice the largest number is none, and an axis to infinity has no end of ticks.
            to = to.min(f64::MAX);
            if from == to {
                from = to / 2.0;
            }
        }
        Self {
            from,
            to,
            log: axis.log,
        }
    }

    fn fraction(&self, value: f64) -> Option<f64> {
        if !value.is_finite() || (self.log && value <= 0.0) {
            return None;
        }
        let warp = |value: f64| if self.log { value.ln() } else { value };
        Some((warp(value) - warp(self.from)) / (warp(self.to) - warp(self.from)))
    }

    /// About `count` round numbers inside the range.
    fn ticks(&self, count: usize) -> Vec<f64> {
        if self.log && self.to / self.from >= 4.0 {
            return self.log_ticks();
        }
        let raw = (self.to - self.from) / count as f64;
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|factor| factor * power)
            .into_iter()
            .find(|&step| step >= raw);
        let step = step.unwrap_or(10.0 * power);
        if !step.is_normal() {
            // The range is smaller than what a number can tell apart, or larger than the largest.
            return Vec::new();
        }
        let first = (self.from / step - 1e-9).ceil() as i64;
        let last = (self.to / step + 1e-9).floor() as i64;
        (first..=last).map(|index| index as f64 * step).collect()
    }

    /// Powers of ten, with their multiples by 2 and 5 if there are few.
    fn log_ticks(&self) -> Vec<f64> {
        let (first, last) = (
            self.from.log10().floor() as i32,
            self.to.log10().ceil() as i32,
        );
        let factors: &[f64] = if last - first > 4 {
            &[1.0]
        } else {
            &[1.0, 2.0, 5.0]
        };
        let all = (first..=last)
            .flat_map(|power| factors.iter().map(move |factor| factor * 10f64.powi(power)));
        all.filter(|tick| (self.from..=self.to).contains(tick))
            .collect()
    }
}

/// Escapes text for SVG and HTML, in elements and in attributes.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            _ => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: Vec<(f64, f64)>) -> Plot {
        let series = vec![Series {
            name: "a <b>".into(),
            points,
            style: Style::Line(0),
        }];
        Plot {
            title: "T & U".into(),
            x: Axis::linear("x"),
            y: Axis {
                log: true,
                ..Axis::linear("y")
            },
            series,
        }
    }

    #[test]
    fn a_chart_is_well_formed_and_leaves_out_what_cannot_be_drawn() {
        let svg = plot(vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 0.0), (3.0, 10.0)]).element("");
        assert!(
            svg.contains("a &lt;b&gt;") && svg.contains("aria-label=\"T &amp; U\""),
            "{svg}"
        );
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(
            svg.contains(&format!(
                "M{LEFT:.1} {:.1}L{:.1} 26.0\"",
                HEIGHT - BOTTOM,
                WIDTH - RIGHT
            )),
            "{svg}"
        );
    }

    #[test]
    fn a_chart_of_nothing_and_of_one_point_can_be_drawn() {
        for points in [vec![], vec![(5.0, 0.5)], vec![(5.0, f64::INFINITY)]] {
            let svg = plot(points).element("");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn thinning_keeps_spikes() {
        let points: Vec<_> = (0..100_000)
            .map(|i| (f64::from(i), if i == 54_321 { 9.0 } else { 1.0 }))
            .collect();
        let thin = thinned(&points);
        assert!(
            thin.len() <= MAX_POINTS && thin.contains(&(54_321.0, 9.0)),
            "{}",
            thin.len()
        );
        assert!(thin.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let scale = |from, to, log| Scale { from, to, log };
        assert_eq!(
            scale(0.0, 1000.0, false).ticks(5),
            [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]
        );
        assert_eq!(scale(0.15, 1.2, true).ticks(5), [0.2, 0.5, 1.0]);
        assert_eq!(scale(1e-8, 1.0, true).ticks(5).len(), 9);
    }
}
