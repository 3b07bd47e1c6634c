//! What captions are like, by mode: how long, how many are cut by the text encoders, how many could
//! not be used, and how they begin, which shows a captioner's tics.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use rectiflow_data::{
    annotation::{Kind, Status},
    annotation_table,
    token::{Cut, Tokenizer},
};
use serde::Serialize;

use crate::error::Result;

/// Words of an opening.
const OPENING_WORDS: usize = 3;
/// Openings that are named.
const NUM_OPENINGS: usize = 5;
/// Openings that are counted at once; the rare ones are dropped then.
const MOST_OPENINGS: usize = 200_000;
/// Chunks that the text encoders read.
const MAX_CHUNKS: usize = 3;
/// Tokens of a chunk.
const CHUNK_TOKENS: usize = 75;
/// Token counts from here on are counted as this one.
const LONGEST_TOKENS: usize = 4096;

/// Captions of one mode, as they are counted.
#[derive(Debug, Default)]
struct Counting {
    statuses: BTreeMap<Status, u64>,
    /// Captions by number of tokens.
    lengths: BTreeMap<usize, u64>,
    chunks: [u64; MAX_CHUNKS],
    num_cut: u64,
    openings: HashMap<String, u64>,
}

/// What the captions of a mode are like.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModeStatistics {
    /// Pictures asked about, by what became of them.
    pub statuses: BTreeMap<&'static str, u64>,
    /// Captions that can be used.
    pub num_captions: u64,
    /// Mean number of CLIP's tokens.
    pub mean_tokens: f64,
    /// Half of the captions have at most as many tokens.
    pub median_tokens: usize,
    /// 95 of 100 captions have at most as many tokens.
    pub p95_tokens: usize,
    /// Most tokens.
    pub max_tokens: usize,
    /// Share of captions with one, two and three chunks of 75 tokens.
    pub chunk_shares: [f64; MAX_CHUNKS],
    /// Share of captions whose end is beyond three chunks and is not read.
    pub cut_share: f64,
    /// Share of all answers that decline.
    pub refused_share: f64,
    /// The commonest first three words, each with its share.
    pub openings: Vec<(String, f64)>,
}

/// Counts captions by mode.
#[derive(Debug, Default)]
pub struct Statistics(BTreeMap<String, Counting>);

impl Statistics {
    /// The captions of a table of annotations.
    ///
    /// # Errors
    /// Those of [`annotation_table::read`].
    pub fn of_table(table: &Path) -> Result<Self> {
        let mut all = Self::default();
        annotation_table::read(table, &mut |row| {
            if row.kind == Kind::Caption {
                all.add(&row.mode, row.status, row.text.as_deref().unwrap_or(""));
            }
            Ok(())
        })?;
        Ok(all)
    }

    /// Counts an answer.
    pub fn add(&mut self, mode: &str, status: Status, text: &str) {
        if !self.0.contains_key(mode) {
            self.0.insert(mode.to_owned(), Counting::default());
        }
        let counting = self.0.get_mut(mode).expect("it is there now");
        *counting.statuses.entry(status).or_default() += 1;
        if status == Status::Ok {
            counting.add(text);
        }
    }

    /// What was counted, by mode.
    pub fn modes(&self) -> BTreeMap<String, ModeStatistics> {
        let mut modes = BTreeMap::new();
        for (mode, counting) in &self.0 {
            modes.insert(mode.clone(), counting.finish());
        }
        modes
    }
}

impl Counting {
    fn add(&mut self, text: &str) {
        let tokenizer = Tokenizer::shared();
        let num_tokens = tokenizer.ids(text).len();
        *self
            .lengths
            .entry(num_tokens.min(LONGEST_TOKENS))
            .or_default() += 1;
        let num_chunks = tokenizer.num_chunks(text, Cut::Plain);
        self.chunks[num_chunks.clamp(1, MAX_CHUNKS) - 1] += 1;
        self.num_cut += u64::from(num_tokens > MAX_CHUNKS * CHUNK_TOKENS);
        *self.openings.entry(opening(text)).or_default() += 1;
        if self.openings.len() > MOST_OPENINGS {
            self.openings.retain(|_, count| *count > 1);
        }
    }

    fn finish(&self) -> ModeStatistics {
        let num_all: u64 = self.statuses.values().sum();
        let num_captions: u64 = self.lengths.values().sum();
        let share = |count: u64, of: u64| count as f64 / of.max(1) as f64;
        let mut sum = 0.0;
        for (&tokens, &count) in &self.lengths {
            sum += tokens as f64 * count as f64;
        }
        let mut statuses = BTreeMap::new();
        for (status, &count) in &self.statuses {
            statuses.insert(status.as_str(), count);
        }
        let num_refused = self.statuses.get(&Status::Refused).copied();
        ModeStatistics {
            statuses,
            num_captions,
            mean_tokens: sum / num_captions.max(1) as f64,
            median_tokens: self.quantile(num_captions.div_ceil(2)),
            p95_tokens: self.quantile((num_captions * 95).div_ceil(100)),
            max_tokens: self.lengths.keys().next_back().copied().unwrap_or_default(),
            chunk_shares: self.chunks.map(|count| share(count, num_captions)),
            cut_share: share(self.num_cut, num_captions),
            refused_share: share(num_refused.unwrap_or_default(), num_all),
            openings: self.commonest(num_captions),
        }
    }

    /// The number of tokens of the caption of this number, from 1, by length.
    fn quantile(&self, number: u64) -> usize {
        let mut sum = 0;
        for (&tokens, &count) in &self.lengths {
            sum += count;
            if sum >= number {
                return tokens;
            }
        }
        0
    }

    fn commonest(&self, num_captions: u64) -> Vec<(String, f64)> {
        let mut openings: Vec<(&String, u64)> = Vec::new();
        for (opening, &count) in &self.openings {
            openings.push((opening, count));
        }
        openings.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
        let shares = openings
            .into_iter()
            .take(NUM_OPENINGS)
            .map(|(opening, count)| (opening.clone(), count as f64 / num_captions.max(1) as f64));
        shares.collect()
    }
}

/// The first words of a caption, in lower case.
fn opening(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().take(OPENING_WORDS).collect();
    words.join(" ").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_openings_and_refusals_are_counted_by_mode() {
        let mut statistics = Statistics::default();
        for number in 0..8 {
            statistics.add("short", Status::Ok, &format!("The image shows a {number}"));
        }
        statistics.add("short", Status::Ok, "A cat.");
        statistics.add("short", Status::Refused, "I'm sorry");
        statistics.add("long", Status::Ok, &"cat ".repeat(226));
        statistics.add("long", Status::Ok, &"cat ".repeat(150));
        let modes = statistics.modes();
        let short = &modes["short"];
        assert_eq!(short.statuses, BTreeMap::from([("ok", 9), ("refused", 1)]));
        assert_eq!(
            (short.num_captions, short.median_tokens, short.max_tokens),
            (9, 5, 5)
        );
        assert!(
            (short.mean_tokens - 43.0 / 9.0).abs() < 1e-12,
            "{}",
            short.mean_tokens
        );
        assert!((short.refused_share - 0.1).abs() < 1e-12);
        assert_eq!(short.openings[0].0, "the image shows");
        assert_eq!(short.chunk_shares, [1.0, 0.0, 0.0]);
        let long = &modes["long"];
        assert_eq!((long.chunk_shares, long.cut_share), ([0.0, 0.5, 0.5], 0.5));
        assert_eq!((long.median_tokens, long.p95_tokens), (150, 226));
    }
}
