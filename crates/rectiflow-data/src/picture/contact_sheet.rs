//! Pictures side by side as one picture, with a label at each row and column.
//!
//! For looking at samples: rows are, for example, prompts, and columns seeds or steps. The font is
//! the 8x8 bitmap font of early home computers, enlarged by whole pixels: it needs no font file and
//! no shaping, and it is legible at every scale. Characters that it lacks (anything beyond Latin
//! and Greek) are drawn as a question mark.

use font8x8::{BASIC_FONTS, GREEK_FONTS, LATIN_FONTS, UnicodeFonts};

use crate::picture::Picture;

/// Side of a character before it is enlarged.
const GLYPH_PX: u32 = 8;
/// Largest number of characters in a line of a row label.
const ROW_LABEL_CHARS: usize = 24;
/// Largest number of lines of a column label.
const COLUMN_LABEL_LINES: usize = 5;
const BACKGROUND: [u8; 3] = [255; 3];
const INK: [u8; 3] = [32; 3];

/// Pictures in rows and columns.
#[derive(Debug)]
pub struct ContactSheet<'a> {
    /// One label per row, or none at all.
    pub row_labels: &'a [String],
    /// One label per column, or none at all.
    pub column_labels: &'a [String],
    /// Number of columns, at least 1.
    pub columns: usize,
    /// The pictures, row by row; the last row can be short. Sizes can differ: each picture is
    /// centred in its cell.
    pub pictures: &'a [Picture],
}

impl ContactSheet<'_> {
    /// Draws the grid as one picture on white.
    ///
    /// # Panics
    /// If there is no picture, if `columns` is 0, or if there are labels, but not one per row or
    /// column.
    pub fn draw(&self) -> Picture {
        let layout = Layout::new(self);
        let mut canvas = Picture::filled(layout.width_px(), layout.height_px(), BACKGROUND);
        layout.draw_column_labels(&mut canvas);
        layout.draw_row_labels(&mut canvas);
        for (index, picture) in self.pictures.iter().enumerate() {
            let (x, y) = layout.cell(index / self.columns, index % self.columns);
            let x = x + (layout.cell_width_px - picture.width_px()) / 2;
            let y = y + (layout.cell_height_px - picture.height_px()) / 2;
            canvas.paste(picture, x, y);
        }
        canvas
    }

    fn rows(&self) -> usize {
        self.pictures.len().div_ceil(self.columns)
    }

    fn assert_complete(&self) {
        assert!(
            self.columns > 0 && !self.pictures.is_empty(),
            "a grid has at least one picture and one column"
        );
        let rows = self.rows();
        assert!(
            self.row_labels.is_empty() || self.row_labels.len() == rows,
            "{} row labels for {rows} rows",
            self.row_labels.len()
        );
        assert!(
            self.column_labels.is_empty() || self.column_labels.len() == self.columns,
            "{} column labels",
            self.column_labels.len()
        );
    }
}

/// Positions and sizes, in pixels.
struct Layout {
    scale: u32,
    margin_px: u32,
    rows: u32,
    columns: u32,
    cell_width_px: u32,
    cell_height_px: u32,
    left_px: u32,
    top_px: u32,
    row_labels: Vec<Vec<String>>,
    column_labels: Vec<Vec<String>>,
}

impl Layout {
    fn new(grid: &ContactSheet<'_>) -> Self {
        grid.assert_complete();
        // Every cell has room for the largest picture.
        let widths = grid.pictures.iter().map(Picture::width_px);
        let heights = grid.pictures.iter().map(Picture::height_px);
        let cell_width_px = widths.max().unwrap_or(1);
        let cell_height_px = heights.max().unwrap_or(1);
        // Letters grow with the pictures, so that a label takes the same part of a grid at every
        // size.
        let scale = (cell_width_px.min(cell_height_px) / 192).clamp(1, 8);
        let glyph_px = GLYPH_PX * scale;
        let line_px = glyph_px + scale;
        let margin_px = glyph_px / 2;

        // Labels take the room that their lines need.
        let max_lines = (cell_height_px / line_px).max(1) as usize;
        let row_labels = wrap_all(grid.row_labels, ROW_LABEL_CHARS, max_lines);
        let column_chars = (cell_width_px / glyph_px).max(1) as usize;
        let column_labels = wrap_all(grid.column_labels, column_chars, COLUMN_LABEL_LINES);
        let tallest = column_labels.iter().map(Vec::len).max().unwrap_or(0) as u32;
        Self {
            scale,
            margin_px,
            rows: grid.rows() as u32,
            columns: grid.columns as u32,
            cell_width_px,
            cell_height_px,
            left_px: label_room_px(margin_px, widest_line(&row_labels) * glyph_px),
            top_px: label_room_px(margin_px, tallest * line_px),
            row_labels,
            column_labels,
        }
    }

