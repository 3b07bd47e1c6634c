//! The container of AVIF: boxes of ISO/IEC 14496-12, and the items, references and properties of
//! HEIF (ISO/IEC 23008-12) that a still picture has.
//!
//! Read here and not by a crate: avif-parse and mp4parse are MPL-2.0, and mp4-atom with what it
//! depends on compiles as long as the AV1 decoder. Boxes that no picture needs are skipped. Every
//! length is compared with the bytes that are there, so that no file makes this code reserve
//! memory.

use std::ops::Range;

use image::metadata::Orientation;

use crate::reject::{Fault, Reason};

/// Most entries of a table of a file: items, places, properties, references. A picture of 1,000
/// tiles has 5,000.
const MOST_ENTRIES: usize = 1 << 14;

/// A four-letter name of a box, an item or a reference.
type Name = [u8; 4];

/// The items of a file.
#[derive(Debug, Default)]
pub(crate) struct Items<'a> {
    file: &'a [u8],
    /// The box `idat`, in which items can be.
    inline: &'a [u8],
    primary: u32,
    infos: Vec<(u32, Name)>,
    places: Vec<Extents>,
    properties: Vec<(Name, &'a [u8])>,
    /// Item, index of its property from 1, and whether a reader must know the property.
    associations: Vec<(u32, usize, bool)>,
    /// Name, from which item, to which.
    references: Vec<(Name, u32, u32)>,
}

/// Where an item's bytes are.
#[derive(Debug)]
struct Extents {
    item: u32,
    is_inline: bool,
    ranges: Vec<(u64, u64)>,
}

/// What the properties of an item say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Properties {
    /// Width and height in pixels, as stored.
    pub(crate) size: (u32, u32),
    /// How its samples become colours, if the container says so.
    pub(crate) coding: Option<Coding>,
    /// An ICC profile.
    pub(crate) profile: Option<Vec<u8>>,
    /// Quarter turns, anticlockwise.
    turns: u8,
    /// 0: top and bottom are exchanged, 1: left and right.
    mirror: Option<u8>,
    /// The operating point of a layered picture.
    pub(crate) operating_point: u32,
    /// Its role if it belongs to another item.
    role: Vec<u8>,
}

/// Code points of ITU-T H.273.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Coding {
    pub(crate) primaries: u16,
    pub(crate) transfer: u16,
    pub(crate) matrix: u16,
    pub(crate) is_full_range: bool,
}

/// A picture that is stored as tiles: rows and columns of them, and the size of the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) size: (u32, u32),
}

/// Whether these are the first bytes of a file that says to be AVIF.
pub(crate) fn is_avif(bytes: &[u8]) -> bool {
    if bytes.get(4..8) != Some(b"ftyp") {
        return false;
    }
    let mut boxes = Boxes(bytes);
    let Ok(Some((_, brands))) = boxes.next() else {
        return matches!(bytes.get(8..12), Some(b"avif" | b"avis"));
    };
    let mut brands = brands.chunks_exact(4);
    brands.any(|brand| brand == b"avif" || brand == b"avis")
}

impl<'a> Items<'a> {
    /// Reads the items of a file.
    ///
    /// # Errors
    /// The file's fault.
    pub(crate) fn new(file: &'a [u8]) -> Result<Self, Fault> {
        let mut boxes = Boxes(file);
        while let Some((name, body)) = boxes.next()? {
            if &name == b"meta" {
                let mut items = Self {
                    file,
                    ..Self::default()
                };
                items.read_meta(Bytes(body))?;
                return Ok(items);
            }
        }
        Err(broken(
            "it has no items: it may be a film without a still picture".to_owned(),
        ))
    }

    fn read_meta(&mut self, mut meta: Bytes<'a>) -> Result<(), Fault> {
        meta.take(4)?;
        let mut boxes = Boxes(meta.0);
        while let Some((name, body)) = boxes.next()? {
            let mut body = Bytes(body);
            match &name {
                b"pitm" => {
                    let version = body.version()?;
                    self.primary = body.id(version > 0)?;
                }
                b"iinf" => self.read_infos(body)?,
                b"iloc" => self.read_places(body)?,
                b"iprp" => self.read_properties(body)?,
                b"iref" => self.read_references(body)?,
                b"idat" => self.inline = body.0,
                _ => {}
            }
        }
        Ok(())
    }

