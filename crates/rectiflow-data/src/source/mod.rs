//! Where pictures and their texts are: a source lists its samples and opens one by its address.
//!
//! A source is a folder of pictures (`folder`), or shards that hold them (`shards`): tars, Parquet,
//! MDS; each on a disk or at a URL. `choice` decides which. Nothing is unpacked or copied; a packed
//! row keeps the address of its picture.
//!
//! In a folder names that begin with a dot are skipped, and so is the data set itself if it is
//! inside. Files behind a symbolic link are read, folders behind one are not. `names` says what a
//! file is; whatever is no caption source can be an image: content decides.
//!
//! Sources of a picture's text, in the order of precedence:
//! 1. JSON beside it: `name.json`, `name.png.json`;
//! 2. captions beside it: `name.caption`;
//! 3. text beside it: `name.txt`, the whole file is one caption;
//! 4. tags beside it: `name.tags`;
//! 5. rows of tables that name it, in its folder or one above it: the nearest folder first, in a
//!    folder `metadata.jsonl`, `metadata.csv` and `metadata.parquet` before other tables;
//! 6. the row of a table of an image board that has its number or hash (`boards`).
//!
//! Members of a tar with its name stand beside a picture (`shards::members`); in Parquet and MDS
//! its own row has its texts. Captions come from the first source with a caption, tags from the
//! first with tags. What another source says differently is listed in `rejected.jsonl`.

pub(crate) mod annotations;
pub(crate) mod boards;
pub mod choice;
pub(crate) mod folder;
pub(crate) mod listing;
#[cfg(test)]
mod mutated;
pub(crate) mod named_path;
pub(crate) mod names;
pub mod no_folder;
pub(crate) mod parquet_rows;
pub(crate) mod rows;
pub mod sample;
pub(crate) mod shards;
pub(crate) mod table;
pub mod texts;
pub(crate) mod tree;
pub(crate) mod walk;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
    time::UNIX_EPOCH,
};

use sha2::{Digest, Sha256};

use crate::{
    board::{TableFile, classes::TagSettings},
    error::{Error, Result},
    format::record::SampleId,
    posts::size,
    reject::{Fault, Reason, Remark},
    remote::{Location, network::Network},
    source::{
        annotations::Annotations,
        boards::{BoardSettings, Boards, Size, named_tables},
        choice::{SourceKind, Survey},
        listing::Listing,
        names::{Kind, Sidecar, stem_of},
        rows::{RowFile, Span, read_span},
        sample::{Place, Sample, Table},
        shards::{
            files::Files,
            mds, parquet_listing,
            parquet_pictures::Pictures,
            shard::Shard,
            tar_headers::{self, BLOCK_BYTES},
            tars,
        },
        texts::{TextReader, Texts},
        tree::Tree,
        walk::{Walk, join},
    },
    text::caption::{MAX_SOURCE_BYTES, Reading},
};

/// Requests at a time for the samples of shards at a URL.
const FAR_THREADS: usize = 16;

/// The pictures of a place, and their texts.
#[derive(Debug)]
pub struct Source {
    /// Where the files are, if it is a folder of pictures.
    tree: Tree,
    reading: Reading,
    /// In a fixed order: of a folder that of the walk, by name in each folder, subfolders in their
    /// place among the files; of shards by name and place.
    pub(crate) samples: Vec<Sample>,
    /// Remarks about names, links and caption sources.
    pub(crate) remarks: Vec<Remark>,
    /// Notes about what is used all the same.
    pub(crate) notes: Vec<Remark>,
    tables: Vec<Table>,
    /// The rows of tables that are not JSON lines.
    rows: File,
    shards: Vec<Arc<Shard>>,
    /// Of Parquet the reader of each shard.
    pictures: Vec<Pictures>,
    /// Tables of image boards, and the filter.
    pub(crate) boards: Boards,
    /// What models say about the pictures.
    pub(crate) annotations: Annotations,
}

/// What says whether a picture is the same as at an earlier time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Its length; 0 if that is not known without reading it.
    pub(crate) bytes: u64,
    /// Modification time of its file; at a URL also a hash of its tag.
    pub(crate) version: u128,
}

impl Source {
    /// Lists the samples of `place`, a path or a URL, without the data set in `out`, where rows of
    /// tables are kept. No picture is read.
    ///
    /// # Errors
    /// [`Error::Io`] if `place` itself cannot be read; [`Error::Remote`] if anything at a URL
    /// cannot be reached; [`Error::Invalid`] if it is no source, or several. What is wrong deeper
    /// down becomes a remark.
    pub fn list(place: &Path, out: &Path, kind: SourceKind, reading: Reading) -> Result<Self> {
        let tags = TagSettings::default();
        let boards = BoardSettings {
            tables: &[],
            tags: &tags,
            filter: "",
        };
        Self::with_tables(place, (out, &out.join("prep")), kind, reading, &boards)
    }

