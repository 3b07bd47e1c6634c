//! The loader on small packed data sets: it delivers what was packed, in every access pattern.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod packed;

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::PathBuf,
    slice::from_ref,
    sync::Arc,
};

use half::f16;
use packed::{BUCKETS, SEED, latents, pack, record, source};
use rectiflow_data::{
    Dataset, Error,
    batch::{MicroBatch, Source, Step},
    loader::Loader,
    order::{Amount, Mode, OrderSettings, RankOf},
    prompt::{self, PromptSettings},
    rng::{Purpose, Rng},
    test_batches::test_batches,
    token::{BOS, CHUNK_LEN, EOS, Tokenizer},
};

fn packed() -> (tempfile::TempDir, Source) {
    let root = tempfile::tempdir().unwrap();
    pack(root.path(), &BUCKETS, 0, "a");
    let source = source(root.path());
    (root, source)
}

fn settings() -> OrderSettings {
    OrderSettings {
        seed: SEED,
        micro_batch: 4,
        micro_batches: 8,
        lanes: None,
        mode: Mode::Local,
        window_samples: 32,
    }
}

fn loader(source: &Source, rank: RankOf) -> Loader {
    Loader::new(vec![source.clone()], settings(), rank).unwrap()
}

fn take(loader: &mut Loader, num_steps: usize) -> Vec<Step> {
    (0..num_steps)
        .map(|_| loader.next_step().unwrap())
        .collect()
}

/// Everything in a micro-batch follows from its ids and passes.
fn check_contents(batch: &MicroBatch, settings: &PromptSettings, tokenizer: &Tokenizer) {
    let len = batch.latent_shape.iter().product::<usize>();
    let expected: Vec<f16> = batch.ids.iter().flat_map(|id| latents(id.0, len)).collect();
    assert_eq!(batch.latents, expected);
    assert_eq!(
        batch.latent_shape,
        [4, batch.height_px as usize / 8, batch.width_px as usize / 8]
    );
    assert_eq!(batch.tokens as u32, *batch.chunks.iter().max().unwrap());
    for (at, id) in batch.ids.iter().enumerate() {
        let record = record(id.0, (batch.width_px, batch.height_px));
        let mut rng = Rng::keyed(SEED, Purpose::Prompt, &[id.0, batch.passes[at]]);
        assert_eq!(batch.prompts[at], prompt::draw(&record, settings, &mut rng));
        let (id, target) = (id.0 as f32, [batch.height_px as f32, batch.width_px as f32]);
        let sizes = [2000.0 + id, 1000.0 + id, 3.0 * id, id, target[0], target[1]];
        assert_eq!(batch.time_ids[at * 6..][..6], sizes);
        let chunks = tokenizer.chunks(&batch.prompts[at]);
        assert_eq!(batch.chunks[at] as usize, chunks.clip_l.len());
        let of_sample = at * batch.tokens * CHUNK_LEN..(at + 1) * batch.tokens * CHUNK_LEN;
        for (ids, chunks, padding) in [
            (&batch.clip_l, &chunks.clip_l, EOS),
            (&batch.clip_g, &chunks.clip_g, 0),
        ] {
            let ids = &ids[of_sample.clone()];
            let own = chunks.len() * CHUNK_LEN;
            assert_eq!(ids[..own], chunks.concat());
            for empty in ids[own..].chunks(CHUNK_LEN) {
                assert!(empty[..2] == [BOS, EOS] && empty[2..].iter().all(|&id| id == padding));
            }
        }
    }
}

#[test]
fn steps_hold_what_was_packed() {
    let (_root, source) = packed();
    let tokenizer = Tokenizer::shared();
    let mut loader = loader(&source, RankOf::ONLY);
    let mut lengths = HashSet::new();
    for (number, step) in (0..).zip(take(&mut loader, 12)) {
        assert_eq!((step.step, step.micro_batches.len()), (number, 8));
        let mut first_sample = 0;
        for (slot, batch) in (0..).zip(&step.micro_batches) {
            assert_eq!(
                (batch.slot, batch.first_sample, batch.data),
                (slot, first_sample, 0)
            );
            assert!(
                batch.weights.iter().all(|&weight| weight == 1.0)
                    && batch.weights.len() == batch.ids.len()
            );
            first_sample += batch.ids.len() as u64;
            check_contents(batch, &source.prompt, tokenizer);
            lengths.insert(batch.tokens);
        }
        assert_eq!(step.num_samples, first_sample);
    }
    assert_eq!(loader.position(), 12);
    assert_eq!(lengths, HashSet::from([1, 2, 3]));
}

