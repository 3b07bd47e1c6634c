//! Captions to prompts to token ids.

pub mod caption;
pub mod prompt;
pub mod token;
pub(crate) mod token_cache;
