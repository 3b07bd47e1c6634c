//! Composes the demo's captioned pictures from `assets/emoji/emoji.tar`.
//!
//! ```text
//! emoji_pictures ARCHIVE OUT [--backgrounds N] [--holdout-subjects N]
//! ```
//!
//! Every subject is put on N plain backgrounds (default 2 of 8) that its captions name, with a margin in proportion to
//! its trimmed size, so that the pictures keep the subjects' many aspect ratios. Black and white are the most frequent
//! backgrounds, because brightness is what the demo compares. The result is what a user's own folder would be:
//! `OUT/train/` with PNGs and one `metadata.jsonl`. `--holdout-subjects` writes that many subjects to `OUT/heldout/`
//! instead: a split by image, as preparation makes it, would leave every subject in training on another background.
//!
//! The same arguments give the same bytes: all choices hang on a hash of the subject's name. `OUT` is written under
//! another name and renamed at the end, and left alone where it already holds this result.
#![allow(clippy::print_stderr, reason = "a program, not a library")]

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering},
};

use image::{ImageEncoder, Rgb, RgbImage, RgbaImage, codecs::png};
use rayon::prelude::*;
use rectiflow_data::{Error, Result};

/// Picture size over subject size, on both axes: a crop to the nearest bucket then seldom cuts into the subject.
const MARGIN: f64 = 1.3;

/// The archive's members by name.
type Files = HashMap<String, Vec<u8>>;

const TAR_BLOCK_BYTES: usize = 512;

/// A plain colour as captions name it; `weight` is relative to the others'.
struct Background {
    name: &'static str,
    colour: Rgb<u8>,
    weight: f64,
}

const BACKGROUNDS: [Background; 8] = [
    Background { name: "black", colour: Rgb([0, 0, 0]), weight: 3.0 },
    Background { name: "white", colour: Rgb([255, 255, 255]), weight: 3.0 },
    Background { name: "gray", colour: Rgb([128, 128, 128]), weight: 1.0 },
    Background { name: "red", colour: Rgb([200, 40, 40]), weight: 1.0 },
    Background { name: "yellow", colour: Rgb([245, 205, 60]), weight: 1.0 },
    Background { name: "green", colour: Rgb([60, 150, 80]), weight: 1.0 },
    Background { name: "blue", colour: Rgb([50, 90, 200]), weight: 1.0 },
    Background { name: "purple", colour: Rgb([120, 60, 160]), weight: 1.0 },
];

/// What the command line says.
struct Options {
    archive: PathBuf,
    out: PathBuf,
    num_backgrounds: usize,
    num_holdout: usize,
}

/// A line of the archive's `index.jsonl`.
#[derive(serde::Deserialize)]
struct Subject {
    file: String,
    name: String,
    group: String,
    keywords: Vec<String>,
    hex: String,
}

/// A line of the `metadata.jsonl` that preparation reads.
#[derive(serde::Serialize)]
struct Metadata {
    file_name: String,
    captions: Vec<String>,
    tags: Vec<String>,
}

fn main() -> ExitCode {
    let result = parse(std::env::args().skip(1)).and_then(|options| run(&options));
    match result {
        Ok(report) => {
            eprintln!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(if matches!(error, Error::Invalid { .. }) { 2 } else { 1 })
        }
    }
}

