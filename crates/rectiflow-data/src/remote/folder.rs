//! A folder in an object store for callers that are not `async`: lengths and ranges of its objects.
//!
//! For viewers, which show a line or a picture more or less: a few attempts, not the minutes that
//! training waits for its data.

use std::{ops::Range, path::Path, time::Duration};

use crate::{
    error::{Error, Result},
    remote::{Location, Remote, network::Network, runtime},
};

/// A folder in an object store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RemoteFolder(Remote);

impl RemoteFolder {
    /// Opens the folder at a URL without a request.
    ///
    /// # Errors
    /// [`Error::Invalid`] for anything but a URL that is supported.
    pub fn open(url: &str) -> Result<Self> {
        let network = Network {
            attempts: 3,
            deadline: Duration::from_secs(30),
            ..Network::default()
        };
        match Location::parse(Path::new(url), &network)? {
            Location::Remote(remote) => Ok(Self(remote)),
            Location::Folder(_) => Err(Error::Invalid {
                what: url.to_owned(),
                reason: "expected s3://, gs://, az://, http:// or https://".to_owned(),
            }),
        }
    }

    /// Returns the length of an object in bytes; `None` if there is none of this name.
    ///
    /// # Errors
    /// [`Error::Remote`].
    pub fn len(&self, name: &str) -> Result<Option<u64>> {
        match runtime().block_on(self.0.len(name)) {
            Ok(len) => Ok(Some(len)),
            Err(Error::Remote { missing: true, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns a range of an object's bytes.
    ///
    /// # Errors
    /// [`Error::Remote`].
    pub fn read_range(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>> {
        let take = |bytes: bytes::Bytes| Ok(bytes.to_vec());
        runtime().block_on(self.0.read_range(name, range, take))
    }

    /// Returns a whole object of at most `limit` bytes.
    ///
    /// # Errors
    /// [`Error::Remote`].
    pub fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let bytes = runtime().block_on(self.0.read_all(name, limit))?;
        Ok(bytes.to_vec())
    }
}
