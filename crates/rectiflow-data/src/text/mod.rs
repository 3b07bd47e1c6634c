//! Captions to prompts to token ids.

pub mod caption;
pub(crate) mod encoding;
pub(crate) mod keys;
pub mod overflow;
pub mod prompt;
pub mod quality_ranks;
pub(crate) mod separated;
pub mod tag_list;
pub mod template;
pub mod token;
pub(crate) mod token_cache;
