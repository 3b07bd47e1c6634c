//! Room in a cache that is full: which blocks go.
//!
//! First those of data sets that no living process has open, then those that the plan of this machine does not need, then
//! the one whose next use is farthest away, unless what is to be kept is needed later still. Blocks that only other
//! living processes plan with are left alone. What is there is found out by looking into the folder, a part of whose
//! blocks are then candidates until the next look; each is asked again for its next use before it goes. A look also
//! counts anew what is in use, so that what a killed process had reserved comes back.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
};

use crate::{
    cache::{Block, DiskCache, LATENTS, OPEN, PLAN_PREFIX, TEXT, is_identity, names},
    durable::TEMPORARY_PREFIX,
    load::uses::Uses,
};

/// Needed by nobody.
const NEVER: u64 = u64::MAX;
/// Not needed by this machine's plan in this epoch nor the next.
const LATE: u64 = u64::MAX - 1;
/// A look is taken when this part of the files that it found has asked for room since the last one.
const FILES_A_LOOK: usize = 64;
/// Candidates that are remembered at least.
const LEAST_CANDIDATES: usize = 64;

/// What may go.
#[derive(Debug, Default)]
pub(crate) struct Room {
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
    block: Block,
    /// Whether it may go where the plan does not need it.
    is_free: bool,
}

impl DiskCache {
    /// The step in which a block is needed next after `step`, as a rank among those that may go.
    pub(crate) fn due(&self, block: &Block, step: u64) -> u64 {
        let plans = self.plans();
        let next = plans.iter().filter_map(|uses| uses.next(&block.folder, block.object, block.number, step));
        next.min().unwrap_or(LATE)
    }

    /// Makes room until `len` bytes more are within the limit, if enough is there that is needed later than `due`; else
    /// nothing goes. Called with the counter `used` locked.
    pub(crate) fn make_room(&self, used: &mut u64, len: u64, due: u64) -> io::Result<()> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        room.asked_since += 1;
        let may_look = !room.has_looked || room.asked_since * FILES_A_LOOK > room.num_files;
        let mut chosen = self.chosen(&mut room, *used, len, due);
        if chosen.is_none() && may_look {
            *room = self.look(used)?;
            chosen = self.chosen(&mut room, *used, len, due);
        }
        for candidate in chosen.into_iter().flatten() {
            if fs::remove_file(&candidate.path).is_ok() {
                *used = used.saturating_sub(candidate.len);
            }
        }
        Ok(())
    }

    /// Takes the farthest candidates that make room enough, if there are.
    fn chosen(&self, room: &mut Room, used: u64, len: u64, due: u64) -> Option<Vec<Candidate>> {
        let mut needed = used.saturating_add(len).saturating_sub(self.limit_bytes());
        let mut chosen = Vec::new();
        while needed > 0 {
            let Some(candidate) = room.candidates.pop_if(|candidate| candidate.due > due) else {
                // The farthest last again.
                room.candidates.extend(chosen.into_iter().rev());
                return None;
            };
            if self.may_go(&candidate, due) {
                needed = needed.saturating_sub(candidate.len);
                chosen.push(candidate);
            }
        }
        Some(chosen)
    }

    /// Whether a candidate is still one.
    fn may_go(&self, candidate: &Candidate, due: u64) -> bool {
        if candidate.due == NEVER {
            return try_alone(&self.root.join(&*candidate.block.folder).join(OPEN)).is_some();
        }
        let now = self.due(&candidate.block, 0);
        now > due && (now < LATE || candidate.is_free)
    }

    /// Looks at all that is there.
    fn look(&self, used: &mut u64) -> io::Result<Room> {
        let plans = self.plans();
        let (mut candidates, mut num_files, mut num_bytes) = (Vec::new(), 0, 0);
        for (path, name) in names(&self.root)?.into_iter().filter(|(_, name)| is_identity(name)) {
            let is_mine = plans.iter().any(|uses| uses.knows(&name));
            let is_dead = !is_mine && try_alone(&path.join(OPEN)).is_some();
            let is_free = is_mine && !is_planned_with(&path, &plans);
            let folder: Arc<str> = name.into();
            for (path, name) in names(&path.join(LATENTS))?.into_iter().chain(names(&path.join(TEXT))?) {
                let Ok(len) = fs::metadata(&path).map(|found| found.len()) else { continue };
                if name.starts_with(TEMPORARY_PREFIX) && is_left_over(&path) {
                    continue;
                }
                num_files += 1;
                num_bytes += len;
                let Some((object, number)) = parse(&name).filter(|_| is_dead || is_mine) else { continue };
                let block = Block { folder: folder.clone(), object, number };
                let due = if is_dead { NEVER } else { self.due(&block, 0) };
                if due != LATE || is_free {
                    candidates.push(Candidate { due, path, len, block, is_free });
                }
            }
        }
        *used = num_bytes;
        candidates.sort_unstable_by_key(|candidate| candidate.due);
        let kept = LEAST_CANDIDATES.max(num_files / FILES_A_LOOK).min(candidates.len());
        candidates.drain(..candidates.len() - kept);
        Ok(Room { candidates, num_files, asked_since: 0, has_looked: true })
    }

    fn plans(&self) -> Vec<Arc<Uses>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        plans.retain(|plan| plan.strong_count() > 0);
        plans.iter().filter_map(std::sync::Weak::upgrade).collect()
    }
}

/// Object and number of a block, from its file's name.
fn parse(name: &str) -> Option<(usize, u32)> {
    let (object, number) = name.split_once('-')?;
    Some((object.parse().ok()?, number.parse().ok()?))
}

/// Whether a half-written file is nobody's any more; then it is deleted.
fn is_left_over(path: &Path) -> bool {
    try_alone(path).is_some_and(|_held| fs::remove_file(path).is_ok())
}

/// The file, if it is there and no living process holds it.
fn try_alone(path: &Path) -> Option<File> {
    let file = File::options().read(true).write(true).open(path).ok()?;
    file.try_lock().is_ok().then_some(file)
}

/// Whether a living process plans with a data set by another plan than ours. Marks of dead ones are deleted.
fn is_planned_with(folder: &Path, plans: &[Arc<Uses>]) -> bool {
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
