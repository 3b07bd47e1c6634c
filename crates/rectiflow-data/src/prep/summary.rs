//! The summary of a preparation, from the objects of the data set and the remarks of the scan.

use std::collections::BTreeMap;

use crate::{
    prep::{
        events::{BucketCount, PrepSummary},
        journal::Stored,
        preparation::{Preparation, latent_shape},
    },
    reject::{self, Reason, Remark},
};

impl Preparation<'_> {
    /// The remarks about files that are not in the data set: of filtered pictures the first.
    pub(crate) fn rejected(&self) -> Vec<Remark> {
        let mut rejected = self.scan.rejected.clone();
        rejected.extend_from_slice(&self.scan.filtered.listed);
        rejected
    }

    pub(crate) fn summary(&self, secs: f64) -> PrepSummary {
        let buckets = self.bucket_counts();
        let mut deleted_rows = 0;
        let mut bytes = 0;
        for stored in &self.store.objects {
            deleted_rows += stored.deleted.len() as u64 - stored.num_live();
            bytes += stored.journal.text_bytes + self.latents_bytes(stored);
        }
        let notes = self.scan.all_notes();
        let rejected = self.rejected();
        let mut counts = reject::count(&rejected);
        if let Some(count) = counts.get_mut(&Reason::Filtered) {
            *count = self.scan.filtered.count();
        }
        let (timeline, encoder_secs) = self.timeline.take();
        PrepSummary {
            train_rows: buckets.iter().map(|count| count.train).sum(),
            test_rows: buckets.iter().map(|count| count.test).sum(),
            buckets,
            rejected: counts,
            notes: reject::count(&notes),
            examples: reject::examples(rejected.iter().chain(&notes)),
            boards: self.source.boards.count(),
            filter: self.scan.filtered.clauses.clone(),
            written_rows: self.counts.written,
            copied_rows: self.counts.copied,
            resumed_rows: self.counts.resumed,
            reread_pictures: self.counts.reread,
            rewritten_rows: self.counts.rewritten,
            deleted_rows,
            bytes,
            encoder_secs,
            timeline,
            secs,
        }
    }

    /// Bytes of an object's latents, deleted rows included.
    fn latents_bytes(&self, stored: &Stored) -> u64 {
        let shape = latent_shape(self.codec, stored.journal.bucket);
        (2 * stored.deleted.len() * shape.iter().product::<usize>()) as u64
    }

    /// Live rows by bucket, in order of width and height.
    fn bucket_counts(&self) -> Vec<BucketCount> {
        let mut counts = BTreeMap::<(u32, u32), BucketCount>::new();
        for stored in &self.store.objects {
            let bucket = stored.journal.bucket;
            counts
                .entry((bucket.width_px, bucket.height_px))
                .or_insert_with(|| BucketCount::empty(bucket))
                .add(stored.journal.split, stored.num_live());
        }
        counts.into_values().collect()
    }
}
