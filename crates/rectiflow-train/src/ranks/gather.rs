//! Gathers vectors whose pieces are spread over the ranks, bucket by bucket, so that it takes
//! additional memory for only one bucket.

use rectiflow_sdxl::write::write_to;
use tch::{Device, Kind, Tensor};

use crate::{
    error::Result,
    ranks::{comm::Comm, traffic::Collective},
    state::{
        layout::narrow,
        partition::{Bucket, Partition},
    },
};

impl Comm {
    /// Overwrites every piece of `vector` `[n]` with the values of the rank that owns it.
    ///
    /// # Errors
    /// [`crate::error::Error::Collective`].
    pub fn all_gather(&self, vector: &Tensor, partition: &Partition) -> Result<()> {
        let own = |bucket: &Bucket| narrow(vector, &bucket.of(self.rank().rank));
        self.gather_buckets(
            partition,
            (vector.kind(), vector.device()),
            own,
            |bucket, all| {
                write_to(&narrow(vector, &bucket.range), &all);
            },
        )
    }

    /// Returns on rank 0 the whole vector `[n]`, of which every rank holds its part in `own`, in
    /// CPU memory if several ranks share it. Returns `None` on other ranks.
    ///
    /// # Errors
    /// [`crate::error::Error::Collective`].
    pub(crate) fn collect(&self, own: &Tensor, partition: &Partition) -> Result<Option<Tensor>> {
        if partition.ranks() == 1 {
            return Ok(self.is_first().then(|| own.shallow_clone()));
        }
        let vector = self
            .is_first()
            .then(|| Tensor::empty([partition.len()], (own.kind(), Device::Cpu)));
        let mut pieces = partition.pieces(self.rank());
        let piece = |_: &Bucket| narrow(own, &pieces.next().expect("every bucket has a piece").own);
        self.gather_buckets(
            partition,
            (own.kind(), own.device()),
            piece,
            |bucket, all| {
                if let Some(vector) = &vector {
                    write_to(&narrow(vector, &bucket.range), &all);
                }
            },
        )?;
        Ok(vector)
    }

    /// Gathers bucket after bucket: `own` returns this rank's elements, `take` receives all
    /// elements.
    fn gather_buckets(
        &self,
        partition: &Partition,
        (kind, device): (Kind, Device),
        mut own: impl FnMut(&Bucket) -> Tensor,
        take: impl Fn(&Bucket, Tensor),
    ) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        for bucket in partition.buckets() {
            let found = own(bucket);
            let piece = Tensor::zeros([bucket.piece], (kind, device));
            write_to(&narrow(&piece, &(0..found.numel() as i64)), &found);
            let len = bucket.piece * partition.ranks() as i64;
            let spare = self.spare.take(len, kind, device);
            let all = narrow(&spare, &(0..len));
            let pending = self.begin_all_gather(&all, piece)?;
            self.waiting(Collective::AllGather, || self.end_all_gather(pending))?;
            take(
                bucket,
                narrow(&all, &(0..bucket.range.end - bucket.range.start)),
            );
            self.spare.release(spare);
        }
        Ok(())
    }
}
