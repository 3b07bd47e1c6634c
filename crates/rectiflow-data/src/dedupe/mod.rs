//! Near-copies of pictures: resized, mirrored, recompressed, bordered, cropped a little.
//!
//! ```text
//! pixels -> signature (grid, border): a thumbnail of each picture, and of what its borders hold
//! thumbnail -> keys of the whole and of windows (key) -> candidate pairs (pairs, exact)
//! candidates -> moved onto each other (registration), compared (thumbnail) -> clusters
//! ```
//!
//! Pure: pictures and files are the caller's.

/// Bits of 256 in which the keys of copies differ at most, chosen by measurement
/// (`examples/near_copies`).
pub const MAX_DISTANCE: u32 = 18;

pub mod border;
pub mod clusters;
pub mod grid;
pub mod key;
pub mod pairs;
pub mod registration;
pub mod signature;
pub mod thumbnail;
