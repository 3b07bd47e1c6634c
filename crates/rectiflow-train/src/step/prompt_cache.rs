//! Encodes prompts that many samples share only once: the empty prompt and those of quality words
//! alone, which replace dropped prompts.
//!
//! Used only while the text encoders are frozen. Such a prompt is encoded by itself, never beside
//! others, so its encoding is a function of its ids alone. It does not matter whether it was
//! encoded just now or a thousand steps ago, and a resumed run continues bit for bit.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use rectiflow_sdxl::{
    cond::{ChunkedIds, Cond},
    error::Result,
    write::upload,
};
use tch::{Kind, Tensor};

/// Capacity in prompts; when it is reached, the whole cache is cleared. With SDXL's encoders one
/// prompt takes 0.3 MB in bf16.
const MOST: usize = 256;

/// Encodings of single chunks, keyed by the chunk's ids for both encoders.
#[derive(Debug, Default)]
pub(crate) struct PromptCache {
    known: Mutex<HashMap<Vec<i64>, Known>>,
}

#[derive(Debug)]
struct Known {
    /// `[77, width]`
    context: Tensor,
    /// `[pooled_dim]`
    pooled: Tensor,
}

impl PromptCache {
    /// Returns the same as `encode(ids)`, up to rounding, and caches the rows that are `dropped`
    /// and have one chunk.
    pub(crate) fn encode(
        &self,
        ids: ChunkedIds<'_>,
        dropped: &[bool],
        encode: impl Fn(ChunkedIds<'_>) -> Result<Cond>,
    ) -> Result<Cond> {
        let is_known = |row: usize| dropped[row] && ids.num_chunks[row] == 1;
        let (known, others): (Vec<usize>, Vec<usize>) =
            (0..dropped.len()).partition(|&row| is_known(row));
        if known.is_empty() {
            return encode(ids);
        }
        let others_cond = if others.is_empty() {
            None
        } else {
            Some(encode_rows(ids, &others, &encode)?)
        };
        let pieces = self.look_up(ids, &known, &encode)?;
        Ok(put_together(others_cond, &others, pieces, &known))
    }

    /// Returns the context `[n, 77, width]` and pooled vectors `[n, pooled_dim]` of these rows.
    fn look_up(
        &self,
        ids: ChunkedIds<'_>,
        rows: &[usize],
        encode: &impl Fn(ChunkedIds<'_>) -> Result<Cond>,
    ) -> Result<[Tensor; 2]> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut contexts, mut pooled) = (Vec::new(), Vec::new());
        for &row in rows {
            let chunk = |ids: &Tensor| ids.get(row as i64).get(0);
            let key = Tensor::cat(&[chunk(ids.clip_l), chunk(ids.clip_g)], 0);
            let key = Vec::<i64>::try_from(key).expect("ids are a vector of int64");
            if !known.contains_key(&key) {
                let cond = encode_rows(ids, &[row], encode)?;
                if known.len() >= MOST {
                    known.clear();
                }
                known.insert(
                    key.clone(),
                    Known {
                        context: cond.context.get(0),
                        pooled: cond.pooled.get(0),
                    },
                );
            }
            let found = &known[&key];
            contexts.push(found.context.shallow_clone());
            pooled.push(found.pooled.shallow_clone());
        }
        Ok([Tensor::stack(&contexts, 0), Tensor::stack(&pooled, 0)])
    }
}

/// Encodes some rows of a batch, padded to the number of chunks of the longest one.
fn encode_rows(
    ids: ChunkedIds<'_>,
    rows: &[usize],
    encode: &impl Fn(ChunkedIds<'_>) -> Result<Cond>,
) -> Result<Cond> {
    let num_chunks: Vec<u32> = rows.iter().map(|&row| ids.num_chunks[row]).collect();
    let most = num_chunks.iter().copied().max().map_or(1, i64::from);
    let at = index(rows, ids.clip_l);
    let select = |ids: &Tensor| ids.index_select(0, &at).narrow(1, 0, most);
    let (clip_l, clip_g) = (select(ids.clip_l), select(ids.clip_g));
    encode(ChunkedIds {
        clip_l: &clip_l,
        clip_g: &clip_g,
        num_chunks: &num_chunks,
    })
}

/// Puts the rows of `others` and `known` back into their places. A row of one chunk is padded with
/// masked repetitions of itself.
fn put_together(
    cond: Option<Cond>,
    others: &[usize],
    [context, pooled]: [Tensor; 2],
    known: &[usize],
) -> Cond {
    let mut rows: Vec<(usize, usize)> = others.iter().chain(known).copied().zip(0..).collect();
    rows.sort_unstable();
    let order: Vec<usize> = rows.into_iter().map(|(_, from)| from).collect();
    let order = index(&order, &context);
    let Some(cond) = cond else {
        return Cond {
            context: context.index_select(0, &order),
            context_mask: None,
            pooled: pooled.index_select(0, &order),
        };
    };
    let (num_tokens, chunk) = (cond.context.size()[1], context.size()[1]);
    let join = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 0).index_select(0, &order);
    let context_mask = (num_tokens > chunk).then(|| {
        let options = (Kind::Bool, context.device());
        let all = || Tensor::ones([others.len() as i64, num_tokens], options);
        let first = Tensor::zeros([known.len() as i64, num_tokens], options);
        let _ = first.narrow(1, 0, chunk).fill_(1);
        join(&cond.context_mask.unwrap_or_else(all), &first)
    });
    Cond {
        context: join(&cond.context, &context.repeat([1, num_tokens / chunk, 1])),
        context_mask,
        pooled: join(&cond.pooled, &pooled),
    }
}

