//! Room in a cache that is full: which blocks go.
//!
//! First those of data sets that no living process has open, then those that the plan of this machine does not need, then
//! the one whose next use is farthest away, unless what is to be kept is needed later still. Blocks that only other
//! living processes plan with are left alone. What is there is found out by looking into the folder, a part of whose
//! blocks are then candidates until the next look; each is asked again for its next use before it goes. A look also
//! counts anew what is in use, so that what a killed process had reserved comes back.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use crate::{
    cache::folder::{
        BlockId, LATENTS, OPEN, PLAN_PREFIX, TEXT, is_identity, is_left_over, names, parse_block, try_alone,
    },
    durable::TEMPORARY_PREFIX,
};

/// Needed by no plan.
const NEVER: u64 = u64::MAX;
/// Not needed by this machine's plan in this epoch nor the next.
const LATE: u64 = u64::MAX - 1;
/// A look is taken when this part of the files that it found has asked for room since the last one.
const FILES_A_LOOK: usize = 64;
/// Candidates that are remembered at least.
const LEAST_CANDIDATES: usize = 64;

/// A plan of this process: when blocks are needed next.
pub(crate) trait NextUse: fmt::Debug + Send + Sync {
    /// Whether the plan includes the data set of a cache's folder.
    fn knows(&self, folder: &str) -> bool;

    /// Whether a mark of a plan is its own.
    fn claims(&self, mark: &str) -> bool;

    /// The first step after `step` in which a block is needed; none if it is not needed soon.
    fn next(&self, folder: &str, object: usize, block: u32, step: u64) -> Option<u64>;
}

/// The plans of this process. A plan that has been dropped counts no more.
#[derive(Debug, Default)]
pub(crate) struct Plans(Mutex<Vec<Weak<dyn NextUse>>>);

impl Plans {
    pub(crate) fn add(&self, plan: Weak<dyn NextUse>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(plan);
    }

    /// The step in which a block is needed next after `step`, as a rank among those that may go.
    pub(crate) fn due(&self, block: &BlockId, step: u64) -> u64 {
        due(&self.living(), block, step)
    }

    fn living(&self) -> Vec<Arc<dyn NextUse>> {
        let mut plans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        plans.retain(|plan| plan.strong_count() > 0);
        plans.iter().filter_map(Weak::upgrade).collect()
    }
}

fn due(plans: &[Arc<dyn NextUse>], block: &BlockId, step: u64) -> u64 {
    let next = plans.iter().filter_map(|plan| plan.next(&block.folder, block.object, block.number, step));
    next.min().unwrap_or(LATE)
}

/// What may go.
#[derive(Debug)]
pub(crate) struct Room {
    root: PathBuf,
    /// The farthest last.
    candidates: Vec<Candidate>,
    num_files: usize,
    asked_since: usize,
    has_looked: bool,
}

#[derive(Debug)]
struct Candidate {
    due: u64,
    path: PathBuf,
    len: u64,
    block: BlockId,
    /// Whether it may go where the plan does not need it.
    is_free: bool,
}

/// What a look finds.
#[derive(Debug, Default)]
struct Look {
    candidates: Vec<Candidate>,
    num_files: usize,
    num_bytes: u64,
}

impl Room {
    /// The room of the cache in the folder `root`. Looks at nothing yet.
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), candidates: Vec::new(), num_files: 0, asked_since: 0, has_looked: false }
    }

    /// Makes room until `len` bytes more are within `limit`, if enough is there that is needed later than `due`; else
    /// nothing goes. Called with the counter `used` locked.
    pub(crate) fn make(&mut self, used: &mut u64, len: u64, limit: u64, due: u64, plans: &Plans) -> io::Result<()> {
        self.asked_since += 1;
        let may_look = !self.has_looked || self.asked_since * FILES_A_LOOK > self.num_files;
        let mut chosen = self.choose(used.saturating_add(len).saturating_sub(limit), due, plans);
        if chosen.is_none() && may_look {
            *used = self.look(plans)?;
            chosen = self.choose(used.saturating_add(len).saturating_sub(limit), due, plans);
        }
        for candidate in chosen.into_iter().flatten() {
            if fs::remove_file(&candidate.path).is_ok() {
                *used = used.saturating_sub(candidate.len);
            }
        }
        Ok(())
    }

    /// Takes the farthest candidates that make room for `needed` bytes, if there are.
    fn choose(&mut self, mut needed: u64, due: u64, plans: &Plans) -> Option<Vec<Candidate>> {
        let mut chosen = Vec::new();
        while needed > 0 {
            let Some(candidate) = self.candidates.pop_if(|candidate| candidate.due > due) else {
                // The farthest last again.
                self.candidates.extend(chosen.into_iter().rev());
                return None;
            };
            if self.may_go(&candidate, due, plans) {
                needed = needed.saturating_sub(candidate.len);
                chosen.push(candidate);
            }
        }
        Some(chosen)
    }

    /// Whether a candidate is still one.
    fn may_go(&self, candidate: &Candidate, due: u64, plans: &Plans) -> bool {
        if candidate.due == NEVER {
            return try_alone(&self.root.join(&*candidate.block.folder).join(OPEN)).is_some();
        }
        let now = plans.due(&candidate.block, 0);
        now > due && (now < LATE || candidate.is_free)
    }

    /// Looks at all files; returns their bytes.
    fn look(&mut self, plans: &Plans) -> io::Result<u64> {
        let plans = plans.living();
        let mut look = Look::default();
        for (path, name) in names(&self.root)? {
            if is_identity(&name) {
                look.at(&path, &name, &plans)?;
            }
        }
        let Look { mut candidates, num_files, num_bytes } = look;
        candidates.sort_unstable_by_key(|candidate| candidate.due);
        let kept = LEAST_CANDIDATES.max(num_files / FILES_A_LOOK).min(candidates.len());
        candidates.drain(..candidates.len() - kept);
        *self = Self { root: std::mem::take(&mut self.root), candidates, num_files, asked_since: 0, has_looked: true };
        Ok(num_bytes)
    }
}

