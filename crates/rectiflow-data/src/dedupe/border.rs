//! The part of a picture inside its borders of one colour.
//!
//! First frames, also frames in frames. A side's frame is made of lines of one colour that end at
//! an edge: a line of which most pixels are of another colour. A sky that drifts away from its
//! first colour is not a frame. Then the margin around a drawing or a text: lines of one colour up
//! to the first with some content. A margin hides a frame of its colour: with both trimmed, a white
//! page and its copy in a white frame are the same.

use crate::dedupe::grid::Rect;

/// A pixel is of another colour if one of its channels differs by more than this many levels.
const OTHER_LEVELS: usize = 20;
/// The percentage of such pixels that makes a line the edge of the picture.
const EDGE_PERCENT: usize = 50;
/// A line is of the border's colour if the mean of its differences is at most this many levels.
const SAME_LEVELS: usize = 5;
/// Lines between the border and the edge, or 1 of 64: what a resize and a JPEG make of an edge.
const EDGE_LINES: usize = 12;
const EDGE_SHARE: usize = 64;
/// Frames in frames that are trimmed.
const MAX_ROUNDS: usize = 16;
/// The part of a pixel's difference that counts as content is what exceeds this many levels: JPEG
/// at quality 50 leaves less beside most strokes.
const NOISE_LEVELS: usize = 12;
/// A line has content if one pixel differs by this many levels and what counts is at least one
/// level a pixel. A sum, since a smaller copy spreads a thin stroke over fewer, paler pixels.
const CONTENT_LEVELS: usize = 32;
/// A margin leaves at least this share (1 of n) of a side.
const MIN_MARGIN_SHARE: usize = 4;
/// What is left has at least this many pixels a side and this share (1 of n) of the side.
const MIN_SIDE: usize = 16;
const MIN_SHARE: usize = 8;

/// An RGB8 picture, `[h, w, 3]`, that somebody else owns.
#[derive(Debug, Clone, Copy)]
pub struct Pixels<'a> {
    /// `[h, w, 3]`
    pub bytes: &'a [u8],
    /// Width in pixels.
    pub width: usize,
}

impl<'a> Pixels<'a> {
    /// Row `y`, `[w, 3]`.
    pub fn row(&self, y: usize) -> &'a [u8] {
        let stride = 3 * self.width;
        &self.bytes[y * stride..(y + 1) * stride]
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.bytes.len() / (3 * self.width)
    }

    fn colour(&self, x: usize, y: usize) -> [u8; 3] {
        let at = 3 * (y * self.width + x);
        [self.bytes[at], self.bytes[at + 1], self.bytes[at + 2]]
    }
}

/// The part of a picture that its frames and its margin leave. The whole picture if it has none, if
/// it is of one colour, or if too little would be left.
pub fn core(pixels: &Pixels<'_>) -> Rect {
    let whole = Rect {
        left: 0,
        top: 0,
        width: pixels.width,
        height: pixels.height(),
    };
    let mut rect = whole;
    for _ in 0..MAX_ROUNDS {
        let Some(trimmed) = trim(pixels, rect, Rule::Frame) else {
            return rect;
        };
        if trimmed == rect || is_too_small(trimmed, whole, MIN_SHARE) {
            break;
        }
        rect = trimmed;
    }
    let trimmed = trim(pixels, rect, Rule::Margin).unwrap_or(rect);
    if is_too_small(trimmed, rect, MIN_MARGIN_SHARE) {
        rect
    } else {
        trimmed
    }
}

fn is_too_small(rect: Rect, whole: Rect, share: usize) -> bool {
    let small = |side: usize, of: usize| side < MIN_SIDE.min(of) || side * share < of;
    small(rect.width, whole.width) || small(rect.height, whole.height)
}

/// Where a border ends.
#[derive(Clone, Copy, PartialEq)]
enum Rule {
    /// At an edge.
    Frame,
    /// At content.
    Margin,
}

/// Trims one border from each side. `None` if all is of one colour.
fn trim(pixels: &Pixels<'_>, rect: Rect, rule: Rule) -> Option<Rect> {
    let row = |y: usize| Line {
        pixels,
        rect,
        at: rect.top + y,
        is_row: true,
    };
    let top = band(rect.height, rule, row)?;
    let low = band(rect.height - top, rule, |y| row(rect.height - 1 - y)).unwrap_or(0);
    // Columns are read inside the rows that are left, which are fewer.
    let rect = Rect {
        top: rect.top + top,
        height: rect.height - top - low,
        ..rect
    };
    let column = |x: usize| Line {
        pixels,
        rect,
        at: rect.left + x,
        is_row: false,
    };
    let left = band(rect.width, rule, column).unwrap_or(0);
    let right = band(rect.width - left, rule, |x| column(rect.width - 1 - x)).unwrap_or(0);
    Some(Rect {
        left: rect.left + left,
        width: rect.width - left - right,
        ..rect
    })
}

/// The number of lines of a side's border; 0 if they do not end. `None` if all is of one colour.
fn band<'a>(length: usize, rule: Rule, line: impl Fn(usize) -> Line<'a>) -> Option<usize> {
    let border = line(0).mean();
    let allowed = EDGE_LINES.max(length / EDGE_SHARE);
    let (mut between, mut flat) = (0, true);
    for at in 0..length {
        match line(at).compare(border, rule) {
            Compared::Flat => between = 0,
            Compared::Same => {
                between = 0;
                flat = false;
            }
            Compared::Between => {
                between += 1;
                flat = false;
            }
            Compared::End => return Some(at),
        }
        if between > allowed {
            break;
        }
    }
    (!flat).then_some(0)
}

