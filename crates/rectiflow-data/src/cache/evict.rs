//! Room in a full cache: which blocks are evicted.
//!
//! First the blocks of data sets that no living process has open, then those that the plan of this
//! machine does not need, then the block whose next use is farthest away, unless the new block is
//! needed later still. Blocks that only plans of other living processes use are never evicted. A
//! scan of the folder finds the blocks; some of them are candidates until the next scan, and the
//! next use of each is looked up again before it is evicted. A scan also recounts the bytes in use,
//! which frees the space that a killed process had reserved.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use crate::{
    cache::folder::{
        BlockId, LATENTS, OPEN, PLAN_PREFIX, TEXT, is_identity, is_left_over, names, parse_block,
        try_alone,
    },
    durable::TEMPORARY_PREFIX,
};

/// Next use of a block of a data set that no living process has open.
const NEVER: u64 = u64::MAX;
/// Next use of a block that this machine's plan does not need in this epoch or the next.
const LATE: u64 = u64::MAX - 1;
/// The folder is scanned again after one request for room per this many files of the last scan.
const FILES_A_LOOK: usize = 64;
/// A scan keeps at least this many candidates.
const LEAST_CANDIDATES: usize = 64;

/// A plan of this process: the next use of each block.
pub(crate) trait NextUse: fmt::Debug + Send + Sync {
    /// Whether the plan includes the data set of a folder of the cache.
    fn knows(&self, folder: &str) -> bool;

    /// Whether the mark of a plan belongs to this plan.
    fn claims(&self, mark: &str) -> bool;

    /// The first step after `step` that needs a block. None if no step of this epoch and the next
    /// does.
    fn next(&self, folder: &str, object: usize, block: u32, step: u64) -> Option<u64>;
}

/// The plans of this process. A dropped plan no longer counts.
#[derive(Debug, Default)]
pub(crate) struct Plans(Mutex<Vec<Weak<dyn NextUse>>>);

impl Plans {
    pub(crate) fn add(&self, plan: Weak<dyn NextUse>) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(plan);
    }

    /// The next step after `step` that needs a block, or [`LATE`].
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
    let next = plans
        .iter()
        .filter_map(|plan| plan.next(&block.folder, block.object, block.number, step));
    next.min().unwrap_or(LATE)
}

/// The blocks that can be evicted.
#[derive(Debug)]
pub(crate) struct Room {
    root: PathBuf,
    /// In order of their next use, the farthest last.
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
    /// Whether it can be evicted when this process's plans do not need it.
    is_free: bool,
}

/// The result of a scan.
#[derive(Debug, Default)]
struct Look {
    candidates: Vec<Candidate>,
    num_files: usize,
    num_bytes: u64,
}