#[test]
fn every_sample_comes_once_an_epoch() {
    let (_root, source) = packed();
    let mut loader = loader(&source, RankOf::ONLY);
    // The buckets have 75, 7 and 1 samples: 18, 1 and 1 micro-batches in the first epoch; after 8
    // epochs 150, 14 and 8.
    let epochs = 8;
    let num_batches = loader.order().epoch_start(epochs) as usize;
    assert_eq!(num_batches, 150 + 14 + 8);
    let steps = take(&mut loader, num_batches.div_ceil(8));
    let batches = steps
        .iter()
        .flat_map(|step| &step.micro_batches)
        .take(num_batches);
    let mut seen = HashMap::new();
    let mut passes = HashSet::new();
    for batch in batches {
        for (id, pass) in batch.ids.iter().zip(&batch.passes) {
            *seen.entry(*id).or_insert(0) += 1;
            assert!(passes.insert((*id, *pass)), "{id} twice in pass {pass}");
        }
    }
    assert_eq!(seen.len(), 83);
    assert!(
        seen.values().all(|times: &u64| times.abs_diff(epochs) <= 1),
        "{seen:?}"
    );
}

#[test]
fn ranks_together_get_the_steps_of_one() {
    let (_root, source) = packed();
    let whole = take(&mut loader(&source, RankOf::ONLY), 6);
    for ranks in [2, 3, 4, 8] {
        let parts: Vec<Vec<Step>> = (0..ranks)
            .map(|rank| take(&mut loader(&source, RankOf { rank, ranks }), 6))
            .collect();
        for (at, step) in whole.iter().enumerate() {
            let mut together: Vec<_> = parts
                .iter()
                .flat_map(|part| part[at].micro_batches.clone())
                .collect();
            together.sort_by_key(|batch| batch.slot);
            assert_eq!(together, step.micro_batches);
            assert!(
                parts
                    .iter()
                    .all(|part| part[at].num_samples == step.num_samples)
            );
        }
    }
    let error = Loader::new(vec![source], settings(), RankOf { rank: 0, ranks: 9 }).unwrap_err();
    assert!(
        error.to_string().contains("9 ranks cannot share 8 lanes"),
        "{error}"
    );
}

#[test]
fn seeking_equals_continuing() {
    let (_root, source) = packed();
    let straight = take(&mut loader(&source, RankOf::ONLY), 30);
    let mut seeker = loader(&source, RankOf::ONLY);
    for step in [0, 29, 3, 4, 17] {
        seeker.seek(step);
        assert_eq!(seeker.position(), step);
        assert_eq!(seeker.next_step().unwrap(), straight[step as usize]);
    }
    assert_eq!(seeker.next_step().unwrap(), straight[18]);
}

#[test]
fn shares_count_mixed_micro_batches_and_padding() {
    let (_root, source) = packed();
    let mut loader = loader(&source, RankOf::ONLY);
    let shares = loader.chunk_shares(12).unwrap();
    assert_eq!(loader.position(), 0);
    let steps = take(&mut loader, 12);
    let batches: Vec<_> = steps.iter().flat_map(|step| &step.micro_batches).collect();
    let longest = |batch: &MicroBatch| batch.tokens as u64 * batch.ids.len() as u64;
    let own = |batch: &MicroBatch| {
        batch
            .chunks
            .iter()
            .map(|&chunks| u64::from(chunks))
            .sum::<u64>()
    };
    assert_eq!(shares.micro_batches, 96);
    assert_eq!(
        shares.mixed,
        batches
            .iter()
            .filter(|batch| longest(batch) != own(batch))
            .count() as u64
    );
    assert_eq!(
        shares.chunks,
        batches.iter().map(|batch| longest(batch)).sum::<u64>()
    );
    assert_eq!(
        shares.padding,
        shares.chunks - batches.iter().map(|batch| own(batch)).sum::<u64>()
    );
    assert!(
        shares.mixed_share() > 0.0 && shares.mixed_share() < 0.5 && shares.padded_share() < 0.3,
        "{shares:?}"
    );
}

#[test]
fn a_dropped_loader_leaves_no_thread() {
    let (_root, source) = packed();
    let mut loader = loader(&source, RankOf::ONLY);
    loader.next_step().unwrap();
    loader.seek(40);
    loader.next_step().unwrap();
    drop(loader);
    // A living thread would still hold the data set.
    assert_eq!(Arc::strong_count(&source.dataset), 1);
}

