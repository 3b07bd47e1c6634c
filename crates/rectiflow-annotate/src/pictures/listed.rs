//! Pictures with what is known about them before they are opened.

use std::{collections::HashMap, path::Path};

use rectiflow_data::{
    Dataset, SampleId, Source, Split,
    caption::Text,
    manifest::MANIFEST_FILE,
    prep::{PrepSettings, list_source_in},
    reject::{Fault, Reason},
};

use crate::error::{Error, Result};

/// A picture that is to be annotated.
#[derive(Debug)]
pub struct Listed {
    /// Index of its sample in the source; None if the source has nothing at its address.
    sample: Option<usize>,
    /// Its address.
    pub address: String,
    /// Its id, if a data set says it.
    pub id: Option<SampleId>,
    /// Its row in a data set, by number.
    row: Option<usize>,
}

/// A picture that is open.
#[derive(Debug)]
pub struct Opened {
    /// Its id, by its bytes.
    pub id: SampleId,
    /// Its file.
    pub bytes: Vec<u8>,
}

/// The pictures of a source or of a data set.
#[derive(Debug)]
pub struct Pictures {
    source: Source,
    listed: Vec<Listed>,
    /// The texts of a data set's rows.
    texts: Vec<Text>,
    /// How many pictures of a data set have nothing at their address.
    num_missing: u64,
}

/// Whether a place is a packed data set, and not a source.
pub fn is_dataset(place: &Path) -> bool {
    place.join(MANIFEST_FILE).is_file()
}

impl Pictures {
    /// The pictures of a source. Rows of tables are kept in the folder `work`.
    ///
    /// # Errors
    /// Those of [`list_source_in`].
    pub fn of_source(place: &Path, work: &Path, settings: &PrepSettings) -> Result<Self> {
        let source = list_source_in(place, work, work, settings)?;
        let mut listed = Vec::with_capacity(source.samples().len());
        for (number, sample) in source.samples().iter().enumerate() {
            listed.push(Listed {
                sample: Some(number),
                address: sample.address().to_owned(),
                id: None,
                row: None,
            });
        }
        Ok(Self {
            source,
            listed,
            texts: Vec::new(),
            num_missing: 0,
        })
    }

    /// The pictures of a data set, opened in the source `root`. Both splits are annotated.
    ///
    /// # Errors
    /// Those of the data set and of the source; [`Error::Invalid`] if the source has none of the
    /// pictures.
    pub fn of_dataset(
        dataset: &Path,
        root: &Path,
        work: &Path,
        settings: &PrepSettings,
    ) -> Result<Self> {
        let source = list_source_in(root, work, work, settings)?;
        let mut by_address = HashMap::new();
        for (number, sample) in source.samples().iter().enumerate() {
            by_address.insert(sample.address(), number);
        }
        let opened = Dataset::open(dataset)?;
        let mut listed = Vec::new();
        let mut texts = Vec::new();
        for split in [Split::Train, Split::Test] {
            for shape in opened.buckets(split) {
                for record in opened.records(split, shape.bucket)? {
                    listed.push(Listed {
                        sample: by_address.get(record.source.as_str()).copied(),
                        address: record.source,
                        id: Some(record.id),
                        row: Some(texts.len()),
                    });
                    texts.push(Text {
                        captions: record.captions,
                        caption_sources: record.caption_sources,
                        tags: record.tags,
                        important_tags: record.important_tags,
                        quality: record.quality,
                        verbatim: record.verbatim,
                    });
                }
            }
        }
        drop(by_address);
        let num_missing = listed
            .iter()
            .filter(|listed| listed.sample.is_none())
            .count();
        if num_missing > 0 && num_missing == listed.len() {
            let example = &listed[0].address;
            let reason = format!(
                "it has none of the {num_missing} pictures of {}, such as {example}: name the \
                 place that the data set was prepared from with --pictures",
                dataset.display()
            );
            return Err(Error::invalid(root.display().to_string(), reason));
        }
        Ok(Self {
            source,
            listed,
            texts,
            num_missing: num_missing as u64,
        })
    }

    /// The pictures, in a fixed order.
    pub fn listed(&self) -> &[Listed] {
        &self.listed
    }

    /// How many pictures of a data set have nothing at their address.
    pub fn num_missing(&self) -> u64 {
        self.num_missing
    }

    /// Opens a picture. One of a data set must have the bytes that were packed.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub fn open(&self, listed: &Listed) -> std::result::Result<Opened, Fault> {
        let Some(sample) = listed.sample else {
            let detail = "there is no picture at this address any more";
            return Err(Fault::new(Reason::Unreadable, detail));
        };
        let bytes = self.source.open(&self.source.samples()[sample])?;
        let id = SampleId::of(&bytes);
        match listed.id {
            Some(expected) if expected != id => {
                let detail =
                    format!("its bytes are no longer those that were packed as {expected}");
                Err(Fault::new(Reason::Unreadable, detail))
            }
            _ => Ok(Opened { id, bytes }),
        }
    }

    /// The text that a picture has already.
    pub fn text(&self, listed: &Listed) -> Text {
        match (listed.row, listed.sample) {
            (Some(row), _) => self.texts[row].clone(),
            (None, Some(sample)) => {
                let sample = &self.source.samples()[sample];
                self.source.text(sample).text.unwrap_or_default()
            }
            (None, None) => Text::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use image::{ImageFormat, RgbImage};

    use super::*;

    fn png(seed: u8) -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let image = RgbImage::from_fn(16, 16, |x, y| image::Rgb([seed, x as u8, y as u8]));
        image.write_to(&mut bytes, ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn pictures_of_a_source_have_their_texts_and_ids() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("source");
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("a.png"), png(1)).unwrap();
        fs::write(place.join("a.txt"), "a cat").unwrap();
        fs::write(place.join("b.png"), png(2)).unwrap();
        let work = folder.path().join("work");
        let settings = PrepSettings::default();
        let pictures = Pictures::of_source(&place, &work, &settings).unwrap();
        let listed = pictures.listed();
        assert_eq!(listed.len(), 2);
        assert_eq!((listed[0].address.as_str(), listed[0].id), ("a.png", None));
        assert_eq!(pictures.text(&listed[0]).captions, ["a cat"]);
        assert_eq!(pictures.text(&listed[1]), Text::default());
        let opened = pictures.open(&listed[1]).unwrap();
        assert_eq!(opened.id, SampleId::of(&png(2)));
        fs::remove_file(place.join("b.png")).unwrap();
        assert!(pictures.open(&listed[1]).is_err());
        assert!(!is_dataset(&place));
    }
}
