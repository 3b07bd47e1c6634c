//! Where a run's files are: in a folder, or below a URL. Nothing here writes.

use std::{
    fs,
    path::{Component, Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use rectiflow_data::{RemoteFolder, text_file};
use rectiflow_train::metrics::{
    self, Event,
    tail::{Found, Lines, Tail},
};

/// The place of a run.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// A folder.
    Folder(PathBuf),
    /// An object store.
    Remote(RemoteFolder),
}

/// Largest preview that is shown, 64 MiB.
const MAX_PREVIEW_BYTES: u64 = 64 << 20;

impl Source {
    /// Begins to follow the run's events.
    pub(crate) fn follow(&self) -> Follower {
        match self {
            Self::Folder(folder) => Follower::Folder(Tail::new(folder, 0)),
            Self::Remote(remote) => Follower::Remote(RemoteTail {
                remote: remote.clone(),
                lines: Lines::default(),
                offset: 0,
                looked: None,
            }),
        }
    }

    /// Returns the bytes of a preview, a PNG file. The name is an event's, so that it is not
    /// trusted: it must be a single name, and what is read must be a PNG file.
    pub(crate) fn preview(&self, name: &str) -> Option<Vec<u8>> {
        /// The first bytes of a PNG file.
        const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
        let mut parts = Path::new(name).components();
        let (Some(Component::Normal(only)), None) = (parts.next(), parts.next()) else {
            return None;
        };
        let only = only.to_str().filter(|only| *only == name)?;
        let bytes = match self {
            Self::Folder(folder) => {
                let path = folder.join("previews").join(only);
                // A link could lead to any file.
                if !fs::symlink_metadata(&path).ok()?.is_file() {
                    return None;
                }
                text_file::bytes(&path, MAX_PREVIEW_BYTES).ok()?
            }
            Self::Remote(remote) => {
                let object = format!("previews/{only}");
                remote.read(&object, MAX_PREVIEW_BYTES).ok()?
            }
        };
        bytes.starts_with(SIGNATURE).then_some(bytes)
    }

    /// Returns the seconds since the run's last event, by the time of its file.
    pub(crate) fn quiet_secs(&self) -> Option<f64> {
        let Self::Folder(folder) = self else {
            return None;
        };
        let written = folder
            .join(metrics::FILE)
            .metadata()
            .ok()?
            .modified()
            .ok()?;
        let quiet = SystemTime::now().duration_since(written);
        Some(quiet.map_or(0.0, |quiet| quiet.as_secs_f64()))
    }

    /// Returns the last events of a rank, from the end of its file.
    pub(crate) fn last_events(&self, rank: usize, bytes: u64) -> Vec<Event> {
        match self {
            Self::Folder(folder) => {
                let mut tail = Tail::new(folder, rank);
                tail.skip_to_last(bytes);
                tail.look().unwrap_or_default().events
            }
            Self::Remote(remote) => remote_end(remote, rank, bytes).unwrap_or_default(),
        }
    }
}

fn remote_end(remote: &RemoteFolder, rank: usize, bytes: u64) -> Option<Vec<Event>> {
    let name = metrics::file_name(rank);
    let len = remote.len(&name).ok()??;
    let bytes = remote
        .read_range(&name, len.saturating_sub(bytes)..len)
        .ok()?;
    let mut events = Vec::new();
    Lines::default().take(&bytes, &mut events);
    Some(events)
}

/// Follows the events of a run.
#[derive(Debug)]
pub(crate) enum Follower {
    Folder(Tail),
    Remote(RemoteTail),
}

impl Follower {
    /// Returns the events since the last look.
    pub(crate) fn look(&mut self) -> anyhow::Result<Found> {
        match self {
            Self::Folder(tail) => Ok(tail.look()?),
            Self::Remote(tail) => Ok(tail.look()?),
        }
    }

    /// Returns the number of lines that are no events.
    pub(crate) fn num_passed_over(&self) -> u64 {
        match self {
            Self::Folder(tail) => tail.num_passed_over(),
            Self::Remote(tail) => tail.lines.num_passed_over(),
        }
    }
}

/// The events of a run in an object store, whose copy of the file grows.
#[derive(Debug)]
pub(crate) struct RemoteTail {
    remote: RemoteFolder,
    lines: Lines,
    offset: u64,
    looked: Option<Instant>,
}

/// Every look is a request, which costs money.
const REMOTE_PAUSE: Duration = Duration::from_secs(5);
/// Bytes of a request.
const MAX_REMOTE_BYTES: u64 = 16 << 20;

impl RemoteTail {
    fn look(&mut self) -> rectiflow_data::Result<Found> {
        let mut found = Found {
            is_at_end: true,
            ..Found::default()
        };
        if self
            .looked
            .is_some_and(|looked| looked.elapsed() < REMOTE_PAUSE)
        {
            return Ok(found);
        }
        let len = self.remote.len(metrics::FILE)?.unwrap_or(0);
        if len < self.offset {
            found.is_anew = true;
            self.offset = 0;
            self.lines = Lines::default();
        }
        let end = len.min(self.offset + MAX_REMOTE_BYTES);
        if end > self.offset {
            let bytes = self.remote.read_range(metrics::FILE, self.offset..end)?;
            self.offset = end;
            self.lines.take(&bytes, &mut found.events);
        }
        found.is_at_end = end == len;
        // A long file is read in several requests without a pause.
        self.looked = found.is_at_end.then(Instant::now);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_preview_is_a_png_file_of_the_runs_folder_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let previews = folder.path().join("previews");
        fs::create_dir(&previews).expect("a folder");
        let png = b"\x89PNG\r\n\x1a\nrest";
        for path in [previews.join("a.png"), folder.path().join("out.png")] {
            fs::write(path, png).expect("writes");
        }
        fs::write(previews.join("text.png"), "no picture").expect("writes");
        symlink(folder.path().join("out.png"), previews.join("link.png")).expect("links");
        let source = Source::Folder(folder.path().to_owned());
        assert_eq!(source.preview("a.png").as_deref(), Some(&png[..]));
        let absolute = folder.path().join("out.png");
        let absolute = absolute.to_str().expect("UTF-8");
        for name in [
            "text.png",
            "link.png",
            "none.png",
            "../out.png",
            "./a.png",
            "a.png/",
            "previews/a.png",
            "",
            ".",
            "..",
            "/",
            "a\0.png",
            absolute,
        ] {
            assert_eq!(source.preview(name), None, "{name:?}");
        }
    }
}
