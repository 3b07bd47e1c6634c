//! The members of a tar by its headers. Members are jumped over, not read.
//!
//! Long names and large sizes are read as GNU and PAX write them. What is no regular file, and a
//! tar that ends in the middle, is named; members before that place stay.

use tar::{EntryType, Header, PaxExtensions};

use crate::{
    error::{Error, Result},
    reject::{Reason, Remark},
    source::shards::shard::Shard,
};

/// Bytes of a header, and the unit of a tar.
pub(crate) const BLOCK_BYTES: u64 = 512;
/// Longest name or table of extensions in bytes.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;

/// A regular file in a tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) name: String,
    /// Where its bytes begin in the tar.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) sha256: Option<Box<[u8; 32]>>,
    /// Width and height that its index says; 0 without.
    pub(crate) listed_px: [u32; 2],
    /// JSON with its texts, if its index has them.
    pub(crate) text: Option<Box<str>>,
}

/// What precedes a header and is about the next member.
#[derive(Debug, Default)]
struct Extensions {
    name: Option<Vec<u8>>,
    bytes: Option<u64>,
    is_sparse: bool,
}

/// Reads the headers of the tar `shard`, and names in `remarks` what is no picture and no text.
///
/// # Errors
/// [`Error::Io`], [`Error::Remote`]. A bad tar is a remark.
pub(crate) fn members(shard: &Shard, remarks: &mut Vec<Remark>) -> Result<Vec<Member>> {
    let mut walk = Walk {
        shard,
        remarks,
        members: Vec::new(),
        has_end: false,
        next: Extensions::default(),
    };
    let mut at = 0;
    while let Some(after) = walk.step(at)? {
        at = after;
    }
    if !walk.has_end {
        walk.truncated(at);
    }
    Ok(walk.members)
}

/// Whether these bytes are a tar's first header.
pub(crate) fn is_header(block: &[u8]) -> bool {
    block.len() == BLOCK_BYTES as usize && has_checksum(Header::from_byte_slice(block))
}

fn has_checksum(header: &Header) -> bool {
    let bytes = header.as_bytes();
    // The checksum counts its own field as spaces.
    let mut sum = 8 * u32::from(b' ');
    for (at, byte) in bytes.iter().enumerate() {
        if !(148..156).contains(&at) {
            sum += u32::from(*byte);
        }
    }
    header.cksum().is_ok_and(|expected| expected == sum)
}

struct Walk<'a> {
    shard: &'a Shard,
    remarks: &'a mut Vec<Remark>,
    members: Vec<Member>,
    /// Whether the last block read was one of those that end a tar.
    has_end: bool,
    next: Extensions,
}