fn invalid(what: &str, reason: impl Into<String>) -> Error {
    Error::Invalid { what: what.to_owned(), reason: reason.into() }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options> {
    let usage = "usage: emoji_pictures ARCHIVE OUT [--backgrounds N] [--holdout-subjects N]";
    let (mut paths, mut num_backgrounds, mut num_holdout) = (Vec::new(), 2, 0);
    while let Some(argument) = arguments.next() {
        let target = match argument.as_str() {
            "--backgrounds" => &mut num_backgrounds,
            "--holdout-subjects" => &mut num_holdout,
            flag if flag.starts_with('-') => return Err(invalid(flag, format!("no such option; {usage}"))),
            _ => {
                paths.push(PathBuf::from(argument));
                continue;
            }
        };
        let value = arguments.next().unwrap_or_default();
        *target = value.parse().map_err(|_| invalid(&argument, format!("expected a number, found '{value}'")))?;
    }
    if num_backgrounds == 0 || num_backgrounds > BACKGROUNDS.len() {
        return Err(invalid("--backgrounds", format!("expected 1 to {}, found {num_backgrounds}", BACKGROUNDS.len())));
    }
    let [archive, out] = <[PathBuf; 2]>::try_from(paths).map_err(|_| invalid("arguments", usage))?;
    Ok(Options { archive, out, num_backgrounds, num_holdout })
}

/// Composes and writes everything; returns the line to end with.
fn run(options: &Options) -> Result<String> {
    let (mut subjects, files) = read_archive(&options.archive)?;
    if options.num_holdout >= subjects.len() {
        let reason =
            format!("expected less than the archive's {} subjects, found {}", subjects.len(), options.num_holdout);
        return Err(invalid("--holdout-subjects", reason));
    }
    subjects.sort_by_cached_key(|subject| *blake3::hash(subject.name.as_bytes()).as_bytes());
    let (held_out, train) = subjects.split_at(options.num_holdout);
    let parts: Vec<(&str, &[Subject])> =
        [("train", train), ("heldout", held_out)].into_iter().filter(|(_, subjects)| !subjects.is_empty()).collect();
    if options.out.exists() {
        return check_existing(options, &parts);
    }
    let mut partial = options.out.clone().into_os_string();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(Error::io(&partial))?;
    }
    let done = AtomicUsize::new(0);
    let total = (train.len() + held_out.len()) * options.num_backgrounds;
    for (part, subjects) in &parts {
        let folder = partial.join(part);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        subjects.par_iter().try_for_each(|subject| {
            write_pictures(subject, &files[&subject.file], &folder, options)?;
            report(done.fetch_add(options.num_backgrounds, Ordering::Relaxed) + options.num_backgrounds, total);
            Ok(())
        })?;
        let path = folder.join("metadata.jsonl");
        fs::write(&path, metadata(subjects, options.num_backgrounds)).map_err(Error::io(&path))?;
    }
    eprintln!();
    fs::rename(&partial, &options.out).map_err(Error::io(&options.out))?;
    Ok(format!("{total} pictures of {} subjects in {}", subjects.len(), options.out.display()))
}

fn report(done: usize, total: usize) {
    if done % 64 < 2 || done == total {
        eprint!("\rcomposing pictures: {done}/{total} ");
    }
}

/// The index, and the bytes of every other member by name.
fn read_archive(path: &Path) -> Result<(Vec<Subject>, Files)> {
    let malformed = |reason: String| Error::Malformed { path: path.to_owned(), kind: "emoji archive", reason };
    let mut files = read_tar(&fs::read(path).map_err(Error::io(path))?).map_err(malformed)?;
    let index = files.remove("index.jsonl").ok_or_else(|| malformed("it has no index.jsonl".to_owned()))?;
    let subjects: Vec<Subject> = serde_json::Deserializer::from_slice(&index)
        .into_iter()
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| malformed(format!("index.jsonl: {error}")))?;
    if let Some(missing) = subjects.iter().find(|subject| !files.contains_key(&subject.file)) {
        return Err(malformed(format!("index.jsonl names {}, which is not in it", missing.file)));
    }
    Ok((subjects, files))
}

/// The plain files of a ustar archive. The crate `tar` would switch on features of libc that make cargo compile half
/// of the workspace twice, for what is here 20 lines: 512-byte headers, each followed by its file in whole blocks.
fn read_tar(mut bytes: &[u8]) -> std::result::Result<Files, String> {
    let mut files = Files::new();
    while let Some((header, rest)) = bytes.split_at_checked(TAR_BLOCK_BYTES) {
        // Two blocks of zeros end an archive.
        if header[0] == 0 {
            return Ok(files);
        }
        let text = |range: std::ops::Range<usize>| {
            String::from_utf8_lossy(&header[range]).trim_matches(['\0', ' ']).to_owned()
        };
        let name = text(0..100);
        let size = usize::from_str_radix(&text(124..136), 8).map_err(|_| format!("{name}: its size is not octal"))?;
        let content =
            rest.get(..size).ok_or_else(|| format!("it ends inside {name}; restore it from the repository"))?;
        files.insert(name, content.to_vec());
        bytes = rest.get(size.next_multiple_of(TAR_BLOCK_BYTES)..).unwrap_or_default();
    }
    Err("it ends without an end mark; restore it from the repository".to_owned())
}

