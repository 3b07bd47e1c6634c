//! `manifest.json`: together with the block table that it names, everything that a reader must know
//! before it reads data.
//!
//! The manifest is small: one entry per object of up to 512 MiB. It is untrusted input:
//! [`Manifest::parse`] checks every rule that later arithmetic relies on. `docs/format.md` is the
//! specification.

use std::{collections::HashSet, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    durable,
    error::{Error, Result},
    format::{
        block_table::{
            BLOCK_ROWS, Block, BlockTable, BlockTableFile, FIRST_VERSION, FORMAT_VERSION,
            read_at_most, table_bytes,
        },
        bucket::{Bucket, Geometry},
    },
};

/// Name of the manifest inside a data set.
pub const MANIFEST_FILE: &str = "manifest.json";
/// The value of `format` in every manifest.
pub const FORMAT: &str = "rectiflow-dataset";
/// Bytes before the first latent in a latents object: safetensors' length word and padded header.
pub const LATENTS_OFFSET: u64 = 512;
/// The largest latents file, except one of a single row.
pub const MAX_OBJECT_BYTES: u64 = 512 << 20;

pub(crate) const MAX_MANIFEST_BYTES: u64 = 256 << 20;
const MAX_BUCKETS: usize = 65_536;

/// The side of the test split that rows are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Used for training.
    Train,
    /// Held out for the test loss.
    Test,
}

/// The VAE that encoded the latents: what a model needs to know to use them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Codec {
    /// The VAE's name, for display only.
    pub vae: String,
    /// Hex BLAKE3 of the VAE's weights: latents of different VAEs are not interchangeable.
    pub hash: String,
    /// Factor that multiplies latents before noising; not applied in the data set.
    pub scaling_factor: f64,
    /// Pixels per latent along each side, 8 for SDXL.
    pub down_factor: u32,
    /// Channels of a latent, 4 for SDXL.
    pub channels: u32,
    /// Number format of the stored latents: always "F16".
    pub dtype: String,
}

/// Rows of one bucket and split that are stored together: a latents file and a text file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object {
    /// Index of the bucket.
    pub bucket: u32,
    /// Side of the test split.
    pub split: Split,
    /// Rows in both files, deleted ones included.
    pub rows: u32,
    /// The latents file, relative to the data set.
    pub latents: String,
    /// The text file, relative to the data set. Its name changes when captions do.
    pub text: String,
    /// Length of the text file.
    pub text_bytes: u64,
    /// Deleted rows as hexadecimal bytes: bit `r % 8` of byte `r / 8` is row r. Absent when there
    /// are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted: Option<String>,
}

/// The description of a packed data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always [`FORMAT`].
    pub format: String,
    /// [`FIRST_VERSION`], or [`FORMAT_VERSION`] if captions have sources.
    pub format_version: u32,
    /// The VAE.
    pub codec: Codec,
    /// How images were fitted into buckets.
    pub geometry: Geometry,
    /// Rows of a block: [`BLOCK_ROWS`].
    pub block_rows: u32,
    /// The block table.
    pub blocks: BlockTableFile,
    /// The buckets that have objects, in order of width and then height.
    pub buckets: Vec<Bucket>,
    /// The objects. A bucket's rows are its objects' rows in this order.
    pub objects: Vec<Object>,
}

impl Object {
    /// Number of blocks. The last one can be shorter than [`BLOCK_ROWS`].
    pub fn num_blocks(&self) -> u32 {
        self.rows.div_ceil(BLOCK_ROWS)
    }

    /// The deleted rows as one bit per row. None if no row is deleted.
    pub fn deleted_bits(&self) -> Option<Vec<u8>> {
        self.deleted.as_deref().and_then(decode_hex)
    }

    /// Number of rows that are not deleted.
    pub fn live_rows(&self) -> u32 {
        let deleted: u32 = self
            .deleted_bits()
            .iter()
            .flatten()
            .map(|byte| byte.count_ones())
            .sum();
        self.rows - deleted
    }

