//! A preparation by several workers, on one machine or many that share a file system.
//!
//! ```text
//! facts     worker i of n reads its samples -> prep/workers/facts-i-of-n.jsonl
//! objects   from the facts of all, the plan; worker i writes every n-th object and its journal
//! join      one call commits the objects of all as the data set
//! ```
//!
//! There is no leader. What a worker writes depends on the source and the settings alone, so a
//! worker that is started again goes on where it was, and the data set is the one that a single
//! preparation writes, byte for byte.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    time::Instant,
};

use half::f16;

use crate::{
    error::{Error, Result},
    format::manifest::Codec,
    prep::{
        encode::Encode,
        events::{PartSummary, PrepEvent, PrepSummary, RgbBatch},
        journal::{Holders, Journal, Store},
        kept_pictures::KeptPictures,
        objects::{ObjectPlan, PlannedObject},
        part::Part,
        places::{check_places, list_source},
        preparation::{FACTS_FILE, Preparation, num_rows, without},
        settings::PrepSettings,
        share::{self, Share},
    },
};

/// What a worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Facts, then objects; waits for the facts of the others in between.
    Both,
    /// Objects alone: the facts of all workers must be there.
    Objects,
}

/// Reads the samples of `part` and leaves their facts in the data set `out` for the other workers.
/// Needs no encoder. Returns the number of these samples.
///
/// # Errors
/// As [`prepare`](crate::prepare), and [`Error::NotReady`] if a worker with this number runs.
pub fn gather_facts(
    source: &Path,
    out: &Path,
    settings: &PrepSettings,
    part: Part,
    progress: &mut dyn FnMut(PrepEvent),
) -> Result<u64> {
    settings.check(None)?;
    check_places(source, out)?;
    let source = list_source(source, out, settings)?;
    let mut share = Share::of_worker(out, &source, settings, part)?;
    share.gather(&source, &out.join(FACTS_FILE), settings, progress)?;
    Ok(part.num_own(source.samples.len()) as u64)
}

/// Does the part of a worker in a preparation: its facts, and its objects of the plan.
/// [`join_parts`] commits them.
///
/// # Errors
/// As [`prepare`](crate::prepare). [`Error::NotReady`] if a worker with this number or a whole
/// preparation runs, or if the facts of other workers are missing ([`Stage::Objects`]) or are about
/// another listing of the source; [`Error::Invalid`] if objects of an interrupted preparation are
/// there.
#[allow(
    clippy::too_many_arguments,
    reason = "those of a whole preparation, and the part"
)]
pub fn prepare_part(
    source: &Path,
    out: &Path,
    settings: &PrepSettings,
    codec: &Codec,
    (part, stage): (Part, Stage),
    encode: &mut dyn FnMut(&RgbBatch) -> std::result::Result<Vec<f16>, String>,
    progress: &mut dyn FnMut(PrepEvent),
) -> Result<PartSummary> {
    let start = Instant::now();
    settings.check(Some(codec))?;
    check_places(source, out)?;
    let store = Store::open(out, codec, &settings.geometry(), Holders::Workers)?;
    let source = list_source(source, out, settings)?;
    let mut share = Share::of_worker(out, &source, settings, part)?;
    let memory = out.join(FACTS_FILE);
    match stage {
        Stage::Both => {
            share.gather(&source, &memory, settings, progress)?;
            share.wait(progress)?;
        }
        Stage::Objects => share.check()?,
    }
    let scan = share.scan(&source, &memory, settings, progress)?;
    let unkept = KeptPictures::new(0);
    let mut preparation = Preparation::new(store, source, scan, unkept, (settings, codec))?;
    let mut summary = preparation.write_part(part, encode, progress)?;
    summary.secs = start.elapsed().as_secs_f64();
    Ok(summary)
}

/// Commits the objects of all workers as the data set `out`. Encodes nothing.
///
/// # Errors
/// As [`prepare`](crate::prepare). [`Error::NotReady`] if facts or objects are missing, with the
/// workers whose they are.
pub fn join_parts(
    source: &Path,
    out: &Path,
    settings: &PrepSettings,
    codec: &Codec,
    progress: &mut dyn FnMut(PrepEvent),
) -> Result<PrepSummary> {
    let start = Instant::now();
    settings.check(Some(codec))?;
    check_places(source, out)?;
    let store = Store::open(out, codec, &settings.geometry(), Holders::One)?;
    let source = list_source(source, out, settings)?;
    let share = Share::of_join(out, &source, settings)?;
    share.check()?;
    let memory = out.join(FACTS_FILE);
    let scan = share.scan(&source, &memory, settings, progress)?;
    let unkept = KeptPictures::new(0);
    let mut preparation = Preparation::new(store, source, scan, unkept, (settings, codec))?;
    preparation.check_complete(share.num_workers())?;
    preparation.run(&mut |_| Err("all objects are written".to_owned()), progress)?;
    preparation.leave_lists(out)?;
    share::forget(out)?;
    Ok(preparation.summary(start.elapsed().as_secs_f64()))
}