    /// As [`Source::list`], with the tables of image boards and the filter of these settings. Rows
    /// of tables are kept in the folder `work`, in a file without a name.
    ///
    /// # Errors
    /// Also [`Error::Invalid`] if a table that the settings name, or the filter, cannot be used.
    pub(crate) fn with_tables(
        place: &Path,
        (out, work): (&Path, &Path),
        kind: SourceKind,
        reading: Reading,
        settings: &BoardSettings<'_>,
    ) -> Result<Self> {
        // `file://` is a folder or a file on this machine.
        let local = match Location::parse(place, &Network::default())? {
            Location::Folder(path) => path,
            Location::Remote(_) => place.to_owned(),
        };
        let row_file = RowFile::create(work).map_err(Error::io(work))?;
        let mut tree = Tree::at(&local, work)?;
        let mut tables = named_tables(&mut tree, settings)?;
        let mut listing = list(&local, (out, work), kind, &mut tree, &mut tables, row_file)?;
        let names = listing.samples.iter().map(|sample| sample.path.as_str());
        let boards = Boards::open(tables, names, work, settings, &mut listing.remarks)?;
        tree.forget();
        Ok(Self {
            tree,
            reading,
            samples: listing.samples,
            remarks: listing.remarks,
            notes: listing.notes,
            tables: listing.tables,
            rows: listing.row_file.finish().map_err(Error::io(work))?,
            shards: listing.shards,
            pictures: listing.pictures,
            boards,
            annotations: Annotations::default(),
        })
    }

    /// The samples, in a fixed order.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// What is no sample, and why.
    pub fn remarks(&self) -> &[Remark] {
        &self.remarks
    }