    /// Marks `row` as deleted.
    ///
    /// # Panics
    /// If the object has no such row.
    pub fn delete(&mut self, row: u32) {
        assert!(
            row < self.rows,
            "row {row} of an object of {} rows",
            self.rows
        );
        let mut bits = self
            .deleted_bits()
            .unwrap_or_else(|| vec![0; self.rows.div_ceil(8) as usize]);
        bits[row as usize / 8] |= 1 << (row % 8);
        self.deleted = Some(encode_hex(&bits));
    }

    /// Checks that `deleted` has one bit for each row and names no others.
    fn check_deleted(&self) -> std::result::Result<(), String> {
        let Some(hex) = &self.deleted else {
            return Ok(());
        };
        let name = &self.latents;
        let num_bytes = self.rows.div_ceil(8);
        let bits = decode_hex(hex).filter(|bits| bits.len() == num_bytes as usize);
        let Some(bits) = bits else {
            return Err(format!(
                "{name}: \"deleted\" is not {num_bytes} hexadecimal bytes"
            ));
        };
        let spare = (8 - self.rows % 8) % 8;
        if bits.last().is_some_and(|last| last.leading_zeros() < spare) {
            return Err(format!(
                "{name}: \"deleted\" names rows beyond the last, {}",
                self.rows - 1
            ));
        }
        Ok(())
    }
}

impl Manifest {
    /// A manifest without rows.
    pub fn new(codec: Codec, geometry: Geometry) -> Self {
        let blocks = BlockTableFile {
            file: String::new(),
            bytes: 0,
            hash: String::new(),
        };
        Self {
            format: FORMAT.to_owned(),
            format_version: FIRST_VERSION,
            codec,
            geometry,
            block_rows: BLOCK_ROWS,
            blocks,
            buckets: Vec::new(),
            objects: Vec::new(),
        }
    }

    /// Reads and checks the manifest of the data set at `root`.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::Malformed`] if it breaks a rule of the format.
    pub fn read(root: &Path) -> Result<Self> {
        let path = root.join(MANIFEST_FILE);
        let bytes = read_at_most(&path, MAX_MANIFEST_BYTES, "manifest")?;
        Self::parse(&path, &bytes)
    }