/// An earlier run's folder is good if it has the same metadata; anything else may be a user's and is not touched.
fn check_existing(options: &Options, parts: &[(&str, &[Subject])]) -> Result<String> {
    let same = |(part, subjects): &(&str, &[Subject])| {
        let text = fs::read(options.out.join(part).join("metadata.jsonl"));
        text.is_ok_and(|text| text == metadata(subjects, options.num_backgrounds).as_bytes())
    };
    if parts.iter().all(same) && options.out.join("heldout").exists() == (options.num_holdout > 0) {
        return Ok(format!("{} already holds these pictures", options.out.display()));
    }
    let reason = "it exists and holds something else; name another folder, or remove this one";
    Err(invalid(&options.out.display().to_string(), reason))
}

/// `num` different backgrounds, by weight (Efraimidis and Spirakis 2006), the same ones whenever the name is the same.
fn choose_backgrounds(subject: &str, num: usize) -> Vec<&'static Background> {
    let draw = |background: &Background| {
        let hash = blake3::hash(format!("{subject}\0{}", background.name).as_bytes());
        let bits = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes"));
        // Uniform in (0, 1]: 53 bits, as a double holds them.
        let uniform = ((bits >> 11) + 1) as f64 * 2f64.powi(-53);
        -uniform.ln() / background.weight
    };
    let mut backgrounds: Vec<&Background> = BACKGROUNDS.iter().collect();
    backgrounds.sort_by(|a, b| draw(a).total_cmp(&draw(b)));
    backgrounds.truncate(num);
    backgrounds
}

fn file_name(subject: &Subject, background: &Background) -> String {
    format!("{}-{}.png", subject.hex, background.name)
}

/// The metadata of all pictures of `subjects`, one JSON object a line.
fn metadata(subjects: &[Subject], num_backgrounds: usize) -> String {
    let mut text = String::new();
    for subject in subjects {
        for background in choose_backgrounds(&subject.name, num_backgrounds) {
            let line = serde_json::to_string(&describe(subject, background)).expect("strings are JSON");
            text.push_str(&line);
            text.push('\n');
        }
    }
    text
}

/// Every caption, and the tags, name the background: a model can only follow what it is told.
fn describe(subject: &Subject, background: &Background) -> Metadata {
    let (name, colour) = (&subject.name, background.name);
    let captions = vec![
        format!("a 3D emoji of {name} on a {colour} background"),
        format!("{name} on a {colour} background"),
        format!("{name}, 3D render, {colour} background"),
    ];
    let mut tags = vec![name.clone(), format!("{colour} background"), subject.group.to_lowercase()];
    for keyword in &subject.keywords {
        if !tags.contains(keyword) {
            tags.push(keyword.clone());
        }
    }
    Metadata { file_name: file_name(subject, background), captions, tags }
}

fn write_pictures(subject: &Subject, bytes: &[u8], folder: &Path, options: &Options) -> Result<()> {
    let malformed = |error: image::ImageError| Error::Malformed {
        path: options.archive.join(&subject.file),
        kind: "picture",
        reason: error.to_string(),
    };
    let picture = image::load_from_memory(bytes).map_err(malformed)?.into_rgba8();
    for background in choose_backgrounds(&subject.name, options.num_backgrounds) {
        let composed = compose(&picture, background.colour);
        let mut png_bytes = Vec::new();
        // The files are read once, minutes later: speed counts, size hardly.
        png::PngEncoder::new_with_quality(&mut png_bytes, png::CompressionType::Fast, png::FilterType::Paeth)
            .write_image(composed.as_raw(), composed.width(), composed.height(), image::ExtendedColorType::Rgb8)
            .map_err(malformed)?;
        let path = folder.join(file_name(subject, background));
        fs::write(&path, png_bytes).map_err(Error::io(&path))?;
    }
    Ok(())
}

