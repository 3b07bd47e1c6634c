//! Token ids to the conditions of the UNet.
//!
//! A text has one to three chunks of 77 tokens. The penultimate states of both encoders are
//! concatenated along the channels, and the chunks along the tokens. The pooled text is bigG's, of
//! the *first* chunk, as in ComfyUI, A1111 and kohya. In a batch of mixed lengths only real chunks
//! are encoded; the other places hold finite values that are masked out, so that no sample depends
//! on the rest of its batch.

use tch::{Kind, TchError, Tensor};

use crate::{
    error::{Error, Result},
    nets::clip::{ClipOutput, ClipText},
    torch::{ffi::Torch, write::f_upload},
};

/// The output of the text encoders for a batch.
#[derive(Debug)]
pub struct Cond {
    /// Penultimate states of both encoders. `[b, 77 k, 2048]`, where k is the largest number of
    /// chunks in the batch
    pub context: Tensor,
    /// Which tokens are real, if lengths differ; `None`: all. `[b, 77 k]` bool
    pub context_mask: Option<Tensor>,
    /// bigG's projected pooled output of the first chunk. `[b, 1280]`
    pub pooled: Tensor,
}

/// The token ids of a batch of texts.
#[derive(Debug, Clone, Copy)]
pub struct ChunkedIds<'a> {
    /// CLIP-L's ids. `[b, n, 77]` int64; chunks beyond a text's length are ignored
    pub clip_l: &'a Tensor,
    /// bigG's ids, split at the same places. `[b, n, 77]` int64
    pub clip_g: &'a Tensor,
    /// Number of chunks of each text, 1 to n. `[b]`
    pub num_chunks: &'a [u32],
}

/// Encodes a batch: each encoder runs once, on the real chunks of all texts. Gradients flow to the
/// encoders' parameters if they require them; CLIP-L's last layer is unused, so its parameters
/// receive none.
///
/// # Errors
/// [`Error::Input`] for ids that do not fit, [`Error::Torch`] if libtorch fails (out of memory).
pub fn encode(clip_l: &ClipText, clip_g: &ClipText, ids: ChunkedIds<'_>) -> Result<Cond> {
    let [_, n, num_tokens] = check(ids)?;
    let places = Places::new(ids.num_chunks, n as usize);
    let real_l = places.real_of(ids.clip_l).map_err(encoding)?;
    let real_g = places.real_of(ids.clip_g).map_err(encoding)?;
    let hidden_l = clip_l.hidden(&real_l)?; // [m, 77, 768]
    let output_g = clip_g.forward(&real_g)?; // [m, 77, 1280]
    places
        .assemble(&hidden_l, &output_g, num_tokens)
        .map_err(encoding)
}

fn encoding(error: TchError) -> Error {
    Error::torch("encoding texts")(error)
}

/// Where each text's chunks are in the input and in the output.
struct Places {
    /// The real chunks in the flattened input, `[m]`.
    real: Vec<i64>,
    /// The index of each text's first chunk among the real ones, `[b]`.
    first: Vec<i64>,
    /// The real chunk at each place of the output, `[b * most]`; at padded places it is the text's
    /// first, which is finite and is masked out.
    padded: Vec<i64>,
    /// Whether each place of the output is real, `[b * most]`.
    is_real: Vec<bool>,
    /// The largest number of chunks.
    most: usize,
}

impl Places {
    fn new(num_chunks: &[u32], stride: usize) -> Self {
        let most = num_chunks.iter().copied().max().unwrap_or(1) as usize;
        let mut places = Self {
            real: vec![],
            first: vec![],
            padded: vec![],
            is_real: vec![],
            most,
        };
        for (text, &count) in num_chunks.iter().enumerate() {
            let first = places.real.len();
            places.first.push(first as i64);
            for chunk in 0..most {
                let is_real = chunk < count as usize;
                if is_real {
                    places.real.push((text * stride + chunk) as i64);
                }
                let padded = if is_real { first + chunk } else { first };
                places.padded.push(padded as i64);
                places.is_real.push(is_real);
            }
        }
        places
    }

    /// Returns the real chunks of `[b, n, 77]` ids, `[m, 77]`.
    fn real_of(&self, ids: &Tensor) -> Torch {
        let at = f_upload(&Tensor::f_from_slice(&self.real)?, ids.device())?;
        let (b, n, num_tokens) = ids.size3()?;
        ids.f_reshape([b * n, num_tokens])?.f_index_select(0, &at)
    }

