//! The `[prep]` section of a recipe: its checks and its bucket geometry. Pure.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    board::classes::TagSettings,
    error::{Error, Result},
    filter,
    format::{
        bucket::{Geometry, ResizeSpace},
        manifest::Codec,
    },
    prep::split::Share,
    source::{boards::BoardSettings, choice::SourceKind},
    text::{
        caption::{Reading, TxtFiles},
        quality_ranks::{self, QualityRank},
        tag_list::TagSeparator,
    },
};

/// The `[prep]` section of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PrepSettings {
    /// What kind of source is prepared: "folder" of pictures, "webdataset": tars, read by their
    /// headers, "tar": tars, read by the index beside each if there is one, "parquet": Parquet
    /// files that hold the pictures, "mds": shards of MosaicML Streaming. Default "auto": the files
    /// that are there decide, and files of several kinds are refused.
    pub source: SourceKind,
    /// Largest area of a bucket in pixels. Range 1024 to 2^26. Default 1048576 = 1024 * 1024, the
    /// area that SDXL was trained at.
    pub area_px: u64,
    /// Sides of buckets are multiples of this many pixels. Use a multiple of the VAE's factor times
    /// the UNet's down-sampling, 8 * 4 = 32 for SDXL. Range 8 to 1024. Default 64, as in SDXL's own
    /// buckets.
    pub step_px: u32,
    /// Shortest side of a bucket in pixels. Range step_px to bucket_max_px. Default 512.
    pub bucket_min_px: u32,
    /// Longest side of a bucket in pixels. Range bucket_min_px to 65536. Default 2048.
    pub bucket_max_px: u32,
    /// Largest difference between the shapes of an image and its bucket: the larger aspect ratio
    /// over the smaller, minus 1. Images beyond it are rejected. Range 0 to 100. Default 0.5: at
    /// most a third of an image is cropped away, and only shapes beyond 1:4 come near that.
    pub max_aspect_error: f64,
    /// Shortest side of an image in pixels; smaller images are rejected. All others are enlarged if
    /// their bucket is larger, and SDXL's size conditioning tells the model their original size.
    /// Range 1 to 65536. Default 256, which enlarges at most fourfold at the default area.
    pub min_side_px: u32,
    /// Most pixels of an image; if its header announces more, it is rejected before memory is
    /// reserved for it. Range 1 to 2^32. Default 134217728, above the largest cameras; decoding
    /// such an image takes up to 1.5 GB.
    pub max_pixels: u64,
    /// Largest image file in MiB; longer files are rejected without being read. Range 1 to 65536.
    /// Default 512.
    pub max_file_mib: u32,
    /// Colour behind transparent pixels: red, green, blue, each 0 to 255. Default white, as on web
    /// pages.
    pub background: [u8; 3],
    /// "gamma" resizes sRGB's encoded values, as for the pictures that SDXL was trained on;
    /// "linear" resizes light intensities. Default "gamma".
    pub resize: ResizeSpace,
    /// Seed of the crops, the order of rows and the test split. Any number. Default 0.
    pub seed: u64,
    /// Fraction of the samples that is held out for the test loss. The split of a picture depends
    /// on its content alone. At most half of a data set is held out. Range 0 to 0.5. Default 0.01;
    /// with 0 and `test_count` 0 nothing is held out.
    pub test_fraction: f64,
    /// Number of samples that are held out, instead of a fraction. Any number; at most half of the
    /// data set is held out. Default 0: use `test_fraction`.
    pub test_count: u64,
    /// Keep images without a caption or tag and train on them with the empty prompt. Default false:
    /// they are listed in rejected.jsonl, since a missing caption is usually a mistake.
    pub keep_captionless: bool,
    /// Captions that contain one of these (whole words, in any case), or one of their image's own
    /// `quality` words, are marked verbatim: training adds no quality words to them. Default: the
    /// usual ones.
    pub quality_words: Vec<String>,
    /// The quality word of a picture by the rank of its score, where tables of annotations have
    /// scores (`rectiflow score`): each word with the share of all scores that must be lower, 0 to
    /// 1; of those that a picture reaches the highest counts. Pictures that have quality words keep
    /// theirs. Default as for NoobAI-XL. An empty list: no words.
    pub quality_ranks: Vec<QualityRank>,
    /// What a `name.txt` beside an image holds: "caption", "tags", or "auto": a caption, unless
    /// another source has a caption and the text reads like a list of tags, as kohya's scripts
    /// leave them beside `name.caption`. Default "auto".
    pub txt_files: TxtFiles,
    /// Each line of a `name.txt` or `name.caption` is a caption, one of which is drawn each time,
    /// as OneTrainer and SimpleTuner read them. Default false: the whole file is one caption.
    pub caption_lines: bool,
    /// What separates the tags in a string of tags: "comma", or "space" as in Danbooru's strings
    /// (`1girl solo long_hair`). Lists of tags are not split, and `tag_string` always has spaces.
    /// Default "comma".
    pub tag_separator: TagSeparator,
    /// Take `\(` and `\)` in captions and tags for parentheses, as ComfyUI does with a prompt
    /// before the text encoder reads it. Turn it off for captions in which the backslash has a
    /// meaning, such as LaTeX. Default true.
    pub unescape_parentheses: bool,
    /// Tables of image boards: Parquet, SQLite, JSON lines or CSV with a row for each post, named
    /// relative to the source folder. They are good for all pictures, and each must be usable.
    /// Default none: tables in the folder that have an id or md5, tags of a board and no names of
    /// files are found by themselves.
    pub tables: Vec<String>,
    /// Tables of annotations, as `rectiflow caption`, `tag` and `score` write them: their captions,
    /// tags and ranks are added to the texts of the pictures that they are about. Paths from where
    /// the program runs; `--annotations` adds others. Default none.
    pub annotations: Vec<PathBuf>,
    /// Lists of near-copies that stay out, as `rectiflow dedupe SOURCE` writes them, if the picture
    /// that stays instead is there. Paths from where the program runs; `--without` adds others. The
    /// data set's own list, `near-copies.jsonl`, needs no naming. Default none.
    pub without: Vec<PathBuf>,
    /// Which pictures are kept, such as `rating in [g, s] and score >= 5 and width*height >= 65536
    /// and not tag:comic`: columns of tables of image boards, and of every picture `width`,
    /// `height`, `num_tags` and `tag:name`. Default "": all.
    pub filter: String,
    /// Memory in GiB for pictures that are read once, for their hash, and kept until they are
    /// encoded; the others are read twice, which matters for a source at a URL. Workers keep none.
    /// Range 0 to 1024. Default 1.
    pub keep_gib: f64,
    /// Images per call of the encoder. Larger is faster on a GPU until its memory is full. Range 1
    /// to 1024. Default 8.
    pub encode_batch: u32,
    /// Largest number of rows of an object. An object is also at most 512 MiB. A killed run loses
    /// at most one unfinished object. Range 32 to 1048576. Default 4096, about 512 MiB at 1024 x
    /// 1024.
    pub object_rows: u32,
    /// How rows of tables of image boards become text.
    pub tags: TagSettings,
    /// Shuffle all rows again, including those that are packed already; existing latents are not
    /// encoded again. Not a setting of a recipe: `--repack`.
    #[serde(skip)]
    pub repack: bool,
    /// URL to which the latents of finished objects are sent, and then deleted from the folder, so
    /// that the disk never holds more than a few objects. Not a setting of a recipe: `--out URL`.
    #[serde(skip)]
    pub send_to: Option<String>,
}

