//! Pairs of copies among many pictures, and which of each cluster is kept.
//!
//! Pictures are numbered by rank, the best first. Those with keys that are near are candidates, one
//! of the two keys being that of a whole thumbnail; their thumbnails decide
//! ([`Thumbnail::matches`]). The best picture that no better one has claimed is kept, and claims
//! every picture that is a pair with it. A cluster is not chained: each of its pictures is a copy
//! of the one that is kept, not of another copy.
//!
//! Many pictures can have one key: flat ones have the empty key. More than [`CROWD`] of them are
//! compared with the best ones that differ among themselves, the leaders, and not each with each.

use std::collections::HashMap;

use rayon::prelude::*;

use crate::{
    dedupe::thumbnail::{Limits, Thumbnail},
    dedupe::{
        key::Keys,
        pairs::{Hash, near_pairs_of_first},
    },
};

/// More pictures of one key are compared with leaders only.
pub const CROWD: usize = 64;
/// Leaders that a picture of a crowd is compared with: the latest.
const MAX_LEADERS: usize = 256;

/// A kept picture and its copies, each in the order of rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    /// The picture that stays.
    pub kept: u32,
    /// The pictures that are copies of it.
    pub copies: Vec<u32>,
}

/// The clusters of two pictures or more, by the rank of the kept one. `pairs` are (i, j) with i <
/// j, ascending.
pub fn clusters(num_pictures: usize, pairs: &[(u32, u32)]) -> Vec<Cluster> {
    let mut claimed = vec![false; num_pictures];
    let mut clusters = Vec::new();
    for pairs in pairs.chunk_by(|a, b| a.0 == b.0) {
        let kept = pairs[0].0;
        if claimed[kept as usize] {
            continue;
        }
        let mut copies: Vec<u32> = pairs.iter().map(|pair| pair.1).collect();
        copies.retain(|&copy| !claimed[copy as usize]);
        for &copy in &copies {
            claimed[copy as usize] = true;
        }
        if !copies.is_empty() {
            clusters.push(Cluster { kept, copies });
        }
    }
    clusters
}

/// A signature of a picture, without its thumbnail.
#[derive(Debug, Clone)]
pub struct View {
    /// The number of the picture, by rank.
    pub picture: u32,
    /// The signature's.
    pub keys: Keys,
}

/// The candidate pairs (i, j), i < j, ascending, of views: the key of the whole of one and a key of
/// the other are near, but in a crowd only pairs with leaders. `views` are in the order of their
/// pictures' rank; `thumbnail` returns that of a view.
pub fn candidates<F>(
    views: &[View],
    max_distance: u32,
    thumbnail: &F,
    limits: &Limits,
) -> Vec<(u32, u32)>
where
    F: Fn(u32) -> Thumbnail + Sync,
{
    let groups = Groups::new(views);
    let mut pairs: Vec<(u32, u32)> = Vec::new();
    let mut crowds: HashMap<usize, Vec<u32>> = HashMap::new();

    // Views with one key.
    for group in 0..groups.num_whole {
        let Members { wholes, windows } = groups.members(group);
        if wholes.len() > CROWD {
            let (leaders, mut claimed) = lead(wholes, thumbnail, limits);
            pairs.append(&mut claimed);
            crowds.insert(group, leaders);
        } else {
            for (at, &first) in wholes.iter().enumerate() {
                pairs.extend(wholes[at + 1..].iter().map(|&second| (first, second)));
            }
        }
        let wholes = crowds.get(&group).map_or(wholes, Vec::as_slice);
        for &whole in wholes.iter().take(CROWD) {
            let windows = windows.iter().take(CROWD);
            pairs.extend(windows.map(|&window| ordered(whole, window)));
        }
    }

    // Views with keys that are near.
    for (first, second) in near_pairs_of_first(&groups.hashes, groups.num_whole, max_distance) {
        let ends = [first as usize, second as usize].map(|group| {
            let members = groups.members(group);
            let wholes = crowds.get(&group).map_or(members.wholes, Vec::as_slice);
            [wholes, members.windows].map(|part| &part[..part.len().min(CROWD)])
        });
        let [[wholes, windows], [other_wholes, other_windows]] = ends;
        for (some, others) in [
            (wholes, other_wholes),
            (wholes, other_windows),
            (windows, other_wholes),
        ] {
            for &a in some {
                pairs.extend(others.iter().map(|&b| ordered(a, b)));
            }
        }
    }
    pairs.retain(|&(a, b)| views[a as usize].picture != views[b as usize].picture);
    pairs.par_sort_unstable();
    pairs.dedup();
    pairs
}

fn ordered(a: u32, b: u32) -> (u32, u32) {
    (a.min(b), a.max(b))
}

/// The pairs of pictures (i, j), i < j, ascending, of which candidate views are copies.
pub fn confirmed<F>(
    views: &[View],
    candidates: &[(u32, u32)],
    thumbnail: &F,
    limits: &Limits,
) -> Vec<(u32, u32)>
where
    F: Fn(u32) -> Thumbnail + Sync,
{
    let matching = |same_first: &[(u32, u32)]| {
        let first = thumbnail(same_first[0].0);
        let mut found = Vec::new();
        for &(a, b) in same_first {
            if first.matches(&thumbnail(b), limits) {
                found.push(ordered(
                    views[a as usize].picture,
                    views[b as usize].picture,
                ));
            }
        }
        found
    };
    let mut pairs: Vec<_> = candidates
        .par_chunk_by(|a, b| a.0 == b.0)
        .flat_map_iter(matching)
        .collect();
    pairs.par_sort_unstable();
    pairs.dedup();
    pairs
}

