//! Verification of all bytes of an object.

use crate::{
    dataset::{Dataset, latents::BLOCKS_A_REQUEST, records::check_len},
    error::Result,
    format::{manifest::LATENTS_OFFSET, shard::check_header},
    remote::{
        Remote,
        request::{ObjectFile, coalesce},
        runtime,
    },
};

impl Dataset {
    /// Checks that every byte of an object's latents and text is what was written, for
    /// `inspect --verify`.
    ///
    /// # Errors
    /// As [`Dataset::read_latents`] and [`Dataset::records`].
    pub fn verify_object(&self, object: usize) -> Result<()> {
        let entry = &self.manifest.objects[object];
        match &self.remote {
            None => drop(self.latents_file(object)?),
            Some(remote) => self.check_remote(remote, object)?,
        }
        for run in coalesce(0..entry.num_blocks(), BLOCKS_A_REQUEST) {
            self.start(ObjectFile::Latents, object, run)?.wait()?;
        }
        self.object_records(object).map(drop)
    }

    /// Checks the lengths of an object's files and the header of its latents.
    fn check_remote(&self, remote: &Remote, object: usize) -> Result<()> {
        let entry = &self.manifest.objects[object];
        let latents = self.root.join(&entry.latents);
        let text = self.root.join(&entry.text);
        let header =
            runtime().block_on(remote.read_range(&entry.latents, 0..LATENTS_OFFSET, Ok))?;
        let shape = self.latent_shape(entry.bucket);
        check_header(&latents, &header, entry.rows, shape)?;
        let latents_len = runtime().block_on(remote.len(&entry.latents))?;
        check_len(&latents, latents_len, self.manifest.latents_bytes(entry))?;
        let text_len = runtime().block_on(remote.len(&entry.text))?;
        check_len(&text, text_len, entry.text_bytes)
    }
}
