//! Numbers as people read them.
//!
//! indicatif's `HumanDuration` rounds to one unit ("2 hours") and `DecimalBytes` always shows two
//! decimals, so [`duration`] and [`bytes`] stay.

use indicatif::HumanCount;

/// 1234567 as "1,234,567".
pub(crate) fn grouped(number: u64) -> String {
    HumanCount(number).to_string()
}

/// A time span with the two units that matter: "0.4 s", "37 s", "4 min 5 s", "2 h 10 min", "3 d 4
/// h".
pub(crate) fn duration(secs: f64) -> String {
    if !secs.is_finite() || secs < 0.0 {
        return "?".to_owned();
    }
    if secs < 9.95 {
        return format!("{secs:.1} s");
    }
    let whole = secs.round() as u64;
    let (minutes, hours, days) = (whole / 60, whole / 3600, whole / 86_400);
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{minutes} min {} s", whole % 60),
        3600..86_400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// A size in decimal units: "812 B", "3.4 kB", "1.2 GB".
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 || value >= 99.5 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Arithmetic: "812 FLOP", "3.4 GFLOP", "20.4 TFLOP".
pub(crate) fn flops(count: f64) -> String {
    const UNITS: [&str; 8] = ["", "k", "M", "G", "T", "P", "E", "Z"];
    let thousands = (count.max(1.0).log10() / 3.0).floor().clamp(0.0, 7.0);
    format!(
        "{} {}FLOP",
        short(count / 1000f64.powf(thousands), 3),
        UNITS[thousands as usize]
    )
}

/// At most `digits` significant digits, without trailing zeros: 0.00010, 3 -> "0.0001".
pub(crate) fn short(value: f64, digits: usize) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let magnitude = value.abs().log10().floor() as i32;
    if !(-4..7).contains(&magnitude) {
        let text = format!("{value:.*e}", digits - 1);
        let (mantissa, exponent) = text.split_once('e').expect("the format has an exponent");
        return format!("{}e{exponent}", trimmed(mantissa));
    }
    let decimals = (digits as i32 - 1 - magnitude).max(0) as usize;
    trimmed(&format!("{value:.decimals$}")).to_owned()
}

/// The median; NaN for an empty slice.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => f64::midpoint(sorted[even / 2 - 1], sorted[even / 2]),
    }
}

/// A number beside an axis: "0.05", "200", "20k", "1.5M".
pub(crate) fn tick(value: f64) -> String {
    match value.abs() {
        1e6..1e9 => format!("{}M", short(value / 1e6, 3)),
        1e4..1e6 => format!("{}k", short(value / 1e3, 3)),
        _ => short(value, 3),
    }
}

fn trimmed(text: &str) -> &str {
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        text
    }
}

/// A table for a terminal: the first row is the heading; columns of numbers are aligned to the
/// right.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let num_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let mut columns = Vec::new();
    for index in 0..num_columns {
        columns.push(Column::of(rows, index));
    }
    let mut lines = Vec::new();
    for row in rows {
        lines.push(line(row, &columns));
    }
    lines.join("\n")
}

/// The layout of a column of a table.
struct Column {
    width: usize,
    to_right: bool,
}

impl Column {
    fn of(rows: &[Vec<String>], index: usize) -> Self {
        let mut width = 0;
        let mut to_right = true;
        for (position, row) in rows.iter().enumerate() {
            let text = cell(row, index);
            width = width.max(text.chars().count());
            // The heading of a column of numbers is text.
            to_right &= position == 0 || text.starts_with(|c: char| c.is_ascii_digit());
        }
        Self { width, to_right }
    }
}

/// A cell of a row; empty if the row is shorter.
fn cell(row: &[String], index: usize) -> &str {
    row.get(index).map_or("", String::as_str)
}

fn line(row: &[String], columns: &[Column]) -> String {
    let mut cells = Vec::new();
    for (index, column) in columns.iter().enumerate() {
        let text = cell(row, index);
        let width = column.width;
        cells.push(if column.to_right {
            format!("{text:>width$}")
        } else {
            format!("{text:<width$}")
        });
    }
    cells.join("  ").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(grouped),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(
            [0.4, 37.2, 245.0, 7800.0, 273_600.0].map(duration),
            ["0.4 s", "37 s", "4 min 5 s", "2 h 10 min", "3 d 4 h"]
        );
        assert_eq!(duration(f64::NAN), "?");
        assert_eq!(
            [0.05, 200.0, 20_000.0, 1.5e6].map(tick),
            ["0.05", "200", "20k", "1.5M"]
        );
        assert_eq!(
            [812, 3_400, 999_600, 512_000_000].map(bytes),
            ["812 B", "3.4 kB", "1.0 MB", "512 MB"]
        );
        assert_eq!(
            [812.0, 2.0352e13, 3.05e21].map(flops),
            ["812 FLOP", "20.4 TFLOP", "3.05 ZFLOP"]
        );
        assert_eq!(
            [0.0001, 1.5e-9, 12.3456, 20_000.0, 3e8].map(|v| short(v, 3)),
            ["0.0001", "1.5e-9", "12.3", "20000", "3e8"]
        );
    }

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!(
            [&[3.0][..], &[9.0, 1.0, 2.0], &[4.0, 1.0, 2.0, 9.0]].map(median),
            [3.0, 2.0, 3.0]
        );
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn tables_align_numbers_to_the_right() {
        let rows = [["bucket", "rows"], ["96x96", "7"], ["128x64", "1,204"]]
            .map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(
            table(&rows[..]),
            "bucket   rows\n 96x96      7\n128x64  1,204"
        );
    }
}
