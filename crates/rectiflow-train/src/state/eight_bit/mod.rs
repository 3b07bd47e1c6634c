//! Both moments of AdamW in 8 bits a number, with one scale for each block of 64: bitsandbytes'
//! block-wise dynamic quantisation (Dettmers et al. 2021, arXiv 2110.02861) with what it lacks for
//! small gradients beside a large one.
//!
//! A block's scale is its number of the largest size. A number is stored as the place of its ratio
//! to the scale in a fixed map, which has more numbers near 1 and some down to 1e-6 (`map`). Both
//! maps are bitsandbytes'. What differs:
//!
//! - **The root of the second moment is stored.** The ratio of two second moments is the square of
//!   that of their gradients: a gradient that is 1e-4 of the largest has a ratio of 1e-8, for which
//!   the map has no number. Its root has a ratio of 1e-4.
//!   On a CPU bitsandbytes looks codes up in 65,536 bins of equal width, so that all ratios below
//!   1.5e-5 become one number: second moments that are 1,500 times too large.
//! - **A root above 0 is never stored as 0**, so no update is divided by almost nothing.
//! - **Roots are rounded at random, with the right mean**, by the update and the place of the
//!   number (`map`). A root changes by at most 0.05% of itself where gradients become smaller, and
//!   the map's steps are 0.7 to 36%: rounded to the nearest, it would not move before the scale
//!   does. The first moment forgets a tenth in an update, and is rounded to the nearest.
//! - **Blocks have 64 numbers**, not 256, and a scale has the sign of its number, so that this one
//!   is exact with either sign.
//! - **All tensors** are stored so, small ones too.

pub(crate) mod blocks;
pub(crate) mod codes;
pub(crate) mod map;
pub(crate) mod pass;
