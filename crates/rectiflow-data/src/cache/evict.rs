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
    let mut soonest = LATE;
    for plan in plans {
        if let Some(next) = plan.next(&block.folder, block.object, block.number, step) {
            soonest = soonest.min(next);
        }
    }
    soonest
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
        for candidate in chosen.unwrap_or_default() {
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
        let mut candidates = look.candidates;
        candidates.sort_unstable_by_key(|candidate| candidate.due);
        let kept = LEAST_CANDIDATES.max(look.num_files / FILES_A_LOOK);
        candidates.drain(..candidates.len().saturating_sub(kept));
        self.candidates = candidates;
        self.num_files = look.num_files;
        self.asked_since = 0;
        self.has_looked = true;
        Ok(look.num_bytes)
    }
}

impl Look {
    /// Scans the folder of a data set.
    fn at(&mut self, path: &Path, name: &str, plans: &[Arc<dyn NextUse>]) -> io::Result<()> {
        let folder = Folder::new(path, name, plans);
        let mut files = names(&path.join(LATENTS))?;
        files.extend(names(&path.join(TEXT))?);
        for (path, name) in files {
            let Ok(found) = fs::metadata(&path) else {
                continue;
            };
            if name.starts_with(TEMPORARY_PREFIX) && is_left_over(&path) {
                continue;
            }
            self.num_files += 1;
            self.num_bytes += found.len();
            if let Some(block) = folder.block(&name)
                && let Some(due) = folder.due(&block, plans)
            {
                self.candidates.push(Candidate {
                    due,
                    path,
                    len: found.len(),
                    block,
                    is_free: folder.is_free,
                });
            }
        }
        Ok(())
    }
}

/// The folder of a data set, and the processes that use it.
struct Folder {
    name: Arc<str>,
    /// Whether a plan of this process includes the data set.
    is_mine: bool,
    /// Whether no living process has the data set open.
    is_dead: bool,
    /// Whether only this process has a plan for it.
    is_free: bool,
}

impl Folder {
    fn new(path: &Path, name: &str, plans: &[Arc<dyn NextUse>]) -> Self {
        let is_mine = plans.iter().any(|plan| plan.knows(name));
        Self {
            name: name.into(),
            is_mine,
            is_dead: !is_mine && try_alone(&path.join(OPEN)).is_some(),
            is_free: is_mine && !is_planned_with(path, plans),
        }
    }

    /// The block in the file `name`, if this process can evict blocks of this data set.
    fn block(&self, name: &str) -> Option<BlockId> {
        if !self.is_dead && !self.is_mine {
            return None;
        }
        let (object, number) = parse_block(name)?;
        Some(BlockId {
            folder: self.name.clone(),
            object,
            number,
        })
    }

    /// The next use of a block. None if it cannot be evicted.
    fn due(&self, block: &BlockId, plans: &[Arc<dyn NextUse>]) -> Option<u64> {
        if self.is_dead {
            return Some(NEVER);
        }
        let due = due(plans, block, 0);
        (due != LATE || self.is_free).then_some(due)
    }
}

/// Whether a living process has another plan than `plans` for a data set. Deletes the marks of dead
/// processes.
fn is_planned_with(folder: &Path, plans: &[Arc<dyn NextUse>]) -> bool {
    for (path, name) in names(folder).unwrap_or_default() {
        let is_mine = plans.iter().any(|plan| plan.claims(&name));
        if !name.starts_with(PLAN_PREFIX) || is_mine {
            continue;
        }
        let is_living = match try_alone(&path) {
            Some(_held) => fs::remove_file(&path).is_err(),
            None => path.exists(),
        };
        if is_living {
            return true;
        }
    }
    false
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
