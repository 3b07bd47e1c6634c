//! The second pass: planned samples to finished objects. Images are decoded in parallel, ahead of
//! the encoder.
//!
//! A thread decodes a window of images at a time on all cores, at most two windows ahead; the
//! caller's thread encodes and writes. With enough cores the encoder never waits for a decoder.
//! Memory is bounded: the pixels of two windows of one bucket, plus one source image per core,
//! whose memory is kept for the next one (large images are decoded one at a time).

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use half::f16;
use rayon::prelude::*;

use crate::{
    dataset::Dataset,
    error::{Error, Result},
    format::{
        bucket::Bucket,
        crop::{Placement, place},
        record::{Record, SampleId},
        shard::ObjectWriter,
    },
    picture::{
        decode::Decoded,
        workspace::{Workspace, Workspaces},
    },
    prep::{
        events::{PrepEvent, RgbBatch},
        journal::{Journal, JournalRow, Store, latents_name, text_name},
        kept_pictures::KeptPictures,
        objects::{Item, PlannedObject},
        scan::Accepted,
        settings::PrepSettings,
        signatures::{self, OldRecords},
        timeline::{Timeline, Work},
    },
    reject::{Fault, Reason},
    source::Source,
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
    /// Pictures that need not be read again.
    pub(crate) kept: &'a KeptPictures,
    /// Object and physical row of the latents of each sample in the data set that is being
    /// repacked.
    pub(crate) latents: &'a HashMap<SampleId, (usize, u32)>,
    /// The signatures of these samples.
    pub(crate) signatures: &'a OldRecords,
    /// Shape of a bucket's latents, `[C, h, w]`.
    pub(crate) shape: &'a (dyn Fn(Bucket) -> [usize; 3] + Sync),
    pub(crate) plan: &'a str,
    pub(crate) timeline: &'a Timeline,
}

/// What the decoding threads share.
#[derive(Default)]
struct Shared {
    /// Held while a large image is decoded and resized.
    large: Mutex<()>,
    workspaces: Workspaces,
}

/// A sample that is ready to be encoded or written.
struct Prepared {
    record: Record,
    payload: Payload,
    /// Its signatures, for near-copies.
    signatures: Vec<u8>,
    note: Option<Fault>,
}

enum Payload {
    /// `[h, w, 3]`, in the size of the bucket.
    Pixels(Vec<u8>),
    /// `[C, h, w]`, copied from an older object.
    Latents(Vec<f16>),
}

/// A sample that is prepared, or the fault of its image.
type Sample = (SampleId, std::result::Result<Prepared, Fault>);

/// A batch of one object's samples, in row order.
struct Batch {
    object: usize,
    /// Whether this is the last batch of the object.
    is_last: bool,
    samples: Vec<Sample>,
}

