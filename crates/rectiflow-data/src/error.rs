//! The errors of this crate, by meaning.

use std::{fmt, io, ops::Range, path::PathBuf};

use nix::errno::Errno;

/// A process has as many files open as it may.
const TOO_MANY_FILES: i32 = Errno::EMFILE as i32;
/// A disk fails.
const INPUT_OUTPUT: i32 = Errno::EIO as i32;

/// A failure of this crate. Each message says what, where, what was expected and found, and what to
/// do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a file or folder.
    #[error("{}: {source}{}", path.display(), advice(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file does not follow its specification.
    #[error("{}: not a valid {kind}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The expected kind of file, e.g. "manifest".
        kind: &'static str,
        /// The first rule it breaks, with expected and found values.
        reason: String,
    },
    /// Bytes changed since they were written.
    #[error(
        "{}: bytes {}..{} are damaged: expected checksum {expected:016x}, found {found:016x}; \
         restore the file from a copy or prepare the data set again",
        path.display(), range.start, range.end
    )]
    Damaged {
        /// The object.
        path: PathBuf,
        /// The damaged bytes.
        range: Range<u64>,
        /// XXH3-64 in the manifest.
        expected: u64,
        /// XXH3-64 of the bytes read.
        found: u64,
    },
    /// A request to an object store failed.
    #[error("{object}{}: {reason}", BytesOf(range))]
    Remote {
        /// The object's URL.
        object: String,
        /// The requested bytes; None for a whole object.
        range: Option<Range<u64>>,
        /// Number of attempts.
        attempts: u32,
        /// Whether the store reports that the object does not exist.
        missing: bool,
        /// The last failure, and what to do.
        reason: String,
    },
    /// A setting or a combination of settings that cannot work.
    #[error("{what}: {reason}")]
    Invalid {
        /// The setting, as the user writes it.
        what: String,
        /// Why it cannot work, and what would.
        reason: String,
    },
    /// What another process has to do first is not done, or it is still at it. Later it may work.
    #[error("{what}: {reason}")]
    NotReady {
        /// What is not ready.
        what: String,
        /// What is missing, and what to do.
        reason: String,
    },
    /// The VAE's encoder failed.
    #[error("encoding {num_images} images of {width_px}x{height_px} px failed: {reason}")]
    Encode {
        /// Images in the batch.
        num_images: usize,
        /// Width of the bucket.
        width_px: u32,
        /// Height of the bucket.
        height_px: u32,
        /// The encoder's message.
        reason: String,
    },
}

/// What to do about an error of the operating system, behind its words. Empty where the path says
/// all.
pub fn advice(error: &io::Error) -> &'static str {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::StorageFull => {
            "; free space on this disk or name a folder on another: what is complete stays, and \
             the same command goes on from there"
        }
        Kind::QuotaExceeded => {
            "; free space within the quota or name a folder outside of it: what is complete \
             stays, and the same command goes on from there"
        }
        Kind::ReadOnlyFilesystem => "; name a folder on a disk that can be written",
        Kind::PermissionDenied => {
            "; let the user that runs this read it, and write it if it is an output, or name \
             another place"
        }
        Kind::FileTooLarge => {
            "; the file system or `ulimit -f` allows no longer files: name a folder elsewhere"
        }
        Kind::StaleNetworkFileHandle => {
            "; the network file system lost it: mount it again, and run the same command"
        }
        _ => match error.raw_os_error() {
            Some(TOO_MANY_FILES) => "; allow more open files with `ulimit -n 65536`",
            Some(INPUT_OUTPUT) => {
                "; the disk cannot be read or written there: look at the system's log (dmesg), \
                 and use another disk"
            }
            _ => "",
        },
    }
}

/// Displays a range in a message, if there is one.
struct BytesOf<'a>(&'a Option<Range<u64>>);

impl fmt::Display for BytesOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |range| {
            write!(f, ", bytes {}..{}", range.start, range.end)
        })
    }
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Whether an object store reports that an object does not exist.
    pub(crate) fn is_missing_object(&self) -> bool {
        matches!(self, Self::Remote { missing: true, .. })
    }

    /// An [`Error::Io`] about `path`, for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// An error and its causes as one line, without repetitions.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        source = cause.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_system_say_what_to_do() {
        for (code, words) in [
            (Errno::ENOSPC, "free space on this disk"),
            (Errno::EDQUOT, "within the quota"),
            (Errno::EROFS, "that can be written"),
            (Errno::EACCES, "let the user that runs this read it"),
            (Errno::EFBIG, "ulimit -f"),
            (Errno::ESTALE, "mount it again"),
            (Errno::EMFILE, "ulimit -n"),
            (Errno::EIO, "dmesg"),
        ] {
            let error = io::Error::from_raw_os_error(code as i32);
            let message = Error::io("set/latents/a.safetensors")(error).to_string();
            assert!(
                message.starts_with("set/latents/a.safetensors: "),
                "{message}"
            );
            assert!(message.contains(words), "{code}: {message}");
        }
        let error = io::Error::from_raw_os_error(Errno::ENOENT as i32);
        let message = Error::io("gone")(error).to_string();
        assert_eq!(message, "gone: No such file or directory (os error 2)");
    }
}
