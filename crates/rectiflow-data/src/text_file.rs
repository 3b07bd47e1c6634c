//! Text files that a user names: recipes, prompts, captions, tables, the state of a run.
//!
//! Only regular files are read: a pipe or a device may block or never end. Sizes are limited, so
//! that a wrong name costs a message and no memory.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read},
    os::unix::fs::FileExt,
    path::Path,
};

use crate::error::{Error, Result};

/// The largest text that is read at once, 64 MiB.
const MAX_BYTES: u64 = 64 << 20;

/// Reads a UTF-8 text of at most 64 MiB, without its byte order mark.
///
/// # Errors
/// [`Error::Invalid`] for anything but a regular file, a longer one or other bytes than UTF-8;
/// [`Error::Io`].
pub fn read(path: &Path) -> Result<String> {
    let text = bytes(path, MAX_BYTES).and_then(text_of);
    text.map_err(|error| error_about(path, error))
}

/// Reads a regular file of at most `limit` bytes.
///
/// # Errors
/// One that says so for anything else; those of the system.
pub fn bytes(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?
        .take(limit.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let reason = format!("it is longer than {limit} bytes");
        return Err(io::Error::new(ErrorKind::InvalidInput, reason));
    }
    Ok(bytes)
}

/// Opens a regular file.
///
/// # Errors
/// [`Error::Invalid`] for anything else, [`Error::Io`].
pub fn open(path: &Path) -> Result<File> {
    open_regular(path).map_err(|error| error_about(path, error))
}

/// As [`open`], with an error that does not name the file.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    // Opening a pipe waits for its other end.
    let kind = fs::metadata(path)?.file_type();
    if kind.is_file() {
        return File::open(path);
    }
    let reason = if kind.is_dir() {
        "it is a folder"
    } else {
        "it is not a regular file"
    };
    Err(io::Error::new(ErrorKind::InvalidInput, reason))
}

/// The first bytes of a file, at most 4 KiB.
pub(crate) fn start(file: &File) -> io::Result<Vec<u8>> {
    let mut start = vec![0; 4096];
    let num_read = file.read_at(&mut start, 0)?;
    start.truncate(num_read);
    Ok(start)
}

fn text_of(bytes: Vec<u8>) -> io::Result<String> {
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let reason = format!("it is not UTF-8: byte {at} does not belong there");
        io::Error::new(ErrorKind::InvalidInput, reason)
    })?;
    match text.strip_prefix('\u{feff}') {
        Some(rest) => Ok(rest.to_owned()),
        None => Ok(text),
    }
}

fn error_about(path: &Path, error: io::Error) -> Error {
    if error.kind() == ErrorKind::InvalidInput {
        return Error::Invalid {
            what: path.display().to_string(),
            reason: error.to_string(),
        };
    }
    Error::io(path)(error)
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::net::UnixListener,
        process::Command,
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn a_text_is_read_without_its_mark() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        for (bytes, expected) in [
            (&b""[..], ""),
            (b"a\r\nb", "a\r\nb"),
            (b"\xef\xbb\xbfa", "a"),
            (b"a\xef\xbb\xbf", "a\u{feff}"),
        ] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(read(&path).unwrap(), expected);
        }
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(read(&link).is_ok());
    }

    #[test]
    fn what_is_no_text_is_refused_at_once_and_says_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        let pipe = Command::new("mkfifo").arg(place("pipe")).status();
        assert!(pipe.unwrap().success());
        let _socket = UnixListener::bind(place("socket")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", place("link")).unwrap();
        fs::write(place("latin"), b"caf\xe9").unwrap();
        let long = File::create(place("long")).unwrap();
        long.set_len(MAX_BYTES + 1).unwrap();
        let began = Instant::now();
        for (path, reason) in [
            (place("pipe"), "it is not a regular file"),
            (place("socket"), "it is not a regular file"),
            (place("link"), "it is not a regular file"),
            ("/dev/zero".into(), "it is not a regular file"),
            (folder.path().into(), "it is a folder"),
            (place("latin"), "it is not UTF-8: byte 3"),
            (place("long"), "it is longer than 67108864 bytes"),
        ] {
            let Err(Error::Invalid {
                what,
                reason: found,
            }) = read(&path)
            else {
                panic!("{} is refused", path.display())
            };
            assert_eq!(what, path.display().to_string());
            assert!(found.starts_with(reason), "{found}");
        }
        assert!(began.elapsed() < Duration::from_secs(5));
        let missing = read(&place("missing")).unwrap_err();
        assert!(matches!(missing, Error::Io { .. }), "{missing}");
    }
}