impl Default for PrepSettings {
    fn default() -> Self {
        let words = [
            "masterpiece",
            "best quality",
            "high quality",
            "normal quality",
            "low quality",
            "worst quality",
        ];
        Self {
            source: SourceKind::Auto,
            area_px: 1024 * 1024,
            step_px: 64,
            bucket_min_px: 512,
            bucket_max_px: 2048,
            max_aspect_error: 0.5,
            min_side_px: 256,
            max_pixels: 1 << 27,
            max_file_mib: 512,
            background: [255; 3],
            resize: ResizeSpace::Gamma,
            seed: 0,
            test_fraction: 0.01,
            test_count: 0,
            keep_captionless: false,
            quality_words: words.map(str::to_owned).to_vec(),
            quality_ranks: quality_ranks::usual(),
            txt_files: TxtFiles::Auto,
            caption_lines: false,
            tag_separator: TagSeparator::Comma,
            unescape_parentheses: true,
            tables: Vec::new(),
            annotations: Vec::new(),
            without: Vec::new(),
            filter: String::new(),
            keep_gib: 1.0,
            encode_batch: 8,
            object_rows: 4096,
            tags: TagSettings::default(),
            repack: false,
            send_to: None,
        }
    }
}

impl PrepSettings {
    /// Returns all problems of the settings, one message each, with keys as in a recipe.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = self.range_problems();
        if !(0.0..=100.0).contains(&self.max_aspect_error) {
            problems.push(format!(
                "prep.max_aspect_error = {}: must be 0 to 100",
                self.max_aspect_error
            ));
        }
        if !(0.0..=0.5).contains(&self.test_fraction) {
            problems.push(format!(
                "prep.test_fraction = {}: must be 0 to 0.5",
                self.test_fraction
            ));
        }
        if !(0.0..=1024.0).contains(&self.keep_gib) {
            problems.push(format!(
                "prep.keep_gib = {}: must be 0 to 1024",
                self.keep_gib
            ));
        }
        problems.extend(self.tags.problems());
        problems.extend(quality_ranks::problems(&self.quality_ranks));
        if let Some(problem) = filter::problem(&self.filter) {
            problems.push(format!("prep.filter: {problem}"));
        }
        if problems.is_empty() && self.geometry().buckets().is_empty() {
            problems.push(format!(
                "prep: area_px {}, step_px {} and sides {} to {} allow no bucket: \
                 lower bucket_min_px or raise area_px",
                self.area_px, self.step_px, self.bucket_min_px, self.bucket_max_px
            ));
        }
        problems
    }

    /// Fails with all problems of the settings, and with what does not fit the VAE if it is known.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub(crate) fn check(&self, codec: Option<&Codec>) -> Result<()> {
        let mut problems = self.validate();
        if let Some(codec) = codec
            && (codec.down_factor == 0 || !self.step_px.is_multiple_of(codec.down_factor))
        {
            problems.push(format!(
                "prep.step_px = {}: must be a multiple of the VAE factor {}",
                self.step_px, codec.down_factor
            ));
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::Invalid {
            what: "settings of the preparation".to_owned(),
            reason: problems.join("; "),
        })
    }

    /// The whole numbers that are out of range.
    fn range_problems(&self) -> Vec<String> {
        let step_px = self.step_px.into();
        let min_px = self.bucket_min_px.into();
        let max_px = self.bucket_max_px.into();
        let mut problems = Vec::new();
        for (name, value, range) in [
            ("area_px", self.area_px, 1024..=1 << 26),
            ("step_px", step_px, 8..=1024),
            ("bucket_min_px", min_px, step_px..=max_px),
            ("bucket_max_px", max_px, min_px..=65_536),
            ("min_side_px", self.min_side_px.into(), 1..=65_536),
            ("max_pixels", self.max_pixels, 1..=1 << 32),
            ("max_file_mib", self.max_file_mib.into(), 1..=65_536),
            ("encode_batch", self.encode_batch.into(), 1..=1024),
            ("object_rows", self.object_rows.into(), 32..=1 << 20),
        ] {
            if !range.contains(&value) {
                let (from, to) = range.into_inner();
                problems.push(format!("prep.{name} = {value}: must be {from} to {to}"));
            }
        }
        problems
    }

    /// The settings that determine the encoded pixels.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            area_px: self.area_px,
            step_px: self.step_px,
            bucket_min_px: self.bucket_min_px,
            bucket_max_px: self.bucket_max_px,
            resize: self.resize,
            background: self.background,
            seed: self.seed,
        }
    }

    /// How caption sources are read.
    pub(crate) fn reading(&self) -> Reading {
        Reading {
            quality_words: self.quality_words.clone(),
            txt_files: self.txt_files,
            caption_lines: self.caption_lines,
            tag_separator: self.tag_separator,
            keep_escapes: !self.unescape_parentheses,
        }
    }

    /// Which tables of image boards are read and how, and which pictures are kept.
    pub(crate) fn boards(&self) -> BoardSettings<'_> {
        BoardSettings {
            tables: &self.tables,
            tags: &self.tags,
            filter: &self.filter,
        }
    }

    /// Bytes of pictures that are kept between the two passes.
    pub(crate) fn keep_bytes(&self) -> u64 {
        (self.keep_gib * f64::from(1 << 30)) as u64
    }

    /// The share of the samples that is held out.
    pub(crate) fn share(&self) -> Share {
        if self.test_count > 0 {
            Share::Count(self.test_count)
        } else {
            Share::Fraction(self.test_fraction)
        }
    }
}