/// The leaders of a crowd, and the pairs of a leader and a member that matches it.
fn lead<F>(members: &[u32], thumbnail: &F, limits: &Limits) -> (Vec<u32>, Vec<(u32, u32)>)
where
    F: Fn(u32) -> Thumbnail + Sync,
{
    let (mut leaders, mut pairs): (Vec<(u32, Thumbnail)>, _) = (Vec::new(), Vec::new());
    for &member in members {
        let own = thumbnail(member);
        let latest = &leaders[leaders.len().saturating_sub(MAX_LEADERS)..];
        match latest
            .iter()
            .find(|(_, leader)| leader.plain_match(&own, limits))
        {
            Some(&(leader, _)) => pairs.push((leader, member)),
            None => leaders.push((member, own)),
        }
    }
    (
        leaders.into_iter().map(|(leader, _)| leader).collect(),
        pairs,
    )
}

/// The views of a key.
struct Members<'a> {
    /// Those of which it is the key of the whole, ascending.
    wholes: &'a [u32],
    /// Those of which it is a window's, ascending.
    windows: &'a [u32],
}

/// The views of each distinct key, first those of keys that a whole has.
struct Groups {
    hashes: Vec<Hash>,
    /// Number of keys that a whole has.
    num_whole: usize,
    /// Where the wholes and where the windows of a group begin in `views`.
    starts: Vec<[u32; 2]>,
    views: Vec<u32>,
}

impl Groups {
    fn new(views: &[View]) -> Self {
        let mut all: Vec<(Hash, bool, u32)> = Vec::new();
        for (number, view) in (0..).zip(views) {
            let whole = view.keys.whole();
            all.push((whole, false, number));
            let windows = view.keys.windows().iter().filter(|&&key| key != whole);
            all.extend(windows.map(|&key| (key, true, number)));
        }
        all.par_sort_unstable();
        all.dedup();
        let mut groups = Self {
            hashes: Vec::new(),
            num_whole: 0,
            starts: Vec::new(),
            views: Vec::with_capacity(all.len()),
        };
        for group in all.chunk_by(|a, b| a.0 == b.0).filter(|group| !group[0].1) {
            groups.push(group);
        }
        groups.num_whole = groups.hashes.len();
        for group in all.chunk_by(|a, b| a.0 == b.0).filter(|group| group[0].1) {
            groups.push(group);
        }
        let end = groups.views.len() as u32;
        groups.starts.push([end; 2]);
        groups
    }

    fn push(&mut self, group: &[(Hash, bool, u32)]) {
        let start = self.views.len();
        let num_wholes = group.partition_point(|entry| !entry.1);
        self.hashes.push(group[0].0);
        self.starts
            .push([start as u32, (start + num_wholes) as u32]);
        self.views.extend(group.iter().map(|entry| entry.2));
    }

    fn members(&self, group: usize) -> Members<'_> {
        let [wholes, windows] = self.starts[group].map(|start| start as usize);
        let end = self.starts[group + 1][0] as usize;
        Members {
            wholes: &self.views[wholes..windows],
            windows: &self.views[windows..end],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dedupe::signature::Signature;

    #[test]
    fn a_cluster_is_not_chained_beyond_what_the_kept_picture_matches() {
        let found = clusters(6, &[(0, 1), (0, 3), (1, 2), (2, 4), (3, 5)]);
        let cluster = |kept, copies: &[u32]| Cluster {
            kept,
            copies: copies.to_vec(),
        };
        // 2 is a copy of 1 only, and 5 of 3 only, which are not kept.
        assert_eq!(found, [cluster(0, &[1, 3]), cluster(2, &[4])]);
    }

    #[test]
    fn a_crowd_of_flat_pictures_is_split_by_colour_without_comparing_all() {
        let colours = [[250, 10, 10], [10, 10, 250], [255, 255, 255]];
        let flat = |i: u32| Signature::of(&colours[i as usize % 3].repeat(20 * 20), 20, 20).0;
        let view = |picture| View {
            picture,
            keys: Keys::new(&flat(picture)),
        };
        let views: Vec<View> = (0..300).map(view).collect();
        let (thumbnail, limits) = (|i: u32| Thumbnail::new(&flat(i)), Limits::default());
        let found = candidates(&views, 20, &thumbnail, &limits);
        assert_eq!(found.len(), 297, "each but the three leaders has one");
        let clusters = clusters(300, &confirmed(&views, &found, &thumbnail, &limits));
        assert_eq!(
            clusters.iter().map(|c| c.kept).collect::<Vec<_>>(),
            [0, 1, 2]
        );
        assert!(
            clusters
                .iter()
                .all(|c| c.copies.iter().all(|copy| copy % 3 == c.kept))
        );
    }
}
