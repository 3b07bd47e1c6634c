//! The guarantees of the order (DESIGN section 6), for awkward bucket sizes, mixtures, ranks and
//! data sets.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use proptest::prelude::*;
use rectiflow_data::{
    Error,
    amplification::amplification,
    epoch::Steps,
    order::{Amount, BucketRows, DataShape, Mode, Order, OrderSettings, RankOf, Slot, Stream},
    rng::{Purpose, key_u64},
    window::{RowRef, Windows},
};

/// Buckets in objects of up to 500 rows, in runs of four blocks. Each object but the last ends with
/// a short block.
fn shape(rows: &[u64], amount: Amount) -> DataShape {
    let buckets = (0..).zip(rows).map(|(bucket, &rows)| BucketRows {
        bucket,
        rows,
        run_ends: run_ends(rows, 500),
    });
    DataShape {
        identity: "identity".into(),
        text: "text".into(),
        amount,
        buckets: buckets.collect(),
    }
}

fn run_ends(rows: u64, object_rows: u64) -> Vec<u32> {
    // Bounded, because a test of the row limit has 2^33 rows.
    let objects = (0..rows.min(1 << 20)).step_by(object_rows as usize);
    let runs = objects.flat_map(|first| {
        let end = rows.min(first + object_rows);
        (first..end)
            .step_by(128)
            .map(move |run| (run + 128).min(end) as u32)
    });
    runs.collect()
}

fn settings(micro_batch: usize, micro_batches: usize) -> OrderSettings {
    OrderSettings {
        seed: 3,
        micro_batch,
        micro_batches,
        lanes: None,
        mode: Mode::Local,
        window_samples: 64,
    }
}

fn order(data: &[DataShape], settings: OrderSettings) -> Arc<Order> {
    Arc::new(Order::new(data, settings).unwrap())
}

fn single(rows: &[u64], micro_batch: usize, micro_batches: usize) -> Arc<Order> {
    order(
        &[shape(rows, Amount::Repeats(1.0))],
        settings(micro_batch, micro_batches),
    )
}

/// The same in `window` mode, in objects of whole blocks except a bucket's last object.
fn windowed(rows: &[u64], micro_batch: usize, micro_batches: usize) -> Arc<Order> {
    let mut data = shape(rows, Amount::Repeats(1.0));
    data.buckets
        .iter_mut()
        .for_each(|bucket| bucket.run_ends = run_ends(bucket.rows, 512));
    let settings = OrderSettings {
        window_samples: 256,
        ..window_mode(micro_batch, micro_batches)
    };
    order(&[data], settings)
}

/// The same in `owned` mode.
fn owned(rows: &[u64], micro_batch: usize, micro_batches: usize) -> Arc<Order> {
    let mut data = shape(rows, Amount::Repeats(1.0));
    data.buckets
        .iter_mut()
        .for_each(|bucket| bucket.run_ends = run_ends(bucket.rows, 512));
    let settings = OrderSettings {
        mode: Mode::Owned,
        window_samples: 256,
        ..settings(micro_batch, micro_batches)
    };
    order(&[data], settings)
}

fn window_mode(micro_batch: usize, micro_batches: usize) -> OrderSettings {
    OrderSettings {
        mode: Mode::Window,
        ..settings(micro_batch, micro_batches)
    }
}

/// Chunk counts as a function of (sample, pass), like those of drawn prompts.
fn count_by(salt: u64) -> impl Fn(&Stream, &RowRef) -> u8 {
    move |stream, place| {
        let words = [
            salt,
            u64::from(stream.data),
            u64::from(stream.bucket),
            u64::from(place.row),
            place.pass,
        ];
        1 + (key_u64(0, Purpose::Prompt, &words) % 3) as u8
    }
}

/// A micro-batch with its samples resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Batch {
    slot: Slot,
    places: Vec<RowRef>,
}

/// Walks steps and windows together, as the loader does.
struct Walk {
    order: Arc<Order>,
    steps: Steps,
    windows: Windows,
    salt: u64,
}

impl Walk {
    fn new(order: &Arc<Order>) -> Self {
        let (steps, windows) = (Steps::new(order.clone()), Windows::new(order.clone()));
        Self {
            order: order.clone(),
            steps,
            windows,
            salt: 0,
        }
    }

    fn step(&mut self, step: u64, slots: &[u32]) -> Vec<Batch> {
        let plan = self.steps.plan(step);
        let wanted = plan
            .slots
            .into_iter()
            .filter(|slot| slots.contains(&slot.slot));
        wanted
            .map(|slot| Batch {
                places: self.resolve(&slot),
                slot,
            })
            .collect()
    }

