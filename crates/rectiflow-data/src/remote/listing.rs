//! The objects below a prefix, and what a store says about one.

use futures_util::TryStreamExt;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    error::Result,
    remote::{Remote, Target},
};

/// An object as its store lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Below the prefix, with `/` between its parts.
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// Changes when the object does: its modification time and its tag.
    pub(crate) version: u128,
}

impl Listed {
    fn new(name: String, object: &ObjectMeta) -> Self {
        let modified = object
            .last_modified
            .timestamp_nanos_opt()
            .unwrap_or_default();
        let tag = object.e_tag.as_deref().unwrap_or_default();
        Self {
            name,
            bytes: object.size,
            version: u128::from(xxh3_64(tag.as_bytes())) << 64 | u128::from(modified as u64),
        }
    }
}

impl Remote {
    /// All objects below the prefix, by name. Servers that speak plain HTTP cannot list.
    pub(crate) async fn list(&self) -> Result<Vec<Listed>> {
        let target = Target::whole("");
        let attempt = || async {
            let objects = self.store.list(Some(&self.prefix)).try_collect::<Vec<_>>();
            objects
                .await
                .map_err(|error| self.classify(&target, &error))
        };
        let objects = self.retried(&target, attempt).await?;
        let mut listed = Vec::with_capacity(objects.len());
        for object in &objects {
            let Some(parts) = object.location.prefix_match(&self.prefix) else {
                continue;
            };
            let parts: Vec<String> = parts.map(|part| part.as_ref().to_owned()).collect();
            listed.push(Listed::new(parts.join("/"), object));
        }
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(listed)
    }

    /// What the store says about the object `name`.
    pub(crate) async fn facts(&self, name: &str) -> Result<Listed> {
        let key = self.key(name);
        let target = Target::whole(name);
        let attempt = || async {
            let object = self.store.head(&key).await;
            object.map_err(|error| self.classify(&target, &error))
        };
        let object = self.retried(&target, attempt).await?;
        Ok(Listed::new(name.to_owned(), &object))
    }
}