    fn draw_column_labels(&self, canvas: &mut Picture) {
        for (column, label) in self.column_labels.iter().enumerate() {
            let (x, _) = self.cell(0, column);
            draw_lines(canvas, label, (x, self.margin_px), self.scale);
        }
    }

    fn draw_row_labels(&self, canvas: &mut Picture) {
        for (row, label) in self.row_labels.iter().enumerate() {
            let (_, y) = self.cell(row, 0);
            let text_px = label.len() as u32 * self.line_px();
            let y = y + self.cell_height_px.saturating_sub(text_px) / 2;
            draw_lines(canvas, label, (self.margin_px, y), self.scale);
        }
    }

    /// Top left of a cell.
    fn cell(&self, row: usize, column: usize) -> (u32, u32) {
        let x = self.left_px + column as u32 * (self.cell_width_px + self.margin_px);
        let y = self.top_px + row as u32 * (self.cell_height_px + self.margin_px);
        (x, y)
    }

    fn line_px(&self) -> u32 {
        (GLYPH_PX + 1) * self.scale
    }

    fn width_px(&self) -> u32 {
        self.left_px + self.columns * (self.cell_width_px + self.margin_px)
    }

    fn height_px(&self) -> u32 {
        self.top_px + self.rows * (self.cell_height_px + self.margin_px)
    }
}

/// Cuts a label into lines of at most `width` characters, at spaces where possible. Three dots
/// replace the text beyond `lines` lines.
fn wrap(label: &str, width: usize, lines: usize) -> Vec<String> {
    let mut wrapped: Vec<String> = Vec::new();
    for word in label.split_whitespace() {
        let letters: Vec<char> = word.chars().collect();
        for piece in letters.chunks(width) {
            let piece: String = piece.iter().collect();
            match wrapped.last_mut() {
                Some(line) if line.chars().count() + 1 + piece.chars().count() <= width => {
                    line.push(' ');
                    line.push_str(&piece);
                }
                _ => wrapped.push(piece),
            }
        }
    }
    if wrapped.len() > lines {
        wrapped.truncate(lines);
        let last = wrapped.last_mut().expect("at least one line is allowed");
        *last = with_dots(last, width);
    }
    wrapped
}

/// A line of at most `width` characters that ends in three dots.
fn with_dots(line: &str, width: usize) -> String {
    let kept = line.chars().take(width.saturating_sub(3));
    kept.chain("...".chars()).take(width).collect()
}

fn wrap_all(labels: &[String], width: usize, lines: usize) -> Vec<Vec<String>> {
    labels
        .iter()
        .map(|label| wrap(label, width, lines))
        .collect()
}

/// Number of characters of the longest line.
fn widest_line(labels: &[Vec<String>]) -> u32 {
    let lines = labels.iter().flatten();
    lines.map(|line| line.chars().count()).max().unwrap_or(0) as u32
}

/// The room for labels of `text_px`, with a margin on both sides; one margin without labels.
fn label_room_px(margin_px: u32, text_px: u32) -> u32 {
    if text_px == 0 {
        margin_px
    } else {
        2 * margin_px + text_px
    }
}

fn draw_lines(canvas: &mut Picture, lines: &[String], (x, y): (u32, u32), scale: u32) {
    for (row, line) in lines.iter().enumerate() {
        for (column, letter) in line.chars().enumerate() {
            let left = x + column as u32 * GLYPH_PX * scale;
            let top = y + row as u32 * (GLYPH_PX + 1) * scale;
            draw_glyph(canvas, glyph(letter), (left, top), scale);
        }
    }
}