    fn resolve(&mut self, slot: &Slot) -> Vec<RowRef> {
        let count = count_by(self.salt);
        let counts = |stream: &Stream, places: &[RowRef]| {
            Ok(places.iter().map(|place| count(stream, place)).collect())
        };
        self.windows.samples(slot, counts).unwrap()
    }

    fn whole_step(&mut self, step: u64) -> Vec<Batch> {
        let all: Vec<u32> = (0..self.order.settings().micro_batches as u32).collect();
        self.step(step, &all)
    }
}

/// All micro-batches of the first `epochs` epochs.
fn epochs(order: &Arc<Order>, epochs: u64) -> Vec<Batch> {
    let mut walk = Walk::new(order);
    let total = order.epoch_start(epochs) as usize;
    let steps = total.div_ceil(order.settings().micro_batches) as u64;
    let mut batches: Vec<Batch> = (0..steps).flat_map(|step| walk.whole_step(step)).collect();
    batches.truncate(total);
    batches
}

/// Number of occurrences of each (data set, bucket, row).
fn times_seen(order: &Order, batches: &[Batch]) -> HashMap<(u32, u32, u32), u64> {
    let mut seen = HashMap::new();
    for batch in batches {
        let Stream { data, bucket, .. } = order.streams()[batch.slot.stream as usize];
        for place in &batch.places {
            *seen.entry((data, bucket, place.row)).or_insert(0) += 1;
        }
    }
    seen
}

/// Checks that nothing is dropped, no pass repeats a sample, and every sample is seen e times, plus
/// or minus one.
fn check_counts(order: &Arc<Order>, num_epochs: u64) {
    let batches = epochs(order, num_epochs);
    let mut passes = HashSet::new();
    // A bucket's rows; in `owned` mode it is several streams.
    let mut buckets = HashMap::<_, (u64, Stream)>::new();
    for facts in order.streams() {
        buckets
            .entry((facts.data, facts.bucket))
            .or_insert((0, *facts))
            .0 += facts.rows;
    }
    for batch in &batches {
        let Stream { data, bucket, .. } = order.streams()[batch.slot.stream as usize];
        for place in &batch.places {
            assert!(passes.insert((data, bucket, *place)), "{place:?} twice");
        }
    }
    for num_epochs in 1..=num_epochs {
        let seen = times_seen(order, &batches[..order.epoch_start(num_epochs) as usize]);
        for (&(data, bucket), (rows, facts)) in &buckets {
            for row in 0..*rows as u32 {
                let seen = *seen.get(&(data, bucket, row)).unwrap_or(&0);
                let expected = num_epochs as f64 * facts.repeats_millionths as f64 / 1e6;
                let slack = if expected.fract() == 0.0 { 1.0 } else { 2.0 };
                let off = (seen as f64 - expected).abs();
                assert!(
                    off <= slack,
                    "{facts:?} row {row}: {seen} times in {num_epochs} epochs"
                );
                // A bucket smaller than a micro-batch delivers each sample exactly once per pass.
                assert!(
                    *rows > u64::from(facts.size) || expected.fract() > 0.0 || off == 0.0,
                    "{facts:?}"
                );
            }
        }
    }
}

const AWKWARD: [&[u64]; 8] = [
    &[1],
    &[2],
    &[15],
    &[16],
    &[17],
    &[1000],
    &[1, 2, 15, 16, 17, 1000],
    &[1, 1, 1],
];

#[test]
fn counts_hold_for_awkward_buckets() {
    for rows in AWKWARD {
        for (micro_batch, micro_batches) in [(16, 1), (16, 8), (1, 3), (7, 4)] {
            check_counts(&single(rows, micro_batch, micro_batches), 5);
            check_counts(&windowed(rows, micro_batch, micro_batches), 5);
            check_counts(&owned(rows, micro_batch, micro_batches), 5);
        }
    }
}

#[test]
fn an_epoch_gives_the_micro_batches_of_the_formula() {
    let order = single(&[17, 1000, 5], 16, 8);
    let streams = order.streams();
    for epoch in 0..40 {
        assert_eq!(streams[0].before_epoch(epoch), epoch * 17 / 16);
        assert_eq!(streams[1].before_epoch(epoch), epoch * 1000 / 16);
        assert_eq!(streams[2].before_epoch(epoch), epoch);
    }
    let of_epoch = |epoch| order.epoch_start(epoch + 1) - order.epoch_start(epoch);
    for batch in [
        0,
        1,
        of_epoch(0) - 1,
        of_epoch(0),
        order.epoch_start(9),
        order.epoch_start(1_000_000),
    ] {
        let epoch = order.epoch_of(batch);
        assert!(
            order.epoch_start(epoch) <= batch && batch < order.epoch_start(epoch + 1),
            "{batch}"
        );
    }
}

