//! Where the rows of a window go: each is copied into its micro-batch as it arrives, while it is in
//! the processor's cache, and its own memory is used again at once.
//!
//! So a window's bytes are held once, and less of them with each micro-batch that is delivered.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::f16;

use crate::{
    dataset::{Dataset, batch_latents::BatchLatents, index::ObjectRow, latents::decode_row},
    error::Result,
    remote::buffers::Buffers,
};

/// The micro-batches of a window, filled as its blocks arrive.
#[derive(Debug)]
pub(crate) struct Scatter {
    dataset: Arc<Dataset>,
    /// Numbers of a row.
    row_len: usize,
    /// Rows of a micro-batch.
    size: usize,
    /// Sorted by row.
    places: Vec<Place>,
    /// Each with the memory that it takes when its first row arrives.
    batches: Vec<Mutex<Batch>>,
    buffers: Buffers<f16>,
}

/// A row of an object, and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    row: ObjectRow,
    /// Micro-batch of the window.
    batch: usize,
    /// Sample of the micro-batch.
    sample: usize,
}

/// A micro-batch that is being filled.
#[derive(Debug, Default)]
struct Batch {
    latents: Option<BatchLatents>,
    /// Rows with numbers that are not finite, each with its sample of the micro-batch.
    not_finite: Vec<(ObjectRow, usize)>,
}

impl Scatter {
    /// The places of `rows`, micro-batches of `size` one after the other. The first `num_delivered`
    /// micro-batches are not wanted any more.
    pub(crate) fn new(
        dataset: &Arc<Dataset>,
        rows: &[ObjectRow],
        row_len: usize,
        size: usize,
        num_delivered: usize,
        buffers: &Buffers<f16>,
    ) -> Self {
        let mut places = Vec::with_capacity(rows.len());
        for (batch, rows) in rows.chunks_exact(size).enumerate().skip(num_delivered) {
            for (sample, &row) in rows.iter().enumerate() {
                places.push(Place { row, batch, sample });
            }
        }
        places.sort_unstable();
        let mut batches = Vec::new();
        batches.resize_with(rows.len() / size, Mutex::default);
        Self {
            dataset: dataset.clone(),
            row_len,
            size,
            places,
            batches,
            buffers: buffers.clone(),
        }
    }

    /// Copies a row to its places, if it has any. A second call with the same row replaces the
    /// first.
    pub(crate) fn place(&self, row: ObjectRow, bytes: &[u8]) {
        let from = self.places.partition_point(|place| place.row < row);
        for place in &self.places[from..] {
            if place.row != row {
                break;
            }
            self.copy_to(place, bytes);
        }
    }

    fn copy_to(&self, place: &Place, bytes: &[u8]) {
        let mut guard = self.lock(place.batch);
        let batch = &mut *guard;
        batch.not_finite.retain(|&(row, _)| row != place.row);
        let latents = batch.latents.get_or_insert_with(|| {
            BatchLatents::unwritten(&self.buffers, self.size * self.row_len)
        });
        let out = &mut latents[place.sample * self.row_len..][..self.row_len];
        if !decode_row(bytes, out) {
            batch.not_finite.push((place.row, place.sample));
        }
    }

    /// The latents of a micro-batch, all of whose blocks have been placed.
    ///
    /// # Errors
    /// [`crate::Error::Malformed`] if a number is not finite; the error names the sample.
    pub(crate) fn take(&self, batch: usize) -> Result<BatchLatents> {
        let Batch {
            latents,
            not_finite,
        } = std::mem::take(&mut *self.lock(batch));
        let latents = latents.expect("the blocks of the micro-batch have been placed");
        for ((object, row), sample) in not_finite {
            let numbers = &latents[sample * self.row_len..][..self.row_len];
            self.dataset.check_finite(object, row, numbers)?;
        }
        Ok(latents)
    }

    fn lock(&self, batch: usize) -> MutexGuard<'_, Batch> {
        self.batches[batch]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::tests::write;

    const ROW_LEN: usize = 24;

    /// Bytes of a row whose numbers are all `number`.
    fn row(number: f32) -> Vec<u8> {
        f16::from_f32(number).to_le_bytes().repeat(ROW_LEN)
    }

    /// Micro-batches of two of the rows `rows` of object 0, of which the first has been delivered.
    fn scatter(root: &std::path::Path, rows: &[u32]) -> Scatter {
        write(root);
        let dataset = Arc::new(Dataset::open(root).unwrap());
        let rows: Vec<ObjectRow> = rows.iter().map(|&row| (0, row)).collect();
        Scatter::new(&dataset, &rows, ROW_LEN, 2, 1, &Buffers::default())
    }

    #[test]
    fn rows_go_to_all_their_places_whatever_their_order() {
        let root = tempfile::tempdir().unwrap();
        let scatter = scatter(root.path(), &[1, 2, 3, 4, 0, 3]);
        for at in [4, 3, 2, 1, 0] {
            scatter.place((0, at), &row(at as f32));
        }
        // No row of the delivered micro-batch takes memory.
        assert!(scatter.lock(0).latents.is_none());
        let first_numbers = |batch| {
            let latents = scatter.take(batch).unwrap();
            [latents[0], latents[ROW_LEN]].map(f16::to_f32)
        };
        assert_eq!(
            [first_numbers(1), first_numbers(2)],
            [[3.0, 4.0], [0.0, 3.0]]
        );
    }

    #[test]
    fn a_number_that_is_not_finite_is_an_error_of_its_micro_batch_alone() {
        let root = tempfile::tempdir().unwrap();
        let scatter = scatter(root.path(), &[1, 2, 3, 4, 5, 6]);
        for at in 3..7 {
            scatter.place((0, at), &row(if at == 4 { f32::NAN } else { 1.0 }));
        }
        let error = scatter.take(1).unwrap_err().to_string();
        assert!(
            error.contains("a/4.png") && error.contains("not finite"),
            "{error}"
        );
        assert!(scatter.take(2).is_ok());
        // A repeated request replaces what came before.
        for (at, number) in [(3, f32::NAN), (4, 1.0), (3, 2.0)] {
            scatter.place((0, at), &row(number));
        }
        assert_eq!(scatter.take(1).unwrap()[0], f16::from_f32(2.0));
    }
}
