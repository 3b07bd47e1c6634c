//! How many near-copies are found, and how many found pairs are wrong: the numbers of
//! `docs/near-copies.md`.
//!
//! ```text
//! cargo run --release --example near_copies -- --seed 2 [--scenes 2400] [--photos FOLDER]
//! ```
//!
//! Draws scenes of 16 kinds from a seed, adds the photographs of a folder, and plants a copy of
//! each. For every kind of copy the data set is the scenes and their copies of that kind. A found
//! pair is wrong if it is neither planted nor labelled as natural twins when the scenes were drawn.
//!
//! With `--keys 1000000` it times the comparison of as many keys, of random windows of the scenes;
//! with `--pictures 200000` the whole search among as many such windows, each with all its keys.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a measurement, not a library"
)]

mod canvas;
mod copies;
mod photos;
mod scenes;

use std::{collections::BTreeMap, path::PathBuf, time::Instant};

use canvas::{Canvas, Dice};
use clap::Parser;
use copies::COPIES;
use rayon::prelude::*;
use rectiflow_data::dedupe::{
    MAX_DISTANCE,
    clusters::{View, candidates, confirmed},
    key::Keys,
    pairs::{Hash, near_pairs},
    signature::Signature,
    thumbnail::{Limits, Thumbnail},
};
use scenes::Scene;

/// Stream of random numbers of the copies.
const COPY_STREAM: u64 = 0x00c0_b1e5;

/// Measures the search for near-copies on drawn scenes and photographs.
#[derive(Debug, Parser)]
struct Args {
    /// Seed of the scenes and of their copies; photographs with an odd number belong to odd seeds.
    #[arg(long, default_value_t = 2)]
    seed: u64,
    /// Number of drawn scenes.
    #[arg(long, default_value_t = 2400)]
    scenes: u64,
    /// A folder with photographs.
    #[arg(long)]
    photos: Option<PathBuf>,
    /// Times the comparison of this many keys instead.
    #[arg(long)]
    keys: Option<u64>,
    /// Times the search among this many pictures instead.
    #[arg(long)]
    pictures: Option<u64>,
}

/// What was found of one kind of copy.
struct Row {
    kind: &'static str,
    /// Whether the copy of each scene is paired with it.
    is_found: Vec<bool>,
    /// Found pairs that are neither planted nor labelled.
    wrong: usize,
    secs: f64,
}

fn main() {
    let args = Args::parse();
    let mut all: Vec<Scene> = (0..args.scenes)
        .into_par_iter()
        .map(|number| scenes::scene(args.seed, number))
        .collect();
    if let Some(folder) = &args.photos {
        all.extend(photos::scenes(folder, args.seed % 2 == 1));
    }
    if let Some(num_keys) = args.keys {
        return time_keys(&all, num_keys, args.seed);
    }
    if let Some(num_pictures) = args.pictures {
        return time_pictures(&all, num_pictures, args.seed);
    }
    let whole: Vec<Vec<Signature>> = all
        .par_iter()
        .map(|scene| views_of(&scene.canvas))
        .collect();
    println!(
        "{} scenes, seed {}, distance {MAX_DISTANCE}",
        all.len(),
        args.seed
    );
    println!("| copy | recall | wrong pairs | precision | seconds |\n|---|---|---|---|---|");
    let mut by_scene = BTreeMap::new();
    for (number, kind) in COPIES.into_iter().enumerate() {
        let row = measure(&args, &all, &whole, number, kind);
        let hits = row.is_found.iter().filter(|&&found| found).count();
        println!(
            "| {} | {:.4} | {} | {:.5} | {:.1} |",
            row.kind,
            hits as f64 / all.len() as f64,
            row.wrong,
            hits as f64 / (hits + row.wrong) as f64,
            row.secs
        );
        for (scene, &found) in all.iter().zip(&row.is_found) {
            let (num, hits) = by_scene.entry(scene.kind).or_insert((0u32, 0u32));
            *num += 1;
            *hits += u32::from(found);
        }
    }
    println!("\n| scenes | recall over all copies |\n|---|---|");
    for (kind, (num, hits)) in by_scene {
        println!("| {kind} | {:.4} |", f64::from(hits) / f64::from(num));
    }
}

/// The signature of a random window of a scene.
fn window(all: &[Scene], number: u64, seed: u64) -> Signature {
    let mut dice = Dice::new(seed, number);
    let canvas = &all[(number % all.len() as u64) as usize].canvas;
    let mut side = |length: usize| {
        let share = dice.real(0.2, 0.6);
        let window = ((length as f32 * share) as usize).max(16).min(length);
        let start = dice.real(0.0, (length - window) as f32) as usize;
        (start, window)
    };
    let ((x, width), (y, height)) = (side(canvas.width), side(canvas.height));
    let window = canvas.crop(x, y, width, height);
    Signature::of(&window.pixels, width, height).0
}

