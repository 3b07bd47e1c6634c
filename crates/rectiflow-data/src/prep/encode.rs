//! The second pass: planned samples to finished objects. Images are decoded in parallel, ahead of
//! the encoder.
//!
//! A thread decodes a window of images at a time on all cores, at most two windows ahead; the
//! caller's thread encodes and writes. With enough cores the encoder never waits for a decoder.
//! Memory is bounded: the pixels of two windows of one bucket, plus one source image per core
//! (large images are decoded one at a time).

use std::{
    fs,
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use half::f16;
use rayon::prelude::*;

use crate::{
    dataset::Dataset,
    error::{Error, Result},
    format::{
        bucket::{Bucket, place},
        record::{Record, SampleId},
        shard::ObjectWriter,
    },
    picture::decode::{decode, fit},
    prep::{
        events::{PrepEvent, RgbBatch},
        journal::{Journal, JournalRow, Store, latents_name, text_name},
        objects::{Item, PlannedObject},
        scan::Accepted,
        settings::PrepSettings,
        source::Source,
    },
    reject::{Fault, Reason},
};

/// Images of more pixels are decoded one at a time: at eight bytes a pixel, one on every core could
/// exceed the memory.
const LARGE_PX: u64 = 1 << 25;
const WINDOWS_AHEAD: usize = 2;

/// The caller's encoder.
pub(crate) type Encode<'a> = dyn FnMut(&RgbBatch) -> std::result::Result<Vec<f16>, String> + 'a;

/// The inputs of the second pass.
pub(crate) struct Encoding<'a> {
    pub(crate) store: &'a Store,
    pub(crate) source: &'a Source,
    pub(crate) settings: &'a PrepSettings,
    /// The samples that `Item::index` refers to.
    pub(crate) accepted: &'a [Accepted],
    /// Object and physical row of a sample's latents in the data set that is being repacked. None
    /// if the sample has no latents yet.
    pub(crate) latents: &'a (dyn Fn(SampleId) -> Option<(usize, u32)> + Sync),
    /// Shape of a bucket's latents, `[C, h, w]`.
    pub(crate) shape: &'a (dyn Fn(Bucket) -> [usize; 3] + Sync),
    pub(crate) plan: &'a str,
}

/// A sample that is ready to be encoded or written.
struct Prepared {
    record: Record,
    payload: Payload,
    note: Option<Fault>,
}

enum Payload {
    /// `[h, w, 3]`, in the size of the bucket.
    Pixels(Vec<u8>),
    /// `[C, h, w]`, copied from an older object.
    Latents(Vec<f16>),
}

/// A batch of one object's samples, in row order.
struct Batch {
    object: usize,
    /// Whether this is the last batch of the object.
    is_last: bool,
    samples: Vec<(SampleId, std::result::Result<Prepared, Fault>)>,
}

