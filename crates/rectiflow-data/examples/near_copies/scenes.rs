//! Drawn scenes of 16 kinds, from a seed, with the labels of natural twins.

use font8x8::legacy::BASIC_LEGACY;

use crate::canvas::{Canvas, Colour, Dice, fractal, mix};

/// The kinds of scenes, in the order in which they take turns.
pub(crate) const KINDS: [&str; 16] = [
    "landscape",
    "shapes",
    "texture",
    "face",
    "lines",
    "text",
    "scan",
    "flat",
    "gradient",
    "chart",
    "panels",
    "sprite",
    "night",
    "composite",
    "figure",
    "pattern",
];

/// A picture with what is known of it before any hash.
pub(crate) struct Scene {
    pub(crate) canvas: Canvas,
    pub(crate) kind: &'static str,
    /// Scenes of one group are labelled as twins.
    pub(crate) group: u64,
    /// The four corners' colours of a picture that shows nothing else: flat, gradient, blank page.
    pub(crate) plain: Option<[Colour; 4]>,
}

/// Whether two scenes were labelled as natural twins: one group, or plain with corners within 12.
pub(crate) fn labelled(a: &Scene, b: &Scene) -> bool {
    if a.group == b.group {
        return true;
    }
    let (Some(a), Some(b)) = (&a.plain, &b.plain) else {
        return false;
    };
    let near = |b: [Colour; 4]| {
        let pairs = a.iter().flatten().zip(b.iter().flatten());
        pairs.fold(0, |worst, (&a, &b)| worst.max(a.abs_diff(b))) <= 12
    };
    near(*b) || near([b[1], b[0], b[3], b[2]])
}

/// The scene number `index` of a seed. Every 20th is a twin of the one 16 before it: the same scene
/// with another exposure and grain and a small mark.
pub(crate) fn scene(seed: u64, index: u64) -> Scene {
    let twin = index % 20 == 19 && index >= 16;
    let source = if twin { index - 16 } else { index };
    let mut dice = Dice::new(seed, source);
    let kind = KINDS[source as usize % KINDS.len()];
    let (width, height) = (dice.whole(320, 769), dice.whole(320, 769));
    let blank = Canvas::filled(width, height, [255; 3]);
    let (mut canvas, plain) = draw(kind, blank, &mut dice);
    if twin {
        let mut jitter = Dice::new(seed ^ 0x7717, index);
        canvas.noise(&mut jitter, 5.0);
        let (x, y) = (jitter.whole(0, width), jitter.whole(0, height));
        canvas.ellipse(x as f32, y as f32, 9.0, 9.0, jitter.colour());
    }
    Scene {
        canvas,
        kind,
        group: source,
        plain,
    }
}

type Drawn = (Canvas, Option<[Colour; 4]>);

fn draw(kind: &str, mut canvas: Canvas, dice: &mut Dice) -> Drawn {
    let c = &mut canvas;
    let mut plain = None;
    match kind {
        "landscape" => landscape(c, dice),
        "shapes" => {
            let colour = dice.colour();
            c.rect(0, 0, c.width as i32, c.height as i32, colour);
            let count = dice.whole(4, 40);
            shapes(c, dice, count, 0.3);
        }
        "texture" => texture(c, dice),
        "face" => face(c, dice),
        "lines" => lines(c, dice),
        "text" => text(c, dice),
        "scan" => plain = scan(c, dice),
        "flat" => {
            let colour = if dice.chance(0.4) {
                dice.between(235, 255)
            } else {
                dice.colour()
            };
            c.rect(0, 0, c.width as i32, c.height as i32, colour);
            plain = Some([colour; 4]);
        }
        "gradient" => {
            let (a, b, angle) = (dice.colour(), dice.colour(), dice.real(0.0, 1.0));
            c.gradient(a, b, angle);
            let (right, low) = (c.width - 1, c.height - 1);
            plain = Some([
                c.get(0, 0),
                c.get(right, 0),
                c.get(0, low),
                c.get(right, low),
            ]);
        }
        "chart" => chart(c, dice),
        "panels" => panels(c, dice),
        "sprite" => sprite(c, dice),
        "night" => night(c, dice),
        "composite" => {
            texture(c, dice);
            let count = dice.whole(2, 8);
            shapes(c, dice, count, 0.4);
            c.noise(dice, 8.0);
        }
        "figure" => figure(c, dice),
        _ => pattern(c, dice),
    }
    (canvas, plain)
}

