//! Speed of the preparation without the encoder: the numbers that `rectiflow bench prep` prints.
//! Writes nothing.
//!
//! The pictures of a folder go through the same steps as in `encode`, on all threads of rayon's
//! pool. Processor time is counted by stage, because on a shared machine it says more than seconds.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::time::{ClockId, clock_gettime};
use rayon::prelude::*;
use serde::Serialize;

use crate::{
    error::{Error, Result},
    format::{
        bucket::{Bucket, nearest},
        crop::{Placement, place},
        record::SampleId,
    },
    picture::{
        Picture,
        workspace::{Workspace, Workspaces},
    },
    prep::settings::PrepSettings,
    reject::{Fault, Reason},
};

/// Processor seconds of a picture, by stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct StageSecs {
    /// Reading the file and hashing its bytes.
    pub read: f64,
    /// Decoding the samples.
    pub decode: f64,
    /// Colour profile and transparency.
    pub colour: f64,
    /// EXIF orientation.
    pub orientation: f64,
    /// Resize and crop.
    pub resize: f64,
}

/// Measurements of preparing the pictures of a folder, without the encoder.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PrepNumbers {
    /// Pictures in the folder that can be prepared.
    pub pictures: usize,
    /// Pictures that cannot, each with the reason.
    pub rejected: Vec<String>,
    /// Number of times that the folder was prepared; a first time is not counted.
    pub passes: u64,
    /// Threads.
    pub threads: usize,
    /// Pictures per second of the clock, all threads together.
    pub pictures_per_sec: f64,
    /// Pictures per second of processor time.
    pub pictures_per_cpu_sec: f64,
    /// Millions of pixels of the files per second of processor time.
    pub megapixels_per_cpu_sec: f64,
    /// Processor seconds of a picture, mean.
    pub stage_secs: StageSecs,
}

/// A picture in the size of its bucket.
#[derive(Debug)]
pub struct Fitted {
    /// The pixels.
    pub picture: Picture,
    /// How it was fitted.
    pub placement: Placement,
    /// Number of pixels before.
    pub from_pixels: u64,
    /// Processor time that it took.
    pub secs: StageSecs,
}

/// Prepares all files in `folder` and its subfolders again and again, for at least `at_least` after
/// a first time that fills the page cache.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be listed, [`Error::Invalid`] if no file is a picture.
pub fn measure(folder: &Path, settings: &PrepSettings, at_least: Duration) -> Result<PrepNumbers> {
    let buckets = settings.geometry().buckets();
    let workspaces = Workspaces::default();
    let prepare =
        |path: &Path| workspaces.with(|workspace| fitted_in(workspace, path, &buckets, settings));
    // The first time: which files are pictures.
    let files = list(folder)?;
    let tried: Vec<_> = files
        .par_iter()
        .map(|path| prepare(path).map(drop))
        .collect();
    let mut good = Vec::new();
    let mut rejected = Vec::new();
    for (path, result) in files.into_iter().zip(tried) {
        match result {
            Ok(()) => good.push(path),
            Err(fault) => rejected.push(format!("{}: {}", path.display(), fault.detail)),
        }
    }
    if good.is_empty() {
        return Err(no_picture(folder, &rejected));
    }
    // The passes that count.
    let began = Instant::now();
    let cpu_before = clock(ClockId::CLOCK_PROCESS_CPUTIME_ID);
    let mut passes = 0;
    let mut total = Total::default();
    while began.elapsed() < at_least || passes == 0 {
        let pass = good
            .par_iter()
            .map(|path| Total::of(prepare(path)))
            .reduce(Total::default, Total::plus);
        total = total.plus(pass);
        passes += 1;
    }
    let secs = began.elapsed().as_secs_f64();
    let cpu_secs = clock(ClockId::CLOCK_PROCESS_CPUTIME_ID) - cpu_before;
    Ok(PrepNumbers {
        pictures: good.len(),
        rejected,
        passes,
        threads: rayon::current_num_threads(),
        pictures_per_sec: total.pictures / secs,
        pictures_per_cpu_sec: total.pictures / cpu_secs,
        megapixels_per_cpu_sec: total.megapixels / cpu_secs,
        stage_secs: total.secs.scaled(1.0 / total.pictures),
    })
}

/// Prepares one file, up to the pixels that the encoder takes.
///
/// # Errors
/// The file's fault.
pub fn fitted(
    path: &Path,
    buckets: &[Bucket],
    settings: &PrepSettings,
) -> std::result::Result<Fitted, Fault> {
    fitted_in(&mut Workspace::default(), path, buckets, settings)
}

