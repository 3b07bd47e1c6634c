//! Seeded mutations of files, shared by the tests of all crates: whatever the bytes, a reader
//! returns an error, a remark or a right answer. It never panics, and never takes long.
//!
//! Each case is a function of its number, so that a failure can be repeated: `MUTATION_SEED` and
//! `MUTATION_COUNT` in the environment choose the numbers, `make fuzz` goes through one range after
//! the other.

use std::{
    env,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

/// Cases of each mutation in a run of the tests.
const COUNT: u64 = 200;
/// No reader of a small file takes this long, even on a busy machine.
const LONG: Duration = Duration::from_secs(30);

/// What is done to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// One bit is flipped.
    FlippedBit,
    /// The end is cut off.
    Cut,
    /// Up to 64 bytes stand twice.
    DoubledRange,
    /// A decimal number is replaced by one at the edge of some range.
    ReplacedNumber,
}

/// All mutations.
pub const ALL: [Mutation; 4] = [
    Mutation::FlippedBit,
    Mutation::Cut,
    Mutation::DoubledRange,
    Mutation::ReplacedNumber,
];

const NUMBERS: [&str; 20] = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "0.5",
    "255",
    "1e9",
    "65536",
    "2147483648",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "1e999",
    "NaN",
    "-Infinity",
    "\"4\"",
];

/// SplitMix64.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`; 0 if there is none.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    /// An element of a list.
    ///
    /// # Panics
    /// If the list is empty.
    pub fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

impl Mutation {
    /// The mutated bytes. They can be the same, as where there is no number to replace.
    pub fn of(self, bytes: &[u8], random: &mut Random) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        if bytes.is_empty() {
            return bytes;
        }
        match self {
            Self::FlippedBit => {
                let place = random.below(bytes.len());
                bytes[place] ^= 1 << random.below(8);
            }
            Self::Cut => bytes.truncate(random.below(bytes.len())),
            Self::DoubledRange => {
                let start = random.below(bytes.len());
                let end = (start + 1 + random.below(64)).min(bytes.len());
                let range = bytes[start..end].to_vec();
                bytes.splice(end..end, range);
            }
            Self::ReplacedNumber => bytes = with_other_number(&bytes, random),
        }
        bytes
    }

    /// Mutates a safetensors file: its header, whose length is then right again, or all of it.
    ///
    /// # Panics
    /// If `bytes` is no such file.
    pub fn of_tensors(self, bytes: &[u8], random: &mut Random) -> Vec<u8> {
        let is_whole = matches!(self, Self::FlippedBit | Self::Cut) && random.below(3) == 0;
        if is_whole {
            return self.of(bytes, random);
        }
        let length = bytes[..8].try_into().expect("a file of at least 8 bytes");
        let (header, data) = bytes[8..].split_at(u64::from_le_bytes(length) as usize);
        let header = self.of(header, random);
        [&(header.len() as u64).to_le_bytes()[..], &header, data].concat()
    }
}

/// Replaces one of the decimal numbers in a text.
fn with_other_number(text: &[u8], random: &mut Random) -> Vec<u8> {
    let mut numbers = Vec::new();
    let mut start = None;
    for (place, byte) in text.iter().chain(b" ").enumerate() {
        match (byte.is_ascii_digit(), start) {
            (true, None) => start = Some(place),
            (false, Some(from)) => {
                numbers.push(from..place);
                start = None;
            }
            _ => {}
        }
    }
    let mut bytes = text.to_vec();
    if !numbers.is_empty() {
        let range = random.of(&numbers).clone();
        bytes.splice(range, random.of(&NUMBERS).bytes());
    }
    bytes
}

/// The seeds of each mutation's cases.
///
/// # Panics
/// If a variable is no number.
pub fn seeds() -> Range<u64> {
    let count = variable("MUTATION_COUNT", COUNT);
    let start = variable("MUTATION_SEED", 0) * count;
    start..start + count
}

fn variable(name: &str, default: u64) -> u64 {
    match env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text}: expected a number")),
        Err(_) => default,
    }
}

/// All cases: each mutation with each seed.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for mutation in ALL {
        for seed in seeds() {
            cases.push(Case { mutation, seed });
        }
    }
    cases
}

/// A mutation and its seed.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// What is done.
    pub mutation: Mutation,
    /// Where, and with which values.
    pub seed: u64,
}

impl Case {
    /// The random numbers of the case; each mutation of a seed has others.
    pub fn random(self) -> Random {
        Random::new(self.seed ^ ((self.mutation as u64) << 60))
    }

    /// Returns what `read` returns.
    ///
    /// # Panics
    /// If it panics or takes long, with the case and `what` is read.
    pub fn run<T>(self, what: &str, read: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let Ok(result) = catch_unwind(AssertUnwindSafe(read)) else {
            panic!("{what}: {self:?} panics; its message is above");
        };
        let took = began.elapsed();
        assert!(took < LONG, "{what}: {self:?} takes {took:?}");
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_a_function_of_its_number_and_does_what_it_says() {
        let text = b"{\"a\": 12, \"b\": 345}";
        for mutation in ALL {
            let mut others = 0;
            for seed in 0..50 {
                let case = Case { mutation, seed };
                let bytes = mutation.of(text, &mut case.random());
                assert_eq!(bytes, mutation.of(text, &mut case.random()));
                others += usize::from(bytes != text);
                match mutation {
                    Mutation::FlippedBit => assert_eq!(bytes.len(), text.len()),
                    Mutation::Cut => assert!(bytes.len() < text.len()),
                    Mutation::DoubledRange => assert!(bytes.len() > text.len()),
                    Mutation::ReplacedNumber => assert!(bytes.starts_with(b"{\"a\": ")),
                }
            }
            assert_eq!(others, 50, "{mutation:?}");
        }
        for mutation in ALL {
            assert_eq!(mutation.of(b"", &mut Random::new(1)), b"");
        }
        assert_eq!(
            Mutation::ReplacedNumber.of(b"none", &mut Random::new(1)),
            b"none"
        );
    }

    #[test]
    fn a_panic_names_its_case() {
        let case = Case {
            mutation: Mutation::Cut,
            seed: 7,
        };
        let failed = catch_unwind(|| case.run("a file", || assert_eq!(case.seed, 0, "broken")));
        let message = *failed.unwrap_err().downcast::<String>().unwrap();
        assert!(
            message.contains("Cut") && message.contains("seed: 7"),
            "{message}"
        );
    }
}
