//! Whether two signatures are of copies of one picture.
//!
//! Two thumbnails are registered, the second also mirrored, and compared block by block: the share
//! of the blocks that agree decides, so that a mark at an edge or a rest of a border spoils its own
//! blocks only. A block with detail may differ by a share of it, a plain one by a few levels.
//!
//! Plain blocks agree too easily: of two night skies or two pages with a few strokes nearly all
//! blocks agree. So a share of the blocks with detail must agree too, and their detail must
//! correlate.

use crate::dedupe::{
    registration::{
        IDENTITY, Map, Pyramid, coarse_error, each_cell, glance, mirrored, refined, softened, start,
    },
    signature::{COLOUR_CELLS, COLOUR_SIDE, LUMA_SIDE, Signature},
};

/// Blocks a side.
const BLOCKS: usize = 8;
/// Cells a side of a block.
const BLOCK_SIDE: usize = LUMA_SIDE / BLOCKS;
/// A block with fewer cells in both pictures is left out.
const MIN_CELLS: f32 = 24.0;
/// Cells at the edges that are left out, since a border's colour runs into them.
const LUMA_MARGIN: usize = 2;
const COLOUR_MARGIN: usize = 1;

/// The limits of [`Thumbnail::matches`]; levels are those of 8-bit pixels.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Root mean square of the luma differences of a plain block.
    pub plain_levels: f32,
    /// The difference of the means of a plain block.
    pub level: f32,
    /// The same as a share of a block's detail.
    pub share: f32,
    /// Standard deviation above which a block has detail, in levels.
    pub detail_levels: f32,
    /// The same of the colour differences.
    pub colour_levels: f32,
    /// The same as a share of the colours' contrast in the picture.
    pub colour_share: f32,
    /// The least share of the blocks that agree.
    pub agreeing: f32,
    /// The least share of the blocks with detail that agree.
    pub detailed: f32,
    /// The least correlation of the detail.
    pub correlation: f32,
    /// The largest relative scale of an axis.
    pub scale: f32,
    /// Root mean square of the luma differences of the coarsest planes.
    pub coarse_levels: f32,
    /// The mean square of these on top of that, as a share of their variance.
    pub coarse_share: f32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            plain_levels: 0.8,
            level: 1.5,
            share: 0.45,
            detail_levels: 0.8,
            colour_levels: 3.0,
            colour_share: 0.5,
            agreeing: 0.8,
            detailed: 0.7,
            correlation: 0.85,
            scale: 1.3,
            coarse_levels: 8.0,
            coarse_share: 0.25,
        }
    }
}

/// A signature prepared for comparisons.
#[derive(Debug, Clone)]
pub struct Thumbnail {
    luma: Pyramid,
    /// `[2, 16, 16]`
    colour: [Vec<f32>; 2],
    colour_contrast: f32,
    /// Width divided by height.
    aspect: f32,
}

/// How two thumbnails agree.
#[derive(Debug, Clone, Copy)]
pub struct Agreement {
    /// The place of the second in the first.
    pub map: Map,
    /// The share of the blocks that agree: of all, or of those away from the edges if that is less.
    pub agreeing: f32,
    /// The share of the blocks with detail that agree.
    pub detailed: f32,
    /// The number of blocks with detail.
    pub num_detailed: u32,
    /// The correlation of the detail inside the blocks.
    pub correlation: f32,
}

/// Sums over the cells of a block.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    count: f32,
    a: f32,
    b: f32,
    aa: f32,
    bb: f32,
    ab: f32,
    colour: f32,
    colour_count: f32,
}

impl Thumbnail {
    /// Prepares a signature.
    pub fn new(signature: &Signature) -> Self {
        let [width, height] = signature.size_px.map(|side| f32::from(side.max(1)));
        let (blue, red) = signature.colour.split_at(COLOUR_CELLS);
        let colour = [blue, red].map(|plane| softened(plane, COLOUR_SIDE));
        Self {
            luma: Pyramid::new(&signature.luma),
            colour_contrast: contrast(&colour),
            colour,
            aspect: width / height,
        }
    }

    /// Whether one of the two is a copy of the other, as it is or mirrored.
    pub fn matches(&self, other: &Self, limits: &Limits) -> bool {
        // What surrounds one picture spoils the search for its place from one side only.
        self.has_shape_of(other, limits)
            && (self.has_copy(other, limits) || other.has_copy(self, limits))
    }

