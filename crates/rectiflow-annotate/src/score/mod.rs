//! Scores of pictures: what a head's numbers mean, scores that others have computed, and the ranks
//! of scores over a whole set.

pub mod assign;
pub mod by_word;
pub mod given;
pub mod head;
pub mod ranked;
pub mod ranks;