    fn read_infos(&mut self, mut body: Bytes<'a>) -> Result<(), Fault> {
        let version = body.version()?;
        body.id(version > 0)?;
        let mut boxes = Boxes(body.0);
        while let Some((name, entry)) = boxes.next()? {
            let mut entry = Bytes(entry);
            let version = entry.version()?;
            // Earlier versions have no type, and no picture is one.
            if &name == b"infe" && version >= 2 {
                let item = entry.id(version > 2)?;
                entry.take(2)?;
                self.infos.push((item, entry.name()?));
                check_number(self.infos.len())?;
            }
        }
        Ok(())
    }

    fn read_places(&mut self, mut body: Bytes<'a>) -> Result<(), Fault> {
        let version = body.version()?;
        let sizes = body.number(2)?;
        let width = |shift: u32| ((sizes >> shift) & 15) as usize;
        let num_items = body.id(version > 1)?;
        let mut num_ranges = 0;
        for _ in 0..num_items {
            let item = body.id(version > 1)?;
            let method = if version > 0 { body.number(2)? & 15 } else { 0 };
            body.take(2)?;
            let base = body.number(width(4))?;
            let num_extents = body.number(2)?;
            let mut ranges = Vec::new();
            for _ in 0..num_extents {
                if version > 0 {
                    body.number(width(0))?;
                }
                let offset = body.number(width(12))?;
                let length = body.number(width(8))?;
                ranges.push((base.saturating_add(offset), length));
                num_ranges += 1;
                check_number(num_ranges)?;
            }
            // What is made of parts of other items is no picture of AVIF.
            if method < 2 {
                self.places.push(Extents {
                    item,
                    is_inline: method == 1,
                    ranges,
                });
                check_number(self.places.len())?;
            }
        }
        Ok(())
    }

    fn read_properties(&mut self, body: Bytes<'a>) -> Result<(), Fault> {
        let mut boxes = Boxes(body.0);
        while let Some((name, body)) = boxes.next()? {
            match &name {
                b"ipco" => {
                    let mut properties = Boxes(body);
                    while let Some(property) = properties.next()? {
                        self.properties.push(property);
                        check_number(self.properties.len())?;
                    }
                }
                b"ipma" => self.read_associations(Bytes(body))?,
                _ => {}
            }
        }
        Ok(())
    }

    fn read_associations(&mut self, mut body: Bytes<'a>) -> Result<(), Fault> {
        let head = body.number(4)?;
        let (version, has_wide_indexes) = (head >> 24, head & 1 == 1);
        let num_items = body.number(4)?;
        for _ in 0..num_items {
            let item = body.id(version > 0)?;
            let num_properties = body.number(1)?;
            for _ in 0..num_properties {
                let bits = if has_wide_indexes { 15 } else { 7 };
                let entry = body.number(if has_wide_indexes { 2 } else { 1 })?;
                let index = (entry & ((1 << bits) - 1)) as usize;
                self.associations.push((item, index, entry >> bits == 1));
                check_number(self.associations.len())?;
            }
        }
        Ok(())
    }

    fn read_references(&mut self, mut body: Bytes<'a>) -> Result<(), Fault> {
        let version = body.version()?;
        let mut boxes = Boxes(body.0);
        while let Some((name, body)) = boxes.next()? {
            let mut body = Bytes(body);
            let from = body.id(version > 0)?;
            let num_items = body.number(2)?;
            for _ in 0..num_items {
                self.references.push((name, from, body.id(version > 0)?));
                check_number(self.references.len())?;
            }
        }
        Ok(())
    }

    /// The picture that is to be shown.
    pub(crate) fn primary(&self) -> u32 {
        self.primary
    }

    /// The type of an item: `av01` is a picture, `grid` one of tiles.
    pub(crate) fn kind(&self, item: u32) -> Name {
        let info = self.infos.iter().find(|(id, _)| *id == item);
        info.map_or(*b"    ", |(_, name)| *name)
    }