    fn has_copy(&self, other: &Self, limits: &Limits) -> bool {
        self.registered(other, limits) || self.registered(&other.mirrored(), limits)
    }

    /// Whether the two are copies without a registration.
    pub fn plain_match(&self, other: &Self, limits: &Limits) -> bool {
        let fits = |other: &Self| {
            let error = coarse_error(&self.luma, &other.luma, &IDENTITY);
            self.may_match(other, error, limits)
                && limits.allow(&self.agreement(other, IDENTITY, limits))
        };
        self.has_shape_of(other, limits) && (fits(other) || fits(&other.mirrored()))
    }

    fn has_shape_of(&self, other: &Self, limits: &Limits) -> bool {
        let ratio = self.aspect / other.aspect;
        ratio <= limits.scale && ratio * limits.scale >= 1.0
    }

    /// Whether the coarsest planes are alike enough for a closer look.
    fn may_match(&self, other: &Self, error: f32, limits: &Limits) -> bool {
        let variance = self
            .luma
            .coarse_variance()
            .max(other.luma.coarse_variance());
        let levels = limits.coarse_levels * limits.coarse_levels;
        error <= levels + limits.coarse_share * variance
    }

    fn registered(&self, other: &Self, limits: &Limits) -> bool {
        let maps = self.maps(other, limits);
        let mut found = maps.iter().map(|&map| self.agreement(other, map, limits));
        found.any(|found| limits.allow(&found))
    }

    /// The maps of `other` onto this picture that are worth a closer look: the refined one; the
    /// start, from which pictures without much detail can drift; and none at all, since a mark at
    /// an edge makes windows without that edge the better start.
    pub fn maps(&self, other: &Self, limits: &Limits) -> Vec<Map> {
        if !self.may_match(other, glance(&self.luma, &other.luma), limits) {
            return Vec::new();
        }
        let start = start(&self.luma, &other.luma);
        let refined = refined(&self.luma, &other.luma, start);
        refined.into_iter().chain([start, IDENTITY]).collect()
    }

    /// This thumbnail, mirrored.
    pub fn mirrored(&self) -> Self {
        let [blue, red] = &self.colour;
        Self {
            luma: self.luma.mirrored(),
            colour: [mirrored(blue, COLOUR_SIDE), mirrored(red, COLOUR_SIDE)],
            ..*self
        }
    }

    /// How the two agree where they overlap.
    pub fn agreement(&self, other: &Self, map: Map, limits: &Limits) -> Agreement {
        let blocks = self.blocks(other, &map);
        let contrast = self.colour_contrast.max(other.colour_contrast);
        let allowed = Allowed {
            limits,
            offset: offset(&blocks, limits),
            colour: limits.colour_levels.max(limits.colour_share * contrast),
        };
        let (mut all, mut inner) = (Tally::default(), Tally::default());
        for (number, block) in blocks.iter().enumerate() {
            if block.count < MIN_CELLS {
                continue;
            }
            all.add(block, &allowed);
            let edge = |at: usize| at == 0 || at == BLOCKS - 1;
            if !edge(number % BLOCKS) && !edge(number / BLOCKS) {
                inner.add(block, &allowed);
            }
        }
        let correlation = match inner.detailed {
            0 => all.correlation(),
            _ => all.correlation().max(inner.correlation()),
        };
        Agreement {
            map,
            agreeing: match all.num {
                0..24 => 0.0,
                // Equal borders do not make up for what they surround.
                _ => all.share().min(inner.share()),
            },
            detailed: match all.detailed {
                0 => 1.0,
                num => all.detailed_agreeing as f32 / num as f32,
            },
            num_detailed: all.detailed,
            correlation,
        }
    }

    fn blocks(&self, other: &Self, map: &Map) -> [Block; BLOCKS * BLOCKS] {
        let mut blocks = [Block::default(); BLOCKS * BLOCKS];
        let (first, second) = (self.luma.fine(), other.luma.fine());
        each_cell(first, LUMA_SIDE, map, LUMA_MARGIN, |x, y, a| {
            let b = second[y * LUMA_SIDE + x];
            blocks[y / BLOCK_SIDE * BLOCKS + x / BLOCK_SIDE].add(a, b);
        });
        for (first, second) in self.colour.iter().zip(&other.colour) {
            each_cell(first, COLOUR_SIDE, map, COLOUR_MARGIN, |x, y, a| {
                let difference = a - second[y * COLOUR_SIDE + x];
                let block = &mut blocks[y / 2 * BLOCKS + x / 2];
                block.colour += difference * difference;
                block.colour_count += 1.0;
            });
        }
        blocks
    }
}