    /// Parses `bytes`, which come from `path`, and checks every rule of the format.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the first broken rule.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        Self::parse_checked(bytes).map_err(|reason| Error::Malformed {
            path: path.into(),
            kind: "manifest",
            reason,
        })
    }

    fn parse_checked(bytes: &[u8]) -> std::result::Result<Self, String> {
        let version: Version = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        version.check()?;
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The manifest's bytes as they are written and hashed.
    pub fn to_json(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a manifest has a JSON form");
        bytes.push(b'\n');
        bytes
    }

    /// Hex BLAKE3 of the manifest, which holds the hash of the block table, which holds all
    /// checksums.
    pub fn identity(&self) -> String {
        blake3::hash(&self.to_json()).to_hex().to_string()
    }

    /// Shape of a bucket's latents: channels, height, width.
    ///
    /// # Panics
    /// If there is no such bucket.
    pub fn latent_shape(&self, bucket: u32) -> [usize; 3] {
        let Bucket {
            width_px,
            height_px,
        } = self.buckets[bucket as usize];
        let Codec {
            channels,
            down_factor,
            ..
        } = self.codec;
        [channels, height_px / down_factor, width_px / down_factor].map(|n| n as usize)
    }

    /// Bytes of one row of latents in a bucket.
    ///
    /// # Panics
    /// If there is no such bucket.
    pub fn row_bytes(&self, bucket: u32) -> u64 {
        row_bytes(&self.codec, self.buckets[bucket as usize])
    }

    /// Length of an object's latents file.
    pub fn latents_bytes(&self, object: &Object) -> u64 {
        LATENTS_OFFSET + u64::from(object.rows) * self.row_bytes(object.bucket)
    }

    /// Blocks of each object, in the order of the objects.
    pub(crate) fn num_blocks(&self) -> impl Iterator<Item = u32> + '_ {
        self.objects.iter().map(Object::num_blocks)
    }

    /// Number of rows of a split that are not deleted.
    pub fn live_rows(&self, split: Split) -> u64 {
        self.objects
            .iter()
            .filter(|o| o.split == split)
            .map(|o| u64::from(o.live_rows()))
            .sum()
    }

    fn check(&self) -> std::result::Result<(), String> {
        self.codec.check()?;
        if self.block_rows != BLOCK_ROWS {
            return Err(format!(
                "block_rows is {}, expected {BLOCK_ROWS}",
                self.block_rows
            ));
        }
        check_name(&self.blocks.file, "", ".bin")?;
        check_hash("the hash of the block table", &self.blocks.hash)?;
        self.check_buckets()?;
        self.check_objects()?;
        let expected = table_bytes(self.num_blocks().map(u64::from).sum(), self.format_version);
        if self.blocks.bytes != expected {
            return Err(format!(
                "the block table has {} bytes, its objects need {expected}",
                self.blocks.bytes
            ));
        }
        Ok(())
    }

    fn check_buckets(&self) -> std::result::Result<(), String> {
        if self.buckets.len() > MAX_BUCKETS {
            return Err(format!(
                "{} buckets, at most {MAX_BUCKETS} are allowed",
                self.buckets.len()
            ));
        }
        let mut shapes = HashSet::new();
        for bucket in &self.buckets {
            bucket.check(self.codec.down_factor)?;
            if !shapes.insert((bucket.width_px, bucket.height_px)) {
                return Err(format!(
                    "bucket {}x{} px is listed twice",
                    bucket.width_px, bucket.height_px
                ));
            }
        }
        Ok(())
    }

    fn check_objects(&self) -> std::result::Result<(), String> {
        let mut names = HashSet::new();
        for object in &self.objects {
            self.check_object(object)?;
            for name in [&object.latents, &object.text] {
                if !names.insert(name) {
                    return Err(format!("two objects are called {name:?}"));
                }
            }
        }
        Ok(())
    }

    fn check_object(&self, object: &Object) -> std::result::Result<(), String> {
        check_name(&object.latents, "latents/", ".safetensors")?;
        check_name(&object.text, "text/", ".parquet")?;
        let name = &object.latents;
        let Some(bucket) = self.buckets.get(object.bucket as usize) else {
            return Err(format!(
                "{name}: bucket {} does not exist, there are {}",
                object.bucket,
                self.buckets.len()
            ));
        };
        let rows_bytes = u128::from(row_bytes(&self.codec, *bucket)) * u128::from(object.rows);
        let bytes = rows_bytes + u128::from(LATENTS_OFFSET);
        if object.rows == 0 || (bytes > u128::from(MAX_OBJECT_BYTES) && object.rows > 1) {
            return Err(format!(
                "{name}: {} rows make {bytes} bytes, allowed are 1 row to 512 MiB",
                object.rows
            ));
        }
        if object.text_bytes > MAX_OBJECT_BYTES * 8 {
            return Err(format!(
                "{}: {} bytes of text, at most 4 GiB are allowed",
                object.text, object.text_bytes
            ));
        }
        object.check_deleted()
    }
}

/// The two keys that are read before all others, so that a later format is reported as such and not
/// as a parse error.
#[derive(Deserialize)]
struct Version {
    format: String,
    format_version: u32,
}

impl Version {
    fn check(&self) -> std::result::Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("format is {:?}, expected {FORMAT:?}", self.format));
        }
        if !(FIRST_VERSION..=FORMAT_VERSION).contains(&self.format_version) {
            let found = self.format_version;
            return Err(format!(
                "format version {found}, this program reads {FIRST_VERSION} to {FORMAT_VERSION}: \
                 read it with a newer one, or prepare the data again"
            ));
        }
        Ok(())
    }
}

