//! Near-copies of pictures: resized, mirrored, recompressed, bordered, cropped a little.
//!
//! ```text
//! pixels -> signature (grid, border): two keys and a thumbnail of each picture
//! keys -> candidate pairs (pairs, exact) -> confirmed by the thumbnails (thumbnail) -> clusters
//! ```
//!
//! Pure: pictures and files are the caller's.

/// Bits of 256 in which the keys of copies differ at most, chosen by measurement
/// (`examples/near_copies`).
pub const MAX_DISTANCE: u32 = 18;

pub mod border;
pub mod clusters;
pub mod grid;
pub mod pairs;
pub mod signature;
pub mod thumbnail;
