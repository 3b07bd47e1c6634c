//! Photographs and wallpapers from packages: each as a whole and as tiles that do not overlap.

use std::path::{Path, PathBuf};

use crate::{canvas::Canvas, copies::resized, scenes::Scene};

/// A tile with less contrast (standard deviation of its green, in levels) is left out: a piece of
/// sky shows nothing that makes it a picture of its own.
const MIN_CONTRAST: f32 = 12.0;

/// The scenes of every second photograph under `folder`: those with an odd or an even number.
pub(crate) fn scenes(folder: &Path, odd: bool) -> Vec<Scene> {
    let mut files = Vec::new();
    collect(folder, &mut files);
    files.sort();
    let mut scenes = Vec::new();
    for (number, path) in files.iter().enumerate() {
        if number % 2 == usize::from(odd) {
            add(path, number as u64, &mut scenes);
        }
    }
    scenes
}

/// The largest picture of each folder of a wallpaper, and each file of the other folders.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    let mut largest: Option<(u64, PathBuf)> = None;
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            collect(&path, files);
            continue;
        }
        let name = path.to_string_lossy().to_lowercase();
        let bytes = path.metadata().unwrap().len();
        // One wallpaper is there in three sizes.
        if name.contains("_3840x2160") || name.contains("_5640x3172") {
            continue;
        }
        if !(name.ends_with(".jpg") || name.ends_with(".png")) || bytes < 20_000 {
            continue;
        }
        if !name.contains("/contents/") {
            files.push(path);
        } else if name.contains("images/") && largest.as_ref().is_none_or(|l| l.0 < bytes) {
            largest = Some((bytes, path));
        }
    }
    files.extend(largest.map(|(_, path)| path));
}

fn add(path: &Path, number: u64, scenes: &mut Vec<Scene>) {
    let Ok(image) = image::open(path) else { return };
    let image = image.into_rgb8();
    let (width, height) = (image.width() as usize, image.height() as usize);
    let whole = Canvas {
        width,
        height,
        pixels: image.into_raw(),
    };
    let mut push = |canvas: &Canvas, tile: u64| {
        let share = 640.0 / canvas.width.max(canvas.height) as f32;
        let canvas = resized(canvas, share.min(1.0));
        // Transparent pictures become white ones here.
        let plain = (contrast(&canvas) < 2.0).then(|| [canvas.get(0, 0); 4]);
        scenes.push(Scene {
            canvas,
            kind: "photo",
            group: 1 << 32 | number << 8 | tile,
            plain,
        });
    };
    push(&whole, 0);
    let count = if width >= 1500 {
        4
    } else if width >= 900 {
        2
    } else {
        return;
    };
    let (w, h) = (width / count, height / count);
    for tile in 0..count * count {
        // Some wallpapers are symmetric: tiles that a mirror exchanges are one label.
        let (row, column) = (tile / count, tile % count);
        let label = row * count + column.min(count - 1 - column);
        let part = whole.crop(tile % count * w, tile / count * h, w, h);
        if contrast(&part) >= MIN_CONTRAST {
            push(&part, 1 + label as u64);
        }
    }
}

fn contrast(canvas: &Canvas) -> f32 {
    let greens: Vec<f32> = canvas
        .pixels
        .chunks_exact(3 * 7)
        .map(|p| f32::from(p[1]))
        .collect();
    let mean = greens.iter().sum::<f32>() / greens.len() as f32;
    let variance = greens.iter().map(|g| (g - mean).powi(2)).sum::<f32>() / greens.len() as f32;
    variance.sqrt()
}
