//! The first contact with a mirror: an object is written, listed and removed, so that missing
//! rights show at the start and not with the first checkpoint.

use std::path::Path;

use rectiflow_data::Bucket;

use crate::error::{Error, Result};

const NAME: &str = ".rectiflow-probe";

/// Checks that objects can be written, listed and removed.
///
/// # Errors
/// [`Error::Checkpoint`] with the address, what failed, and what to do.
pub(crate) fn probe(bucket: &Bucket) -> Result<()> {
    let refused = |what: &str, error: rectiflow_data::Error| {
        let reason = format!(
            "the mirror of the run cannot be {what}: {error}. Its credentials need the rights to \
             write, read, list and remove objects (S3: PutObject, GetObject, ListBucket, \
             DeleteObject, AbortMultipartUpload); or take checkpoint.mirror out of the recipe"
        );
        Error::checkpoint(Path::new(bucket.url()), reason)
    };
    if let Err(error) = bucket.put(NAME, b"written and removed when a run starts\n") {
        return Err(refused("written", error));
    }
    if let Err(error) = bucket.list() {
        return Err(refused("listed", error));
    }
    match bucket.remove(NAME) {
        Err(error) => Err(refused("cleared of old checkpoints", error)),
        Ok(()) => Ok(()),
    }
}