    /// Reads the bytes of a picture.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub fn open(&self, sample: &Sample) -> std::result::Result<Vec<u8>, Fault> {
        match sample.place {
            Place::File | Place::Object { .. } => self.tree.read(&sample.path),
            Place::Bytes {
                shard,
                offset,
                bytes,
                by_index,
            } => {
                let shard = &self.shards[shard as usize];
                if by_index {
                    return read_indexed(shard, sample, offset, bytes);
                }
                read_bytes(shard, offset, bytes)
            }
            Place::Row { shard, row } => {
                let number = shard as usize;
                self.pictures[number].read(&self.shards[number], row)
            }
        }
    }

    /// The stamp of a picture.
    pub(crate) fn stamp(&self, sample: &Sample) -> std::result::Result<Stamp, Fault> {
        match sample.place {
            Place::File => stamp_of(&self.path(&sample.path)),
            Place::Object { bytes, version } => {
                let (bytes, version) = match version {
                    0 => self.tree.ask(&sample.path)?,
                    _ => (bytes, version),
                };
                Ok(Stamp {
                    bytes,
                    version: version.into(),
                })
            }
            Place::Bytes { shard, .. } | Place::Row { shard, .. } => Ok(Stamp {
                bytes: sample.size_bytes().unwrap_or_default(),
                version: self.shards[shard as usize].version,
            }),
        }
    }

    /// The text of a picture, if it has any, and remarks about its caption sources.
    pub fn text(&self, sample: &Sample) -> Texts {
        let mut texts = TextReader::new(&self.reading);
        for sidecar in &sample.sidecars {
            let (name, bytes) = self.read_sidecar(sample, sidecar);
            texts.add(name, sidecar.kind, bytes);
        }
        for line in &sample.lines {
            let table = &self.tables[line.table as usize];
            let file = table.file.as_ref().unwrap_or(&self.rows);
            let name = match sample.place {
                Place::File | Place::Object { .. } => format!("{}:{}", table.path, line.number),
                _ => sample.path.clone(),
            };
            texts.add(name, Kind::Json, read_span(file, line.span));
        }
        let mut remarks = Vec::new();
        let post = self.boards.post(&sample.path, &mut remarks);
        if let Some(post) = &post {
            let text = self.boards.text(post, &self.reading);
            if !text.is_empty() || !text.quality.is_empty() {
                texts.add_text(post.address.clone(), text);
            }
        }
        let mut texts = texts.finish(&sample.path);
        texts.remarks.extend(remarks);
        texts.post = post;
        texts
    }

    /// As [`Source::text`], with what tables of annotations say about the picture `id`.
    pub(crate) fn text_of(&self, sample: &Sample, id: SampleId) -> Texts {
        let mut texts = self.text(sample);
        let mut text = texts.text.unwrap_or_default();
        self.annotations.merge(id, &mut text, &self.reading);
        let has_text = !text.is_empty() || !text.quality.is_empty();
        texts.text = has_text.then_some(text);
        texts
    }

    /// The clause of the filter that removes an image of this size with these texts. None if it is
    /// kept.
    pub(crate) fn removed_by(&self, texts: &Texts, width_px: u32, height_px: u32) -> Option<usize> {
        let size = Size {
            width_px,
            height_px,
        };
        let post = texts.post.as_ref();
        self.boards.removed_by(size, texts.text.as_ref(), post)
    }

    /// Width and height of a picture in pixels as its index or a row of a table says. None if none
    /// does.
    pub(crate) fn listed_size(&self, sample: &Sample) -> Option<(u32, u32)> {
        let [width, height] = sample.listed_px;
        if width > 0 && height > 0 {
            return Some((width, height));
        }
        // What is wrong with a row is said when its text is read.
        let post = self.boards.post(&sample.path, &mut Vec::new());
        if let Some(size) = post.and_then(|post| size::of(&post.row)) {
            return Some(size);
        }
        for line in &sample.lines {
            let table = &self.tables[line.table as usize];
            let file = table.file.as_ref().unwrap_or(&self.rows);
            let bytes = read_span(file, line.span).ok()?;
            let row = serde_json::from_slice(&bytes).ok()?;
            if let Some(size) = size::of(&row) {
                return Some(size);
            }
        }
        None
    }

    /// The name of a caption file beside a picture, and its bytes.
    fn read_sidecar(
        &self,
        sample: &Sample,
        sidecar: &Sidecar,
    ) -> (String, std::result::Result<Vec<u8>, String>) {
        if let (Place::Bytes { shard, .. }, Some(span)) = (sample.place, sidecar.span) {
            let shard = &self.shards[shard as usize];
            let name = join(&shard.name, &sidecar.name);
            return (name, read_text(shard, span));
        }
        let folder = sample
            .path
            .rsplit_once('/')
            .map_or("", |(folder, _)| folder);
        let name = join(folder, &sidecar.name);
        let bytes = self.tree.text(&name, MAX_SOURCE_BYTES);
        (name, bytes)
    }

    /// Why a picture has no text: what could have been there, and what is there.
    pub(crate) fn missing_text(&self, sample: &Sample) -> String {
        let stem = stem_of(&sample.path);
        let name = stem.rsplit('/').next().unwrap_or(&stem);
        let no_row = self.boards.without_row();
        match sample.place {
            Place::File | Place::Object { .. } => {}
            Place::Bytes { .. } if !sample.path.contains('#') => {
                return format!(
                    "it has no text: the tar has no member {name}.txt, .caption, .tags or .json \
                     with text{no_row}"
                );
            }
            _ => return format!("it has no text: no column of its row has any{no_row}"),
        }
        let mut detail = format!(
            "it has no text: there is no {name}.txt, .caption, .tags or .json with text beside it, \
             and no row of a metadata table names it"
        );
        detail += &no_row;
        for ending in names::UNREAD_ENDINGS {
            let other = format!("{stem}{ending}");
            if self
                .tree
                .local()
                .is_some_and(|root| root.join(&other).exists())
            {
                detail += &format!("; {other} is of a kind that is not read");
            }
        }
        detail
    }

    /// The full path of a file in a folder of pictures on this machine.
    fn path(&self, relative: &str) -> PathBuf {
        let root = self.tree.local();
        root.expect("files are on this machine").join(relative)
    }

    /// Runs work that opens many samples on as many threads as the source can serve: at a URL more
    /// than the processor has, since they wait for answers.
    pub(crate) fn on_threads<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let is_far = self.tree.is_far() || self.shards.first().is_some_and(|it| it.is_far());
        on_threads(is_far, work)
    }
}