impl Encoding<'_> {
    /// Writes `objects` and their journals. Calls `finished` with each journal when its object is
    /// complete.
    ///
    /// # Errors
    /// [`Error::Encode`], [`Error::Io`], and those of `finished`. Finished objects are kept for the
    /// next run.
    pub(crate) fn run(
        &self,
        objects: &[&PlannedObject],
        encode: &mut Encode<'_>,
        progress: &mut dyn FnMut(PrepEvent),
        finished: &mut dyn FnMut(Journal) -> Result<()>,
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
        let shared = Shared::default();
        let size = self.settings.encode_batch as usize;
        let window = (4 * rayon::current_num_threads()).next_multiple_of(size);
        for (object, planned) in objects.iter().enumerate() {
            let mut left = planned.items.len();
            for items in planned.items.chunks(window) {
                let samples: Vec<Sample> = self.source.on_threads(|| {
                    let items = items.par_iter();
                    items
                        .map(|item| (item.id, self.prepare(item, &shared)))
                        .collect()
                });
                left -= samples.len();
                let mut window = cut(object, samples, size);
                if let Some(last) = window.last_mut() {
                    last.is_last = left == 0;
                }
                if batches.send(window).is_err() {
                    return;
                }
            }
        }
    }

    /// Prepares a sample: its text, and its decoded, resized and cropped pixels or its existing
    /// latents.
    fn prepare(&self, item: &Item, shared: &Shared) -> std::result::Result<Prepared, Fault> {
        let accepted = &self.accepted[item.index];
        let placement = place(
            item.bucket,
            accepted.width_px,
            accepted.height_px,
            self.settings.seed,
            item.id,
        );
        let (payload, signatures, note) = match self.stored(item) {
            Some(latents) => (Payload::Latents(latents), self.signatures.of(item.id), None),
            None => {
                let timeline = self.timeline;
                let bytes = timeline.time(Work::Read, || self.read(accepted.file, item.id))?;
                let _alone = lock_if_large(accepted, &shared.large);
                shared.workspaces.with(|workspace| {
                    let decode = || self.decoded(workspace, accepted, &bytes);
                    let Decoded { picture, note } = timeline.time(Work::Decode, decode)?;
                    let sign = || signatures::records(item.id, &picture);
                    let signatures = timeline.time(Work::Sign, sign);
                    let resize = self.settings.resize;
                    let fit = || workspace.fit(picture, &placement, item.bucket, resize);
                    let pixels = timeline.time(Work::Resize, fit);
                    Ok((Payload::Pixels(pixels), signatures, note))
                })?
            }
        };
        let record = || self.record(item, &placement);
        Ok(Prepared {
            record: self.timeline.time(Work::Text, record),
            payload,
            signatures,
            note,
        })
    }

    /// The record of a sample, with its text.
    fn record(&self, item: &Item, placement: &Placement) -> Record {
        let accepted = &self.accepted[item.index];
        let found = &self.source.samples[accepted.file];
        let texts = self.source.text_of(found, item.id);
        let text = texts.text.unwrap_or_default();
        Record {
            id: item.id,
            captions: text.captions,
            caption_sources: text.caption_sources,
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
        }
    }

    /// Decodes a sample's image, which must have the size of its header.
    fn decoded(
        &self,
        workspace: &mut Workspace,
        accepted: &Accepted,
        bytes: &[u8],
    ) -> std::result::Result<Decoded, Fault> {
        let settings = self.settings;
        let decoded = workspace.decode(bytes, settings.max_pixels, settings.background)?;
        let size = (decoded.picture.width_px(), decoded.picture.height_px());
        if size != (accepted.width_px, accepted.height_px) {
            let detail = format!("it decodes to {size:?} px, unlike its header");
            return Err(Fault::new(Reason::Broken, detail));
        }
        Ok(decoded)
    }

    /// Reads a picture, by its index in the source, which must have the bytes of sample `id`.
    fn read(&self, file: usize, id: SampleId) -> std::result::Result<Vec<u8>, Fault> {
        if let Some(bytes) = self.kept.take(file) {
            return Ok(bytes);
        }
        let bytes = self.source.open(&self.source.samples[file])?;
        if SampleId::of(&bytes) == id {
            return Ok(bytes);
        }
        let detail = "it changed while it was read: prepare again";
        Err(Fault::new(Reason::Unreadable, detail))
    }

    /// The existing latents of a sample, if any. Damaged ones count as missing, so that the image
    /// is encoded again.
    fn stored(&self, item: &Item) -> Option<Vec<f16>> {
        let &(object, row) = self.latents.get(&item.id)?;
        let dataset: &Dataset = self.store.dataset.as_ref()?;
        let mut latents = vec![f16::ZERO; (self.shape)(item.bucket).iter().product()];
        match dataset.read_row(object, row, &mut latents) {
            Ok(()) => Some(latents),
            Err(error) => {
                tracing::warn!(
                    %error,
                    "the stored latents cannot be read; the image is encoded again"
                );
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
        finished: &mut dyn FnMut(Journal) -> Result<()>,
    ) -> Result<()> {
        let num_samples: u64 = objects.iter().map(|object| object.items.len() as u64).sum();
        let mut done = 0;
        let mut rejected = 0;
        let mut open: Option<OpenObject<'_>> = None;
        let mut batches = windows.into_iter().flatten();
        while let Some(batch) = self.timeline.time(Work::Wait, || batches.next()) {
            let planned = objects[batch.object];
            let is_last = batch.is_last;
            done += batch.samples.len() as u64;

            // Encode and append.
            let mut object = match open.take() {
                Some(object) => object,
                None => OpenObject::new(self, planned),
            };
            object.add(batch, encode)?;

            // Report, and close a complete object.
            let failed = rejected + object.journal.faults.len() as u64;
            progress(PrepEvent::Encoding {
                width_px: planned.bucket.width_px,
                height_px: planned.bucket.height_px,
                done,
                num_samples,
                rejected: failed,
            });
            if is_last {
                rejected = failed;
                finished(self.timeline.time(Work::Write, || object.finish())?)?;
            } else {
                open = Some(object);
            }
        }
        Ok(())
    }
}

/// Waits until no other large image is being decoded or resized, if this one is large.
fn lock_if_large<'a>(accepted: &Accepted, large: &'a Mutex<()>) -> Option<MutexGuard<'a, ()>> {
    let num_pixels = u64::from(accepted.width_px) * u64::from(accepted.height_px);
    (num_pixels > LARGE_PX).then(|| large.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Cuts the samples of a window into batches of `size`.
fn cut(object: usize, samples: Vec<Sample>, size: usize) -> Vec<Batch> {
    let mut samples = samples.into_iter();
    let mut batches = Vec::new();
    while samples.len() > 0 {
        batches.push(Batch {
            object,
            is_last: false,
            samples: samples.by_ref().take(size).collect(),
        });
    }
    batches
}

/// The object being written. Its files are created with its first good row.
struct OpenObject<'a> {
    store: &'a Store,
    timeline: &'a Timeline,
    /// Shape of its latents, `[C, h, w]`.
    shape: [usize; 3],
    journal: Journal,
    writer: Option<ObjectWriter>,
    /// The signatures of its rows.
    signatures: Vec<u8>,
}

