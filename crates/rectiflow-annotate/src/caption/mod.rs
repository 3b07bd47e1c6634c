//! Captions from served models: any server that answers OpenAI's chat requests.
//!
//! ```text
//! run        pictures -> (threads) question -> (async) client -> judge -> a row of the table
//! client     one question: servers, deadlines, retries, the second seed
//! probe      whether a server sees pictures at all, before anything is paid for
//! ```

pub mod answer;
pub(crate) mod attempt;
pub mod client;
pub mod judge;
pub mod probe;
pub mod question;
pub mod run;
pub(crate) mod servers;
pub mod statistics;
pub mod tally;