/// `subject` in the middle of a plain picture.
fn compose(subject: &RgbaImage, colour: Rgb<u8>) -> RgbImage {
    let side = |px: u32| (f64::from(px) * MARGIN).round() as u32;
    let mut picture = RgbImage::from_pixel(side(subject.width()), side(subject.height()), colour);
    let left = (picture.width() - subject.width()) / 2;
    let top = (picture.height() - subject.height()) / 2;
    for (x, y, pixel) in subject.enumerate_pixels() {
        let [red, green, blue, alpha] = pixel.0.map(u32::from);
        let below = picture.get_pixel_mut(left + x, top + y);
        for (value, over) in below.0.iter_mut().zip([red, green, blue]) {
            *value = ((over * alpha + u32::from(*value) * (255 - alpha) + 127) / 255) as u8;
        }
    }
    picture
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/emoji/emoji.tar")
    }

    #[test]
    fn damaged_archives_are_errors() {
        let bytes = fs::read(archive()).unwrap();
        for (damaged, expected) in [
            (bytes[..100_000].to_vec(), "it ends inside"),
            (bytes[..100].to_vec(), "without an end mark"),
            ([&bytes[..124], &b"xyz"[..], &bytes[127..]].concat(), "not octal"),
            ([&bytes[..124], &b"777777777777"[..], &bytes[136..]].concat(), "it ends inside"),
        ] {
            assert!(read_tar(&damaged).unwrap_err().contains(expected));
        }
    }

    #[test]
    fn every_text_names_the_background_and_the_subject() {
        let (subjects, files) = read_archive(&archive()).unwrap();
        assert_eq!(subjects.len(), 1598);
        assert_eq!(files.len(), 1598 + 1, "the pictures and the licence");
        for subject in &subjects {
            for background in choose_backgrounds(&subject.name, 3) {
                let Metadata { captions, tags, .. } = describe(subject, background);
                assert!(captions.iter().all(|text| text.contains(&subject.name) && text.contains(background.name)));
                assert!(tags.contains(&format!("{} background", background.name)));
            }
        }
    }

    #[test]
    fn black_and_white_are_a_quarter_each() {
        let (subjects, _) = read_archive(&archive()).unwrap();
        let first = |colour: &str| {
            subjects.iter().filter(|subject| choose_backgrounds(&subject.name, 1)[0].name == colour).count() as f64
                / subjects.len() as f64
        };
        // Five standard deviations of a share of 1/4 and 1/12 of 1,598.
        assert!((first("black") - 0.25).abs() < 0.055 && (first("white") - 0.25).abs() < 0.055);
        assert!((first("purple") - 1.0 / 12.0).abs() < 0.035);
    }

    #[test]
    fn subject_lies_in_the_middle_and_blends() {
        let subject = RgbaImage::from_pixel(10, 20, image::Rgba([200, 100, 0, 128]));
        let picture = compose(&subject, Rgb([0, 0, 255]));
        assert_eq!(picture.dimensions(), (13, 26));
        assert_eq!(picture.get_pixel(0, 3).0, [0, 0, 255]);
        assert_eq!(picture.get_pixel(1, 3).0, [100, 50, 127]);
        assert_eq!(picture.get_pixel(10, 22).0, [100, 50, 127]);
        assert_eq!(picture.get_pixel(11, 22).0, [0, 0, 255]);
    }

    #[test]
    fn bad_arguments_say_what_was_expected() {
        let words = |text: &str| parse(text.split(' ').map(str::to_owned)).err().unwrap().to_string();
        assert!(words("a b --backgrounds 9").contains("expected 1 to 8, found 9"));
        assert!(words("a b --backgrounds").contains("expected a number"));
        assert!(words("a b --colour").contains("no such option"));
        assert!(words("a").contains("usage"));
    }
}