fn fitted_in(
    workspace: &mut Workspace,
    path: &Path,
    buckets: &[Bucket],
    settings: &PrepSettings,
) -> std::result::Result<Fitted, Fault> {
    let mut lap = Lap::begin();
    let mut secs = StageSecs::default();
    let bytes =
        fs::read(path).map_err(|error| Fault::new(Reason::Unreadable, error.to_string()))?;
    let id = SampleId::of(&bytes);
    secs.read = lap.secs();
    let stored = workspace.stored(&bytes, settings.max_pixels)?;
    secs.decode = lap.secs();
    let opaque = workspace.opaque(stored, settings.background)?;
    secs.colour = lap.secs();
    let picture = opaque.upright().picture;
    secs.orientation = lap.secs();
    let (width_px, height_px) = (picture.width_px(), picture.height_px());
    let bucket = buckets[nearest(buckets, width_px, height_px)];
    let placement = place(bucket, width_px, height_px, settings.seed, id);
    let pixels = workspace.fit(picture, &placement, bucket, settings.resize);
    secs.resize = lap.secs();
    Ok(Fitted {
        picture: Picture::new(bucket.width_px, bucket.height_px, pixels),
        placement,
        from_pixels: u64::from(width_px) * u64::from(height_px),
        secs,
    })
}

/// All files in a folder and its subfolders, sorted.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let entry = entry.map_err(Error::io(&folder))?;
            // A link to a folder is not followed: it could lead back.
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_folder {
                folders.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

fn no_picture(folder: &Path, rejected: &[String]) -> Error {
    let example = rejected.first().map_or("it has no files", String::as_str);
    Error::Invalid {
        what: folder.display().to_string(),
        reason: format!("no file in it is a picture, such as {example}: name a folder of pictures"),
    }
}

/// Sums over pictures.
#[derive(Debug, Clone, Copy, Default)]
struct Total {
    pictures: f64,
    megapixels: f64,
    secs: StageSecs,
}

impl Total {
    /// Of one picture. One that fails, because its file changed, counts nothing.
    fn of(fitted: std::result::Result<Fitted, Fault>) -> Self {
        fitted.map_or_else(
            |_| Self::default(),
            |fitted| Self {
                pictures: 1.0,
                megapixels: fitted.from_pixels as f64 / 1e6,
                secs: fitted.secs,
            },
        )
    }

    fn plus(self, other: Self) -> Self {
        Self {
            pictures: self.pictures + other.pictures,
            megapixels: self.megapixels + other.megapixels,
            secs: self.secs.plus(other.secs),
        }
    }
}

impl StageSecs {
    fn plus(self, other: Self) -> Self {
        Self {
            read: self.read + other.read,
            decode: self.decode + other.decode,
            colour: self.colour + other.colour,
            orientation: self.orientation + other.orientation,
            resize: self.resize + other.resize,
        }
    }

    fn scaled(self, factor: f64) -> Self {
        Self {
            read: self.read * factor,
            decode: self.decode * factor,
            colour: self.colour * factor,
            orientation: self.orientation * factor,
            resize: self.resize * factor,
        }
    }
}

/// Processor time of this thread since the last stage.
struct Lap(f64);

impl Lap {
    fn begin() -> Self {
        Self(clock(ClockId::CLOCK_THREAD_CPUTIME_ID))
    }

    fn secs(&mut self) -> f64 {
        let now = clock(ClockId::CLOCK_THREAD_CPUTIME_ID);
        now - std::mem::replace(&mut self.0, now)
    }
}

/// Seconds of a clock.
fn clock(id: ClockId) -> f64 {
    let time = clock_gettime(id).expect("every Unix has the clocks of processor time");
    time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The settings of a small geometry.
    fn settings() -> PrepSettings {
        PrepSettings {
            area_px: 64 * 64,
            step_px: 8,
            bucket_min_px: 32,
            bucket_max_px: 128,
            ..PrepSettings::default()
        }
    }

    #[test]
    fn pictures_are_counted_and_other_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("below")).unwrap();
        let picture = Picture::filled(200, 100, [10, 20, 30]);
        picture.write_png(&dir.path().join("a.png"), &[]).unwrap();
        let below = dir.path().join("below/b.png");
        picture.write_png(&below, &[]).unwrap();
        fs::write(dir.path().join("a.txt"), "no picture").unwrap();

        let numbers = measure(dir.path(), &settings(), Duration::ZERO).unwrap();
        assert_eq!((numbers.pictures, numbers.passes), (2, 1));
        assert!(numbers.rejected.len() == 1 && numbers.rejected[0].contains("a.txt"));
        let secs = numbers.stage_secs;
        let sum = secs.read + secs.decode + secs.colour + secs.orientation + secs.resize;
        assert!(
            sum > 0.0 && sum <= 1.0 / numbers.pictures_per_cpu_sec,
            "{numbers:?}"
        );
    }

    #[test]
    fn a_folder_without_pictures_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.txt"), "no picture").unwrap();
        let error = measure(dir.path(), &settings(), Duration::ZERO).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(dir.path().to_str().unwrap()), "{message}");
        assert!(message.contains("a.txt"), "{message}");
    }

    #[test]
    fn a_fitted_picture_has_the_size_of_its_bucket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        let picture = Picture::filled(200, 100, [10, 20, 30]);
        picture.write_png(&path, &[]).unwrap();
        let buckets = settings().geometry().buckets();
        let fitted = fitted(&path, &buckets, &settings()).unwrap();
        let bucket = buckets[nearest(&buckets, 200, 100)];
        assert_eq!(
            fitted.picture,
            Picture::filled(bucket.width_px, bucket.height_px, [10, 20, 30])
        );
        assert_eq!(fitted.from_pixels, 20_000);
    }
}