    /// The tiles of a grid, row by row.
    pub(crate) fn tiles(&self, grid: u32) -> Vec<u32> {
        let references = self.references.iter();
        let of_grid = references.filter(|(name, from, _)| name == b"dimg" && *from == grid);
        of_grid.map(|(_, _, tile)| *tile).collect()
    }

    /// The item with the opacity of a picture, and whether its colours are multiplied by it.
    pub(crate) fn alpha_of(&self, picture: u32) -> Result<Option<(u32, bool)>, Fault> {
        for (name, from, to) in &self.references {
            if name != b"auxl" || *to != picture {
                continue;
            }
            let role = self.properties_of(*from)?.role;
            let roles: [&[u8]; 2] = [
                b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha",
                b"urn:mpeg:hevc:2015:auxid:1",
            ];
            if roles.contains(&role.as_slice()) {
                let is_multiplied = self.references.contains(&(*b"prem", picture, *from));
                return Ok(Some((*from, is_multiplied)));
            }
        }
        Ok(None)
    }

    /// The bytes of an item.
    ///
    /// # Errors
    /// A fault if they are not in the file.
    pub(crate) fn bytes(&self, item: u32) -> Result<Vec<u8>, Fault> {
        let place = self.places.iter().find(|place| place.item == item);
        let place = place.ok_or_else(|| broken(format!("item {item} is nowhere in the file")))?;
        let from = if place.is_inline {
            self.inline
        } else {
            self.file
        };
        let mut bytes = Vec::new();
        for &(offset, length) in &place.ranges {
            let part = range_of(offset, length, from.len()).and_then(|range| from.get(range));
            let part = part.ok_or_else(|| {
                let place = format!("{length} bytes from byte {offset} on");
                broken(format!("it ends in the middle: item {item} has {place}"))
            })?;
            // Extents may overlap: a file of a few kilobytes could fill the memory.
            if bytes.len() + part.len() > from.len() {
                return Err(broken(format!("item {item} is longer than the file")));
            }
            bytes.extend_from_slice(part);
        }
        if bytes.is_empty() {
            return Err(broken(format!("item {item} has no bytes")));
        }
        Ok(bytes)
    }

    /// The layout of an item that is a grid.
    ///
    /// # Errors
    /// The file's fault.
    pub(crate) fn grid(&self, item: u32) -> Result<Grid, Fault> {
        let bytes = self.bytes(item)?;
        let mut bytes = Bytes(&bytes);
        let has_wide_sides = bytes.number(2)? & 1 == 1;
        let rows = bytes.number(1)? as usize + 1;
        let columns = bytes.number(1)? as usize + 1;
        let width = bytes.number(if has_wide_sides { 4 } else { 2 })?;
        let height = bytes.number(if has_wide_sides { 4 } else { 2 })?;
        Ok(Grid {
            rows,
            columns,
            size: (width as u32, height as u32),
        })
    }

    /// What the properties of an item say.
    ///
    /// # Errors
    /// The file's fault, also for a property that a reader must know and this one does not.
    pub(crate) fn properties_of(&self, item: u32) -> Result<Properties, Fault> {
        let mut found = Properties::default();
        for &(of, index, is_essential) in &self.associations {
            if of != item || index == 0 {
                continue;
            }
            let property = self.properties.get(index - 1);
            let (name, body) =
                property.ok_or_else(|| broken(format!("it has no property {index}")))?;
            let mut body = Bytes(body);
            match name {
                b"ispe" => {
                    body.take(4)?;
                    found.size = (body.number(4)? as u32, body.number(4)? as u32);
                }
                b"colr" => found.add_colour(body)?,
                b"irot" => found.turns = body.number(1)? as u8 & 3,
                b"imir" => found.mirror = Some(body.number(1)? as u8 & 1),
                b"a1op" => found.operating_point = body.number(1)? as u32 & 31,
                b"auxC" => {
                    body.take(4)?;
                    let end = body.0.iter().position(|&byte| byte == 0);
                    found.role = body.take(end.unwrap_or(body.0.len()))?.to_vec();
                }
                b"av1C" | b"pixi" | b"pasp" => {}
                other if is_essential || other == b"clap" => {
                    let name = String::from_utf8_lossy(other);
                    let detail = format!(
                        "AVIF with the property {name} is not supported: convert it to PNG"
                    );
                    return Err(Fault::new(Reason::UnsupportedFormat, detail));
                }
                _ => {}
            }
        }
        Ok(found)
    }
}