impl Codec {
    fn check(&self) -> std::result::Result<(), String> {
        if self.dtype != "F16" {
            return Err(format!(
                "latents of dtype {:?}, expected \"F16\"",
                self.dtype
            ));
        }
        if !(1..=64).contains(&self.channels) || !(1..=64).contains(&self.down_factor) {
            let (channels, factor) = (self.channels, self.down_factor);
            return Err(format!(
                "{channels} channels and down-factor {factor}: both must be 1 to 64"
            ));
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.0) {
            return Err(format!(
                "scaling factor {}, expected a positive number",
                self.scaling_factor
            ));
        }
        Ok(())
    }
}

fn row_bytes(codec: &Codec, bucket: Bucket) -> u64 {
    let width = u64::from(bucket.width_px / codec.down_factor);
    let height = u64::from(bucket.height_px / codec.down_factor);
    2 * u64::from(codec.channels) * width * height
}

/// Checks that a file name in a manifest stays inside the data set.
fn check_name(name: &str, folder: &str, extension: &str) -> std::result::Result<(), String> {
    let stem = name
        .strip_prefix(folder)
        .and_then(|rest| rest.strip_suffix(extension));
    if stem.is_some_and(is_plain) && name.len() < 256 {
        return Ok(());
    }
    Err(format!(
        "{name:?} is not a name like {folder}1024x1024-00000{extension}"
    ))
}

/// Whether a name without its folder and extension can neither leave the folder nor be hidden.
fn is_plain(stem: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !stem.is_empty() && !stem.starts_with('.') && stem.chars().all(is_plain)
}

fn check_hash(what: &str, hash: &str) -> std::result::Result<(), String> {
    match decode_hex(hash) {
        Some(bytes) if bytes.len() == 32 => Ok(()),
        _ => Err(format!(
            "{what} is {hash:?}, expected 64 hexadecimal digits"
        )),
    }
}

fn encode_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn decode_hex(hex: &str) -> Option<Vec<u8>> {
    if !hex.len().is_multiple_of(2) || !hex.is_ascii() {
        return None;
    }
    let mut bytes = Vec::with_capacity(hex.len() / 2);
    for pair in hex.as_bytes().chunks_exact(2) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        bytes.push((high * 16 + low) as u8);
    }
    Some(bytes)
}

