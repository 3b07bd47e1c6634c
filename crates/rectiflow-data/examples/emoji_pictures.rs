//! Composes the demo's captioned pictures from `assets/emoji/emoji.tar`.
//!
//! ```text
//! emoji_pictures ARCHIVE OUT [--backgrounds N] [--holdout-subjects N]
//! ```
//!
//! Every subject is put on N plain backgrounds (default 2 of 8) that its captions name. The margin
//! is proportional to its trimmed size, so that the pictures keep the subjects' many aspect ratios.
//! Black and white are the most frequent backgrounds, because the demo compares brightness. The
//! result looks like a user's own folder: `OUT/train/` with PNGs and one `metadata.jsonl`.
//! `--holdout-subjects` writes that number of subjects to `OUT/heldout/` instead: preparation
//! splits by image, which would leave every subject in training on another background.
//!
//! The same arguments produce the same bytes: all choices depend on a hash of the subject's name.
//! `OUT` is written under another name and renamed at the end. If it holds this result already, it
//! is left unchanged.
#![allow(clippy::print_stderr, reason = "a program, not a library")]

use std::{
    collections::HashMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering},
};

use clap::Parser;
use image::{ImageEncoder, ImageError, Rgb, RgbImage, RgbaImage, codecs::png};
use rayon::prelude::*;
use rectiflow_data::{Error, Result};

/// Picture size over subject size, on both axes. A crop to the nearest bucket then seldom cuts into
/// the subject.
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
    Background {
        name: "black",
        colour: Rgb([0, 0, 0]),
        weight: 3.0,
    },
    Background {
        name: "white",
        colour: Rgb([255, 255, 255]),
        weight: 3.0,
    },
    Background {
        name: "gray",
        colour: Rgb([128, 128, 128]),
        weight: 1.0,
    },
    Background {
        name: "red",
        colour: Rgb([200, 40, 40]),
        weight: 1.0,
    },
    Background {
        name: "yellow",
        colour: Rgb([245, 205, 60]),
        weight: 1.0,
    },
    Background {
        name: "green",
        colour: Rgb([60, 150, 80]),
        weight: 1.0,
    },
    Background {
        name: "blue",
        colour: Rgb([50, 90, 200]),
        weight: 1.0,
    },
    Background {
        name: "purple",
        colour: Rgb([120, 60, 160]),
        weight: 1.0,
    },
];

/// Composes captioned pictures of the emoji archive.
#[derive(Debug, Parser)]
struct Arguments {
    /// The emoji archive, a tar file.
    archive: PathBuf,
    /// Folder for the pictures.
    out: PathBuf,
    /// Backgrounds for each subject, 1 to 8.
    #[arg(long = "backgrounds", value_name = "N", default_value_t = 2)]
    #[arg(value_parser = parse_num_backgrounds)]
    num_backgrounds: usize,
    /// Subjects written to OUT/heldout instead of OUT/train.
    #[arg(long = "holdout-subjects", value_name = "N", default_value_t = 0)]
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

/// The subjects of one folder.
struct Part<'a> {
    folder: &'static str,
    subjects: &'a [Subject],
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(report) => {
            eprintln!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(if matches!(error, Error::Invalid { .. }) {
                2
            } else {
                1
            })
        }
    }
}

fn invalid(what: &str, reason: impl Into<String>) -> Error {
    Error::Invalid {
        what: what.to_owned(),
        reason: reason.into(),
    }
}

fn parse_num_backgrounds(text: &str) -> std::result::Result<usize, String> {
    let most = BACKGROUNDS.len();
    match text.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!("expected 1 to {most}, found {text}")),
    }
}