fn landscape(c: &mut Canvas, dice: &mut Dice) {
    let (w, h) = (c.width as f32, c.height as f32);
    let (top, low) = (dice.between(60, 220), dice.between(140, 255));
    c.gradient(top, low, 0.25);
    if dice.chance(0.6) {
        let radius = dice.real(0.03, 0.12) * w;
        let (x, y) = (dice.real(0.1, 0.9) * w, dice.real(0.05, 0.4) * h);
        c.ellipse(x, y, radius, radius, dice.between(200, 255));
    }
    let ridges = dice.whole(2, 5);
    let mut colour = dice.between(60, 180);
    for ridge in 0..ridges {
        let base = h * (0.35 + 0.5 * ridge as f32 / ridges as f32);
        let (height, scale, seed) = (dice.real(0.1, 0.35) * h, dice.real(2.0, 7.0), dice.next());
        for x in 0..c.width {
            let peak = fractal(seed, x as f32 / w * scale, 0.5, 5);
            let y = base - height * (peak - 0.4);
            c.rect(x as i32, y as i32, 1, c.height as i32, colour);
        }
        colour = mix(colour, dice.between(0, 120), 0.6);
    }
    for _ in 0..dice.whole(0, 25) {
        let (x, y, size) = (
            dice.real(0.0, w),
            dice.real(0.7, 1.0) * h,
            dice.real(0.02, 0.1) * h,
        );
        c.polygon(
            &[
                (x - size / 2.5, y),
                (x + size / 2.5, y),
                (x, y - 1.8 * size),
            ],
            colour,
        );
    }
    c.noise(dice, 6.0);
}

fn shapes(c: &mut Canvas, dice: &mut Dice, count: usize, largest: f32) {
    let (w, h) = (c.width as f32, c.height as f32);
    for _ in 0..count {
        let (x, y) = (dice.real(0.0, w), dice.real(0.0, h));
        let (a, b) = (dice.real(0.03, largest) * w, dice.real(0.03, largest) * h);
        let colour = dice.colour();
        match dice.whole(0, 4) {
            0 => c.ellipse(x, y, a, b, colour),
            1 => c.rect(x as i32, y as i32, a as i32, b as i32, colour),
            2 => {
                let points: Vec<(f32, f32)> = (0..dice.whole(3, 7))
                    .map(|_| (x + dice.real(-a, a), y + dice.real(-b, b)))
                    .collect();
                c.polygon(&points, colour);
            }
            _ => {
                let thick = dice.real(2.0, 12.0);
                c.line((x, y), (x + a - b, y + b), thick, colour);
            }
        }
    }
}

fn texture(c: &mut Canvas, dice: &mut Dice) {
    let seeds = [dice.next(), dice.next()];
    let scale = dice.real(2.0, 12.0);
    let colours = [dice.colour(), dice.colour(), dice.colour()];
    for y in 0..c.height {
        for x in 0..c.width {
            let (u, v) = (x as f32 / 512.0 * scale, y as f32 / 512.0 * scale);
            let first = fractal(seeds[0], u, v, 6);
            let second = fractal(seeds[1], u * 0.7, v * 0.7, 4);
            let base = mix(colours[0], colours[1], first * 2.0 - 0.5);
            c.set(
                x as i32,
                y as i32,
                mix(base, colours[2], second * 1.6 - 0.5),
            );
        }
    }
}

