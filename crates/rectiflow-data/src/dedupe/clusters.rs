//! Pairs of copies among many pictures, and which of each cluster is kept.
//!
//! Pictures are numbered by rank, the best first ([`Rank`]). Those with keys that are near are
//! candidates; their thumbnails decide ([`Thumbnail::matches`]). The best picture that
//! no better one has claimed is kept, and claims every picture that is a pair with it. A cluster is
//! not chained: each of its pictures is a copy of the one that is kept, not of another copy.
//!
//! Many pictures can have one key: flat ones have the empty key. More than [`CROWD`] of them are
//! compared with the best ones that differ among themselves, the leaders, and not each with each.

use std::cmp::Reverse;

use rayon::prelude::*;

use crate::{
    dedupe::pairs::{Hash, near_pairs},
    dedupe::thumbnail::{Limits, Thumbnail},
};

/// More pictures of one key are compared with leaders only.
pub const CROWD: usize = 64;
/// Leaders that a picture of a crowd is compared with: the latest.
const MAX_LEADERS: usize = 256;

/// What decides which picture of a cluster is kept. The greatest is the best.
#[derive(Debug, Clone, PartialEq, PartialOrd)]
pub struct Rank {
    /// Width times height.
    pub pixels: u64,
    /// The score of the source, 0 where there is none; never NaN.
    pub score: f64,
    /// Bytes of the caption.
    pub caption_bytes: usize,
    /// The smaller address wins, so that the result does not depend on the order of the rows.
    pub address: Reverse<String>,
}

/// The numbers of the pictures, the best first.
pub fn by_rank(ranks: &[Rank]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..ranks.len() as u32).collect();
    order.par_sort_by(|&a, &b| {
        let (a, b) = (&ranks[a as usize], &ranks[b as usize]);
        let scores = b.score.total_cmp(&a.score);
        let sizes = b.pixels.cmp(&a.pixels).then(scores);
        sizes
            .then_with(|| b.caption_bytes.cmp(&a.caption_bytes))
            .then_with(|| b.address.cmp(&a.address))
    });
    order
}

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
#[derive(Debug, Clone, Copy)]
pub struct View {
    /// The number of the picture, by rank.
    pub picture: u32,
    /// The signature's.
    pub keys: [Hash; 2],
}

/// The candidate pairs (i, j), i < j, ascending, of views: a key of one and a key of the other are
/// near, but in a crowd only pairs with leaders. `views` are in the order of their pictures' rank;
/// `thumbnail` returns that of a view.
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
    let mut leaders: Vec<Vec<u32>> = Vec::with_capacity(groups.hashes.len());
    for group in 0..groups.hashes.len() {
        let members = groups.members(group);
        if members.len() <= CROWD {
            leaders.push(members.to_vec());
            for (at, &first) in members.iter().enumerate() {
                pairs.extend(members[at + 1..].iter().map(|&second| (first, second)));
            }
        } else {
            let (found, mut claimed) = lead(members, thumbnail, limits);
            pairs.append(&mut claimed);
            leaders.push(found);
        }
    }
    for (first, second) in near_pairs(&groups.hashes, max_distance) {
        let (firsts, seconds) = (&leaders[first as usize], &leaders[second as usize]);
        for &a in firsts.iter().take(CROWD) {
            pairs.extend(seconds.iter().take(CROWD).map(|&b| (a.min(b), a.max(b))));
        }
    }
    pairs.retain(|&(a, b)| views[a as usize].picture != views[b as usize].picture);
    pairs.par_sort_unstable();
    pairs.dedup();
    pairs
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
    let matches = |&&(a, b): &&(u32, u32)| thumbnail(a).matches(&thumbnail(b), limits);
    let pictures = |&(a, b): &(u32, u32)| {
        let (a, b) = (views[a as usize].picture, views[b as usize].picture);
        (a.min(b), a.max(b))
    };
    let mut pairs: Vec<_> = candidates
        .par_iter()
        .filter(matches)
        .map(pictures)
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

/// The views of each distinct key.
struct Groups {
    hashes: Vec<Hash>,
    /// The members of group g are `starts[g]..starts[g + 1]`.
    starts: Vec<usize>,
    /// In each group ascending, every view once.
    members: Vec<u32>,
}

impl Groups {
    fn new(views: &[View]) -> Self {
        let mut all: Vec<(Hash, u32)> = Vec::with_capacity(2 * views.len());
        for (number, view) in views.iter().enumerate() {
            all.extend(view.keys.iter().map(|&key| (key, number as u32)));
        }
        all.par_sort_unstable();
        all.dedup();
        let (mut hashes, mut starts) = (Vec::new(), Vec::new());
        for (at, (hash, _)) in all.iter().enumerate() {
            if hashes.last() != Some(hash) {
                hashes.push(*hash);
                starts.push(at);
            }
        }
        starts.push(all.len());
        Self {
            hashes,
            starts,
            members: all.into_iter().map(|(_, view)| view).collect(),
        }
    }

    fn members(&self, group: usize) -> &[u32] {
        &self.members[self.starts[group]..self.starts[group + 1]]
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
    fn the_best_is_the_largest_then_the_best_scored_then_the_best_described() {
        let rank = |pixels, score, caption_bytes, address: &str| Rank {
            pixels,
            score,
            caption_bytes,
            address: Reverse(address.to_owned()),
        };
        let ranks = [
            rank(10, 1.0, 5, "b"),
            rank(10, 1.0, 5, "a"),
            rank(10, 1.0, 9, "c"),
            rank(10, 2.0, 0, "d"),
            rank(20, 0.0, 0, "e"),
        ];
        assert_eq!(by_rank(&ranks), [4, 3, 2, 1, 0]);
    }

    #[test]
    fn a_crowd_of_flat_pictures_is_split_by_colour_without_comparing_all() {
        let colours = [[250, 10, 10], [10, 10, 250], [255, 255, 255]];
        let flat = |i: u32| Signature::of(&colours[i as usize % 3].repeat(20 * 20), 20, 20).0;
        let view = |picture| View {
            picture,
            keys: flat(picture).keys,
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