#[test]
fn counts_hold_for_each_of_several_data_sets() {
    let data = [
        shape(&[17, 100], Amount::Repeats(1.0)),
        shape(&[16, 3], Amount::Repeats(3.0)),
        shape(&[33, 1], Amount::Repeats(0.4)),
        shape(&[40], Amount::Repeats(1.5)),
    ];
    check_counts(&order(&data, settings(16, 4)), 6);
    check_counts(&order(&data, window_mode(16, 4)), 6);
    check_counts(
        &order(
            &data,
            OrderSettings {
                mode: Mode::Owned,
                ..window_mode(16, 4)
            },
        ),
        6,
    );
    let shares = [
        shape(&[100, 20], Amount::Share(0.75)),
        shape(&[360], Amount::Share(0.25)),
    ];
    let order = order(&shares, settings(8, 4));
    check_counts(&order, 6);
    // 480 samples per epoch, 360 of them from the first data set.
    let mut samples = [0u64; 2];
    for batch in epochs(&order, 20) {
        samples[order.streams()[batch.slot.stream as usize].data as usize] +=
            batch.places.len() as u64;
    }
    assert!(
        samples[0].abs_diff(20 * 360) <= 16 && samples[1].abs_diff(20 * 120) <= 16,
        "{samples:?}"
    );
}

#[test]
fn text_changes_neither_the_number_of_micro_batches_nor_what_a_window_holds() {
    let order = single(&[1000, 17, 3], 16, 4);
    let (mut one, mut other) = (Walk::new(&order), Walk::new(&order));
    other.salt = 1;
    let mut windows = [HashMap::<_, Vec<_>>::new(), HashMap::new()];
    for step in 0..30 {
        let (a, b) = (one.whole_step(step), other.whole_step(step));
        assert_eq!(
            a.iter().map(|x| x.slot).collect::<Vec<_>>(),
            b.iter().map(|x| x.slot).collect::<Vec<_>>()
        );
        for (held, batches) in windows.iter_mut().zip([a, b]) {
            for batch in batches {
                let window = batch.slot.index / order.streams()[batch.slot.stream as usize].window;
                let rows = batch.places.iter().map(|place| (place.pass, place.row));
                held.entry((batch.slot.stream, window))
                    .or_default()
                    .extend(rows);
            }
        }
    }
    let [one, other] = windows.map(|held| {
        let whole = held.into_iter().filter(|((stream, _), rows)| {
            let facts = order.streams()[*stream as usize];
            rows.len() as u64 == facts.window * u64::from(facts.size)
        });
        whole
            .map(|(key, mut rows)| (rows.sort_unstable(), (key, rows)).1)
            .collect::<HashMap<_, _>>()
    });
    assert!(one.len() > 20);
    assert_eq!(one, other);
}

#[test]
fn at_most_two_micro_batches_of_a_window_are_mixed() {
    let order = single(&[1000, 65, 31], 8, 4);
    let count = count_by(0);
    let mut mixed = HashMap::new();
    let mut num_pure = 0;
    for batch in epochs(&order, 4) {
        let facts = &order.streams()[batch.slot.stream as usize];
        let counts: HashSet<u8> = batch
            .places
            .iter()
            .map(|place| count(facts, place))
            .collect();
        if counts.len() > 1 {
            *mixed
                .entry((batch.slot.stream, batch.slot.index / facts.window))
                .or_insert(0) += 1;
        } else {
            num_pure += 1;
        }
    }
    assert!(mixed.values().all(|&count| count <= 2), "{mixed:?}");
    assert!(num_pure > mixed.values().sum::<i32>());
}

#[test]
fn a_window_spans_at_most_two_passes_and_no_more_than_a_pass() {
    for rows in [16, 17, 100, 1000] {
        let order = single(&[rows], 16, 1);
        let stream = order.streams()[0];
        let samples = stream.window * 16;
        assert!(
            samples <= rows.min(64) && samples + 16 > rows.min(64),
            "{stream:?}"
        );
    }
}