impl Room {
    /// The room of the cache in the folder `root`. Reads nothing yet.
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            candidates: Vec::new(),
            num_files: 0,
            asked_since: 0,
            has_looked: false,
        }
    }

    /// Evicts blocks until `len` more bytes are within `limit`, if enough blocks are needed later
    /// than `due`; otherwise evicts nothing. Called with the counter `used` locked.
    pub(crate) fn make(
        &mut self,
        used: &mut u64,
        len: u64,
        limit: u64,
        due: u64,
        plans: &Plans,
    ) -> io::Result<()> {
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

    /// Takes the candidates with the farthest next use that make room for `needed` bytes. None if
    /// there are not enough.
    fn choose(&mut self, mut needed: u64, due: u64, plans: &Plans) -> Option<Vec<Candidate>> {
        let mut chosen = Vec::new();
        while needed > 0 {
            let Some(candidate) = self.candidates.pop_if(|candidate| candidate.due > due) else {
                // Put them back, the farthest last.
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

    /// Whether a candidate can still be evicted.
    fn may_go(&self, candidate: &Candidate, due: u64, plans: &Plans) -> bool {
        if candidate.due == NEVER {
            return try_alone(&self.root.join(&*candidate.block.folder).join(OPEN)).is_some();
        }
        let now = plans.due(&candidate.block, 0);
        now > due && (now < LATE || candidate.is_free)
    }

    /// Scans all files and returns their total size in bytes.
    fn look(&mut self, plans: &Plans) -> io::Result<u64> {
        let plans = plans.living();
        let mut look = Look::default();
        for (path, name) in names(&self.root)? {
            if is_identity(&name) {
                look.at(&path, &name, &plans)?;
            }
        }
        let Look {
            mut candidates,
            num_files,
            num_bytes,
        } = look;
        candidates.sort_unstable_by_key(|candidate| candidate.due);
        let kept = LEAST_CANDIDATES
            .max(num_files / FILES_A_LOOK)
            .min(candidates.len());
        candidates.drain(..candidates.len() - kept);
        *self = Self {
            root: std::mem::take(&mut self.root),
            candidates,
            num_files,
            asked_since: 0,
            has_looked: true,
        };
        Ok(num_bytes)
    }
}

impl Look {
    /// Scans the folder of a data set.
    fn at(&mut self, folder: &Path, name: &str, plans: &[Arc<dyn NextUse>]) -> io::Result<()> {
        let is_mine = plans.iter().any(|plan| plan.knows(name));
        let is_dead = !is_mine && try_alone(&folder.join(OPEN)).is_some();
        let is_free = is_mine && !is_planned_with(folder, plans);
        let dataset: Arc<str> = name.into();
        for (path, name) in names(&folder.join(LATENTS))?
            .into_iter()
            .chain(names(&folder.join(TEXT))?)
        {
            let Ok(len) = fs::metadata(&path).map(|found| found.len()) else {
                continue;
            };
            if name.starts_with(TEMPORARY_PREFIX) && is_left_over(&path) {
                continue;
            }
            self.num_files += 1;
            self.num_bytes += len;
            let Some((object, number)) = parse_block(&name).filter(|_| is_dead || is_mine) else {
                continue;
            };
            let block = BlockId {
                folder: dataset.clone(),
                object,
                number,
            };
            let due = if is_dead {
                NEVER
            } else {
                due(plans, &block, 0)
            };
            if due != LATE || is_free {
                self.candidates.push(Candidate {
                    due,
                    path,
                    len,
                    block,
                    is_free,
                });
            }
        }
        Ok(())
    }
}

/// Whether a living process has another plan than `plans` for a data set. Deletes the marks of dead
/// processes.
fn is_planned_with(folder: &Path, plans: &[Arc<dyn NextUse>]) -> bool {
    let marks = names(folder)
        .unwrap_or_default()
        .into_iter()
        .filter(|(_, name)| name.starts_with(PLAN_PREFIX));
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
        // Stands for another process, which must not evict the first data set's blocks.
        let second = open(folder.path(), 500);
        keep(&second.of(&other), &request, &blocks);
        assert_eq!(found(&mine, &request), [true, true, true, true, false]);
        assert_eq!(
            found(&second.of(&other), &request)
                .iter()
                .filter(|found| **found)
                .count(),
            1
        );
        drop((mine, cache));
        keep(&second.of(&other), &request, &blocks);
        assert_eq!(
            (found(&second.of(&other), &request), second.used_bytes()),
            (vec![true; 5], 500)
        );
    }

    #[test]
    fn a_look_counts_anew_and_deletes_what_is_left_over() {
        let folder = tempfile::tempdir().unwrap();
        let blocks = blocks(3);
        let (request, cache) = (request(0, &blocks), open(folder.path(), 300));
        keep(&cache.of(IDENTITY), &request, &blocks[..1]);
        // A process was killed while others live: counted space without a file, a file without a
        // lock.
        count_more(&cache, 150);
        let left = folder
            .path()
            .join(&IDENTITY[..32])
            .join(LATENTS)
            .join(format!("{TEMPORARY_PREFIX}9-9"));
        fs::write(&left, [0; 50]).unwrap();
        keep(&cache.of(IDENTITY), &request, &blocks);
        assert_eq!(
            (found(&cache.of(IDENTITY), &request), cache.used_bytes()),
            (vec![true; 3], 300)
        );
        assert!(!left.exists());
    }
}
