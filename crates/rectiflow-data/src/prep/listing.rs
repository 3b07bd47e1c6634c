//! What a source holds, from its listing, tables and indexes alone: no picture is opened, so that a
//! million samples take seconds. Sizes that tables say are not those of the pictures: a preparation
//! reads its own.

use std::{collections::BTreeMap, path::Path, time::Instant};

use rayon::prelude::*;
use serde::Serialize;

use crate::{
    board::count::{BoardCount, ClauseCount, Counted},
    error::{Error, Result},
    format::bucket::{Bucket, aspect_error, nearest},
    prep::{
        events::PrepEvent,
        part::Part,
        places::{check_places, list_source_in},
        settings::PrepSettings,
    },
    reject::{self, Reason, Remark},
    source::Source,
};

/// Samples between two reports of progress.
const SAMPLES_PER_CHUNK: usize = 1 << 14;

/// A bucket and the samples whose listed size goes there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ListedBucket {
    /// Width of its images.
    pub width_px: u32,
    /// Height of its images.
    pub height_px: u32,
    /// Number of samples.
    pub samples: u64,
}

/// The share of a worker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct WorkShare {
    /// Samples that it reads.
    pub samples: u64,
    /// Of these, samples that no listed size and no clause of the filter excludes.
    pub usable: u64,
    /// Bytes of its samples, as far as the source knows them.
    pub bytes: u64,
    /// Pixels of its usable samples, as far as the source knows them.
    pub pixels: u64,
}

/// What a source holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ListSummary {
    /// All samples.
    pub samples: u64,
    /// Samples with a size in a table or an index.
    pub with_size: u64,
    /// Samples that the listed size and the filter leave. Those without a listed size are counted
    /// as usable.
    pub usable: u64,
    /// The buckets of usable samples with a size.
    pub buckets: Vec<ListedBucket>,
    /// Samples that are smaller than `prep.min_side_px`.
    pub too_small: Counted,
    /// Samples whose shape no bucket has.
    pub aspect_ratio: Counted,
    /// The clauses of `prep.filter`, and what each removes.
    pub filter: Vec<ClauseCount>,
    /// Tables of image boards. None without them.
    pub boards: Option<BoardCount>,
    /// What is no sample, by reason.
    pub rejected: BTreeMap<Reason, u64>,
    /// The first of each reason.
    pub examples: BTreeMap<Reason, Remark>,
    /// The shares of the workers.
    pub workers: Vec<WorkShare>,
    /// Duration.
    pub secs: f64,
}

/// Lists `source` and says how a preparation into `out` with `num_workers` workers would share it.
/// Opens no picture and writes nothing but rows of tables, in a temporary folder.
///
/// # Errors
/// As [`prepare`](crate::prepare).
pub fn list(
    source: &Path,
    out: &Path,
    settings: &PrepSettings,
    num_workers: u32,
    progress: &mut dyn FnMut(PrepEvent),
) -> Result<ListSummary> {
    let start = Instant::now();
    settings.check(None)?;
    check_places(source, out)?;
    let work = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
    let source = list_source_in(source, out, work.path(), settings)?;
    let mut count = Count::new(&source, settings, num_workers);
    let num_samples = source.samples.len();
    let mut done = 0;
    while done < num_samples {
        let files = done..num_samples.min(done + SAMPLES_PER_CHUNK);
        let reads_texts = !count.filter.is_empty();
        let listed: Vec<Listed> = files
            .into_par_iter()
            .map(|file| Listed::of(&source, file, reads_texts))
            .collect();
        for listed in listed {
            count.add(&source, done, listed);
            done += 1;
        }
        progress(PrepEvent::Listing {
            done: done as u64,
            num_samples: num_samples as u64,
        });
    }
    Ok(count.summary(&source, start.elapsed().as_secs_f64()))
}

/// What tables and indexes say about a sample.
struct Listed {
    /// Width and height.
    size_px: Option<(u32, u32)>,
    /// The clause of the filter that removes it.
    removed_by: Option<usize>,
}

impl Listed {
    fn of(source: &Source, file: usize, reads_texts: bool) -> Self {
        let sample = &source.samples[file];
        let size_px = source.listed_size(sample);
        let mut removed_by = None;
        if reads_texts && (size_px.is_some() || !source.boards.filter_needs_size()) {
            let texts = source.text(sample);
            let (width_px, height_px) = size_px.unwrap_or_default();
            removed_by = source.removed_by(&texts, width_px, height_px);
        }
        Self {
            size_px,
            removed_by,
        }
    }
}

/// The counts of a listing, sample by sample.
struct Count<'a> {
    settings: &'a PrepSettings,
    all_buckets: Vec<Bucket>,
    /// Samples of each bucket.
    in_bucket: Vec<u64>,
    with_size: u64,
    too_small: Counted,
    aspect_ratio: Counted,
    filter: Vec<ClauseCount>,
    workers: Vec<WorkShare>,
}

impl<'a> Count<'a> {
    fn new(source: &Source, settings: &'a PrepSettings, num_workers: u32) -> Self {
        let all_buckets = settings.geometry().buckets();
        Self {
            settings,
            in_bucket: vec![0; all_buckets.len()],
            all_buckets,
            with_size: 0,
            too_small: Counted::default(),
            aspect_ratio: Counted::default(),
            filter: source.boards.clauses(),
            workers: vec![WorkShare::default(); num_workers as usize],
        }
    }

    fn add(&mut self, source: &Source, file: usize, listed: Listed) {
        let sample = &source.samples[file];
        self.with_size += u64::from(listed.size_px.is_some());
        let is_usable = self.is_usable(&sample.path, &listed);
        let worker = Part::owner(file, self.workers.len());
        let share = &mut self.workers[worker];
        share.samples += 1;
        share.bytes += sample.size_bytes().unwrap_or_default();
        if is_usable {
            let (width, height) = listed.size_px.unwrap_or_default();
            share.usable += 1;
            share.pixels += u64::from(width) * u64::from(height);
        }
    }

    /// Whether neither the filter nor the listed size excludes a sample. Counts it.
    fn is_usable(&mut self, path: &str, listed: &Listed) -> bool {
        if let Some(clause) = listed.removed_by {
            self.filter[clause].removed.add(|| path.to_owned());
            return false;
        }
        let Some((width, height)) = listed.size_px else {
            return true;
        };
        if width.min(height) < self.settings.min_side_px {
            self.too_small.add(|| path.to_owned());
            return false;
        }
        let bucket = nearest(&self.all_buckets, width, height);
        let error = aspect_error(self.all_buckets[bucket], width, height);
        if error > self.settings.max_aspect_error {
            self.aspect_ratio.add(|| path.to_owned());
            return false;
        }
        self.in_bucket[bucket] += 1;
        true
    }

    fn summary(self, source: &Source, secs: f64) -> ListSummary {
        let mut buckets = Vec::new();
        for (bucket, &samples) in self.all_buckets.iter().zip(&self.in_bucket) {
            if samples > 0 {
                buckets.push(ListedBucket {
                    width_px: bucket.width_px,
                    height_px: bucket.height_px,
                    samples,
                });
            }
        }
        ListSummary {
            samples: source.samples.len() as u64,
            with_size: self.with_size,
            usable: self.workers.iter().map(|share| share.usable).sum(),
            buckets,
            too_small: self.too_small,
            aspect_ratio: self.aspect_ratio,
            filter: self.filter,
            boards: source.boards.count(),
            rejected: reject::count(&source.remarks),
            examples: reject::examples(source.remarks.iter()),
            workers: self.workers,
            secs,
        }
    }
}