#[test]
fn each_pass_is_a_fresh_permutation() {
    let order = single(&[1024, 1024], 16, 4);
    let mut windows = HashMap::<_, Vec<u32>>::new();
    for batch in epochs(&order, 3) {
        let rows = batch.places.iter().map(|place| place.row);
        windows
            .entry((batch.slot.stream, batch.slot.index / 4))
            .or_default()
            .extend(rows);
    }
    // 16 windows per pass: no two hold the same rows, in any pass and any bucket.
    let distinct: HashSet<Vec<u32>> = windows
        .into_values()
        .map(|mut rows| (rows.sort_unstable(), rows).1)
        .collect();
    assert_eq!(distinct.len(), 2 * 3 * 16);
}

#[test]
fn ranks_are_disjoint_and_together_run_the_same_steps() {
    let sizes = [1, 2, 15, 16, 17, 1000];
    for order in [
        single(&sizes, 16, 8),
        windowed(&sizes, 16, 8),
        owned(&sizes, 16, 8),
    ] {
        for step in [0, 1, 7, 8, 9, 50] {
            let whole = Walk::new(&order).whole_step(step);
            let num_samples = Steps::new(order.clone()).plan(step).num_samples;
            assert_eq!(
                whole
                    .iter()
                    .map(|batch| batch.places.len() as u64)
                    .sum::<u64>(),
                num_samples
            );
            for ranks in [1, 2, 3, 4, 8] {
                let mut together = Vec::new();
                for rank in 0..ranks {
                    let slots = order.slots_of(RankOf { rank, ranks }).unwrap();
                    assert!(
                        slots.iter().all(|slot| *slot as usize % ranks == rank),
                        "as many lanes as slots"
                    );
                    together.extend(Walk::new(&order).step(step, &slots));
                }
                together.sort_by_key(|batch| batch.slot.slot);
                assert_eq!(together, whole, "step {step}, {ranks} ranks");
            }
        }
    }
}

#[test]
fn first_samples_number_the_samples_of_a_step() {
    let order = single(&[1, 2, 15, 17, 100], 16, 8);
    for batches in (0..20).map(|step| Walk::new(&order).whole_step(step)) {
        let mut expected = 0;
        for batch in batches {
            assert_eq!(batch.slot.first_sample, expected);
            assert_eq!(batch.slot.size as usize, batch.places.len());
            expected += batch.places.len() as u64;
        }
    }
}

#[test]
fn seeking_equals_continuing() {
    let orders = AWKWARD.iter().flat_map(|rows| {
        [
            single(rows, 16, 3),
            windowed(rows, 16, 3),
            owned(rows, 16, 3),
        ]
    });
    for order in orders {
        let mut walk = Walk::new(&order);
        let straight: Vec<_> = (0..60).map(|step| walk.whole_step(step)).collect();
        for step in [0, 1, 2, 30, 59] {
            assert_eq!(
                Walk::new(&order).whole_step(step),
                straight[step as usize],
                "{order:?}, step {step}"
            );
        }
        // Backwards, with the state of the later steps.
        assert_eq!(walk.whole_step(7), straight[7]);
    }
    // A distant step costs no more than a near one.
    assert_eq!(
        Steps::new(single(&[1000], 16, 8)).plan(1 << 40).step,
        1 << 40
    );
}

#[test]
fn lanes_default_to_a_divisor_and_bound_the_ranks() {
    for (micro_batches, lanes) in [
        (1, 1),
        (8, 8),
        (64, 64),
        (96, 48),
        (100, 50),
        (127, 1),
        (256, 64),
    ] {
        assert_eq!(single(&[100], 4, micro_batches).lanes(), lanes);
    }
    let with = |lanes| {
        Order::new(
            &[shape(&[9], Amount::Repeats(1.0))],
            OrderSettings {
                lanes,
                ..settings(4, 12)
            },
        )
    };
    assert!(
        with(Some(5))
            .unwrap_err()
            .to_string()
            .contains("divisor of micro_batches = 12")
    );
    assert!(with(Some(0)).is_err());
    let order = with(Some(4)).unwrap();
    let slots: Vec<_> = (0..3)
        .map(|rank| order.slots_of(RankOf { rank, ranks: 3 }).unwrap())
        .collect();
    assert_eq!(
        slots,
        [vec![0, 3, 4, 7, 8, 11], vec![1, 5, 9], vec![2, 6, 10]]
    );
    assert_eq!(
        [1, 2, 3, 4].map(|ranks| order.idle_share(ranks)),
        [0.0, 0.0, 1.0 - 4.0 / 6.0, 0.0]
    );
    let refused = |ranks| {
        order
            .slots_of(RankOf { rank: 0, ranks })
            .unwrap_err()
            .to_string()
    };
    assert!(
        refused(5).contains("5 ranks cannot share 4 lanes; set lanes = 6"),
        "{}",
        refused(5)
    );
    assert!(refused(13).contains("raise them to 13"), "{}", refused(13));
    assert!(order.slots_of(RankOf { rank: 2, ranks: 2 }).is_err());
}

