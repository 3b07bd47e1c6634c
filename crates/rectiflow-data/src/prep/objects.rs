//! Assigns new samples to objects, in random order. Pure.
//!
//! The samples of a bucket and split are shuffled together and then cut into objects. The order
//! depends on (seed, bucket, split, number of the first object) and on the set of ids, and on
//! nothing else in the folder, so that an interrupted preparation arrives at the same plan again.

use std::collections::BTreeMap;

use crate::{
    format::{
        block_table::BLOCK_ROWS,
        bucket::Bucket,
        manifest::{LATENTS_OFFSET, MAX_OBJECT_BYTES, Split},
        record::SampleId,
    },
    rng::{Purpose, Rng},
};

/// Width, height and split. The objects of a series are numbered together.
pub(crate) type Series = (u32, u32, Split);

/// A sample to pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Item {
    /// The caller's index of it.
    pub(crate) index: usize,
    pub(crate) id: SampleId,
    pub(crate) bucket: Bucket,
    pub(crate) split: Split,
}

/// An object to write. Samples that fail are left out of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlannedObject {
    /// Name without folder and extension, e.g. `1024x1024-00003`.
    pub(crate) stem: String,
    pub(crate) bucket: Bucket,
    pub(crate) split: Split,
    pub(crate) items: Vec<Item>,
}

/// All objects of a run. Two runs with the same `id` write the same bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ObjectPlan {
    pub(crate) id: String,
    pub(crate) objects: Vec<PlannedObject>,
}

/// The sizes of objects and the key of their order.
#[derive(Debug, Clone)]
pub(crate) struct Cut {
    pub(crate) seed: u64,
    /// Largest number of rows of an object; the limit in bytes can lower it.
    pub(crate) max_rows: u32,
    /// Bytes of latents per pixel of the bucket, as a fraction.
    pub(crate) bytes_per_px: (u64, u64),
    /// Everything else that the written bytes depend on: codec and geometry.
    pub(crate) salt: String,
}

impl ObjectPlan {
    /// Plans `items`. `first` holds the number of each series' next object; 0 if it is missing.
    pub(crate) fn new(items: Vec<Item>, first: &BTreeMap<Series, u32>, cut: &Cut) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(cut.salt.as_bytes());
        let mut objects = Vec::new();
        for (series @ (width_px, height_px, split), mut items) in by_series(items) {
            let first = first.get(&series).copied().unwrap_or(0);
            shuffle(&mut items, series, first, cut.seed);
            let bucket = Bucket {
                width_px,
                height_px,
            };
            for (number, items) in (first..).zip(items.chunks(cut.rows(bucket))) {
                let stem = stem(series, number);
                hasher.update(stem.as_bytes());
                for item in items {
                    hasher.update(&item.id.0.to_le_bytes());
                }
                objects.push(PlannedObject {
                    stem,
                    bucket,
                    split,
                    items: items.to_vec(),
                });
            }
        }
        Self {
            id: hasher.finalize().to_hex().to_string(),
            objects,
        }
    }
}

impl Cut {
    /// Rows of a full object: whole blocks within 512 MiB and `max_rows`, but at least one row.
    fn rows(&self, bucket: Bucket) -> usize {
        let (bytes, px) = self.bytes_per_px;
        let row_bytes =
            (u64::from(bucket.width_px) * u64::from(bucket.height_px) * bytes / px).max(1);
        let block = u64::from(BLOCK_ROWS);
        let rows = ((MAX_OBJECT_BYTES - LATENTS_OFFSET) / row_bytes).min(u64::from(self.max_rows));
        if rows >= block {
            (rows / block * block) as usize
        } else {
            rows.max(1) as usize
        }
    }
}

/// The stem of an object. The split in it is for people; readers use the manifest.
fn stem((width, height, split): Series, number: u32) -> String {
    let infix = if split == Split::Test { "test-" } else { "" };
    format!("{width}x{height}-{infix}{number:05}")
}

fn by_series(items: Vec<Item>) -> BTreeMap<Series, Vec<Item>> {
    let mut series = BTreeMap::<Series, Vec<Item>>::new();
    for item in items {
        let key = (item.bucket.width_px, item.bucket.height_px, item.split);
        series.entry(key).or_default().push(item);
    }
    series
}