fn draw_glyph(canvas: &mut Picture, glyph: [u8; 8], (left, top): (u32, u32), scale: u32) {
    for (row, bits) in (0..).zip(glyph) {
        for column in (0..GLYPH_PX).filter(|column| bits >> column & 1 == 1) {
            canvas.fill(left + column * scale, top + row * scale, scale, scale, INK);
        }
    }
}

/// The bits of a character: one byte per row, the leftmost pixel in the lowest bit.
fn glyph(letter: char) -> [u8; 8] {
    let fonts = BASIC_FONTS
        .get(letter)
        .or_else(|| LATIN_FONTS.get(letter))
        .or_else(|| GREEK_FONTS.get(letter));
    fonts
        .or_else(|| BASIC_FONTS.get('?'))
        .expect("the font has a question mark")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn labels_are_wrapped_at_spaces_and_cut_with_dots() {
        assert_eq!(wrap("a cat on a mat", 6, 9), ["a cat", "on a", "mat"]);
        assert_eq!(wrap("incomprehensible", 6, 9), ["incomp", "rehens", "ible"]);
        assert_eq!(wrap("a cat on a mat", 6, 2), ["a cat", "on ..."]);
        assert_eq!(wrap("abcdef g", 2, 1), [".."]);
        assert_eq!(wrap("été 猫", 8, 1), ["été 猫"]);
        assert!(wrap("  ", 6, 2).is_empty());
    }

    #[test]
    fn every_picture_is_in_its_cell_and_nothing_else_is_coloured() {
        let red = Picture::filled(64, 40, [255, 0, 0]);
        let blue = Picture::filled(40, 64, [0, 0, 255]);
        let pictures = [red.clone(), blue.clone(), blue];
        let (rows, columns) = (labels(&["first", "second"]), labels(&["a", "b"]));
        let grid = ContactSheet {
            row_labels: &rows,
            column_labels: &columns,
            columns: 2,
            pictures: &pictures,
        };
        let drawn = grid.draw();
        let layout = Layout::new(&grid);
        assert_eq!((layout.cell_width_px, layout.cell_height_px), (64, 64));
        let centre = |row, column| {
            let (x, y) = layout.cell(row, column);
            drawn.at(x + 32, y + 32)
        };
        assert_eq!(
            [centre(0, 0), centre(0, 1), centre(1, 0)],
            [[255, 0, 0], [0, 0, 255], [0, 0, 255]]
        );
        assert_eq!(centre(1, 1), BACKGROUND, "the last row is short");
        // The sheet holds every pixel of the pictures, and the labels.
        let count = |colour| {
            drawn
                .pixels()
                .chunks(3)
                .filter(|&pixel| pixel == colour)
                .count()
        };
        assert_eq!(count([255, 0, 0]), 64 * 40);
        assert_eq!(count([0, 0, 255]), 2 * 64 * 40);
        assert!(count(INK) > 0, "labels are drawn");
    }

    #[test]
    fn an_l_is_upright_and_not_mirrored() {
        let mut canvas = Picture::filled(8, 8, BACKGROUND);
        draw_lines(&mut canvas, &labels(&["L"]), (0, 0), 1);
        let ink = |x: u32, y: u32| canvas.at(x, y) == INK;
        let column = |x| (0..8).filter(|&y| ink(x, y)).count();
        let (left, right) = (
            (0..4).map(column).sum::<usize>(),
            (4..8).map(column).sum::<usize>(),
        );
        let (top, bottom) = (
            (0..8).filter(|&x| ink(x, 0)).count(),
            (0..8).filter(|&x| ink(x, 6)).count(),
        );
        assert!(
            left > right && bottom > top,
            "{left} {right} {top} {bottom}"
        );
    }

    #[test]
    fn a_grid_without_labels_has_only_margins() {
        let pictures = [Picture::filled(512, 512, [9; 3])];
        let drawn = ContactSheet {
            row_labels: &[],
            column_labels: &[],
            columns: 1,
            pictures: &pictures,
        }
        .draw();
        assert_eq!((drawn.width_px(), drawn.height_px()), (512 + 16, 512 + 16));
    }

    #[test]
    #[should_panic(expected = "row labels")]
    fn labels_must_match_the_rows() {
        let pictures = [Picture::filled(8, 8, [0; 3])];
        ContactSheet {
            row_labels: &labels(&["a", "b"]),
            column_labels: &[],
            columns: 1,
            pictures: &pictures,
        }
        .draw();
    }
}