#[test]
fn hash_depends_on_every_ingredient() {
    let base = [
        shape(&[100, 7], Amount::Repeats(1.0)),
        shape(&[50], Amount::Repeats(1.0)),
    ];
    let hash = |data: &[DataShape], settings| Order::new(data, settings).unwrap().hash().to_owned();
    let first = hash(&base, settings(8, 4));
    assert_eq!(first, hash(&base, settings(8, 4)));
    assert_eq!(
        first,
        hash(
            &base,
            OrderSettings {
                lanes: Some(4),
                ..settings(8, 4)
            }
        ),
        "the default, written out"
    );
    let mut hashes = HashSet::from([first]);
    let mut differs = |what, hash: String| assert!(hashes.insert(hash), "{what}");
    differs(
        "seed",
        hash(
            &base,
            OrderSettings {
                seed: 4,
                ..settings(8, 4)
            },
        ),
    );
    differs("b", hash(&base, settings(9, 4)));
    differs("A", hash(&base, settings(8, 8)));
    differs(
        "L",
        hash(
            &base,
            OrderSettings {
                lanes: Some(2),
                ..settings(8, 4)
            },
        ),
    );
    differs("mode", hash(&base, window_mode(8, 4)));
    differs(
        "mode",
        hash(
            &base,
            OrderSettings {
                mode: Mode::Owned,
                ..window_mode(8, 4)
            },
        ),
    );
    differs(
        "S",
        hash(
            &base,
            OrderSettings {
                window_samples: 63,
                ..settings(8, 4)
            },
        ),
    );
    let mut with = |what, change: fn(&mut [DataShape; 2])| {
        let mut data = base.clone();
        change(&mut data);
        differs(what, hash(&data, settings(8, 4)));
    };
    with("identity", |data| data[1].identity = "other".into());
    with("text", |data| data[1].text = "other".into());
    with("repeats", |data| data[1].amount = Amount::Repeats(2.0));
    with("rows", |data| data[1].buckets[0].rows = 51);
    with("bucket", |data| data[1].buckets[0].bucket = 1);
    with("order of data sets", |data| data.swap(0, 1));
}

#[test]
fn impossible_settings_are_refused_by_name() {
    let refused =
        |data: &[DataShape], settings| Order::new(data, settings).unwrap_err().to_string();
    let one = |amount| [shape(&[100], amount)];
    let repeats = Amount::Repeats(1.0);
    assert!(refused(&[], settings(8, 4)).starts_with("data: "));
    assert!(refused(&[shape(&[], repeats)], settings(8, 4)).starts_with("data[0]: "));
    assert!(refused(&one(repeats), settings(0, 4)).starts_with("micro_batch: "));
    assert!(refused(&one(repeats), settings(8, 0)).starts_with("micro_batches: "));
    assert!(
        refused(
            &one(repeats),
            OrderSettings {
                window_samples: 0,
                ..settings(8, 4)
            }
        )
        .starts_with("window_samples")
    );
    for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-9] {
        assert!(
            refused(&one(Amount::Repeats(wrong)), settings(8, 4)).starts_with("data[0].repeats: "),
            "{wrong}"
        );
    }
    for (first, second) in [
        (Amount::Share(0.5), Amount::Share(0.4)),
        (Amount::Share(0.5), repeats),
    ] {
        let data = [shape(&[10], first), shape(&[10], second)];
        assert!(refused(&data, settings(8, 4)).starts_with("data.share: "));
    }
    assert!(refused(&[shape(&[1 << 33], repeats)], settings(8, 4)).contains("bucket 0"));
    assert!(matches!(
        Order::new(&[], settings(8, 4)),
        Err(Error::Invalid { .. })
    ));
}