impl Look {
    /// Looks at the folder of a data set.
    fn at(&mut self, folder: &Path, name: &str, plans: &[Arc<dyn NextUse>]) -> io::Result<()> {
        let is_mine = plans.iter().any(|plan| plan.knows(name));
        let is_dead = !is_mine && try_alone(&folder.join(OPEN)).is_some();
        let is_free = is_mine && !is_planned_with(folder, plans);
        let dataset: Arc<str> = name.into();
        for (path, name) in names(&folder.join(LATENTS))?.into_iter().chain(names(&folder.join(TEXT))?) {
            let Ok(len) = fs::metadata(&path).map(|found| found.len()) else { continue };
            if name.starts_with(TEMPORARY_PREFIX) && is_left_over(&path) {
                continue;
            }
            self.num_files += 1;
            self.num_bytes += len;
            let Some((object, number)) = parse_block(&name).filter(|_| is_dead || is_mine) else { continue };
            let block = BlockId { folder: dataset.clone(), object, number };
            let due = if is_dead { NEVER } else { due(plans, &block, 0) };
            if due != LATE || is_free {
                self.candidates.push(Candidate { due, path, len, block, is_free });
            }
        }
        Ok(())
    }
}

/// Whether a living process plans with a data set by another plan than ours. Marks of dead ones are deleted.
fn is_planned_with(folder: &Path, plans: &[Arc<dyn NextUse>]) -> bool {
    let marks = names(folder).unwrap_or_default().into_iter().filter(|(_, name)| name.starts_with(PLAN_PREFIX));
    let mut others = marks.filter(|(_, name)| !plans.iter().any(|plan| plan.claims(name)));
    others.any(|(path, _)| match try_alone(&path) {
        Some(_held) => fs::remove_file(&path).is_err(),
        None => path.exists(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::tests::{IDENTITY, blocks, count_more, found, keep, open, request};

    #[test]
    fn a_dead_data_set_makes_room_and_a_living_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let (blocks, other) = (blocks(5), IDENTITY.replace('0', "f"));
        let request = request(0, &blocks);
        let cache = open(folder.path(), 500);
        let mine = cache.of(IDENTITY);
        keep(&mine, &request, &blocks[..4]);
        // Another process, which has the first data set's blocks to leave alone.
        let second = open(folder.path(), 500);
        keep(&second.of(&other), &request, &blocks);
        assert_eq!(found(&mine, &request), [true, true, true, true, false]);
        assert_eq!(found(&second.of(&other), &request).iter().filter(|found| **found).count(), 1);
        drop((mine, cache));
        keep(&second.of(&other), &request, &blocks);
        assert_eq!((found(&second.of(&other), &request), second.used_bytes()), (vec![true; 5], 500));
    }

    #[test]
    fn a_look_counts_anew_and_deletes_what_is_left_over() {
        let folder = tempfile::tempdir().unwrap();
        let blocks = blocks(3);
        let (request, cache) = (request(0, &blocks), open(folder.path(), 300));
        keep(&cache.of(IDENTITY), &request, &blocks[..1]);
        // A process was killed while others live: space that nothing stands for, a file that nobody holds.
        count_more(&cache, 150);
        let left = folder.path().join(&IDENTITY[..32]).join(LATENTS).join(format!("{TEMPORARY_PREFIX}9-9"));
        fs::write(&left, [0; 50]).unwrap();
        keep(&cache.of(IDENTITY), &request, &blocks);
        assert_eq!((found(&cache.of(IDENTITY), &request), cache.used_bytes()), (vec![true; 3], 300));
        assert!(!left.exists());
    }
}
