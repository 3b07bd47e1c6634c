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
        for (column, label) in layout.column_labels.iter().enumerate() {
            let (x, _) = layout.cell(0, column);
            draw_lines(&mut canvas, label, (x, layout.margin_px), layout.scale);
        }
        for (row, label) in layout.row_labels.iter().enumerate() {
            let (_, y) = layout.cell(row, 0);
            let text_px = label.len() as u32 * layout.line_px();
            let y = y + layout.cell_height_px.saturating_sub(text_px) / 2;
            draw_lines(&mut canvas, label, (layout.margin_px, y), layout.scale);
        }
        for (index, picture) in self.pictures.iter().enumerate() {
            let (x, y) = layout.cell(index / self.columns, index % self.columns);
            let x = x + (layout.cell_width_px - picture.width_px()) / 2;
            let y = y + (layout.cell_height_px - picture.height_px()) / 2;
            canvas.paste(picture, x, y);
        }
        canvas
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
        assert!(
            grid.columns > 0 && !grid.pictures.is_empty(),
            "a grid has at least one picture and one column"
        );
        let rows = grid.pictures.len().div_ceil(grid.columns);
        let fits = |labels: &[String], count| labels.is_empty() || labels.len() == count;
        assert!(
            fits(grid.row_labels, rows),
            "{} row labels for {rows} rows",
            grid.row_labels.len()
        );
        assert!(
            fits(grid.column_labels, grid.columns),
            "{} column labels",
            grid.column_labels.len()
        );

        let largest = |side: fn(&Picture) -> u32| grid.pictures.iter().map(side).max().unwrap_or(1);
        let (cell_width_px, cell_height_px) =
            (largest(Picture::width_px), largest(Picture::height_px));
        // Letters grow with the pictures, so that a label takes the same part of a grid at every
        // size.
        let scale = (cell_width_px.min(cell_height_px) / 192).clamp(1, 8);
        let margin_px = GLYPH_PX * scale / 2;
        let glyph_px = GLYPH_PX * scale;

        let max_lines = (cell_height_px / (glyph_px + scale)).max(1) as usize;
        let wrap_all = |labels: &[String], width, lines| {
            labels.iter().map(|l| wrap(l, width, lines)).collect()
        };
        let row_labels: Vec<Vec<String>> = wrap_all(grid.row_labels, ROW_LABEL_CHARS, max_lines);
        let column_chars = (cell_width_px / glyph_px).max(1) as usize;
        let column_labels: Vec<Vec<String>> =
            wrap_all(grid.column_labels, column_chars, COLUMN_LABEL_LINES);

        let widest = row_labels
            .iter()
            .flatten()
            .map(|line| line.chars().count())
            .max()
            .unwrap_or(0) as u32;
        let tallest = column_labels.iter().map(Vec::len).max().unwrap_or(0) as u32;
        let left_px = if widest == 0 {
            margin_px
        } else {
            2 * margin_px + widest * glyph_px
        };
        let top_px = if tallest == 0 {
            margin_px
        } else {
            2 * margin_px + tallest * (glyph_px + scale)
        };
        let (rows, columns) = (rows as u32, grid.columns as u32);
        Self {
            scale,
            margin_px,
            rows,
            columns,
            cell_width_px,
            cell_height_px,
            left_px,
            top_px,
            row_labels,
            column_labels,
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
        *last = last
            .chars()
            .take(width.saturating_sub(3))
            .chain("...".chars())
            .take(width)
            .collect();
    }
    wrapped
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