fn on_threads<T: Send>(is_far: bool, work: impl FnOnce() -> T + Send) -> T {
    if !is_far || rayon::current_num_threads() >= FAR_THREADS {
        return work();
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(FAR_THREADS);
    pool.build()
        .expect("the process can start threads")
        .install(work)
}

/// Lists a place of a kind that is known or found out.
fn list(
    place: &Path,
    (out, work): (&Path, &Path),
    kind: SourceKind,
    tree: &mut Tree,
    boards: &mut Vec<TableFile>,
    row_file: RowFile,
) -> Result<Listing> {
    let files = match kind {
        SourceKind::Folder if !tree.is_far() => None,
        kind => Some(Files::of(place, out, kind != SourceKind::Auto)?),
    };
    let survey = files.as_ref().map(Survey::of).unwrap_or_default();
    let kind = match (&files, kind) {
        (Some(files), SourceKind::Auto) => survey.kind(files, place)?,
        (_, kind) => kind,
    };
    if kind == SourceKind::Folder {
        let walk = match files.filter(|_| tree.is_far()) {
            Some(files) => far_walk(files, tree, work)?,
            None => {
                no_folder::refuse_shards(place)?;
                fs::read_dir(place).map_err(Error::io(place))?;
                Walk::over(place, out)
            }
        };
        return folder::list(tree, walk, boards, row_file);
    }
    let files = files.expect("shards are files");
    let uses_index = kind == SourceKind::Tar;
    match kind {
        SourceKind::Parquet => parquet_listing::list(&files, &survey.parquets, row_file),
        SourceKind::Mds => mds::list(&files, &survey.indexes, row_file),
        _ => on_threads(files.is_far(), || {
            tars::list(
                &files,
                &survey.tars,
                &survey.compressed,
                uses_index,
                row_file,
            )
        }),
    }
}

/// A walk over the objects at a URL: all that the store lists, or those that its tables name.
fn far_walk(files: Files, tree: &mut Tree, work: &Path) -> Result<Walk> {
    let names = files.names.clone();
    let Some(objects) = files.into_listed() else {
        return folder::named(tree, &names, work);
    };
    // A folder can be an object without bytes, for programs that show folders.
    let mut paths = Vec::new();
    for object in &objects {
        let below = format!("{}/", object.name);
        let at = names.partition_point(|name| *name < below);
        let is_folder = names.get(at).is_some_and(|name| name.starts_with(&below));
        if object.bytes > 0 || !is_folder {
            paths.push(object.name.as_str());
        }
    }
    let walk = Walk::over_names(paths.into_iter());
    tree.remember(objects);
    Ok(walk)
}

/// Reads a picture at a place that an index says, with the header before it, which is compared.
fn read_indexed(
    shard: &Shard,
    sample: &Sample,
    offset: u64,
    bytes: u64,
) -> std::result::Result<Vec<u8>, Fault> {
    let mut found = read_bytes(shard, offset - BLOCK_BYTES, bytes + BLOCK_BYTES)?;
    let picture = found.split_off(BLOCK_BYTES as usize);
    let name = &sample.path[shard.name.len() + 1..];
    tar_headers::check(&found, name, bytes).map_err(|reason| {
        let detail = format!("the index says that it begins at byte {offset}: {reason}");
        Fault::new(Reason::BadIndex, detail)
    })?;
    if let Some(expected) = sample.sha256()
        && Sha256::digest(&picture).as_slice() != expected
    {
        let detail =
            "its bytes have another SHA-256 than the index says: one of the two is damaged";
        return Err(Fault::new(Reason::BadIndex, detail));
    }
    Ok(picture)
}

fn read_bytes(shard: &Shard, offset: u64, bytes: u64) -> std::result::Result<Vec<u8>, Fault> {
    match shard.read(offset..offset + bytes) {
        Ok(bytes) => Ok(bytes.into()),
        Err(error) => Err(Fault::new(Reason::Unreadable, error.to_string())),
    }
}

/// Reads a text in a shard.
fn read_text(shard: &Shard, span: Span) -> std::result::Result<Vec<u8>, String> {
    if u64::from(span.len) > MAX_SOURCE_BYTES {
        return Err(format!("it is longer than {MAX_SOURCE_BYTES} bytes"));
    }
    let bytes = shard.read(span.offset..span.offset + u64::from(span.len));
    bytes.map(Into::into).map_err(|error| error.to_string())
}

/// The stamp of a file, which must be a regular one.
fn stamp_of(path: &Path) -> std::result::Result<Stamp, Fault> {
    let unreadable = |error: std::io::Error| Fault::new(Reason::Unreadable, error.to_string());
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        // Reading a pipe or a device could block or never end.
        return Err(Fault::new(Reason::Unreadable, "it is not a regular file"));
    }
    let modified = metadata.modified().map_err(unreadable)?;
    let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Stamp {
        bytes: metadata.len(),
        version: since.as_nanos(),
    })
}
