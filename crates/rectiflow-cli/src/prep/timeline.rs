//! `rectiflow prep --timeline`: what each thread did, as a picture: a row for each thread, a colour
//! for each stage.

use std::{fmt::Write, path::Path};

use rectiflow_data::{
    durable,
    prep::{EncoderSecs, Stretch, Work},
};

use crate::terminal::numbers::{duration, short};

/// Sizes in pixels.
const WIDTH: f64 = 1200.0;
const LEFT: f64 = 110.0;
const ROW: f64 = 34.0;
const TOP: f64 = 62.0;
/// Stretches that are nearer to each other than this are drawn as one.
const GAP: f64 = 0.4;

/// Each stage, its name and its colour.
const STAGES: [(Work, &str, &str); 9] = [
    (Work::Facts, "facts", "#9e9e9e"),
    (Work::Read, "read", "#17becf"),
    (Work::Decode, "decode", "#1f77b4"),
    (Work::Sign, "signature", "#9467bd"),
    (Work::Resize, "resize", "#2ca02c"),
    (Work::Text, "text", "#bcbd22"),
    (Work::Wait, "waits", "#ffd8d8"),
    (Work::Encode, "encode", "#ff7f0e"),
    (Work::Write, "write", "#8c564b"),
];

/// Writes the picture.
pub(super) fn write(
    path: &Path,
    stretches: &[Stretch],
    encoder: &EncoderSecs,
) -> anyhow::Result<()> {
    durable::write(path, svg(stretches, encoder).as_bytes())?;
    Ok(())
}

/// How the encoder's thread spent its time, in a line. Empty if nothing was encoded.
pub(super) fn describe(encoder: &EncoderSecs) -> String {
    if encoder.encode == 0.0 {
        return String::new();
    }
    let after_first = encoder.encode + encoder.wait + encoder.write;
    format!(
        "the VAE worked for {}, {} % of the time from the first picture on; it waited {} for the \
         first and {} for others",
        duration(encoder.encode),
        short(100.0 * encoder.encode / after_first, 3),
        duration(encoder.first_wait),
        duration(encoder.wait)
    )
}

fn svg(stretches: &[Stretch], encoder: &EncoderSecs) -> String {
    let end_secs = stretches.iter().map(|it| it.to_secs).fold(0.0, f64::max);
    let num_threads = stretches.iter().map(|it| it.thread + 1).max().unwrap_or(1);
    let height = TOP + ROW * num_threads as f64 + 30.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    let scale = (WIDTH - LEFT - 20.0) / end_secs.max(1e-9);
    let drawn = &mut svg;
    write_text(drawn, (10.0, 20.0), &describe(encoder));
    legend(drawn);
    for thread in 0..num_threads {
        let y = TOP + ROW * thread as f64;
        let name = match thread {
            0 => "VAE, writing".to_owned(),
            number => format!("pictures {number}"),
        };
        write_text(drawn, (10.0, y + 20.0), &name);
        for (work, _, colour) in STAGES {
            let own = stretches.iter();
            let own = own.filter(|it| it.thread == thread && it.work == work);
            for (from, to) in joined(own, scale) {
                let (x, width) = (LEFT + from, (to - from).max(0.2));
                let bar = ROW - 8.0;
                push(
                    drawn,
                    format_args!(
                        "<rect x=\"{x:.2}\" y=\"{y}\" width=\"{width:.2}\" height=\"{bar}\" \
                     fill=\"{colour}\"/>\n"
                    ),
                );
            }
        }
    }
    axis(drawn, end_secs, scale, height);
    svg + "</svg>\n"
}

/// From and to of stretches in pixels, those that touch as one.
fn joined<'a>(stretches: impl Iterator<Item = &'a Stretch>, scale: f64) -> Vec<(f64, f64)> {
    let mut spans: Vec<(f64, f64)> = Vec::new();
    for stretch in stretches {
        let (from, to) = (stretch.from_secs * scale, stretch.to_secs * scale);
        match spans.last_mut() {
            Some(last) if from - last.1 < GAP => last.1 = to.max(last.1),
            _ => spans.push((from, to)),
        }
    }
    spans
}

fn legend(svg: &mut String) {
    for (number, (_, name, colour)) in STAGES.iter().enumerate() {
        let x = LEFT + 110.0 * number as f64;
        push(
            svg,
            format_args!(
                "<rect x=\"{x}\" y=\"34\" width=\"14\" height=\"14\" fill=\"{colour}\"/>\n"
            ),
        );
        write_text(svg, (x + 20.0, 46.0), name);
    }
}

/// Seconds below the rows.
fn axis(svg: &mut String, end_secs: f64, scale: f64, height: f64) {
    for tick in 0..=10 {
        let secs = end_secs * f64::from(tick) / 10.0;
        write_text(
            svg,
            (LEFT + secs * scale - 12.0, height - 12.0),
            &format!("{secs:.1} s"),
        );
    }
}

fn write_text(svg: &mut String, (x, y): (f64, f64), text: &str) {
    push(
        svg,
        format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>\n"),
    );
}

fn push(svg: &mut String, text: std::fmt::Arguments<'_>) {
    svg.write_fmt(text).expect("a string takes all text");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thread_has_a_row_and_each_stage_its_colour() {
        let stretch = |work, thread, from_secs: f64| Stretch {
            work,
            thread,
            from_secs,
            to_secs: from_secs + 1.0,
        };
        let stretches = [
            stretch(Work::Decode, 1, 0.0),
            stretch(Work::Wait, 0, 0.0),
            stretch(Work::Encode, 0, 1.0),
            stretch(Work::Encode, 0, 2.0),
            stretch(Work::Write, 0, 3.0),
        ];
        let encoder = EncoderSecs {
            encode: 2.0,
            first_wait: 1.0,
            wait: 0.0,
            write: 1.0,
        };
        let svg = svg(&stretches, &encoder);
        assert!(svg.contains(">VAE, writing</text>") && svg.contains(">pictures 1</text>"));
        assert!(
            svg.contains("66.7 % of the time from the first picture on"),
            "{svg}"
        );
        for (work, _, colour) in STAGES {
            // One in the legend; two stretches that touch are one.
            let is_there = stretches.iter().any(|it| it.work == work);
            let expected = 1 + usize::from(is_there);
            assert_eq!(svg.matches(colour).count(), expected, "{work:?}");
        }
        assert_eq!(svg.matches('<').count(), svg.matches('>').count());
    }
}