/// Puts the new items of a series in random order. `first` is the number of their first object.
fn shuffle(items: &mut [Item], (width, height, split): Series, first: u32, seed: u64) {
    items.sort_unstable_by_key(|item| item.id);
    let words = [
        width.into(),
        height.into(),
        u64::from(split == Split::Test),
        first.into(),
    ];
    Rng::keyed(seed, Purpose::WriteOrder, &words).shuffle(items);
}

/// The series and number in a stem. None if a preparation does not write such a name.
pub(crate) fn parse_stem(stem: &str) -> Option<(Series, u32)> {
    let (size, rest) = stem.split_once('-')?;
    let (width, height) = size.split_once('x')?;
    let (split, number) = rest
        .strip_prefix("test-")
        .map_or((Split::Train, rest), |number| (Split::Test, number));
    let series = (width.parse().ok()?, height.parse().ok()?, split);
    Some((series, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUCKET: Bucket = Bucket {
        width_px: 128,
        height_px: 64,
    };

    fn cut(max_rows: u32) -> Cut {
        Cut {
            seed: 7,
            max_rows,
            bytes_per_px: (8, 64),
            salt: "salt".to_owned(),
        }
    }

    fn items(range: std::ops::Range<u64>) -> Vec<Item> {
        range
            .map(|i| Item {
                index: i as usize,
                id: SampleId(i),
                bucket: BUCKET,
                split: Split::Train,
            })
            .collect()
    }

    #[test]
    fn every_item_is_in_one_object_in_an_order_that_only_ids_decide() {
        let plan = ObjectPlan::new(items(0..1000), &BTreeMap::new(), &cut(320));
        let stems: Vec<&str> = plan.objects.iter().map(|o| o.stem.as_str()).collect();
        assert_eq!(
            stems,
            [
                "128x64-00000",
                "128x64-00001",
                "128x64-00002",
                "128x64-00003"
            ]
        );
        assert_eq!(
            plan.objects
                .iter()
                .map(|o| o.items.len())
                .collect::<Vec<_>>(),
            [320, 320, 320, 40]
        );
        // Every id is in the plan, in another order, which the order of the input does not change.
        let mut ids: Vec<u64> = plan
            .objects
            .iter()
            .flat_map(|o| &o.items)
            .map(|item| item.id.0)
            .collect();
        assert!(
            ids.windows(2).filter(|pair| pair[1] == pair[0] + 1).count() < 10,
            "they are shuffled"
        );
        ids.sort_unstable();
        assert_eq!(ids, (0..1000).collect::<Vec<_>>());
        let mut reversed = items(0..1000);
        reversed.reverse();
        assert_eq!(ObjectPlan::new(reversed, &BTreeMap::new(), &cut(320)), plan);
    }

    #[test]
    fn plan_changes_with_all_that_it_depends_on() {
        let base = ObjectPlan::new(items(0..100), &BTreeMap::new(), &cut(320)).id;
        let later = BTreeMap::from([((128, 64, Split::Train), 3)]);
        let salted = Cut {
            salt: "other".to_owned(),
            ..cut(320)
        };
        let seeded = Cut {
            seed: 8,
            ..cut(320)
        };
        let test: Vec<Item> = items(0..100)
            .into_iter()
            .map(|i| Item {
                split: Split::Test,
                ..i
            })
            .collect();
        let others = [
            ObjectPlan::new(items(0..101), &BTreeMap::new(), &cut(320)).id,
            ObjectPlan::new(items(0..100), &later, &cut(320)).id,
            ObjectPlan::new(items(0..100), &BTreeMap::new(), &salted).id,
            ObjectPlan::new(items(0..100), &BTreeMap::new(), &seeded).id,
            ObjectPlan::new(items(0..100), &BTreeMap::new(), &cut(32)).id,
            ObjectPlan::new(test, &BTreeMap::new(), &cut(320)).id,
        ];
        assert!(others.iter().all(|id| *id != base));
    }

    #[test]
    fn objects_stay_below_512_mib() {
        let bucket = Bucket {
            width_px: 1024,
            height_px: 1024,
        };
        assert_eq!(cut(1 << 20).rows(bucket), 4064);
        assert_eq!(cut(100).rows(bucket), 96);
        assert_eq!(
            cut(1).rows(Bucket {
                width_px: 65_536,
                height_px: 65_536
            }),
            1
        );
    }

    #[test]
    fn names_tell_series_and_number() {
        for key in [(1024, 768, Split::Train), (64, 64, Split::Test)] {
            assert_eq!(parse_stem(&stem(key, 42)), Some((key, 42)));
        }
        assert_eq!(parse_stem("x"), None);
    }
}
