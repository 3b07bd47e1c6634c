//! Listing of Parquet files that hold pictures: the columns of text alone are read.

use std::sync::Arc;

use crate::{
    error::{Error, Result},
    reject::{Reason, Remark},
    source::{
        listing::Listing,
        rows::RowFile,
        sample::{Place, Sample},
        shards::{
            files::Files,
            parquet_pictures::{Pictures, SEVERAL, contained},
            row_texts::{keep, only_table},
            shard::Shard,
            tar_headers::remark_of,
        },
    },
};

/// Lists the rows of the Parquet files `names`.
///
/// # Errors
/// [`Error::Remote`] if a file at a URL cannot be reached; [`Error::Io`] if the texts cannot be
/// kept. A bad file is a remark.
pub(crate) fn list(files: &Files, names: &[String], row_file: RowFile) -> Result<Listing> {
    let mut listing = Listing::new(row_file);
    listing.tables.push(only_table());
    for name in names {
        let shard = match files.shard(name) {
            Ok(shard) => Arc::new(shard),
            Err(error @ Error::Remote { .. }) => return Err(error),
            Err(error) => {
                let remark = Remark::new(name, Reason::Unreadable, error.to_string());
                listing.remarks.push(remark);
                continue;
            }
        };
        let listed = contained(&shard, || list_one(&shard, &mut listing));
        if let Err(error) = listed {
            listing.remarks.push(remark_of(&shard, error)?);
        }
    }
    Ok(listing)
}

/// Whether a file has a column of pictures.
///
/// # Errors
/// [`Error::Remote`].
pub(crate) fn has_pictures(shard: Shard) -> Result<bool> {
    let shard = Arc::new(shard);
    match contained(&shard, || Pictures::open(&shard)) {
        Ok(_) => Ok(true),
        Err(error @ Error::Remote { .. }) => Err(error),
        // Several columns of pictures are named when the file is listed.
        Err(error) => Ok(error.to_string().contains(SEVERAL)),
    }
}

fn list_one(shard: &Arc<Shard>, listing: &mut Listing) -> Result<()> {
    let pictures = Pictures::open(shard)?;
    let number = listing.shards.len() as u32;
    let num_rows = pictures.starts.last().copied().unwrap_or_default();
    let mut lines = Vec::new();
    let read = pictures.texts(shard, |row, object| {
        let address = format!("{}#{row}", shard.name);
        let line = keep(
            &object,
            &address,
            &mut listing.row_file,
            &mut listing.remarks,
        );
        lines.push(line.map_err(Error::io(&shard.name))?);
        Ok(())
    });
    // Rows whose texts cannot be read have pictures all the same.
    for row in 0..num_rows {
        let line = lines.get(row as usize).copied().flatten();
        listing.samples.push(Sample {
            path: format!("{}#{row}", shard.name),
            place: Place::Row { shard: number, row },
            sidecars: Box::default(),
            lines: line.into_iter().collect(),
            sha256: None,
            listed_px: [0; 2],
        });
    }
    listing.shards.push(shard.clone());
    listing.pictures.push(pictures);
    read
}