enum Compared {
    /// No pixel is of another colour.
    Flat,
    Same,
    Between,
    End,
}

/// A row or a column of a part of a picture.
struct Line<'a> {
    pixels: &'a Pixels<'a>,
    rect: Rect,
    at: usize,
    is_row: bool,
}

impl Line<'_> {
    fn num_pixels(&self) -> usize {
        if self.is_row {
            self.rect.width
        } else {
            self.rect.height
        }
    }

    fn colours(&self) -> impl Iterator<Item = [u8; 3]> {
        (0..self.num_pixels()).map(|i| {
            if self.is_row {
                self.pixels.colour(self.rect.left + i, self.at)
            } else {
                self.pixels.colour(self.at, self.rect.top + i)
            }
        })
    }

    fn mean(&self) -> [u8; 3] {
        let mut sums = [0usize; 3];
        for colour in self.colours() {
            for (sum, value) in sums.iter_mut().zip(colour) {
                *sum += usize::from(value);
            }
        }
        sums.map(|sum| (sum / self.num_pixels()) as u8)
    }

    fn compare(&self, border: [u8; 3], rule: Rule) -> Compared {
        let (mut sum, mut others, mut content, mut largest) = (0, 0, 0, 0);
        for colour in self.colours() {
            let mut difference = 0;
            for (value, border) in colour.into_iter().zip(border) {
                difference = difference.max(usize::from(value.abs_diff(border)));
            }
            sum += difference;
            others += usize::from(difference > OTHER_LEVELS);
            content += difference.saturating_sub(NOISE_LEVELS);
            largest = largest.max(difference);
        }
        let ends = match rule {
            Rule::Frame => 100 * others >= EDGE_PERCENT * self.num_pixels(),
            Rule::Margin => largest >= CONTENT_LEVELS && content >= self.num_pixels(),
        };
        if ends {
            Compared::End
        } else if largest <= OTHER_LEVELS {
            if sum <= SAME_LEVELS * self.num_pixels() {
                Compared::Flat
            } else {
                Compared::Between
            }
        } else if sum <= SAME_LEVELS * self.num_pixels() {
            Compared::Same
        } else {
            Compared::Between
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A picture of one colour with a checkered rectangle.
    fn framed(width: usize, height: usize, rect: Rect) -> Vec<u8> {
        let mut bytes = vec![250; 3 * width * height];
        for y in rect.top..rect.top + rect.height {
            for x in rect.left..rect.left + rect.width {
                let shade = if (x / 3 + y / 3) % 2 == 0 { 20 } else { 130 };
                bytes[3 * (y * width + x)..][..3].fill(shade);
            }
        }
        bytes
    }

    const RECT: Rect = Rect {
        left: 10,
        top: 6,
        width: 60,
        height: 50,
    };

    #[test]
    fn a_border_of_one_colour_is_trimmed() {
        let bytes = framed(80, 64, RECT);
        assert_eq!(
            core(&Pixels {
                bytes: &bytes,
                width: 80
            }),
            RECT
        );
    }

    #[test]
    fn a_frame_around_a_border_is_trimmed_too() {
        let inner = framed(80, 64, RECT);
        let mut bytes = vec![0; 3 * 100 * 80];
        for y in 0..64 {
            bytes[3 * ((y + 8) * 100 + 12)..][..240].copy_from_slice(&inner[240 * y..][..240]);
        }
        let found = core(&Pixels {
            bytes: &bytes,
            width: 100,
        });
        assert_eq!(
            found,
            Rect {
                left: 22,
                top: 14,
                ..RECT
            }
        );
    }

    #[test]
    fn the_margin_of_a_drawing_is_trimmed_to_its_strokes() {
        let mut bytes = vec![255; 3 * 80 * 64];
        for i in 10..54 {
            bytes[3 * (i * 80 + i)..][..3].fill(0);
        }
        let found = core(&Pixels {
            bytes: &bytes,
            width: 80,
        });
        assert_eq!(
            found,
            Rect {
                left: 10,
                top: 10,
                width: 44,
                height: 44
            }
        );
    }

    #[test]
    fn a_sky_is_not_a_border() {
        let mut bytes = framed(
            80,
            64,
            Rect {
                left: 0,
                top: 40,
                width: 80,
                height: 24,
            },
        );
        for y in 0..40 {
            bytes[240 * y..][..240].fill(100 + y as u8 / 2);
        }
        let whole = Rect {
            left: 0,
            top: 0,
            width: 80,
            height: 64,
        };
        assert_eq!(
            core(&Pixels {
                bytes: &bytes,
                width: 80
            }),
            whole
        );
    }

    #[test]
    fn a_picture_of_one_colour_and_a_small_mark_stay_whole() {
        let whole = Rect {
            left: 0,
            top: 0,
            width: 80,
            height: 64,
        };
        let flat = vec![90; 3 * 80 * 64];
        assert_eq!(
            core(&Pixels {
                bytes: &flat,
                width: 80
            }),
            whole
        );
        let marked = framed(
            80,
            64,
            Rect {
                left: 40,
                top: 30,
                width: 5,
                height: 5,
            },
        );
        assert_eq!(
            core(&Pixels {
                bytes: &marked,
                width: 80
            }),
            whole
        );
    }
}