/// The difference in level of the two pictures: what JPEG's clipping makes of a page of text. Small
/// where there is no detail. The middle of the blocks', so that a mark does not move the others.
fn offset(blocks: &[Block], limits: &Limits) -> f32 {
    let mut shifts = Vec::with_capacity(blocks.len());
    let mut detail = 0.0f32;
    for block in blocks.iter().filter(|block| block.count >= MIN_CELLS) {
        let [aa, bb, _] = block.moments();
        shifts.push((block.a - block.b) / block.count);
        detail += aa.max(bb);
    }
    if shifts.is_empty() {
        return 0.0;
    }
    let most = limits.share * (detail / shifts.len() as f32).sqrt();
    let middle = shifts.len() / 2;
    let (_, shift, _) = shifts.select_nth_unstable_by(middle, f32::total_cmp);
    shift.clamp(-most, most)
}

/// What a block may differ by.
struct Allowed<'a> {
    limits: &'a Limits,
    offset: f32,
    colour: f32,
}

/// Counts of blocks, and the sums of their moments.
#[derive(Debug, Default)]
struct Tally {
    num: u32,
    agreeing: u32,
    detailed: u32,
    detailed_agreeing: u32,
    moments: [f32; 3],
}

impl Tally {
    fn add(&mut self, block: &Block, allowed: &Allowed<'_>) {
        let limits = allowed.limits;
        let [aa, bb, ab] = block.moments();
        let detail = aa.max(bb);
        let of_detail = limits.share * detail.sqrt();
        let shift = (block.a - block.b) / block.count - allowed.offset;
        let rest = (aa - 2.0 * ab + bb).max(0.0).sqrt();
        let colour = (block.colour / block.colour_count.max(1.0)).sqrt();
        let agrees = rest <= limits.plain_levels.max(of_detail)
            && shift.abs() <= limits.level.max(of_detail)
            && colour <= allowed.colour;
        let has_detail = detail > limits.detail_levels * limits.detail_levels;
        self.num += 1;
        self.agreeing += u32::from(agrees);
        self.detailed += u32::from(has_detail);
        self.detailed_agreeing += u32::from(has_detail && agrees);
        for (sum, moment) in self.moments.iter_mut().zip([aa, bb, ab]) {
            *sum += moment * block.count;
        }
    }

    /// The share of the blocks that agree; 1 without blocks.
    fn share(&self) -> f32 {
        match self.num {
            0 => 1.0,
            num => self.agreeing as f32 / num as f32,
        }
    }

    /// 0 if one of the two has no detail.
    fn correlation(&self) -> f32 {
        let [aa, bb, ab] = self.moments;
        // A thousandth of a level in each cell of a block.
        let least = 1e-6 * (BLOCK_SIDE * BLOCK_SIDE) as f32;
        match aa.min(bb) > least {
            true => ab / (aa * bb).sqrt(),
            false => 0.0,
        }
    }
}

impl Block {
    fn add(&mut self, a: f32, b: f32) {
        self.count += 1.0;
        self.a += a;
        self.b += b;
        self.aa += a * a;
        self.bb += b * b;
        self.ab += a * b;
    }

    /// The variances of both and the covariance.
    fn moments(&self) -> [f32; 3] {
        let (a, b) = (self.a / self.count, self.b / self.count);
        [
            (self.aa / self.count - a * a).max(0.0),
            (self.bb / self.count - b * b).max(0.0),
            self.ab / self.count - a * b,
        ]
    }
}

impl Limits {
    /// Whether these are copies.
    pub fn allow(&self, found: &Agreement) -> bool {
        let near = |scale: f32| scale <= self.scale && scale * self.scale >= 1.0;
        near(found.map.scale[0])
            && near(found.map.scale[1])
            && found.map.is_inside()
            && found.agreeing >= self.agreeing
            && match found.num_detailed {
                // A part of a plain picture is like every other.
                0 => found.map.is_near_identity(),
                _ => found.detailed >= self.detailed && found.correlation >= self.correlation,
            }
    }
}