impl Preparation<'_> {
    /// Writes the objects of the plan that are the worker's, except those that are written.
    fn write_part(
        &mut self,
        part: Part,
        encode: &mut Encode<'_>,
        progress: &mut dyn FnMut(PrepEvent),
    ) -> Result<PartSummary> {
        let plan = self.plan();
        self.refuse_other_plans(&plan)?;
        let own = own_objects(&plan, part);
        let left: Vec<&PlannedObject> = without(&own, &self.store.pending);
        let finished = self.finished(&own);
        let latents = self.existing_latents();
        let written = self.encode_objects((&left, &finished), &plan, &latents, encode, progress)?;
        let failed = written.iter().map(|journal| journal.faults.len() as u64);
        let (timeline, encoder_secs) = self.timeline.take();
        Ok(PartSummary {
            part,
            all_objects: plan.objects.len() as u64,
            own_objects: own.len() as u64,
            resumed_objects: (own.len() - left.len()) as u64,
            written_rows: num_rows(&written),
            failed: failed.sum(),
            encoder_secs,
            timeline,
            secs: 0.0,
        })
    }

    /// The journals of the objects that are finished.
    fn finished(&self, objects: &[PlannedObject]) -> Vec<Journal> {
        let stems: HashSet<&str> = objects.iter().map(|object| object.stem.as_str()).collect();
        let mut finished = self.store.pending.clone();
        finished.retain(|journal| stems.contains(journal.stem.as_str()));
        finished
    }

    /// Fails if there are objects of another plan: their names could be those of this plan.
    fn refuse_other_plans(&self, plan: &ObjectPlan) -> Result<()> {
        let pending = self.store.pending.iter();
        let num_others = pending.filter(|journal| journal.plan != plan.id).count();
        if num_others == 0 {
            return Ok(());
        }
        Err(Error::Invalid {
            what: self.store.root.display().to_string(),
            reason: format!(
                "{num_others} finished objects of an interrupted preparation of other pictures or \
                 settings are there: end it first, without workers, or delete {}",
                self.store.root.join("prep").display()
            ),
        })
    }

    /// Fails if an object of the plan is missing. Objects of an interrupted preparation with
    /// another plan join the data set first.
    fn check_complete(&mut self, num_workers: u32) -> Result<()> {
        let mut plan = self.plan();
        let mut pending = self.store.pending.iter();
        if pending.any(|journal| journal.plan != plan.id) {
            self.adopt_pending()?;
            plan = self.plan();
        }
        let missing = without(&plan.objects, &self.store.pending);
        if missing.is_empty() {
            return Ok(());
        }
        let stems: HashSet<&str> = missing.iter().map(|left| left.stem.as_str()).collect();
        let mut workers = BTreeMap::<usize, (u64, &str)>::new();
        for (number, object) in plan.objects.iter().enumerate() {
            if stems.contains(object.stem.as_str()) {
                let worker = number % num_workers as usize;
                workers.entry(worker).or_insert((0, &object.stem)).0 += 1;
            }
        }
        let mut named = Vec::new();
        for (worker, (count, first)) in workers {
            let part = format!("{worker}/{num_workers}");
            named.push(format!("{count} of worker {part} (the first is {first})"));
        }
        Err(Error::NotReady {
            what: self.store.root.display().to_string(),
            reason: format!(
                "{} of {} objects are missing, {}: run these workers again, then join",
                missing.len(),
                plan.objects.len(),
                named.join(", ")
            ),
        })
    }
}

/// The objects of a plan that are a worker's.
fn own_objects(plan: &ObjectPlan, part: Part) -> Vec<PlannedObject> {
    let mut own = Vec::new();
    for (number, object) in plan.objects.iter().enumerate() {
        if part.owns(number) {
            own.push(object.clone());
        }
    }
    own
}