/// Writes the block table and then the manifest that names it, which makes its objects part of the
/// data set. `blocks` has each object's blocks, in the manifest's order.
///
/// # Errors
/// [`Error::Io`].
pub fn commit(root: &Path, manifest: &mut Manifest, blocks: &[Vec<Block>]) -> Result<()> {
    assert_eq!(
        blocks.len(),
        manifest.objects.len(),
        "every object has its blocks"
    );
    let table = BlockTable::new(blocks.iter().map(Vec::as_slice));
    manifest.format_version = table.version();
    manifest.blocks = table.file();
    let path = root.join(&manifest.blocks.file);
    durable::write(&path, table.as_bytes())?;
    durable::write(&root.join(MANIFEST_FILE), &manifest.to_json())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::format::block_table::{entry_bytes, tests::block};

    fn good() -> (Value, Vec<u8>) {
        let object = |number: u32, rows: u32| {
            json!({"bucket": 0, "split": "train", "rows": rows, "text_bytes": 100,
                "latents": format!("latents/64x64-{number:05}.safetensors"),
                "text": format!("text/64x64-{number:05}.parquet")})
        };
        let blocks = [vec![block(1), block(2)], vec![block(3)]];
        let table = BlockTable::new(blocks.iter().map(Vec::as_slice));
        let file = table.file();
        let manifest = json!({
            "format": FORMAT, "format_version": 1, "block_rows": 32,
            "codec": {"vae": "v", "hash": "00", "scaling_factor": 0.13025, "down_factor": 8,
                "channels": 4, "dtype": "F16"},
            "geometry": {"area_px": 4096, "step_px": 32, "bucket_min_px": 32,
                "bucket_max_px": 128, "resize": "gamma", "background": [255, 255, 255],
                "seed": 0},
            "blocks": {"file": file.file, "bytes": file.bytes, "hash": file.hash},
            "buckets": [{"width_px": 64, "height_px": 64}],
            "objects": [object(0, 33), object(1, 20)],
        });
        (manifest, table.as_bytes().to_vec())
    }

    fn parse(value: &Value) -> Result<Manifest> {
        Manifest::parse(Path::new("m"), value.to_string().as_bytes())
    }

    #[test]
    fn good_manifest_survives_the_round() {
        let (value, table) = good();
        let manifest = parse(&value).unwrap();
        assert_eq!(
            Manifest::parse(Path::new("m"), &manifest.to_json()).unwrap(),
            manifest
        );
        assert_eq!(
            (manifest.row_bytes(0), manifest.latent_shape(0)),
            (512, [4, 8, 8])
        );
        let table = BlockTable::parse(
            Path::new("t"),
            table,
            &manifest.blocks,
            manifest.num_blocks(),
        )
        .unwrap();
        assert_eq!(
            [table.block(0, 0), table.block(0, 1), table.block(1, 0)],
            [block(1), block(2), block(3)]
        );
        assert_eq!((entry_bytes(1), entry_bytes(2)), (128, 136));
    }

    #[test]
    fn deleted_rows_are_kept_as_bits() {
        let mut object = parse(&good().0).unwrap().objects.remove(0);
        [0, 9, 32, 9].into_iter().for_each(|row| object.delete(row));
        assert_eq!(
            (object.deleted.as_deref(), object.live_rows()),
            (Some("0102000001"), 30)
        );
    }

    /// One edit that breaks a rule of the format, and a word that the message must contain.
    struct Case {
        pointer: String,
        value: Value,
        word: &'static str,
    }

    fn head(pointer: &str, value: Value, word: &'static str) -> Case {
        let pointer = pointer.to_owned();
        Case {
            pointer,
            value,
            word,
        }
    }

    fn object(key: &str, value: Value, word: &'static str) -> Case {
        head(&format!("/objects/1/{key}"), value, word)
    }

    fn head_cases() -> Vec<Case> {
        vec![
            head("/format", json!("parquet"), "parquet"),
            head("/format_version", json!(3), "version 3"),
            head("/format_version", json!(0), "version 0"),
            head("/format_version", json!(u64::MAX), "invalid value"),
            head("/block_rows", json!(64), "block_rows"),
            head("/codec/dtype", json!("BF16"), "BF16"),
            head("/codec/channels", json!(0), "channels"),
            head("/codec/channels", json!(4_000_000_000u32), "channels"),
            head("/codec/down_factor", json!(0), "down-factor"),
            head("/codec/scaling_factor", json!(-1.0), "scaling"),
            head("/codec/scaling_factor", json!(null), "null"),
            head("/geometry/resize", json!("cubic"), "cubic"),
            head("/geometry/background", json!([1, 2]), "array of length 3"),
            head("/blocks/file", json!("../blocks.bin"), "../blocks.bin"),
            head("/blocks/file", json!("/etc/x.bin"), "/etc/x.bin"),
            head("/blocks/bytes", json!(u64::MAX), "block table has"),
            head("/blocks/hash", json!("xyz"), "64 hexadecimal"),
            head("/buckets/0/width_px", json!(0), "multiples of 8"),
            head("/buckets/0/width_px", json!(60), "multiples of 8"),
            head("/buckets/0/height_px", json!(4_294_967_288u32), "65536"),
            head(
                "/buckets",
                json!([{"width_px": 64, "height_px": 64}, {"width_px": 64, "height_px": 64}]),
                "twice",
            ),
            head("/buckets", json!([]), "bucket 0 does not exist"),
        ]
    }

    fn object_cases() -> Vec<Case> {
        vec![
            object("bucket", json!(1), "bucket 1 does not exist"),
            object("split", json!("validation"), "validation"),
            object("rows", json!(0), "0 rows"),
            object("rows", json!(u32::MAX), "512 MiB"),
            object("rows", json!(-1), "invalid value"),
            object("rows", json!(33), "block table has"),
            object(
                "latents",
                json!("latents/../../etc/passwd.safetensors"),
                "is not a name",
            ),
            object("latents", json!("/latents/a.safetensors"), "is not a name"),
            object("latents", json!("latents/.safetensors"), "is not a name"),
            object("latents", json!("latents/.a.safetensors"), "is not a name"),
            object("latents", json!("latents/a b.safetensors"), "is not a name"),
            object(
                "latents",
                json!(format!("latents/{}.safetensors", "a".repeat(300))),
                "is not a name",
            ),
            object(
                "latents",
                json!("latents/64x64-00000.safetensors"),
                "two objects",
            ),
            object("text", json!("text/a.parquet/../b"), "is not a name"),
            object("text", json!("text/64x64-00000.parquet"), "two objects"),
            object("text_bytes", json!(u64::MAX), "4 GiB"),
            object("deleted", json!("00"), "3 hexadecimal bytes"),
            object("deleted", json!("00000g"), "3 hexadecimal bytes"),
            object("deleted", json!("0000é"), "3 hexadecimal bytes"),
            object("deleted", json!("000010"), "beyond the last"),
        ]
    }

    #[test]
    fn every_broken_rule_is_named() {
        for Case {
            pointer,
            value,
            word,
        } in head_cases().into_iter().chain(object_cases())
        {
            let (mut manifest, _) = good();
            match manifest.pointer_mut(&pointer) {
                Some(place) => *place = value.clone(),
                None => drop(
                    manifest["objects"][1]
                        .as_object_mut()
                        .unwrap()
                        .insert("deleted".to_owned(), value.clone()),
                ),
            }
            let error = parse(&manifest).expect_err(&format!("{pointer} = {value} is accepted"));
            assert!(
                matches!(
                    error,
                    Error::Malformed {
                        kind: "manifest",
                        ..
                    }
                ),
                "{error}"
            );
            assert!(
                error.to_string().contains(word),
                "{pointer} = {value}: {error}"
            );
        }
        let (mut manifest, _) = good();
        manifest["extra"] = json!(1);
        assert!(parse(&manifest).unwrap_err().to_string().contains("extra"));
    }

    #[test]
    fn deep_and_long_json_is_refused() {
        let deep = format!("{}{}", "{\"format\":".repeat(100_000), "1");
        assert!(matches!(
            Manifest::parse(Path::new("m"), deep.as_bytes()),
            Err(Error::Malformed { .. })
        ));
        let root = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(root.path().join(MANIFEST_FILE)).unwrap();
        // A sparse file: it takes no space on the disk and must take none in memory.
        file.set_len(1 << 40).unwrap();
        let error = Manifest::read(root.path()).unwrap_err().to_string();
        assert!(error.contains("1099511627776 bytes"), "{error}");
    }

    proptest! {
        #[test]
        fn any_edit_gives_a_manifest_or_an_error(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let (value, table) = good();
            let mut bytes = value.to_string().into_bytes();
            for (at, byte) in edits {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(manifest) = Manifest::parse(Path::new("m"), &bytes) {
                // Later arithmetic relies on these bounds.
                for object in &manifest.objects {
                    let most = MAX_OBJECT_BYTES + manifest.row_bytes(object.bucket);
                    prop_assert!(manifest.latents_bytes(object) <= most);
                    prop_assert!(object.live_rows() <= object.rows);
                }
                let num_blocks = manifest.num_blocks();
                let _ = BlockTable::parse(Path::new("t"), table, &manifest.blocks, num_blocks);
            }
        }
    }
}