/// The standard deviation of two planes of colour, together.
fn contrast(colour: &[Vec<f32>; 2]) -> f32 {
    let mut sum = 0.0f32;
    for plane in colour {
        let mean = plane.iter().sum::<f32>() / COLOUR_CELLS as f32;
        for value in plane {
            sum += (value - mean) * (value - mean);
        }
    }
    (sum / (2 * COLOUR_CELLS) as f32).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dedupe::signature::tests::{disc, drawn};

    fn thumbnail(width: usize, height: usize, shape: impl Fn(f32, f32) -> [u8; 3]) -> Thumbnail {
        Thumbnail::new(&Signature::of(&drawn(width, height, shape), width, height).0)
    }

    /// Dark, with lights at places that a number decides.
    fn night(number: u32, x: f32, y: f32) -> [u8; 3] {
        let mut light = 0.0f32;
        for star in 0..30 {
            let at = |axis: u32| {
                let bytes = [number, star, axis].map(u32::to_le_bytes).concat();
                xxhash_rust::xxh3::xxh3_64(&bytes) as f32 / u64::MAX as f32
            };
            let far = (x - at(0)).powi(2) + (y - at(1)).powi(2);
            light += 200.0 * (-far / 0.0001).exp();
        }
        [(8.0 + 12.0 * y + light).min(255.0) as u8; 3]
    }

    #[test]
    fn crops_borders_and_mirror_images_match() {
        let limits = Limits::default();
        let picture = thumbnail(400, 300, disc);
        let crop = |x: f32, y: f32| disc(0.03 + 0.9 * x, 0.1 + 0.9 * y);
        let bordered = |x: f32, y: f32| {
            let (x, y) = ((x - 0.06) / 0.88, (y - 0.08) / 0.84);
            match (0.0..1.0).contains(&x) && (0.0..1.0).contains(&y) {
                true => disc(x, y),
                false => [255; 3],
            }
        };
        for copy in [
            thumbnail(200, 150, disc),
            thumbnail(400, 300, |x, y| disc(1.0 - x, y)),
            thumbnail(360, 270, crop),
            thumbnail(360, 270, |x, y| crop(1.0 - x, y)),
            thumbnail(454, 357, bordered),
        ] {
            assert!(picture.matches(&copy, &limits) && copy.matches(&picture, &limits));
        }
    }

    #[test]
    fn a_mark_at_an_edge_spoils_its_own_blocks_only() {
        let marked = |x: f32, y: f32| match x > 0.7 && y < 0.1 {
            true => [255, 255, 0],
            false => disc(x, y),
        };
        let (picture, marked) = (thumbnail(400, 300, disc), thumbnail(400, 300, marked));
        assert!(picture.matches(&marked, &Limits::default()));
    }

    #[test]
    fn two_night_skies_are_two_pictures_and_a_crop_of_one_is_its_copy() {
        let limits = Limits::default();
        let skies: Vec<Thumbnail> = (0..8)
            .map(|number| thumbnail(400, 300, |x, y| night(number, x, y)))
            .collect();
        for (i, sky) in skies.iter().enumerate() {
            for (j, other) in skies.iter().enumerate() {
                assert_eq!(sky.matches(other, &limits), i == j, "{i} and {j}");
            }
            let part = |x: f32, y: f32| night(i as u32, 0.05 + 0.9 * x, 0.02 + 0.9 * y);
            assert!(sky.matches(&thumbnail(360, 270, part), &limits), "{i}");
        }
    }

    #[test]
    fn gradients_and_flat_pictures_match_by_their_levels() {
        let limits = Limits::default();
        let gradient = |from: f32, to: f32| {
            thumbnail(200, 200, move |x, y| {
                let level = from + (to - from) * (0.7 * x + 0.3 * y);
                [level as u8, 90, 200 - level as u8 / 2]
            })
        };
        let first = gradient(20.0, 180.0);
        assert!(first.matches(&gradient(28.0, 172.0), &limits), "a crop");
        assert!(!first.matches(&gradient(20.0, 140.0), &limits));
        assert!(!first.matches(&gradient(180.0, 60.0), &limits));
        let flat = |colour: [u8; 3]| thumbnail(60, 40, move |_, _| colour);
        assert!(flat([200, 10, 10]).matches(&flat([201, 11, 9]), &limits));
        assert!(!flat([200, 10, 10]).matches(&flat([10, 10, 200]), &limits));
        assert!(!flat([250; 3]).matches(&flat([235; 3]), &limits));
    }
}