/// Composes and writes everything; returns the line to end with.
fn run(arguments: &Arguments) -> Result<String> {
    let (mut subjects, files) = read_archive(&arguments.archive)?;
    let (num_subjects, num_holdout) = (subjects.len(), arguments.num_holdout);
    if num_holdout >= num_subjects {
        let reason = format!(
            "expected less than the archive's {num_subjects} subjects, found {num_holdout}"
        );
        return Err(invalid("--holdout-subjects", reason));
    }
    subjects.sort_by_cached_key(|subject| *blake3::hash(subject.name.as_bytes()).as_bytes());
    let (held_out, train) = subjects.split_at(num_holdout);
    let mut parts = vec![Part {
        folder: "train",
        subjects: train,
    }];
    if num_holdout > 0 {
        parts.push(Part {
            folder: "heldout",
            subjects: held_out,
        });
    }
    if arguments.out.exists() {
        return check_existing(arguments, &parts);
    }

    // Everything goes to OUT.partial first; an earlier run may have left one.
    let mut partial = arguments.out.clone().into_os_string();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(Error::io(&partial))?;
    }
    let progress = Progress {
        done: AtomicUsize::new(0),
        total: num_subjects * arguments.num_backgrounds,
    };
    for part in &parts {
        write_part(part, &files, &partial, arguments, &progress)?;
    }
    eprintln!();
    fs::rename(&partial, &arguments.out).map_err(Error::io(&arguments.out))?;
    let (total, out) = (progress.total, arguments.out.display());
    Ok(format!(
        "{total} pictures of {num_subjects} subjects in {out}"
    ))
}

/// Counts pictures for the progress line.
struct Progress {
    done: AtomicUsize,
    total: usize,
}

impl Progress {
    fn add(&self, count: usize) {
        let done = self.done.fetch_add(count, Ordering::Relaxed) + count;
        if done % 64 < 2 || done == self.total {
            eprint!("\rcomposing pictures: {done}/{} ", self.total);
        }
    }
}

/// Writes a part's pictures and metadata to its folder in `out`.
fn write_part(
    part: &Part<'_>,
    files: &Files,
    out: &Path,
    arguments: &Arguments,
    progress: &Progress,
) -> Result<()> {
    let folder = out.join(part.folder);
    fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    part.subjects.par_iter().try_for_each(|subject| {
        write_pictures(subject, &files[&subject.file], &folder, arguments)?;
        progress.add(arguments.num_backgrounds);
        Ok(())
    })?;
    let path = folder.join("metadata.jsonl");
    fs::write(&path, metadata(part.subjects, arguments.num_backgrounds)).map_err(Error::io(&path))
}

fn malformed_archive(path: &Path, reason: impl Into<String>) -> Error {
    Error::Malformed {
        path: path.to_owned(),
        kind: "emoji archive",
        reason: reason.into(),
    }
}

/// The index, and the bytes of all other members by name.
fn read_archive(path: &Path) -> Result<(Vec<Subject>, Files)> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let mut files = read_tar(&bytes).map_err(|reason| malformed_archive(path, reason))?;
    let Some(index) = files.remove("index.jsonl") else {
        return Err(malformed_archive(path, "it has no index.jsonl"));
    };
    let subjects: Vec<Subject> = serde_json::Deserializer::from_slice(&index)
        .into_iter()
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| malformed_archive(path, format!("index.jsonl: {error}")))?;
    if let Some(missing) = subjects
        .iter()
        .find(|subject| !files.contains_key(&subject.file))
    {
        let reason = format!("index.jsonl names {}, which is not in it", missing.file);
        return Err(malformed_archive(path, reason));
    }
    Ok((subjects, files))
}