#[test]
fn all_micro_batches_of_a_window_are_run_by_one_lane() {
    let order = windowed(&[5000, 700, 17, 3], 16, 8);
    let mut lanes = HashMap::new();
    for batch in epochs(&order, 3) {
        let Slot {
            stream,
            window_first,
            window_len,
            index,
            slot,
            ..
        } = batch.slot;
        assert!((window_first..window_first + u64::from(window_len)).contains(&index));
        let lane = slot as usize % order.lanes();
        assert_eq!(*lanes.entry((stream, window_first)).or_insert(lane), lane);
    }
    // A lane never has more than two windows open.
    let mut open: HashMap<usize, HashMap<(u32, u64), u32>> = HashMap::new();
    for batch in epochs(&order, 2) {
        let windows = open
            .entry(batch.slot.slot as usize % order.lanes())
            .or_default();
        let key = (batch.slot.stream, batch.slot.window_first);
        *windows.entry(key).or_insert(batch.slot.window_len) -= 1;
        windows.retain(|_, left| *left > 0);
        assert!(windows.len() <= 2, "{windows:?}");
    }
}

/// Rows of all blocks that the windows of a list of micro-batches read. A block is 32 rows of an
/// object of 512.
fn rows_read(order: &Arc<Order>, epochs_of: &[Batch]) -> u64 {
    let mut blocks = HashSet::new();
    for batch in epochs_of {
        let facts = &order.streams()[batch.slot.stream as usize];
        let window = (batch.slot.stream, batch.slot.window_first);
        blocks.extend(batch.places.iter().map(|place| {
            let (object, row) = (place.row / 512 * 512, place.row % 512);
            let first = object + row / 32 * 32;
            (window, first, u64::from(32.min(facts.rows as u32 - first)))
        }));
    }
    blocks.iter().map(|(_, _, rows)| rows).sum()
}

#[test]
fn every_block_is_read_once_an_epoch() {
    let order = windowed(&[60_000, 30_011, 9_000], 16, 8);
    let start = |epoch| order.epoch_start(epoch) as usize;
    let batches = epochs(&order, 3);
    for epoch in 0..3 {
        let of_epoch = &batches[start(epoch)..start(epoch + 1)];
        let delivered: usize = of_epoch.iter().map(|batch| batch.places.len()).sum();
        let counted = rows_read(&order, of_epoch) as f64 / delivered as f64;
        let expected = amplification(&order, epoch);
        assert!(
            (counted - expected).abs() < 1e-9,
            "counted {counted}, expected {expected}"
        );
        assert!((1.0..=1.01).contains(&counted), "epoch {epoch}: {counted}");
    }
    // Buckets that are small compared with a window per lane are read more often, and
    // `amplification` reports it.
    assert!(amplification(&windowed(&[40, 50, 60], 16, 8), 1) > 1.1);
}

/// A sample of a run of m rows meets (m - 1) (b - 1) / (S - 1) others of its run in a micro-batch
/// of b samples from a window of S, as in drawing without replacement.
#[test]
fn samples_of_a_run_meet_as_often_as_by_chance() {
    let order = windowed(&[61_440], 16, 8);
    let whole = epochs(&order, 4)
        .into_iter()
        .filter(|batch| batch.slot.window_len == 16);
    let (mut mates, mut samples) = (0, 0);
    for batch in whole {
        let run = |place: &RowRef| place.row / 128;
        let mates_of = |place: &RowRef| {
            batch
                .places
                .iter()
                .filter(|other| run(other) == run(place))
                .count()
                - 1
        };
        mates += batch.places.iter().map(mates_of).sum::<usize>();
        samples += batch.places.len();
    }
    let (found, expected) = (mates as f64 / samples as f64, 127.0 * 15.0 / 255.0);
    assert!(
        samples > 100_000 && (found / expected - 1.0).abs() < 0.02,
        "{found}, expected {expected}"
    );
}

