//! AdamW in one pass over masters, gradients and moments in 8 bits, on a CPU.
//!
//! A block's moments are decoded to 512 bytes beside the stack, updated with its masters, and
//! encoded: each byte in memory is read and written once, and nothing else is allocated.

use std::ops::Range;

use rectiflow_sdxl::write::write_to;
use tch::{Device, Kind, Tensor};

use crate::state::{
    eight_bit::{
        blocks::{BLOCK, Blocks, Run},
        codes::{Codes, Rounding, encode},
        map::{Chances, Map, NEAREST, SIGNED, UNSIGNED},
    },
    layout::narrow,
    masters::{Numbers, Part},
    one_pass::{AdamW, Constants},
    plain::{PIECE, is_plain, numbers, side_by_side},
};

/// Both moments of the elements that a rank owns.
#[derive(Debug)]
pub(crate) struct EightBit {
    blocks: Blocks,
    pub(crate) mean: Codes,
    /// The root of the mean square.
    pub(crate) root: Codes,
}

/// Why moments in 8 bits cannot be taken over.
const OTHER_BLOCKS: &str = "its moments are in 8 bits, and blocks of 64 of them begin elsewhere in \
                            a run that trains these parts: they would be rounded anew; train the \
                            parts that the checkpoint trained, or start from its weights alone, \
                            with moments of zero: its path as model.base, without --branch-from";

/// Moments of some elements, `[m]` fp32.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub(crate) mean: Tensor,
    pub(crate) mean_square: Tensor,
}

impl EightBit {
    /// Returns moments of codes `[k]` uint8 and scales `[b]` fp32.
    pub(crate) fn new(blocks: Blocks, mean: [Tensor; 2], root: [Tensor; 2]) -> Self {
        Self {
            mean: Codes::new(&SIGNED, mean),
            root: Codes::new(&UNSIGNED, root),
            blocks,
        }
    }

    /// Returns another handle of the same memory.
    pub(crate) fn shallow_clone(&self) -> Self {
        Self {
            blocks: self.blocks.clone(),
            mean: self.mean.shallow_clone(),
            root: self.root.shallow_clone(),
        }
    }

    /// Returns moments of zero.
    pub(crate) fn zeros(len: i64, blocks: Blocks, device: Device) -> Self {
        Self {
            mean: Codes::zeros(&SIGNED, len, &blocks, device),
            root: Codes::zeros(&UNSIGNED, len, &blocks, device),
            blocks,
        }
    }

    /// Overwrites the moments of a tensor's elements `range` with those of `other`'s elements
    /// `from`.
    ///
    /// # Errors
    /// Why that would round them, if they are in other blocks there.
    pub(crate) fn copy_blocks(
        &self,
        range: &Range<i64>,
        other: &Self,
        from: &Range<i64>,
    ) -> Result<(), String> {
        let (own, others) = (self.blocks.over(range), other.blocks.over(from));
        let [(own, found)] = &own.iter().zip(&others).collect::<Vec<_>>()[..] else {
            return Err(OTHER_BLOCKS.to_owned());
        };
        let is_whole = own.own == *range && found.own == *from;
        if !is_whole || own.lacks != found.lacks || own.num_blocks() != found.num_blocks() {
            return Err(OTHER_BLOCKS.to_owned());
        }
        for (own_codes, codes) in [(&self.mean, &other.mean), (&self.root, &other.root)] {
            let of_blocks = narrow(&codes.codes, &found.own);
            write_to(&narrow(&own_codes.codes, &own.own), &of_blocks);
            let of_blocks = narrow(&codes.scales, &found.blocks);
            write_to(&narrow(&own_codes.scales, &own.blocks), &of_blocks);
        }
        Ok(())
    }

    pub(crate) fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Returns the moments of whole blocks.
    pub(crate) fn decode(&self, run: &Run) -> Decoded {
        Decoded {
            mean: self.mean.read(run),
            mean_square: self.root.read(run).square(),
        }
    }

    /// Returns the moments of some elements.
    pub(crate) fn read(&self, range: &Range<i64>) -> Decoded {
        let mut means = Vec::new();
        let mut mean_squares = Vec::new();
        for run in self.blocks.over(range) {
            let start = range.start.max(run.own.start);
            let end = range.end.min(run.own.end);
            let inside = start - run.own.start..end - run.own.start;
            let found = self.decode(&run);
            means.push(narrow(&found.mean, &inside));
            mean_squares.push(narrow(&found.mean_square, &inside));
        }
        Decoded {
            mean: joined(means),
            mean_square: joined(mean_squares),
        }
    }

    /// Overwrites the moments of whole blocks after an update.
    pub(crate) fn encode(&self, run: &Run, moments: &Decoded, update: u64) {
        self.mean.write(run, &moments.mean, Rounding::Nearest);
        let chances = Chances::of_update(update);
        let root = moments.mean_square.sqrt();
        self.root.write(run, &root, Rounding::Random(chances));
    }

