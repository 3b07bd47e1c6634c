//! A cache of the token ids of words: captions use few different words, and a lookup is much
//! cheaper than tokenising.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::{PoisonError, RwLock},
};

/// Parts of the cache, each with its own lock, so that threads rarely wait for each other.
const NUM_PARTS: usize = 16;
/// Largest number of words in a part: 65,536 in all, about 7 MB. Later words are tokenised each
/// time.
const MOST_IN_PART: usize = 4096;
/// Longer words, such as text in a script without spaces, rarely repeat and are not kept.
const LONGEST_BYTES: usize = 32;

type Part = HashMap<Box<str>, Box<[u32]>>;

/// The token ids of words, shared by threads.
#[derive(Debug, Default)]
pub(crate) struct TokenCache {
    parts: [RwLock<Part>; NUM_PARTS],
    hasher: RandomState,
}

impl TokenCache {
    /// Appends the ids of `word` to `ids`. Calls `encode` if the word is not in the cache.
    pub(crate) fn append(
        &self,
        word: &str,
        ids: &mut Vec<u32>,
        encode: impl FnOnce(&str) -> Vec<u32>,
    ) {
        if word.len() > LONGEST_BYTES {
            return ids.extend(encode(word));
        }
        let part = &self.parts[self.hasher.hash_one(word) as usize % NUM_PARTS];
        if let Some(known) = part
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(word)
        {
            return ids.extend_from_slice(known);
        }
        let encoded = encode(word);
        ids.extend_from_slice(&encoded);
        let mut part = part.write().unwrap_or_else(PoisonError::into_inner);
        if part.len() < MOST_IN_PART {
            part.insert(word.into(), encoded.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_encoded_once_as_long_as_there_is_room() {
        let words = TokenCache::default();
        let mut num_encoded = 0;
        let mut append = |word: &str| {
            let mut ids = vec![7];
            words.append(word, &mut ids, |word| {
                num_encoded += 1;
                word.bytes().map(u32::from).collect()
            });
            assert_eq!(ids[1..], word.bytes().map(u32::from).collect::<Vec<_>>());
            num_encoded
        };
        assert_eq!(
            [append("cat"), append("dog"), append("cat"), append("")],
            [1, 2, 2, 3]
        );
        let long = "a".repeat(LONGEST_BYTES + 1);
        assert_eq!([append(&long), append(&long)], [4, 5]);
        for number in 0..2 * NUM_PARTS * MOST_IN_PART {
            append(&number.to_string());
        }
        let len = words
            .parts
            .iter()
            .map(|part| part.read().unwrap().len())
            .sum::<usize>();
        assert_eq!(len, NUM_PARTS * MOST_IN_PART);
    }
}