fn face(c: &mut Canvas, dice: &mut Dice) {
    let (w, h) = (c.width as f32, c.height as f32);
    let (back, skin, hair) = (dice.colour(), dice.between(150, 250), dice.colour());
    c.rect(0, 0, c.width as i32, c.height as i32, back);
    let (cx, cy) = (w * dice.real(0.4, 0.6), h * dice.real(0.45, 0.6));
    let (rx, ry) = (w * dice.real(0.2, 0.3), h * dice.real(0.25, 0.35));
    c.ellipse(cx, cy - ry * 0.2, rx * 1.25, ry * dice.real(1.1, 1.4), hair);
    if dice.chance(0.5) {
        let long = dice.real(1.0, 2.2) * ry;
        c.rect(
            (cx - rx * 1.2) as i32,
            cy as i32,
            (rx * 2.4) as i32,
            long as i32,
            hair,
        );
    }
    c.rect(
        (cx - rx * 0.3) as i32,
        cy as i32,
        (rx * 0.6) as i32,
        (ry * 1.5) as i32,
        skin,
    );
    c.ellipse(cx, cy, rx, ry, skin);
    let (eye, spread, size) = (dice.colour(), dice.real(0.35, 0.55), dice.real(0.1, 0.24));
    for side in [-1.0, 1.0] {
        let x = cx + side * spread * rx;
        c.ellipse(x, cy - ry * 0.1, rx * size * 1.3, ry * size, [250; 3]);
        c.ellipse(x, cy - ry * 0.1, rx * size * 0.8, ry * size * 0.9, eye);
        c.ellipse(x, cy - ry * 0.1, rx * size * 0.3, ry * size * 0.4, [10; 3]);
    }
    let mouth = dice.real(0.1, 0.4);
    c.ellipse(
        cx,
        cy + ry * 0.55,
        rx * mouth,
        ry * dice.real(0.03, 0.15),
        dice.between(80, 200),
    );
    let shirt = dice.colour();
    c.ellipse(cx, h * 1.1, w * dice.real(0.35, 0.5), h * 0.25, shirt);
    if dice.chance(0.4) {
        let hat = dice.colour();
        c.rect(
            (cx - rx) as i32,
            (cy - ry * 1.4) as i32,
            (rx * 2.0) as i32,
            (ry * 0.5) as i32,
            hat,
        );
    }
}

fn lines(c: &mut Canvas, dice: &mut Dice) {
    let ink = dice.between(0, 60);
    let (w, h) = (c.width as f32, c.height as f32);
    for _ in 0..dice.whole(3, 18) {
        let mut at = (dice.real(0.1, 0.9) * w, dice.real(0.1, 0.9) * h);
        let (mut angle, bend) = (dice.real(0.0, 6.3), dice.real(-0.05, 0.05));
        let thick = dice.real(1.0, 5.0);
        for _ in 0..dice.whole(10, 120) {
            angle += bend + dice.real(-0.15, 0.15);
            let to = (at.0 + 6.0 * angle.cos(), at.1 + 6.0 * angle.sin());
            c.line(at, to, thick, ink);
            at = to;
        }
    }
}

fn glyphs(c: &mut Canvas, dice: &mut Dice, mut x: i32, y: i32, word: usize, zoom: i32) -> i32 {
    let ink = [20, 20, 24];
    for _ in 0..word {
        let glyph = BASIC_LEGACY[dice.whole(97, 123)];
        for (row, bits) in glyph.iter().enumerate() {
            for column in (0..8).filter(|column| bits >> column & 1 == 1) {
                c.rect(x + zoom * column, y + zoom * row as i32, zoom, zoom, ink);
            }
        }
        x += 8 * zoom;
    }
    x
}

/// Pages share their size, margins and line pitch: only the words differ.
fn text(c: &mut Canvas, dice: &mut Dice) {
    let zoom = dice.whole(1, 3) as i32;
    let (margin, pitch) = (40, 8 * zoom + 6);
    *c = Canvas::filled(540, 720, [252, 252, 250]);
    let right = c.width as i32 - margin;
    let mut y = margin;
    while y + 8 * zoom < c.height as i32 - margin {
        let mut x = margin + if dice.chance(0.15) { 30 } else { 0 };
        let end = if dice.chance(0.15) {
            right - dice.whole(0, 300) as i32
        } else {
            right
        };
        loop {
            let word = dice.whole(1, 11);
            if x + 8 * zoom * word as i32 > end {
                break;
            }
            x = glyphs(c, dice, x, y, word, zoom) + 8 * zoom;
        }
        y += if dice.chance(0.08) { 2 * pitch } else { pitch };
    }
}