    /// Updates masters and moments of whole blocks with their gradients `[m]` fp32. Returns `false`
    /// and changes nothing if they are not in CPU memory.
    pub(crate) fn update(&self, adamw: &AdamW, part: &Part, gradients: &Tensor) -> bool {
        let all_plain = self.mean.is_plain()
            && self.root.is_plain()
            && part.numbers.is_plain()
            && is_plain(gradients, Kind::Float);
        if !all_plain {
            return false;
        }
        let mut pieces = Vec::new();
        for run in self.blocks.over(&part.range) {
            for run in run.parts(PIECE as i64) {
                pieces.push(self.piece(part, gradients, run));
            }
        }
        let constants = Constants::new(adamw);
        let chances = Chances::of_update(adamw.update);
        side_by_side(pieces, |piece| piece.update(constants, chances));
        true
    }

    /// Returns the memory of some blocks. Nothing else may use it meanwhile.
    fn piece(&self, part: &Part, gradients: &Tensor, run: Run) -> Piece<'_> {
        let inside = run.own.start - part.range.start..run.own.end - part.range.start;
        let gradients = narrow(gradients, &inside);
        // SAFETY: the runs of an update do not overlap and nothing else uses masters and moments
        // meanwhile; they and the gradients outlive the update.
        let [mean, root] = [&self.mean, &self.root].map(|codes| unsafe {
            Stored {
                codes: numbers(&narrow(&codes.codes, &run.own)),
                scales: numbers(&narrow(&codes.scales, &run.blocks)),
            }
        });
        // SAFETY: as above; gradients are only read.
        let (values, gradients) = unsafe {
            let values = match part.numbers.narrow(&inside) {
                Numbers::Whole(whole) => Values::Whole(numbers(&whole)),
                Numbers::Halves(nearest, remainder) => {
                    Values::Halves(numbers(&nearest), numbers(&remainder))
                }
            };
            (values, &*numbers::<f32>(&gradients))
        };
        Piece {
            values,
            mean,
            root,
            gradients,
            run,
        }
    }
}

fn joined(mut parts: Vec<Tensor>) -> Tensor {
    if parts.len() == 1 {
        return parts.remove(0);
    }
    if parts.is_empty() {
        return Tensor::zeros([0], (Kind::Float, Device::Cpu));
    }
    Tensor::cat(&parts, 0)
}

/// The memory of some blocks.
struct Piece<'a> {
    values: Values<'a>,
    mean: Stored<'a>,
    root: Stored<'a>,
    gradients: &'a [f32],
    run: Run,
}

/// Numbers in 8 bits.
struct Stored<'a> {
    codes: &'a mut [u8],
    scales: &'a mut [f32],
}

/// Masters.
enum Values<'a> {
    Whole(&'a mut [f32]),
    /// The nearest bf16 numbers, as bits, and the remainders.
    Halves(&'a mut [u16], &'a mut [i16]),
}

impl Piece<'_> {
    fn update(mut self, constants: Constants, chances: Chances) {
        let (signed, unsigned): (&Map, &Map) = (&SIGNED, &UNSIGNED);
        let mut start = 0;
        for (block, length) in self.run.lengths().enumerate() {
            let range = start..start + length;
            let (mut means, mut roots) = ([0f32; BLOCK as usize], [0f32; BLOCK as usize]);
            let (means, roots) = (&mut means[..length], &mut roots[..length]);
            let (of_mean, of_root) = (
                &mut self.mean.codes[range.clone()],
                &mut self.root.codes[range.clone()],
            );
            decode(signed, of_mean, self.mean.scales[block], means);
            decode(unsigned, of_root, self.root.scales[block], roots);

            let gradients = &self.gradients[range.clone()];
            let moments = means.iter_mut().zip(roots.iter_mut()).zip(gradients);
            match &mut self.values {
                Values::Whole(values) => {
                    for (value, ((mean, root), &gradient)) in values[range].iter_mut().zip(moments)
                    {
                        *value = constants.updated_by_root(*value, mean, root, gradient);
                    }
                }
                Values::Halves(nearest, remainder) => {
                    let halves = nearest[range.clone()].iter_mut().zip(&mut remainder[range]);
                    for (halves, ((mean, root), &gradient)) in halves.zip(moments) {
                        constants.update_halves_by_root(halves, mean, root, gradient);
                    }
                }
            }

            self.mean.scales[block] = encode(signed, means, of_mean, |_| NEAREST);
            let element = self.run.element as u64 + start as u64;
            self.root.scales[block] = encode(unsigned, roots, of_root, |index| {
                chances.of(element + index as u64)
            });
            start += length;
        }
    }
}

#[inline(always)]
fn decode(map: &Map, codes: &[u8], scale: f32, found: &mut [f32]) {
    for (number, &code) in found.iter_mut().zip(codes) {
        *number = map.numbers[usize::from(code)] * scale;
    }
}
