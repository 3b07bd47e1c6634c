//! The list of near-copies that stay out of a data set: `near-copies.jsonl` in its folder, and
//! those that a preparation is told of.

use std::{
    collections::{HashMap, HashSet},
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    durable::DurableFile,
    error::{Error, Result},
    format::record::SampleId,
    prep::near_copy::NearCopyCluster,
    text_file,
};

/// Name of the list inside a data set.
pub const NEAR_COPIES_FILE: &str = "near-copies.jsonl";

/// A line of the list. Hashes are sixteen hexadecimal digits, since many readers of JSON round
/// numbers of 64 bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// The hash of the picture that stays out.
    pub(crate) drop: String,
    /// Its address, for people.
    pub(crate) address: String,
    /// The hash of the picture that stays.
    pub(crate) keep: String,
    /// The address of the picture that stays, for people.
    pub(crate) kept_address: String,
}

/// The picture that stays instead of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stays {
    pub(crate) id: SampleId,
    pub(crate) address: String,
}

/// The pictures that stay out, each with the one that stays. Those whose partner is gone do not
/// stay out.
pub(crate) type LeftOut = HashMap<SampleId, Stays>;

/// A hash as the list writes it.
pub(crate) fn digits(id: SampleId) -> String {
    format!("{:016x}", id.0)
}

/// The lines of the list at `path`; none without a list.
///
/// # Errors
/// [`Error::Io`]; [`Error::Malformed`] for what is no line of a list.
pub(crate) fn read(path: &Path) -> Result<Vec<Line>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let mut lines = Vec::new();
    let text = text_file::bytes(path, u64::MAX).map_err(Error::io(path))?;
    for (number, line) in (1..).zip(String::from_utf8_lossy(&text).lines()) {
        if line.trim().is_empty() {
            continue;
        }
        let parsed = serde_json::from_str::<Line>(line);
        let parsed =
            parsed.map_err(|_| "it has no drop, address, keep and kept_address".to_owned());
        let checked = parsed.and_then(|line| {
            parse(&line.drop)?;
            parse(&line.keep)?;
            Ok(line)
        });
        lines.push(checked.map_err(|reason| Error::Malformed {
            path: path.to_owned(),
            kind: "list of near-copies",
            reason: format!("line {number}: {reason}: mend it, or delete the file"),
        })?);
    }
    Ok(lines)
}

fn parse(hash: &str) -> std::result::Result<SampleId, String> {
    let id = u64::from_str_radix(hash, 16);
    id.map(SampleId)
        .map_err(|_| format!("{hash:?} is no hash of sixteen hexadecimal digits"))
}

/// Adds all but the first picture of each cluster, except those that are on the list.
pub(crate) fn add(lines: &mut Vec<Line>, clusters: &[NearCopyCluster]) {
    let known: HashSet<String> = lines.iter().map(|line| line.drop.clone()).collect();
    for cluster in clusters {
        let kept = &cluster[0];
        for copy in &cluster[1..] {
            if !known.contains(&digits(copy.id)) {
                lines.push(Line {
                    drop: digits(copy.id),
                    address: copy.address.clone(),
                    keep: digits(kept.id),
                    kept_address: kept.address.clone(),
                });
            }
        }
    }
}

/// Writes the list at `path`.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write(path: &Path, lines: &[Line]) -> Result<()> {
    let mut file = DurableFile::create(path)?;
    for line in lines {
        let line = serde_json::to_string(line).expect("a line is strings");
        writeln!(file, "{line}").map_err(file.error())?;
    }
    file.commit()
}

/// The pictures that the list of the data set in `root` and other lists leave out.
///
/// # Errors
/// As [`read`]; also [`Error::Io`] if one of the other lists does not exist.
pub(crate) fn left_out(root: &Path, others: &[PathBuf]) -> Result<LeftOut> {
    let mut lines = read(&root.join(NEAR_COPIES_FILE))?;
    for other in others {
        std::fs::metadata(other).map_err(Error::io(other))?;
        lines.extend(read(other)?);
    }
    let mut all = LeftOut::new();
    for line in lines {
        let (Ok(drop), Ok(keep)) = (parse(&line.drop), parse(&line.keep)) else {
            continue;
        };
        let stays = Stays {
            id: keep,
            address: line.kept_address,
        };
        all.insert(drop, stays);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_list_is_read_as_it_was_written_and_edited() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(NEAR_COPIES_FILE);
        assert_eq!(read(&path).unwrap(), []);
        let line = |drop: u64, keep: u64| Line {
            drop: digits(SampleId(drop)),
            address: "a.png".to_owned(),
            keep: digits(SampleId(keep)),
            kept_address: "b.png".to_owned(),
        };
        let lines = [line(1, u64::MAX), line(7, 9)];
        write(&path, &lines).unwrap();
        assert_eq!(read(&path).unwrap(), lines);
        assert_eq!(
            left_out(folder.path(), &[]).unwrap()[&SampleId(1)].id,
            SampleId(u64::MAX)
        );

        // Other lists are read too, and must be there.
        let other = folder.path().join("other.jsonl");
        assert!(left_out(folder.path(), std::slice::from_ref(&other)).is_err());
        write(&other, &[line(3, 4)]).unwrap();
        assert_eq!(left_out(folder.path(), &[other]).unwrap().len(), 3);

        // Blank lines and another system's line ends are no damage.
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("\n{}\n\n", text.replace('\n', "\r\n"))).unwrap();
        assert_eq!(read(&path).unwrap(), lines);
        for damaged in [&b"\xff\xfe"[..], b"{", b"[1]", br#"{"drop": "xyz"}"#] {
            fs::write(&path, damaged).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("line 1: "), "{error}");
            assert!(error.contains("mend it, or delete the file"), "{error}");
        }
    }
}
