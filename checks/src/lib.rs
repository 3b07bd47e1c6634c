//! Checks of the source tree itself, on its syntax: which file uses which, and what each may use.
//!
//! ```text
//! files -> source (syntax, test lines) -> tree (modules, mentions) -> resolve -> graph -> house
//!          |-> words -> rules                                                      \-> rules
//!          \-> comments -> limits
//! ```
//!
//! A crate of its own, without any of the crates it reads: it builds in seconds, needs no libtorch,
//! and can judge a tree that does not compile. `tests/` holds the checks of this repository;
//! `cargo run --release -p checks -- FOLDER` prints the same for any checkout. [`mutation`] is for
//! tests of the other crates: seeded damage to the files that they read.

pub mod comments;
pub mod files;
pub mod graph;
pub mod house;
pub mod limits;
pub mod mutation;
pub mod resolve;
pub mod rules;
pub mod source;
pub mod tree;
pub mod words;

mod scan;