impl Encoding<'_> {
    /// Writes `objects` and their journals. Calls `finished` with each journal when its object is
    /// complete.
    ///
    /// # Errors
    /// [`Error::Encode`], [`Error::Io`]. Finished objects are kept for the next run.
    pub(crate) fn run(
        &self,
        objects: &[&PlannedObject],
        encode: &mut Encode<'_>,
        progress: &mut dyn FnMut(PrepEvent),
        finished: &mut dyn FnMut(Journal),
    ) -> Result<()> {
        std::thread::scope(|scope| {
            let (sender, batches) = sync_channel(WINDOWS_AHEAD);
            // When the receiver is dropped, sending fails and the thread ends; the scope waits for
            // that.
            scope.spawn(move || self.decode_all(objects, &sender));
            self.write_all(objects, batches, encode, progress, finished)
        })
    }

    fn decode_all(&self, objects: &[&PlannedObject], batches: &SyncSender<Vec<Batch>>) {
        let large = Mutex::new(());
        let size = self.settings.encode_batch as usize;
        let window = (4 * rayon::current_num_threads()).next_multiple_of(size);
        for (object, planned) in objects.iter().enumerate() {
            let mut left = planned.items.len();
            for items in planned.items.chunks(window) {
                let decoded: Vec<_> = items
                    .par_iter()
                    .map(|item| (item.id, self.prepare(item, &large)))
                    .collect();
                let mut decoded = decoded.into_iter();
                let mut window = Vec::new();
                while decoded.len() > 0 {
                    let samples: Vec<_> = decoded.by_ref().take(size).collect();
                    left -= samples.len();
                    window.push(Batch {
                        object,
                        is_last: left == 0,
                        samples,
                    });
                }
                if batches.send(window).is_err() {
                    return;
                }
            }
        }
    }

    /// Prepares a sample: its text, and its decoded, resized and cropped pixels or its existing
    /// latents.
    fn prepare(&self, item: &Item, large: &Mutex<()>) -> std::result::Result<Prepared, Fault> {
        let accepted = &self.accepted[item.index];
        let found = &self.source.files[accepted.file];
        let settings = self.settings;
        let placement = place(
            item.bucket,
            accepted.width_px,
            accepted.height_px,
            settings.seed,
            item.id,
        );
        let stored =
            (self.latents)(item.id).and_then(|(object, row)| self.stored(object, row, item.bucket));
        let (payload, note) = match stored {
            Some(latents) => (Payload::Latents(latents), None),
            None => {
                let unreadable = |detail: String| Fault::new(Reason::Unreadable, detail);
                let bytes = fs::read(self.source.path(&found.path))
                    .map_err(|error| unreadable(error.to_string()))?;
                if SampleId::of(&bytes) != item.id {
                    return Err(unreadable(
                        "it changed while it was read: prepare again".to_owned(),
                    ));
                }
                let pixels = u64::from(accepted.width_px) * u64::from(accepted.height_px);
                let _alone = (pixels > LARGE_PX)
                    .then(|| large.lock().unwrap_or_else(PoisonError::into_inner));
                let decoded = decode(&bytes, settings.max_pixels, settings.background)?;
                let size = (decoded.picture.width_px(), decoded.picture.height_px());
                if size != (accepted.width_px, accepted.height_px) {
                    return Err(Fault::new(
                        Reason::Broken,
                        format!("it decodes to {size:?} px, unlike its header"),
                    ));
                }
                (
                    Payload::Pixels(fit(
                        &decoded.picture,
                        &placement,
                        item.bucket,
                        settings.resize,
                    )),
                    decoded.note,
                )
            }
        };
        let (text, _) = self.source.text(found, &settings.quality_words);
        let text = text.unwrap_or_default();
        let record = Record {
            id: item.id,
            captions: text.captions,
            tags: text.tags,
            important_tags: text.important_tags,
            quality: text.quality,
            verbatim: text.verbatim,
            original_width_px: accepted.width_px,
            original_height_px: accepted.height_px,
            crop_left_px: placement.crop_left_px,
            crop_top_px: placement.crop_top_px,
            target_width_px: item.bucket.width_px,
            target_height_px: item.bucket.height_px,
            source: found.path.clone(),
        };
        Ok(Prepared {
            record,
            payload,
            note,
        })
    }

    /// The existing latents of a row. Damaged ones count as missing, so that the image is encoded
    /// again.
    fn stored(&self, object: usize, row: u32, bucket: Bucket) -> Option<Vec<f16>> {
        let dataset: &Dataset = self.store.dataset.as_ref()?;
        let mut latents = vec![f16::ZERO; (self.shape)(bucket).iter().product()];
        match dataset.read_row(object, row, &mut latents) {
            Ok(()) => Some(latents),
            Err(error) => {
                tracing::warn!(%error, "the stored latents cannot be read; the image is encoded again");
                None
            }
        }
    }

    fn write_all(
        &self,
        objects: &[&PlannedObject],
        windows: Receiver<Vec<Batch>>,
        encode: &mut Encode<'_>,
        progress: &mut dyn FnMut(PrepEvent),
        finished: &mut dyn FnMut(Journal),
    ) -> Result<()> {
        let num_samples: u64 = objects.iter().map(|object| object.items.len() as u64).sum();
        let (mut done, mut rejected) = (0, 0);
        let mut open: Option<OpenObject> = None;
        for batch in windows.into_iter().flatten() {
            let planned = objects[batch.object];
            let Bucket {
                width_px,
                height_px,
            } = planned.bucket;
            let object = open.get_or_insert_with(|| OpenObject::new(self.plan, planned));
            done += batch.samples.len() as u64;
            let is_last = batch.is_last;
            object.add(self, planned, batch, encode)?;
            let failed = rejected + object.journal.faults.len() as u64;
            progress(PrepEvent::Encoding {
                width_px,
                height_px,
                done,
                num_samples,
                rejected: failed,
            });
            if is_last {
                rejected = failed;
                let complete = open.take().expect("it was just filled");
                finished(complete.finish(self.store)?);
            }
        }
        Ok(())
    }
}

