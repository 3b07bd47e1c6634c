//! Listing of tars, plain or with an index beside each, many at a time.

use rayon::prelude::*;

use crate::{
    error::{Error, Result},
    reject::{Reason, Remark},
    source::{
        choice::compressed,
        listing::Listing,
        rows::RowFile,
        sample::Sample,
        shards::{
            files::Files,
            members::Tar,
            row_texts::{keep, only_table},
            shard::Shard,
            tar_headers::{self, Member, remark_of},
            tar_index,
        },
    },
};

/// Tars that are listed before their samples are added.
const TARS_AT_ONCE: usize = 64;

/// What one tar has.
struct Listed {
    shard: Shard,
    /// Each with the JSON that an index has about it.
    samples: Vec<(Sample, Option<Box<str>>)>,
    remarks: Vec<Remark>,
}

/// Lists the samples of the tars `names`.
///
/// # Errors
/// [`Error::Remote`] if a tar at a URL cannot be reached. A bad tar is a remark.
pub(crate) fn list(
    files: &Files,
    names: &[String],
    unread: &[String],
    uses_index: bool,
    row_file: RowFile,
) -> Result<Listing> {
    let mut listing = Listing::new(row_file);
    listing.tables.push(only_table());
    for name in unread {
        let remark = Remark::new(name, Reason::Archive, compressed(name));
        listing.remarks.push(remark);
    }
    // Tars that cannot be opened have no number.
    let mut shards = Vec::with_capacity(names.len());
    for name in names {
        match files.shard(name) {
            Ok(shard) => shards.push(shard),
            Err(error @ Error::Remote { .. }) => return Err(error),
            Err(error) => {
                let remark = Remark::new(name, Reason::Unreadable, error.to_string());
                listing.remarks.push(remark);
            }
        }
    }
    let mut shards = (0..).zip(shards).peekable();
    while shards.peek().is_some() {
        let some: Vec<(u32, Shard)> = shards.by_ref().take(TARS_AT_ONCE).collect();
        let listed: Vec<Result<Listed>> = some
            .into_par_iter()
            .map(|(number, shard)| list_one(files, number, shard, uses_index))
            .collect();
        for listed in listed {
            add(listed?, &mut listing)?;
        }
    }
    Ok(listing)
}

/// Adds what a tar has to the listing.
fn add(listed: Listed, listing: &mut Listing) -> Result<()> {
    for (mut sample, text) in listed.samples {
        if let Some(text) = text {
            let object = serde_json::from_str(&text).unwrap_or_default();
            let (row_file, remarks) = (&mut listing.row_file, &mut listing.remarks);
            let line = keep(&object, &sample.path, row_file, remarks);
            sample.lines = line
                .map_err(Error::io(&listed.shard.name))?
                .into_iter()
                .collect();
        }
        listing.samples.push(sample);
    }
    listing.remarks.extend(listed.remarks);
    listing.shards.push(listed.shard.into());
    Ok(())
}

fn list_one(files: &Files, number: u32, shard: Shard, uses_index: bool) -> Result<Listed> {
    let mut remarks = Vec::new();
    let by_index = match uses_index {
        true => by_index(files, &shard, &mut remarks)?,
        false => None,
    };
    let tar = Tar {
        number,
        name: &shard.name,
        by_index: by_index.is_some(),
    };
    let members = match by_index {
        Some(members) => members,
        None => by_headers(&shard, &mut remarks)?,
    };
    let samples = tar.samples(&members, &mut remarks);
    Ok(Listed {
        shard,
        samples,
        remarks,
    })
}

fn by_headers(shard: &Shard, remarks: &mut Vec<Remark>) -> Result<Vec<Member>> {
    match tar_headers::members(shard, remarks) {
        Ok(members) => Ok(members),
        Err(error) => {
            remarks.push(remark_of(shard, error)?);
            Ok(Vec::new())
        }
    }
}

/// The members by the index beside a tar. None if there is none, or if it says something else than
/// the tar: then its headers are read.
fn by_index(files: &Files, tar: &Shard, remarks: &mut Vec<Remark>) -> Result<Option<Vec<Member>>> {
    let Some((stem, _)) = tar.name.rsplit_once('.') else {
        return Ok(None);
    };
    let name = format!("{stem}.json");
    let Some(index) = files.shard_if_any(&name)? else {
        return Ok(None);
    };
    let reason = match tar_index::members(&index, tar) {
        Ok(Ok(members)) => return Ok(Some(members)),
        Ok(Err(reason)) => reason,
        Err(error @ Error::Remote { .. }) => return Err(error),
        Err(error) => error.to_string(),
    };
    let detail = format!(
        "{reason}: it is no index of {}, whose headers are read",
        tar.name
    );
    remarks.push(Remark::new(name, Reason::BadIndex, detail));
    Ok(None)
}