/// The plain files of a ustar archive: 512-byte headers, each followed by its file in whole blocks.
///
/// The crate `tar` would replace these 20 lines, but enables features of libc that make cargo
/// compile half of the workspace twice.
fn read_tar(mut bytes: &[u8]) -> std::result::Result<Files, String> {
    let mut files = Files::new();
    while let Some((header, rest)) = bytes.split_at_checked(TAR_BLOCK_BYTES) {
        // Two blocks of zeros end an archive.
        if header[0] == 0 {
            return Ok(files);
        }
        let name = header_text(header, 0..100);
        let Ok(size) = usize::from_str_radix(&header_text(header, 124..136), 8) else {
            return Err(format!("{name}: its size is not octal"));
        };
        let Some(content) = rest.get(..size) else {
            return Err(format!(
                "it ends inside {name}; restore it from the repository"
            ));
        };
        files.insert(name, content.to_vec());
        bytes = rest
            .get(size.next_multiple_of(TAR_BLOCK_BYTES)..)
            .unwrap_or_default();
    }
    Err("it ends without an end mark; restore it from the repository".to_owned())
}

/// A field of a tar header, without the padding.
fn header_text(header: &[u8], range: Range<usize>) -> String {
    String::from_utf8_lossy(&header[range])
        .trim_matches(['\0', ' '])
        .to_owned()
}

/// Accepts an earlier run's folder with the same metadata. Anything else may be a user's and is an
/// error.
fn check_existing(arguments: &Arguments, parts: &[Part<'_>]) -> Result<String> {
    let out = &arguments.out;
    let has_heldout = out.join("heldout").exists();
    if has_heldout == (arguments.num_holdout > 0)
        && parts
            .iter()
            .all(|part| has_part(out, part, arguments.num_backgrounds))
    {
        return Ok(format!("{} already holds these pictures", out.display()));
    }
    let reason = "it exists and holds something else; name another folder, or remove this one";
    Err(invalid(&out.display().to_string(), reason))
}

/// Whether a part's metadata is in `out`.
fn has_part(out: &Path, part: &Part<'_>, num_backgrounds: usize) -> bool {
    let found = fs::read(out.join(part.folder).join("metadata.jsonl"));
    found.is_ok_and(|text| text == metadata(part.subjects, num_backgrounds).as_bytes())
}

/// `num` different backgrounds, drawn by weight (Efraimidis and Spirakis 2006). They depend on the
/// subject's name alone.
fn choose_backgrounds(subject: &str, num: usize) -> Vec<&'static Background> {
    let mut backgrounds: Vec<&Background> = BACKGROUNDS.iter().collect();
    backgrounds.sort_by(|a, b| draw_key(subject, a).total_cmp(&draw_key(subject, b)));
    backgrounds.truncate(num);
    backgrounds
}

/// The lowest keys are drawn: exponentially distributed with the background's weight as rate.
fn draw_key(subject: &str, background: &Background) -> f64 {
    let hash = blake3::hash(format!("{subject}\0{}", background.name).as_bytes());
    let bits = u64::from_le_bytes(
        hash.as_bytes()[..8]
            .try_into()
            .expect("a hash has 32 bytes"),
    );
    // Uniform in (0, 1], with the 53 bits of a double.
    let uniform = ((bits >> 11) + 1) as f64 * 2f64.powi(-53);
    -uniform.ln() / background.weight
}

fn file_name(subject: &Subject, background: &Background) -> String {
    format!("{}-{}.png", subject.hex, background.name)
}

/// The metadata of all pictures of `subjects`, one JSON object per line.
fn metadata(subjects: &[Subject], num_backgrounds: usize) -> String {
    let mut text = String::new();
    for subject in subjects {
        for background in choose_backgrounds(&subject.name, num_backgrounds) {
            let described = describe(subject, background);
            text.push_str(&serde_json::to_string(&described).expect("strings are JSON"));
            text.push('\n');
        }
    }
    text
}

/// All captions and the tags name the background, so that a model can learn to follow it.
fn describe(subject: &Subject, background: &Background) -> Metadata {
    let (name, colour) = (&subject.name, background.name);
    let captions = vec![
        format!("a 3D emoji of {name} on a {colour} background"),
        format!("{name} on a {colour} background"),
        format!("{name}, 3D render, {colour} background"),
    ];
    let group = subject.group.to_lowercase();
    let mut tags = vec![name.clone(), format!("{colour} background"), group];
    for keyword in &subject.keywords {
        if !tags.contains(keyword) {
            tags.push(keyword.clone());
        }
    }
    Metadata {
        file_name: file_name(subject, background),
        captions,
        tags,
    }
}