/// The object being written. Its files are created with its first good row.
struct OpenObject {
    journal: Journal,
    writer: Option<ObjectWriter>,
}

impl OpenObject {
    fn new(plan: &str, planned: &PlannedObject) -> Self {
        let PlannedObject {
            stem,
            bucket,
            split,
            ..
        } = planned;
        let journal = Journal {
            plan: plan.to_owned(),
            stem: stem.clone(),
            bucket: *bucket,
            split: *split,
            text: text_name(stem, 0),
            text_bytes: 0,
            rows: Vec::new(),
            blocks: Vec::new(),
            faults: Vec::new(),
            notes: Vec::new(),
        };
        Self {
            journal,
            writer: None,
        }
    }

    /// Encodes a batch and appends its good rows.
    fn add(
        &mut self,
        encoding: &Encoding<'_>,
        planned: &PlannedObject,
        batch: Batch,
        encode: &mut Encode<'_>,
    ) -> Result<()> {
        let shape = (encoding.shape)(planned.bucket);
        let mut good = Vec::new();
        for (id, sample) in batch.samples {
            match sample {
                Ok(prepared) => good.push(prepared),
                Err(fault) => self.journal.faults.push((id, fault)),
            }
        }
        let latents = encode_pixels(&good, planned.bucket, shape, encode)?;
        let mut encoded = latents.chunks_exact(shape.iter().product());
        for Prepared {
            record,
            payload,
            note,
        } in good
        {
            let row: &[f16] = match &payload {
                Payload::Pixels(_) => encoded
                    .next()
                    .expect("encode_pixels returns one row per image"),
                Payload::Latents(latents) => latents,
            };
            if !row.iter().all(|x| x.is_finite()) {
                let detail = "its latents are not finite in F16";
                self.journal
                    .faults
                    .push((record.id, Fault::new(Reason::NotFinite, detail)));
                continue;
            }
            self.journal
                .notes
                .extend(note.map(|note| (record.id, note)));
            self.journal.rows.push(JournalRow::of(&record));
            self.writer(encoding.store, shape)?.push(row, record)?;
        }
        Ok(())
    }

    fn writer(&mut self, store: &Store, shape: [usize; 3]) -> Result<&mut ObjectWriter> {
        if self.writer.is_none() {
            let latents = latents_name(&self.journal.stem);
            self.writer = Some(ObjectWriter::create(
                &store.root,
                &latents,
                &self.journal.text,
                shape,
            )?);
        }
        Ok(self.writer.as_mut().expect("it was just created"))
    }

    fn finish(mut self, store: &Store) -> Result<Journal> {
        if let Some(writer) = self.writer {
            let done = writer.finish()?;
            (self.journal.text_bytes, self.journal.blocks) = (done.text_bytes, done.blocks);
        }
        store.write_journal(&self.journal)?;
        Ok(self.journal)
    }
}

/// Encodes the images of a batch. Returns `[n, C, h, w]`; samples that have latents already are
/// skipped.
fn encode_pixels(
    samples: &[Prepared],
    bucket: Bucket,
    shape: [usize; 3],
    encode: &mut Encode<'_>,
) -> Result<Vec<f16>> {
    let images = samples.iter().filter_map(|sample| match &sample.payload {
        Payload::Pixels(pixels) => Some(pixels.as_slice()),
        Payload::Latents(_) => None,
    });
    let images: Vec<&[u8]> = images.collect();
    if images.is_empty() {
        return Ok(Vec::new());
    }
    let Bucket {
        width_px,
        height_px,
    } = bucket;
    let batch = RgbBatch {
        width_px,
        height_px,
        num_images: images.len(),
        pixels: images.concat(),
    };
    let failed = |reason: String| Error::Encode {
        num_images: batch.num_images,
        width_px,
        height_px,
        reason,
    };
    let latents = encode(&batch).map_err(failed)?;
    let expected = batch.num_images * shape.iter().product::<usize>();
    if latents.len() == expected {
        return Ok(latents);
    }
    Err(failed(format!(
        "it returned {} numbers, expected {expected}, {shape:?} per image",
        latents.len()
    )))
}