/// A nearly white page: a paper colour with shade and grain; a third of them show nothing else.
fn scan(c: &mut Canvas, dice: &mut Dice) -> Option<[Colour; 4]> {
    let (a, b) = (dice.between(238, 255), dice.between(238, 255));
    c.gradient(a, b, dice.real(0.0, 1.0));
    let (right, low) = (c.width - 1, c.height - 1);
    let plain = [
        c.get(0, 0),
        c.get(right, 0),
        c.get(0, low),
        c.get(right, low),
    ];
    let marks = if dice.chance(0.33) {
        0
    } else {
        dice.whole(3, 12)
    };
    for _ in 0..marks {
        let ink = dice.between(120, 225);
        let (w, h) = (c.width as f32, c.height as f32);
        let from = (dice.real(0.1, 0.9) * w, dice.real(0.1, 0.9) * h);
        if dice.chance(0.3) {
            let radius = dice.real(0.02, 0.12) * w;
            c.ellipse(from.0, from.1, radius, radius, ink);
        } else {
            let to = (
                from.0 + dice.real(-0.4, 0.4) * w,
                from.1 + dice.real(-0.1, 0.1) * h,
            );
            c.line(from, to, dice.real(1.0, 5.0), ink);
        }
    }
    c.noise(dice, 3.0);
    (marks == 0).then_some(plain)
}

fn chart(c: &mut Canvas, dice: &mut Dice) {
    *c = Canvas::filled(640, 480, [255; 3]);
    let (left, top, width, height) = (60, 30, 550, 390);
    for step in 0..=5 {
        c.rect(left, top + height * step / 5, width, 1, [200; 3]);
    }
    c.rect(left, top, 2, height, [30; 3]);
    c.rect(left, top + height, width, 2, [30; 3]);
    let ink = [[31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40]][dice.whole(0, 4)];
    if dice.chance(0.5) {
        let bars = dice.whole(4, 14) as i32;
        for bar in 0..bars {
            let tall = (dice.real(0.05, 0.98) * height as f32) as i32;
            let wide = width / bars;
            c.rect(
                left + bar * wide + wide / 8,
                top + height - tall,
                wide * 3 / 4,
                tall,
                ink,
            );
        }
    } else {
        for series in 0..dice.whole(1, 4) {
            let (seed, scale) = (dice.next(), dice.real(2.0, 10.0));
            let at = |x: i32| {
                let value = fractal(seed, x as f32 / width as f32 * scale, 0.3, 4);
                (left as f32 + x as f32, top as f32 + height as f32 * value)
            };
            for x in (0..width - 5).step_by(5) {
                c.line(
                    at(x),
                    at(x + 5),
                    3.0,
                    mix(ink, [90, 0, 120], series as f32 / 3.0),
                );
            }
        }
    }
}

fn panels(c: &mut Canvas, dice: &mut Dice) {
    let (columns, rows, gap) = (dice.whole(1, 4), dice.whole(2, 5), dice.whole(6, 16));
    let (w, h) = (
        (c.width - gap) / columns - gap,
        (c.height - gap) / rows - gap,
    );
    for row in 0..rows {
        for column in 0..columns {
            let shade = dice.whole(120, 256) as u8;
            let mut panel = Canvas::filled(w, h, [shade; 3]);
            let count = dice.whole(2, 9);
            shapes(&mut panel, dice, count, 0.4);
            for value in panel.pixels.chunks_exact_mut(3) {
                let grey = value.iter().map(|&v| u32::from(v)).sum::<u32>() / 3;
                value.fill(grey as u8);
            }
            c.paste(&panel, gap + column * (w + gap), gap + row * (h + gap));
        }
    }
}