/// In `owned` mode the same lane delivers a sample of a share in each pass, shares are equal, and
/// from the second epoch on a share is shuffled without regard to blocks.
#[test]
fn shares_stay_with_their_lanes_and_are_fully_shuffled() {
    let order = owned(&[9000, 700, 17, 3], 16, 8);
    let batches = epochs(&order, 4);
    let mut lanes = HashMap::new();
    let mut shared = 0;
    for batch in &batches {
        let facts = &order.streams()[batch.slot.stream as usize];
        let lane = batch.slot.slot % order.lanes() as u32;
        if let Some(owner) = facts.lane {
            shared += batch.places.len();
            assert_eq!(owner, lane);
            assert!(
                batch
                    .places
                    .iter()
                    .all(|place| *lanes.entry((facts.bucket, place.row)).or_insert(lane) == lane)
            );
        }
    }
    // 9000 = 8 * 1120 + 40 and 700 = 8 * 64 + 188, so all but 228 samples of these two buckets (248
    // with the small ones) are in shares.
    assert_eq!(
        (lanes.len(), shared),
        (9000 + 700 - 40 - 188, 4 * (9000 + 700 - 40 - 188))
    );
    let blocks = |epoch: u64| {
        let of_share = batches
            [order.epoch_start(epoch) as usize..order.epoch_start(epoch + 1) as usize]
            .iter();
        let of_share =
            of_share.filter(|batch| order.streams()[batch.slot.stream as usize].rows == 1120);
        let in_batch = of_share.map(|batch| {
            batch
                .places
                .iter()
                .map(|place| place.row / 32)
                .collect::<HashSet<_>>()
        });
        let counts: Vec<usize> = in_batch.map(|blocks| blocks.len()).collect();
        counts.iter().sum::<usize>() as f64 / counts.len() as f64
    };
    // 16 samples out of 35 blocks touch 35 (1 - (34/35)^16) = 13.0 blocks on average, out of a
    // window of at most 8 blocks at most 7.1.
    let expected = 35.0 * (1.0 - (34.0f64 / 35.0).powi(16));
    assert!(blocks(0) < 7.2, "{}", blocks(0));
    for epoch in 1..4 {
        assert!(
            (blocks(epoch) / expected - 1.0).abs() < 0.03,
            "epoch {epoch}: {}, {expected}",
            blocks(epoch)
        );
    }
    // After the first epoch only the remainders are fetched.
    assert!(
        (0.99..1.1).contains(&amplification(&order, 0)),
        "{}",
        amplification(&order, 0)
    );
    let later = amplification(&order, 1);
    assert!(
        (248.0 / 9720.0..2.0 * 248.0 / 9720.0).contains(&later),
        "{later}"
    );
}

#[test]
fn a_share_is_run_by_the_same_windows_whatever_else_there_is_to_do() {
    let order = owned(&[60_000], 16, 8);
    // Equal shares of 7,488 rows make equal parts of an epoch: every lane runs the same number of
    // its own micro-batches.
    let counts = |epoch: u64| {
        let mut counts = [0; 8];
        for batch in &epochs(&order, epoch + 1)[order.epoch_start(epoch) as usize..] {
            counts[batch.slot.slot as usize % 8] +=
                usize::from(order.streams()[batch.slot.stream as usize].lane.is_some());
        }
        counts
    };
    assert_eq!([counts(0), counts(1)], [[468; 8]; 2]);
}

#[test]
fn the_first_windows_are_small_and_grow() {
    let order = windowed(&[60_000, 30_000], 16, 8);
    let batches = epochs(&order, 1);
    let window = |batch: &Batch| batch.slot.window_len;
    assert!(
        batches[..8].iter().all(|batch| window(batch) == 2),
        "32 samples are one block"
    );
    assert!(
        batches[2000..]
            .iter()
            .filter(|batch| window(batch) == 16)
            .count()
            > 2500
    );
    let rows: HashSet<_> = batches[..16]
        .iter()
        .flat_map(|batch| &batch.places)
        .map(|place| place.row / 32)
        .collect();
    assert!(
        rows.len() <= 16,
        "the first two steps need {} blocks",
        rows.len()
    );
}

#[test]
fn modes_are_known_by_their_names() {
    let parse = |name: &str| serde_json::from_str::<Mode>(&format!("\"{name}\""));
    for mode in [Mode::Local, Mode::Window, Mode::Owned, Mode::Auto] {
        assert_eq!(parse(&mode.to_string()).unwrap(), mode);
    }
    assert!(
        parse("loca")
            .unwrap_err()
            .to_string()
            .contains("expected mode \"auto\"")
    );
    let auto = OrderSettings {
        mode: Mode::Auto,
        ..settings(8, 4)
    };
    let error = Order::new(&[shape(&[9], Amount::Repeats(1.0))], auto).unwrap_err();
    assert!(error.to_string().starts_with("mode: "), "{error}");
}