#[test]
fn an_error_arrives_at_its_step_and_the_step_can_be_asked_for_again() {
    let (root, source) = packed();
    let clean = take(&mut loader(&source, RankOf::ONLY), 10);
    let path: PathBuf = root.path().join("latents/16x16-2-0.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut damaged = bytes.clone();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(&path, damaged).unwrap();
    // The image is the only one of its bucket: the step that holds it fails, earlier steps do not.
    let dataset = Arc::new(Dataset::open(root.path()).unwrap());
    let mut loader = loader(&Source { dataset, ..source }, RankOf::ONLY);
    let has_it = |step: &Step| step.micro_batches.iter().any(|batch| batch.bucket == 2);
    let fails_at = clean.iter().position(has_it).unwrap();
    assert_eq!(take(&mut loader, fails_at), clean[..fails_at]);
    for _ in 0..2 {
        let error = loader.next_step().unwrap_err();
        assert!(
            matches!(&error, Error::Damaged { path: found, .. } if *found == path),
            "{error}"
        );
        assert_eq!(loader.position(), fails_at as u64);
    }
    fs::write(&path, bytes).unwrap();
    assert_eq!(take(&mut loader, 10 - fails_at), clean[fails_at..]);
}

#[test]
fn several_data_sets_keep_their_own_amounts_and_prompts() {
    let roots = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    pack(roots[0].path(), &[(24, 16, 30, 0)], 0, "a");
    pack(
        roots[1].path(),
        &[(24, 16, 20, 0), (16, 24, 10, 0)],
        1000,
        "a",
    );
    let rates = |captions, dropped| PromptSettings {
        captions,
        dropped,
        ..Default::default()
    };
    let sources = vec![
        Source {
            prompt: rates(1.0, 0.0),
            amount: Amount::Repeats(0.5),
            ..source(roots[0].path())
        },
        Source {
            prompt: rates(0.0, 1.0),
            amount: Amount::Repeats(2.0),
            ..source(roots[1].path())
        },
    ];
    let mut loader = Loader::new(sources.clone(), settings(), RankOf::ONLY).unwrap();
    let tokenizer = Tokenizer::shared();
    let num_batches = loader.order().epoch_start(6) as usize;
    let mut samples = [0; 2];
    for batch in take(&mut loader, num_batches.div_ceil(8))
        .iter()
        .flat_map(|s| &s.micro_batches)
        .take(num_batches)
    {
        samples[batch.data as usize] += batch.ids.len();
        assert_eq!(batch.ids[0].0 >= 1000, batch.data == 1);
        check_contents(batch, &sources[batch.data as usize].prompt, tokenizer);
        let full = batch
            .prompts
            .iter()
            .filter(|prompt| prompt.contains("photograph"))
            .count();
        assert_eq!(full, if batch.data == 0 { batch.ids.len() } else { 0 });
    }
    // Six epochs of 15 and of 60 samples, minus at most the samples of incomplete micro-batches.
    assert!(
        samples[0] > 86 && samples[0] <= 90 && samples[1] > 352 && samples[1] <= 360,
        "{samples:?}"
    );
    let base = loader.order_hash();
    let mut changed = sources.clone();
    changed[1].prompt.captions = 0.1;
    assert_ne!(
        Loader::new(changed, settings(), RankOf::ONLY)
            .unwrap()
            .order_hash(),
        base
    );
    assert_eq!(
        Loader::new(sources, settings(), RankOf { rank: 1, ranks: 3 })
            .unwrap()
            .order_hash(),
        base
    );
}

#[test]
fn data_sets_of_different_vaes_are_refused() {
    let roots = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    pack(roots[0].path(), &[(24, 16, 3, 0)], 0, "a");
    pack(roots[1].path(), &[(24, 16, 3, 0)], 9, "b");
    let error = Loader::new(
        roots.iter().map(|root| source(root.path())).collect(),
        settings(),
        RankOf::ONLY,
    );
    assert!(
        error
            .unwrap_err()
            .to_string()
            .starts_with("data[1]: encoded by")
    );
}

#[test]
fn three_images_in_three_buckets_train_and_test_at_any_number_of_ranks() {
    let root = tempfile::tempdir().unwrap();
    pack(
        root.path(),
        &[(24, 16, 1, 0), (16, 24, 1, 1), (16, 16, 1, 0)],
        0,
        "a",
    );
    let source = source(root.path());
    let whole = take(&mut loader(&source, RankOf::ONLY), 3);
    assert!(whole.iter().all(|step| step.num_samples == 8));
    for rank in 0..8 {
        let part = take(&mut loader(&source, RankOf { rank, ranks: 8 }), 3);
        assert!(
            part.iter()
                .zip(&whole)
                .all(|(part, whole)| part.micro_batches[0] == whole.micro_batches[rank])
        );
        assert_eq!(
            test_batches(from_ref(&source), 4, SEED, RankOf { rank, ranks: 8 })
                .unwrap()
                .count(),
            1
        );
    }
}

#[test]
fn test_pass_weighs_every_sample_once_on_any_number_of_ranks() {
    let (_root, source) = packed();
    let tokenizer = Tokenizer::shared();
    let whole: Vec<MicroBatch> = test_batches(from_ref(&source), 4, SEED, RankOf::ONLY)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let no_drops = PromptSettings {
        dropped: 0.0,
        ..source.prompt.clone()
    };
    let mut first_sample = 0;
    for (slot, batch) in (0..).zip(&whole) {
        assert_eq!((batch.slot, batch.first_sample), (slot, first_sample));
        assert!(batch.ids.len() <= 4 && batch.passes.iter().all(|&pass| pass == 0));
        assert!(
            batch
                .chunks
                .iter()
                .all(|&chunks| chunks as usize == batch.tokens),
            "one chunk count"
        );
        assert!(batch.prompts.iter().all(|prompt| !prompt.is_empty()));
        check_contents(batch, &no_drops, tokenizer);
        first_sample += batch.ids.len() as u64;
    }
    assert_eq!(first_sample, 12);
    for ranks in [1, 2, 3, 4, 8, 40] {
        let mut counted: Vec<MicroBatch> = Vec::new();
        for rank in 0..ranks {
            let pass = test_batches(from_ref(&source), 4, SEED, RankOf { rank, ranks }).unwrap();
            assert_eq!(
                (pass.num_samples(), pass.len()),
                (12, whole.len().div_ceil(ranks))
            );
            let batches: Vec<MicroBatch> = pass.map(Result::unwrap).collect();
            assert_eq!(batches.len(), whole.len().div_ceil(ranks));
            assert!(batches.iter().all(|batch| !batch.ids.is_empty()));
            counted.extend(
                batches
                    .into_iter()
                    .filter(|batch| batch.weights.iter().all(|&weight| weight == 1.0)),
            );
        }
        counted.sort_by_key(|batch| batch.slot);
        assert_eq!(counted, whole, "{ranks} ranks");
    }
}

/// A split that has broken evaluations in other programs: 2,048 samples that fill no batch in any
/// bucket.
#[test]
fn a_test_split_of_2048_samples_over_300_buckets_is_counted_once() {
    let root = tempfile::tempdir().unwrap();
    let rows = |at: u32| if at < 248 { 7 } else { 6 };
    let buckets: Vec<_> = (0..300)
        .map(|at| (8 + at % 20 * 8, 8 + at / 20 * 8, 0, rows(at)))
        .collect();
    pack(root.path(), &buckets, 0, "a");
    let source = [source(root.path())];
    for ranks in [1, 3] {
        let (mut seen, mut calls) = (HashSet::new(), HashSet::new());
        for rank in 0..ranks {
            let pass = test_batches(&source, 16, SEED, RankOf { rank, ranks }).unwrap();
            assert_eq!(pass.num_samples(), 2048);
            let batches: Vec<MicroBatch> = pass.map(Result::unwrap).collect();
            calls.insert(batches.len());
            let samples = batches
                .iter()
                .flat_map(|batch| batch.ids.iter().zip(&batch.weights));
            let counted = samples.filter(|(_, weight)| **weight > 0.0);
            assert!(
                counted
                    .into_iter()
                    .all(|(id, weight)| *weight == 1.0 && seen.insert(*id)),
                "{ranks} ranks"
            );
        }
        assert_eq!((seen.len(), calls.len()), (2048, 1), "{ranks} ranks");
    }
}

#[test]
fn a_data_set_without_a_test_split_makes_no_calls() {
    let root = tempfile::tempdir().unwrap();
    pack(root.path(), &[(24, 16, 3, 0)], 0, "a");
    let source = [source(root.path())];
    assert_eq!(
        test_batches(&source, 4, SEED, RankOf { rank: 1, ranks: 2 })
            .unwrap()
            .count(),
        0
    );
    assert!(test_batches(&source, 0, SEED, RankOf::ONLY).is_err());
}