fn sprite(c: &mut Canvas, dice: &mut Dice) {
    let back = dice.colour();
    c.rect(0, 0, c.width as i32, c.height as i32, back);
    let cells = dice.whole(5, 13);
    let cell = (c.width.min(c.height) * 9 / 10 / cells) as i32;
    let palette = [dice.colour(), dice.colour(), dice.colour()];
    let left = (c.width as i32 - cell * cells as i32) / 2;
    let top = (c.height as i32 - cell * cells as i32) / 2;
    let symmetric = dice.chance(0.6);
    for row in 0..cells {
        for column in 0..cells {
            if symmetric && column >= cells.div_ceil(2) {
                break;
            }
            if dice.chance(0.45) {
                continue;
            }
            let colour = palette[dice.whole(0, 3)];
            let mut put = |column: usize| {
                c.rect(
                    left + column as i32 * cell,
                    top + row as i32 * cell,
                    cell,
                    cell,
                    colour,
                );
            };
            put(column);
            if symmetric {
                put(cells - 1 - column);
            }
        }
    }
}

fn night(c: &mut Canvas, dice: &mut Dice) {
    let (w, h) = (c.width as f32, c.height as f32);
    c.gradient(dice.between(0, 12), dice.between(4, 30), 0.25);
    for _ in 0..dice.whole(10, 150) {
        let (x, y, size) = (
            dice.real(0.0, w),
            dice.real(0.0, h * 0.9),
            dice.real(0.7, 3.0),
        );
        c.ellipse(x, y, size, size, dice.between(120, 255));
    }
    if dice.chance(0.5) {
        let radius = dice.real(0.03, 0.1) * w;
        c.ellipse(
            dice.real(0.1, 0.9) * w,
            dice.real(0.1, 0.5) * h,
            radius,
            radius,
            [230; 3],
        );
    }
    c.noise(dice, 2.0);
}

/// A figure on white, as cut-outs and drawings of characters are.
fn figure(c: &mut Canvas, dice: &mut Dice) {
    let (w, h) = (c.width as f32, c.height as f32);
    let (skin, cloth, hair) = (dice.between(150, 250), dice.colour(), dice.colour());
    let (cx, head) = (w * dice.real(0.45, 0.55), h * dice.real(0.06, 0.13));
    let neck = h * 0.08 + 2.0 * head;
    let (hip, foot) = (neck + h * dice.real(0.2, 0.35), h * 0.97);
    let wide = head * dice.real(0.8, 1.6);
    for side in [-1.0, 1.0] {
        let knee = cx + side * wide * dice.real(0.3, 1.8);
        c.line(
            (cx + side * wide * 0.4, hip),
            (knee, foot),
            head * 0.6,
            dice.colour(),
        );
        let hand = (
            cx + side * wide * dice.real(0.8, 3.0),
            neck + h * dice.real(-0.1, 0.3),
        );
        c.line((cx + side * wide * 0.7, neck), hand, head * 0.4, skin);
    }
    let skirt = wide * dice.real(0.8, 2.0);
    let body = [
        (cx - wide, neck),
        (cx + wide, neck),
        (cx + skirt, hip),
        (cx - skirt, hip),
    ];
    c.polygon(&body, cloth);
    c.ellipse(cx, neck - head, head * 1.1, head * 1.15, hair);
    c.ellipse(cx, neck - head * 0.9, head * 0.8, head * 0.9, skin);
}

fn pattern(c: &mut Canvas, dice: &mut Dice) {
    let (a, b) = (dice.colour(), dice.colour());
    let (period, slope, style) = (dice.whole(24, 120), dice.real(-1.0, 1.0), dice.whole(0, 3));
    for y in 0..c.height {
        for x in 0..c.width {
            let shifted = (x as f32 + slope * y as f32 + 4096.0) as usize;
            let on = match style {
                0 => (shifted / period).is_multiple_of(2),
                1 => (x / period + y / period) % 2 == 0,
                _ => {
                    let (dx, dy) = (x % period * 2, y % period * 2);
                    dx.abs_diff(period).pow(2) + dy.abs_diff(period).pow(2) < period * period / 3
                }
            };
            c.set(x as i32, y as i32, if on { a } else { b });
        }
    }
}