/// Writes a subject on each of its backgrounds.
fn write_pictures(
    subject: &Subject,
    bytes: &[u8],
    folder: &Path,
    arguments: &Arguments,
) -> Result<()> {
    let malformed = |error: ImageError| Error::Malformed {
        path: arguments.archive.join(&subject.file),
        kind: "picture",
        reason: error.to_string(),
    };
    let picture = image::load_from_memory(bytes)
        .map_err(malformed)?
        .into_rgba8();
    for background in choose_backgrounds(&subject.name, arguments.num_backgrounds) {
        let png = to_png(&compose(&picture, background.colour)).map_err(malformed)?;
        let path = folder.join(file_name(subject, background));
        fs::write(&path, png).map_err(Error::io(&path))?;
    }
    Ok(())
}

/// Fast rather than small: the files are read once, minutes later.
fn to_png(picture: &RgbImage) -> std::result::Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    let (compression, filter) = (png::CompressionType::Fast, png::FilterType::Paeth);
    let encoder = png::PngEncoder::new_with_quality(&mut bytes, compression, filter);
    let (width, height) = picture.dimensions();
    encoder.write_image(
        picture.as_raw(),
        width,
        height,
        image::ExtendedColorType::Rgb8,
    )?;
    Ok(bytes)
}

/// `subject` in the middle of a plain picture.
fn compose(subject: &RgbaImage, colour: Rgb<u8>) -> RgbImage {
    let (width, height) = (with_margin(subject.width()), with_margin(subject.height()));
    let mut picture = RgbImage::from_pixel(width, height, colour);
    let left = (width - subject.width()) / 2;
    let top = (height - subject.height()) / 2;
    for (x, y, pixel) in subject.enumerate_pixels() {
        let [red, green, blue, alpha] = pixel.0.map(u32::from);
        let below = picture.get_pixel_mut(left + x, top + y);
        for (value, over) in below.0.iter_mut().zip([red, green, blue]) {
            *value = ((over * alpha + u32::from(*value) * (255 - alpha) + 127) / 255) as u8;
        }
    }
    picture
}

fn with_margin(side_px: u32) -> u32 {
    (f64::from(side_px) * MARGIN).round() as u32
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
            (
                [&bytes[..124], &b"xyz"[..], &bytes[127..]].concat(),
                "not octal",
            ),
            (
                [&bytes[..124], &b"777777777777"[..], &bytes[136..]].concat(),
                "it ends inside",
            ),
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
                assert!(
                    captions
                        .iter()
                        .all(|text| text.contains(&subject.name) && text.contains(background.name))
                );
                assert!(tags.contains(&format!("{} background", background.name)));
            }
        }
    }

    #[test]
    fn black_and_white_are_a_quarter_each() {
        let (subjects, _) = read_archive(&archive()).unwrap();
        let first = |colour: &str| {
            subjects
                .iter()
                .filter(|subject| choose_backgrounds(&subject.name, 1)[0].name == colour)
                .count() as f64
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
        let words = |text: &str| {
            let arguments = ["emoji_pictures"].into_iter().chain(text.split(' '));
            Arguments::try_parse_from(arguments)
                .unwrap_err()
                .to_string()
        };
        assert!(words("a b --backgrounds 9").contains("expected 1 to 8, found 9"));
        assert!(words("a b --backgrounds x").contains("expected 1 to 8, found x"));
        assert!(words("a b --backgrounds").contains("a value is required for '--backgrounds <N>'"));
        assert!(words("a b --colour").contains("unexpected argument '--colour'"));
        assert!(words("a").contains("Usage"));
    }
}
