//! Preparation: a folder of captioned images to a packed data set. A killed run resumes, and only
//! changes are encoded.
//!
//! ```text
//! list (source) -> hash, header, text (scanned, scan) -> new, deleted, rewritten (preparation)
//!   -> order, objects (objects) -> decode, encode, write (encode) -> manifest (journal)
//! ```
//!
//! Several workers share the work (`workers`): each scans some samples and leaves its facts for the
//! others (`share`); from all facts each comes to the same plan, and writes some of its objects.
//! One call then commits what they wrote. `listing` says what a source holds without opening a
//! picture. Of a data set for a URL, `outlet` sends the latents while others are encoded.
//!
//! The encoder is an argument, because this crate has no tensor library. A killed run leaves
//! finished objects, which the next run reuses: unchanged if the folder is the same; otherwise they
//! become part of the data set and the rest is planned again. The content of a file never ends a
//! run; a full disk or a failing encoder does.

pub(crate) mod compared;
pub(crate) mod copies_list;
pub(crate) mod encode;
pub(crate) mod events;
pub(crate) mod fact;
pub(crate) mod filtered;
pub(crate) mod journal;
pub(crate) mod kept_pictures;
pub(crate) mod listing;
pub mod near_copies;
pub(crate) mod near_copy;
pub(crate) mod objects;
pub(crate) mod outlet;
pub(crate) mod part;
pub(crate) mod places;
pub(crate) mod preparation;
pub mod publish;
pub(crate) mod scan;
pub(crate) mod scanned;
pub(crate) mod scores;
pub(crate) mod settings;
pub(crate) mod share;
pub(crate) mod sign;
pub(crate) mod signatures;
pub mod small_pictures;
pub(crate) mod source_copies;
pub mod speed;
pub(crate) mod split;
mod summary;
pub(crate) mod text_notes;
pub(crate) mod timeline;
pub(crate) mod workers;

pub use events::{BucketCount, PartSummary, PrepEvent, PrepSummary, RgbBatch};
pub use listing::{ListSummary, ListedBucket, WorkShare, list};
pub use part::Part;
pub use places::{check_places, list_source_in};
pub use preparation::prepare;
pub use settings::PrepSettings;
pub use sign::{SignedAgain, sign_again};
pub use source_copies::find_near_copies_in_source;
pub use timeline::{EncoderSecs, Stretch, Work};
pub use workers::{Stage, gather_facts, join_parts, prepare_part};