fn index(rows: &[usize], like: &Tensor) -> Tensor {
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    upload(&Tensor::from_slice(&rows), like.device())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use rectiflow_sdxl::{
        clip::ClipText,
        cond,
        model::{Component, OpenOptions},
    };
    use tch::{Device, no_grad};

    use super::*;

    fn encoders() -> [ClipText; 2] {
        let models =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../rectiflow-sdxl/tests/golden");
        [("clip-l", Component::ClipL), ("clip-g", Component::ClipG)].map(|(name, which)| {
            ClipText::open(&models.join(name), which, &OpenOptions::default())
                .expect("the golden encoder opens")
        })
    }

    /// Returns ids `[rows, 3, 77]`: begin 62, one word, end 63. Rows with the same word are equal.
    fn ids(words: &[i64]) -> Tensor {
        let ids = Tensor::full([words.len() as i64, 3, 77], 63, (Kind::Int64, Device::Cpu));
        let _ = ids.select(2, 0).fill_(62);
        ids.select(2, 1)
            .copy_(&Tensor::from_slice(words).unsqueeze(1).repeat([1, 3]));
        ids
    }

    fn equal(a: &Cond, b: &Cond) -> bool {
        let mask = match (&a.context_mask, &b.context_mask) {
            (Some(a), Some(b)) => a.equal(b),
            (None, None) => true,
            _ => false,
        };
        mask && a.context.equal(&b.context) && a.pooled.equal(&b.pooled)
    }

    #[test]
    fn what_is_remembered_is_what_would_be_calculated_bit_for_bit() {
        let [clip_l, clip_g] = encoders();
        let calls = Cell::new(0);
        let encode = |ids: ChunkedIds<'_>| {
            calls.set(calls.get() + 1);
            cond::encode(&clip_l, &clip_g, ids)
        };
        let run = |cache: &PromptCache, words: &[i64], dropped: &[bool], num_chunks: &[u32]| {
            let ids = ids(words);
            let ids = ChunkedIds {
                clip_l: &ids,
                clip_g: &ids,
                num_chunks,
            };
            no_grad(|| cache.encode(ids, dropped, encode)).expect("the ids fit")
        };
        let cache = PromptCache::default();
        let first = run(
            &cache,
            &[5, 9, 5, 7],
            &[true, false, true, false],
            &[1, 2, 1, 3],
        );
        assert_eq!(
            calls.get(),
            2,
            "one call for the others together, one for the dropped prompt"
        );
        let again = run(
            &cache,
            &[5, 9, 5, 7],
            &[true, false, true, false],
            &[1, 2, 1, 3],
        );
        assert_eq!(calls.get(), 3, "one more call, for the others");
        assert!(equal(&first, &again));
        // A resumed run starts with an empty cache, and first sees the prompt beside others.
        let other = PromptCache::default();
        run(&other, &[3, 4, 5], &[true, true, true], &[1, 1, 1]);
        assert!(equal(
            &first,
            &run(
                &other,
                &[5, 9, 5, 7],
                &[true, false, true, false],
                &[1, 2, 1, 3]
            )
        ));
        // By itself, with an empty cache.
        let alone = run(&PromptCache::default(), &[5], &[false], &[1]);
        assert!(
            first
                .context
                .narrow(0, 0, 1)
                .narrow(1, 0, 77)
                .equal(&alone.context)
        );
        assert!(first.pooled.narrow(0, 2, 1).equal(&alone.pooled));
    }

    #[test]
    fn rows_come_back_in_their_places_with_the_mask_of_their_lengths() {
        let [clip_l, clip_g] = encoders();
        let encode = |ids: ChunkedIds<'_>| cond::encode(&clip_l, &clip_g, ids);
        for num_chunks in [[1, 2, 1, 3], [1, 2, 1, 2], [1, 1, 1, 1]] {
            for dropped in [
                [true, false, true, false],
                [false, true, true, false],
                [true; 4],
            ] {
                let ids = ids(&[5, 9, 8, 7]);
                let ids = ChunkedIds {
                    clip_l: &ids,
                    clip_g: &ids,
                    num_chunks: &num_chunks,
                };
                let found = no_grad(|| PromptCache::default().encode(ids, &dropped, encode))
                    .expect("the ids fit");
                let expected = no_grad(|| encode(ids)).expect("the ids fit");
                let difference = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
                assert!(difference(&found.pooled, &expected.pooled) < 1e-5);
                assert_eq!(found.context.size(), expected.context.size());
                assert!(difference(&found.context, &expected.context) < 1e-5);
                match (found.context_mask, expected.context_mask) {
                    (Some(found), Some(expected)) => assert!(found.equal(&expected)),
                    (found, expected) => assert!(
                        found.is_none() && expected.is_none(),
                        "{num_chunks:?} {dropped:?}"
                    ),
                }
            }
        }
    }
}