    /// Builds the conditions from the encoders' output for the real chunks.
    fn assemble(&self, hidden_l: &Tensor, output_g: &ClipOutput, num_tokens: i64) -> Torch<Cond> {
        let hidden = Tensor::f_cat(&[hidden_l, &output_g.hidden], 2)?; // [m, 77, 2048]
        let device = hidden.device();
        let width = hidden.size()[2];
        let context = if self.uniform() {
            hidden
        } else {
            select(&hidden, &self.padded)?
        };
        let context_mask = match self.mask(num_tokens)? {
            Some(mask) => Some(f_upload(&mask, device)?),
            None => None,
        };
        Ok(Cond {
            context: context.f_reshape([-1, self.most as i64 * num_tokens, width])?,
            context_mask,
            pooled: select(&output_g.pooled, &self.first)?,
        })
    }

    fn uniform(&self) -> bool {
        self.is_real.iter().all(|&real| real)
    }

    /// Returns the mask of real tokens, `[b, 77 k]`, or `None` if all are real.
    fn mask(&self, num_tokens: i64) -> Torch<Option<Tensor>> {
        if self.uniform() {
            return Ok(None);
        }
        let most = self.most as i64;
        let chunks = Tensor::f_from_slice(&self.is_real)?.f_reshape([-1, most, 1])?;
        let tokens = chunks.f_expand([-1, -1, num_tokens], false)?;
        Ok(Some(tokens.f_reshape([-1, most * num_tokens])?))
    }
}

/// Returns the rows of `x` at these indices.
fn select(x: &Tensor, at: &[i64]) -> Torch {
    let at = f_upload(&Tensor::f_from_slice(at)?, x.device())?;
    x.f_index_select(0, &at)
}

/// Checks the ids and returns their shape `[b, n, 77]`.
fn check(ids: ChunkedIds<'_>) -> Result<[i64; 3]> {
    let size = ids.clip_l.size();
    let [b, n, num_tokens] = size[..] else {
        let found = format!("{size:?}");
        return Err(Error::input("clip_l ids", "[b, n, 77]", found));
    };
    if ids.clip_g.size() != size {
        let expected = format!("{size:?} as clip_l's");
        let found = format!("{:?}", ids.clip_g.size());
        return Err(Error::input("clip_g ids", expected, found));
    }
    check_kind("clip_l ids", ids.clip_l)?;
    check_kind("clip_g ids", ids.clip_g)?;
    check_counts(ids.num_chunks, [b, n])?;
    Ok([b, n, num_tokens])
}

fn check_kind(name: &str, ids: &Tensor) -> Result<()> {
    if ids.kind() == Kind::Int64 {
        return Ok(());
    }
    let found = format!("{:?}", ids.kind());
    Err(Error::input(name, "dtype Int64", found))
}

/// Checks that each of `b` texts has 1 to `n` chunks.
fn check_counts(num_chunks: &[u32], [b, n]: [i64; 2]) -> Result<()> {
    let fits = |&count: &u32| (1..=n).contains(&i64::from(count));
    if num_chunks.len() as i64 == b && b > 0 && num_chunks.iter().all(fits) {
        return Ok(());
    }
    let expected = format!("{b} (at least 1) numbers from 1 to {n}");
    Err(Error::input(
        "num_chunks",
        expected,
        format!("{num_chunks:?}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_mixed_lengths() {
        let places = Places::new(&[2, 1, 3], 4);
        assert_eq!(places.real, [0, 1, 4, 8, 9, 10]);
        assert_eq!(places.first, [0, 2, 3]);
        assert_eq!(places.padded, [0, 1, 0, 2, 2, 2, 3, 4, 5]);
        assert_eq!(places.most, 3);
        let mask = places.mask(2).unwrap().unwrap();
        let row = |i| Vec::<bool>::try_from(mask.get(i)).unwrap();
        assert_eq!(row(0), [true, true, true, true, false, false]);
        assert_eq!(row(1), [true, true, false, false, false, false]);
        assert!(Places::new(&[2, 2], 2).mask(2).unwrap().is_none());
    }
}