/// A change here changes the order of every earlier run. If it is unavoidable, raise the version in
/// `order::hash`.
#[test]
fn first_slots_are_frozen() {
    let cases = [
        (single(&[5, 40, 100], 4, 4), FROZEN),
        (windowed(&[5, 40, 1000], 4, 4), FROZEN_WINDOWS),
        (owned(&[5, 40, 1000], 4, 4), FROZEN_SHARES),
    ];
    assert_eq!(cases[0].0.hash(), FROZEN_HASH);
    for (order, expected) in cases {
        let mut walk = Walk::new(&order);
        let found: Vec<(u32, u64, Vec<u32>)> = (0..2)
            .flat_map(|step| walk.whole_step(step))
            .map(|batch| {
                (
                    batch.slot.stream,
                    batch.slot.index,
                    batch.places.iter().map(|place| place.row).collect(),
                )
            })
            .collect();
        assert_eq!(
            found,
            expected.map(|(stream, index, rows)| (stream, index, rows.to_vec()))
        );
    }
}
const FROZEN: [(u32, u64, &[u32]); 8] = [
    (1, 0, &[24, 27, 4, 18]),
    (1, 7, &[10, 6, 21, 31]),
    (2, 14, &[7, 55, 12, 96]),
    (2, 2, &[27, 99, 72, 44]),
    (2, 10, &[88, 2, 68, 24]),
    (2, 3, &[4, 41, 86, 66]),
    (2, 11, &[22, 65, 48, 36]),
    (1, 5, &[16, 25, 30, 19]),
];
/// The first windows are one block long; the buckets are in runs of 128 rows.
const FROZEN_WINDOWS: [(u32, u64, &[u32]); 8] = [
    (1, 0, &[7, 21, 10, 6]),
    (2, 64, &[285, 269, 281, 286]),
    (2, 120, &[626, 621, 625, 636]),
    (2, 192, &[8, 15, 29, 2]),
    (1, 1, &[14, 4, 16, 24]),
    (0, 0, &[0, 2, 1, 3]),
    (2, 24, &[236, 781, 777, 822]),
    (2, 193, &[1, 13, 18, 25]),
];
/// Shares of 224 rows of the last bucket, and its remainder.
const FROZEN_SHARES: [(u32, u64, &[u32]); 8] = [
    (2, 0, &[775, 799, 794, 783]),
    (3, 0, &[394, 414, 385, 401]),
    (4, 0, &[648, 645, 657, 665]),
    (6, 17, &[965, 979, 983, 974]),
    (2, 1, &[777, 770, 778, 795]),
    (6, 0, &[899, 908, 905, 918]),
    (6, 16, &[961, 962, 960, 963]),
    (6, 18, &[975, 978, 977, 987]),
];
const FROZEN_HASH: &str = "f2f1b22411a410591369c58ef04f45d97f88ebce62f61e3e38766a2a21a1b8d6";

type Make = fn(&[u64], usize, usize) -> Arc<Order>;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn counts_hold_for_any_mixture(
        sizes in prop::collection::vec(
            prop_oneof![1u64..40, Just(15), Just(16), Just(17), 100u64..1000],
            1..6,
        ),
        micro_batch in 1usize..33,
        micro_batches in 1usize..17,
        window_samples in 1u64..300,
        seed: u64,
    ) {
        for mode in [Mode::Local, Mode::Window, Mode::Owned] {
            let settings = OrderSettings {
                seed,
                window_samples,
                mode,
                ..settings(micro_batch, micro_batches)
            };
            check_counts(&order(&[shape(&sizes, Amount::Repeats(1.0))], settings), 3);
        }
    }

    #[test]
    fn counts_hold_for_any_repeats(
        first in 1u64..200,
        second in 1u64..200,
        repeats in 0.05f64..4.0,
        micro_batch in 1usize..20,
    ) {
        let data = [
            shape(&[first], Amount::Repeats(1.0)),
            shape(&[second, 5], Amount::Repeats(repeats)),
        ];
        check_counts(&order(&data, settings(micro_batch, 4)), 5);
        check_counts(&order(&data, window_mode(micro_batch, 4)), 5);
        let owned_mode = OrderSettings {
            mode: Mode::Owned,
            ..window_mode(micro_batch, 4)
        };
        check_counts(&order(&data, owned_mode), 5);
    }

    #[test]
    fn any_ranks_share_any_step(
        sizes in prop::collection::vec(1u64..300, 1..5),
        micro_batches in 1usize..13,
        ranks in 1usize..13,
        step in 0u64..500,
        make in prop_oneof![Just(single as Make), Just(windowed as Make), Just(owned as Make)],
    ) {
        let order = make(&sizes, 16, micro_batches);
        if ranks > order.lanes() {
            let refused = order.slots_of(RankOf { rank: 0, ranks }).is_err();
            prop_assert!(refused);
            return Ok(());
        }
        let mut slots: Vec<u32> =
            (0..ranks).flat_map(|rank| order.slots_of(RankOf { rank, ranks }).unwrap()).collect();
        slots.sort_unstable();
        prop_assert_eq!(slots, (0..micro_batches as u32).collect::<Vec<_>>());
        prop_assert_eq!(Walk::new(&order).whole_step(step), Walk::new(&order).whole_step(step));
    }
}