impl Properties {
    fn add_colour(&mut self, mut body: Bytes<'_>) -> Result<(), Fault> {
        match &body.name()? {
            b"nclx" => {
                self.coding = Some(Coding {
                    primaries: body.number(2)? as u16,
                    transfer: body.number(2)? as u16,
                    matrix: body.number(2)? as u16,
                    is_full_range: body.number(1)? >> 7 == 1,
                });
            }
            b"prof" | b"rICC" => self.profile = Some(body.0.to_vec()),
            _ => {}
        }
        Ok(())
    }

    /// How the picture is turned upright: turned first, mirrored then.
    pub(crate) fn orientation(&self) -> Orientation {
        use Orientation as O;
        let [plain, top_and_bottom, left_and_right] = match self.turns {
            0 => [O::NoTransforms, O::FlipVertical, O::FlipHorizontal],
            1 => [O::Rotate270, O::Rotate90FlipH, O::Rotate270FlipH],
            2 => [O::Rotate180, O::FlipHorizontal, O::FlipVertical],
            _ => [O::Rotate90, O::Rotate270FlipH, O::Rotate90FlipH],
        };
        match self.mirror {
            None => plain,
            Some(0) => top_and_bottom,
            Some(_) => left_and_right,
        }
    }
}

/// The boxes in some bytes.
struct Boxes<'a>(&'a [u8]);

impl<'a> Boxes<'a> {
    /// The next box: its name and what it holds. None at the end.
    fn next(&mut self) -> Result<Option<(Name, &'a [u8])>, Fault> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let mut bytes = Bytes(self.0);
        let short = bytes.number(4)?;
        let name = bytes.name()?;
        let length = match short {
            0 => self.0.len() as u64, // to the end of the file
            1 => bytes.number(8)?,
            length => length,
        };
        let head = self.0.len() - bytes.0.len();
        let body = usize::try_from(length)
            .ok()
            .and_then(|end| self.0.get(head..end));
        let body = body.ok_or_else(|| {
            let name = String::from_utf8_lossy(&name);
            let left = self.0.len();
            broken(format!(
                "it ends in the middle: the box {name:?} has {length} bytes, and {left} are there"
            ))
        })?;
        self.0 = &self.0[length as usize..];
        Ok(Some((name, body)))
    }
}

/// Bytes that are taken from the front.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, num: usize) -> Result<&'a [u8], Fault> {
        let (taken, rest) = self
            .0
            .split_at_checked(num)
            .ok_or_else(|| broken("a box ends in the middle".to_owned()))?;
        self.0 = rest;
        Ok(taken)
    }

    /// A number of at most eight bytes; 0 if it has none.
    fn number(&mut self, num_bytes: usize) -> Result<u64, Fault> {
        if num_bytes > 8 {
            return Err(broken(format!("it has numbers of {num_bytes} bytes")));
        }
        let bytes = self.take(num_bytes)?;
        Ok(bytes
            .iter()
            .fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    /// The number of an item, or of items: of four bytes or of two.
    fn id(&mut self, is_wide: bool) -> Result<u32, Fault> {
        Ok(self.number(if is_wide { 4 } else { 2 })? as u32)
    }

    /// The version of a box, and past its flags.
    fn version(&mut self) -> Result<u64, Fault> {
        Ok(self.number(4)? >> 24)
    }

    fn name(&mut self) -> Result<Name, Fault> {
        let bytes = self.take(4)?;
        Ok(bytes.try_into().expect("four bytes were taken"))
    }
}

/// The bytes of an extent in a file of `len` bytes; one without a length goes to the end.
fn range_of(offset: u64, length: u64, len: usize) -> Option<Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    let end = match length {
        0 => len,
        _ => start.checked_add(usize::try_from(length).ok()?)?,
    };
    (start <= end).then_some(start..end)
}

fn check_number(num: usize) -> Result<(), Fault> {
    if num > MOST_ENTRIES {
        return Err(broken(format!("it has more than {MOST_ENTRIES} entries")));
    }
    Ok(())
}

fn broken(reason: String) -> Fault {
    Fault::new(Reason::Broken, reason)
}