impl Walk<'_> {
    /// Reads the header at `at`. Returns where the next one is; None at the end of the tar.
    fn step(&mut self, at: u64) -> Result<Option<u64>> {
        if at + BLOCK_BYTES > self.shard.bytes {
            if at < self.shard.bytes {
                self.has_end = false;
            }
            return Ok(None);
        }
        let block = self.shard.read(at..at + BLOCK_BYTES)?;
        if block.iter().all(|&byte| byte == 0) {
            // Tars that were joined have such blocks between them too.
            self.has_end = true;
            return Ok(Some(at + BLOCK_BYTES));
        }
        let header = Header::from_byte_slice(&block);
        if !has_checksum(header) {
            let detail = format!("at byte {at} it has no header of a member");
            self.bad(&detail);
            return Ok(None);
        }
        self.has_end = false;
        let Some(bytes) = self.bytes_of(header) else {
            self.bad(&format!("the header at byte {at} has no length"));
            return Ok(None);
        };
        let offset = at + BLOCK_BYTES;
        let end = offset
            .checked_add(bytes)
            .filter(|end| *end <= self.shard.bytes);
        let Some(end) = end else {
            return Ok(self.cut(header, offset, bytes));
        };
        self.take(header, offset..end)?;
        Ok(Some(end.next_multiple_of(BLOCK_BYTES)))
    }

    /// Length of the member after `header`: extensions have precedence.
    fn bytes_of(&self, header: &Header) -> Option<u64> {
        match self.next.bytes {
            Some(bytes) if !is_extension(header.entry_type()) => Some(bytes),
            _ => header.entry_size().ok(),
        }
    }

    /// Takes the member or the extension in `range`.
    fn take(&mut self, header: &Header, range: std::ops::Range<u64>) -> Result<()> {
        match header.entry_type() {
            EntryType::GNULongName => {
                let mut name = self.extension(range)?;
                while name.last() == Some(&0) {
                    name.pop();
                }
                self.next.name = Some(name);
            }
            EntryType::XHeader => {
                let table = self.extension(range)?;
                self.read_pax(&table);
            }
            EntryType::GNULongLink | EntryType::XGlobalHeader => {}
            kind => {
                let next = std::mem::take(&mut self.next);
                let name = next
                    .name
                    .unwrap_or_else(|| header.path_bytes().into_owned());
                self.add(name, kind, next.is_sparse, range);
            }
        }
        Ok(())
    }

    fn extension(&self, range: std::ops::Range<u64>) -> Result<Vec<u8>> {
        let end = range.end.min(range.start + MAX_EXTENSION_BYTES);
        Ok(self.shard.read(range.start..end)?.to_vec())
    }

    fn read_pax(&mut self, table: &[u8]) {
        for extension in PaxExtensions::new(table).flatten() {
            match extension.key_bytes() {
                b"path" => self.next.name = Some(extension.value_bytes().to_vec()),
                b"size" => {
                    let value = std::str::from_utf8(extension.value_bytes()).ok();
                    self.next.bytes = value.and_then(|value| value.parse().ok());
                }
                key => self.next.is_sparse |= key.starts_with(b"GNU.sparse."),
            }
        }
    }

    fn add(
        &mut self,
        name: Vec<u8>,
        kind: EntryType,
        is_sparse: bool,
        range: std::ops::Range<u64>,
    ) {
        let name = match String::from_utf8(name) {
            Ok(name) => name.trim_start_matches("./").to_owned(),
            Err(error) => {
                let name = String::from_utf8_lossy(error.as_bytes()).into_owned();
                let detail = format!("its name is not UTF-8: {name:?}");
                return self.remark(&name, Reason::UnreadableName, detail);
            }
        };
        match kind {
            EntryType::Regular | EntryType::Continuous if !is_sparse => self.members.push(Member {
                name,
                offset: range.start,
                bytes: range.end - range.start,
                sha256: None,
                listed_px: [0; 2],
                text: None,
            }),
            EntryType::Directory => {}
            kind => {
                let what = if is_sparse {
                    "a sparse file".to_owned()
                } else {
                    kind_name(kind)
                };
                let detail = format!("{what}, which is not read: only regular files are");
                self.remark(&name, Reason::BadShard, detail);
            }
        }
    }

    /// A member whose bytes go beyond the end of the tar.
    fn cut(&mut self, header: &Header, offset: u64, bytes: u64) -> Option<u64> {
        let next = std::mem::take(&mut self.next);
        let name = next
            .name
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let name = String::from_utf8_lossy(&name).into_owned();
        let have = self.shard.bytes - offset;
        let detail = format!(
            "the tar ends after {have} of its {bytes} bytes: it is truncated; copy it again"
        );
        self.remark(&name, Reason::Truncated, detail);
        self.has_end = true;
        None
    }

    fn truncated(&mut self, at: u64) {
        let detail = format!(
            "it ends at byte {at} of {} without the empty blocks that end a tar: members may be \
             missing; copy it again",
            self.shard.bytes
        );
        self.remarks
            .push(Remark::new(&self.shard.name, Reason::Truncated, detail));
    }

    fn bad(&mut self, what: &str) {
        let detail = format!(
            "{what}: it is damaged, or no tar; of its {} bytes the {} members before are read",
            self.shard.bytes,
            self.members.len()
        );
        self.remarks
            .push(Remark::new(&self.shard.name, Reason::BadShard, detail));
        self.has_end = true;
    }

    fn remark(&mut self, member: &str, reason: Reason, detail: String) {
        let path = format!("{}/{member}", self.shard.name);
        self.remarks.push(Remark::new(path, reason, detail));
    }
}

fn is_extension(kind: EntryType) -> bool {
    matches!(
        kind,
        EntryType::GNULongName
            | EntryType::GNULongLink
            | EntryType::XHeader
            | EntryType::XGlobalHeader
    )
}

fn kind_name(kind: EntryType) -> String {
    match kind {
        EntryType::Link => "a hard link".to_owned(),
        EntryType::Symlink => "a symbolic link".to_owned(),
        EntryType::GNUSparse => "a sparse file".to_owned(),
        other => format!("a member of kind {:?}", char::from(other.as_byte())),
    }
}

/// Compares a member with the header in front of it, as an index has them: `block` is the 512 bytes
/// before the member.
///
/// # Errors
/// What differs.
pub(crate) fn check(block: &[u8], name: &str, bytes: u64) -> std::result::Result<(), String> {
    if !is_header(block) {
        return Err("no header of a member stands before it".to_owned());
    }
    let header = Header::from_byte_slice(block);
    let kind = header.entry_type();
    if !matches!(kind, EntryType::Regular | EntryType::Continuous) {
        return Err(format!("{} stands there", kind_name(kind)));
    }
    // 8 GiB and more are written in an extension.
    let found = header.entry_size().unwrap_or_default();
    if found != bytes && bytes < 8 << 30 {
        return Err(format!(
            "the tar has {found} bytes there, the index {bytes}"
        ));
    }
    let found = header.path_bytes();
    let found = String::from_utf8_lossy(&found);
    let found = found.trim_start_matches("./");
    // A name that is long or not ASCII is written in an extension, and here in part.
    if found == name || name.len() > 99 || !name.is_ascii() {
        return Ok(());
    }
    Err(format!("the tar has {found:?} there"))
}

/// An error of a shard as a remark, unless another attempt can succeed.
///
/// # Errors
/// [`Error::Remote`]: a shard that cannot be reached is not a shard without samples.
pub(crate) fn remark_of(shard: &Shard, error: Error) -> Result<Remark> {
    let reason = match &error {
        Error::Remote { .. } => return Err(error),
        Error::Io { .. } => Reason::Unreadable,
        _ => Reason::BadShard,
    };
    Ok(Remark::new(&shard.name, reason, error.to_string()))
}
