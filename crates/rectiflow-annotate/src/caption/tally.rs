//! What a run has done so far, and what it costs.

use std::collections::BTreeMap;

use rectiflow_data::{annotation::Status, captioning::CaptionSettings};
use serde::Serialize;

/// Counts of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Tally {
    /// Captions that this run asks for, at most: one for each picture and mode.
    pub total: u64,
    /// Captions of which this run is done, with an answer or without.
    pub done: u64,
    /// Pictures that had an answer before.
    pub known: u64,
    /// Pictures that are copies of others, byte for byte, or turned out to have an answer.
    pub copies: u64,
    /// Pictures that cannot be read.
    pub unreadable: u64,
    /// The first of these, with the reason.
    pub unreadable_example: Option<String>,
    /// Answers of this run by status.
    pub statuses: BTreeMap<&'static str, u64>,
    /// Requests that were sent again after a failure.
    pub retries: u64,
    /// The last failure.
    pub last_failure: Option<String>,
    /// Answers that were asked for again with another seed.
    pub second_seeds: u64,
    /// Tokens of prompts, as the servers count them.
    pub prompt_tokens: u64,
    /// Tokens of answers, as the servers count them.
    pub answer_tokens: u64,
    /// Time so far in seconds.
    pub secs: f64,
}

/// What one picture cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spent {
    /// Requests that were sent again after a failure.
    pub retries: u32,
    /// Whether another seed was tried.
    pub second_seed: bool,
    /// Tokens of the prompts of all attempts.
    pub prompt_tokens: u64,
    /// Tokens of the answers of all attempts.
    pub answer_tokens: u64,
}

impl Tally {
    /// Adds a picture that is done.
    pub(crate) fn add(&mut self, status: Status, spent: Spent) {
        self.done += 1;
        *self.statuses.entry(status.as_str()).or_default() += 1;
        self.retries += u64::from(spent.retries);
        self.second_seeds += u64::from(spent.second_seed);
        self.prompt_tokens += spent.prompt_tokens;
        self.answer_tokens += spent.answer_tokens;
    }

    /// Answers with a status.
    pub fn num(&self, status: Status) -> u64 {
        self.statuses
            .get(status.as_str())
            .copied()
            .unwrap_or_default()
    }

    /// Answers that cannot be used.
    pub fn num_set_aside(&self) -> u64 {
        self.statuses.values().sum::<u64>() - self.num(Status::Ok)
    }

    /// The price so far. None if the settings have no price.
    pub fn price(&self, settings: &CaptionSettings) -> Option<f64> {
        let prices = [
            settings.price_per_million_prompt_tokens * self.prompt_tokens as f64 / 1e6,
            settings.price_per_million_answer_tokens * self.answer_tokens as f64 / 1e6,
            settings.price_per_hour * self.secs / 3600.0,
        ];
        let has_price = settings.price_per_million_prompt_tokens > 0.0
            || settings.price_per_million_answer_tokens > 0.0
            || settings.price_per_hour > 0.0;
        has_price.then(|| prices.iter().sum())
    }

    /// The price of the whole run at the rate so far. None before the first picture is done.
    pub fn whole_price(&self, settings: &CaptionSettings) -> Option<f64> {
        let price = self.price(settings)?;
        (self.done > 0).then(|| price * self.total as f64 / self.done as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_follow_tokens_and_hours() {
        let mut tally = Tally {
            total: 10,
            secs: 1800.0,
            ..Tally::default()
        };
        let spent = Spent {
            prompt_tokens: 400_000,
            answer_tokens: 50_000,
            ..Spent::default()
        };
        tally.add(Status::Ok, spent);
        tally.add(
            Status::Loop,
            Spent {
                second_seed: true,
                retries: 3,
                ..spent
            },
        );
        let free = CaptionSettings::default();
        assert_eq!(tally.price(&free), None);
        let paid = CaptionSettings {
            price_per_million_prompt_tokens: 0.5,
            price_per_million_answer_tokens: 2.0,
            price_per_hour: 4.0,
            ..free
        };
        let price = tally.price(&paid).unwrap();
        assert!((price - (0.4 + 0.2 + 2.0)).abs() < 1e-12, "{price}");
        assert!((tally.whole_price(&paid).unwrap() - 5.0 * price).abs() < 1e-12);
        assert_eq!((tally.num(Status::Ok), tally.num_set_aside()), (1, 1));
        assert_eq!((tally.retries, tally.second_seeds), (3, 1));
    }
}