impl<'a> OpenObject<'a> {
    fn new(encoding: &Encoding<'a>, planned: &PlannedObject) -> Self {
        let journal = Journal {
            plan: encoding.plan.to_owned(),
            stem: planned.stem.clone(),
            bucket: planned.bucket,
            split: planned.split,
            text: text_name(&planned.stem, 0),
            text_bytes: 0,
            rows: Vec::new(),
            blocks: Vec::new(),
            faults: Vec::new(),
            notes: Vec::new(),
            signatures_bytes: 0,
            is_sent: false,
        };
        Self {
            store: encoding.store,
            timeline: encoding.timeline,
            shape: (encoding.shape)(planned.bucket),
            journal,
            writer: None,
            signatures: Vec::new(),
        }
    }

    /// Encodes a batch and appends its good rows.
    fn add(&mut self, batch: Batch, encode: &mut Encode<'_>) -> Result<()> {
        let mut good = Vec::new();
        for (id, sample) in batch.samples {
            match sample {
                Ok(prepared) => good.push(prepared),
                Err(fault) => self.journal.faults.push((id, fault)),
            }
        }
        let timeline = self.timeline;
        let encode = || encode_pixels(&good, self.journal.bucket, self.shape, encode);
        let latents = timeline.time(Work::Encode, encode)?;
        timeline.time(Work::Write, || self.append(good, &latents))
    }

    /// Appends rows. `latents` are those of the samples that had none.
    fn append(&mut self, good: Vec<Prepared>, latents: &[f16]) -> Result<()> {
        let mut encoded = latents.chunks_exact(self.shape.iter().product());
        for prepared in good {
            let row = match &prepared.payload {
                Payload::Pixels(_) => encoded
                    .next()
                    .expect("encode_pixels returns one row per image"),
                Payload::Latents(row) => row,
            };
            self.push(row, prepared.record, prepared.note, &prepared.signatures)?;
        }
        Ok(())
    }

    /// Appends a row, unless its latents are not finite.
    fn push(
        &mut self,
        row: &[f16],
        record: Record,
        note: Option<Fault>,
        signatures: &[u8],
    ) -> Result<()> {
        if !row.iter().all(|x| x.is_finite()) {
            let fault = Fault::new(Reason::NotFinite, "its latents are not finite in F16");
            self.journal.faults.push((record.id, fault));
            return Ok(());
        }
        if let Some(note) = note {
            self.journal.notes.push((record.id, note));
        }
        self.signatures.extend_from_slice(signatures);
        self.journal.rows.push(JournalRow::of(&record));
        self.writer()?.push(row, record)
    }

    fn writer(&mut self) -> Result<&mut ObjectWriter> {
        if self.writer.is_none() {
            let latents = latents_name(&self.journal.stem);
            let writer =
                ObjectWriter::create(&self.store.root, &latents, &self.journal.text, self.shape)?;
            self.writer = Some(writer);
        }
        Ok(self.writer.as_mut().expect("it was just created"))
    }

    fn finish(mut self) -> Result<Journal> {
        if let Some(writer) = self.writer {
            let done = writer.finish()?;
            self.journal.text_bytes = done.text_bytes;
            self.journal.blocks = done.blocks;
            let stem = &self.journal.stem;
            self.journal.signatures_bytes =
                signatures::write(&self.store.root, stem, &self.signatures)?;
        }
        self.store.write_journal(&self.journal)?;
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
    let mut images: Vec<&[u8]> = Vec::new();
    for sample in samples {
        if let Payload::Pixels(pixels) = &sample.payload {
            images.push(pixels);
        }
    }
    if images.is_empty() {
        return Ok(Vec::new());
    }
    let batch = RgbBatch {
        width_px: bucket.width_px,
        height_px: bucket.height_px,
        num_images: images.len(),
        pixels: images.concat(),
    };
    let latents = encode(&batch).map_err(|reason| failed(&batch, reason))?;
    let found = latents.len();
    let expected = batch.num_images * shape.iter().product::<usize>();
    if found == expected {
        return Ok(latents);
    }
    let reason = format!("it returned {found} numbers, expected {expected}, {shape:?} per image");
    Err(failed(&batch, reason))
}

fn failed(batch: &RgbBatch, reason: String) -> Error {
    Error::Encode {
        num_images: batch.num_images,
        width_px: batch.width_px,
        height_px: batch.height_px,
        reason,
    }
}