/// Times the search for near pairs among the keys of random windows of the scenes.
fn time_keys(all: &[Scene], num_keys: u64, seed: u64) {
    let key = |number: u64| Keys::new(&window(all, number, seed)).whole();
    let mut keys: Vec<Hash> = (0..num_keys).into_par_iter().map(key).collect();
    keys.par_sort_unstable();
    keys.dedup();
    let start = Instant::now();
    let pairs = near_pairs(&keys, MAX_DISTANCE);
    let secs = start.elapsed().as_secs_f64();
    println!(
        "{num_keys} keys, {} of them distinct: {} pairs within distance {MAX_DISTANCE} in {secs:.1} s",
        keys.len(),
        pairs.len()
    );
}

/// Times the search for near-copies among random windows of the scenes.
fn time_pictures(all: &[Scene], num_pictures: u64, seed: u64) {
    let numbers = (0..num_pictures).into_par_iter();
    let signatures: Vec<Signature> = numbers.map(|number| window(all, number, seed)).collect();
    let start = Instant::now();
    let view = |(picture, signature): (usize, &Signature)| View {
        picture: picture as u32,
        keys: Keys::new(signature),
    };
    let views: Vec<View> = signatures.par_iter().enumerate().map(view).collect();
    let keyed = start.elapsed().as_secs_f64();
    let limits = Limits::default();
    let thumbnail = |view: u32| Thumbnail::new(&signatures[view as usize]);
    let near = candidates(&views, MAX_DISTANCE, &thumbnail, &limits);
    let compared = start.elapsed().as_secs_f64();
    let pairs = confirmed(&views, &near, &thumbnail, &limits);
    let secs = start.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find(|line| line.starts_with("VmHWM"));
    println!(
        "{num_pictures} pictures of {} bytes: keys {keyed:.1} s, {} candidates after {compared:.1} \
         s, {} pairs after {secs:.1} s; {}",
        Signature::BYTES,
        near.len(),
        pairs.len(),
        peak.unwrap_or("")
    );
}

/// The signatures of a picture: of the whole, and of the part inside its borders.
fn views_of(canvas: &Canvas) -> Vec<Signature> {
    let (whole, inside) = Signature::of(&canvas.pixels, canvas.width, canvas.height);
    [whole].into_iter().chain(inside).collect()
}

/// Plants a copy of one kind of every scene and looks for it. Picture `2 i` is scene i, `2 i + 1`
/// its copy.
fn measure(
    args: &Args,
    all: &[Scene],
    whole: &[Vec<Signature>],
    number: usize,
    kind: &'static str,
) -> Row {
    let planted: Vec<Vec<Signature>> = (0..all.len())
        .into_par_iter()
        .map(|index| {
            let stream = (index * 16 + number) as u64;
            let mut dice = Dice::new(args.seed ^ COPY_STREAM, stream);
            views_of(&copies::copy(&all[index].canvas, kind, &mut dice))
        })
        .collect();

    // The search, as `rectiflow dedupe` does it.
    let start = Instant::now();
    let mut views = Vec::new();
    let mut signatures = Vec::new();
    for (index, (scene, copy)) in (0..).zip(whole.iter().zip(&planted)) {
        for (picture, own) in [(2 * index, scene), (2 * index + 1, copy)] {
            for signature in own {
                let keys = Keys::new(signature);
                views.push(View { picture, keys });
                signatures.push(signature.clone());
            }
        }
    }
    let limits = Limits::default();
    let thumbnail = |view: u32| Thumbnail::new(&signatures[view as usize]);
    let near = candidates(&views, MAX_DISTANCE, &thumbnail, &limits);
    let pairs = confirmed(&views, &near, &thumbnail, &limits);
    let secs = start.elapsed().as_secs_f64();

    // Plain pictures are a crowd, in which a scene and its copy are found by the leader of both.
    let mut leaders = vec![Vec::new(); 2 * all.len()];
    let mut is_found = vec![false; all.len()];
    let mut wrong = 0;
    for &(a, b) in &pairs {
        leaders[a as usize].push(b);
        leaders[b as usize].push(a);
        let (i, j) = (a as usize / 2, b as usize / 2);
        if i == j {
            is_found[i] = true;
        } else if !scenes::labelled(&all[i], &all[j]) {
            wrong += 1;
        }
    }
    for (index, scene) in all.iter().enumerate() {
        let (own, copy) = (&leaders[2 * index], &leaders[2 * index + 1]);
        let shares = own.iter().any(|leader| copy.contains(leader));
        is_found[index] |= scene.plain.is_some() && shares;
    }
    Row {
        kind,
        is_found,
        wrong,
        secs,
    }
}
