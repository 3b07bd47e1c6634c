//! Single rows, for the later passes of `owned` mode: from blocks on a disk that are read whole
//! only once.
//!
//! The first read of a block in a process reads all of it and verifies its checksum, later reads
//! take only the requested rows. A block that is no longer on the disk is fetched whole over the
//! network. Text is small and always read in whole blocks. One request here is for rows of one data
//! set, whatever their blocks.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::try_join_all;
use half::f16;

use crate::{
    dataset::{
        Dataset,
        fetch::{Ticket, in_turn, read},
        index::ObjectRow,
    },
    error::Result,
    format::{block_table::BLOCK_ROWS, record::Record},
    remote::request::ObjectFile,
};

/// Blocks of text that one task reads; many tasks run at once.
const TEXTS_A_TASK: usize = 16;

/// Starts reading the latents of rows, `[rows, C, h, w]` with `row_len` numbers per row, for
/// `step`.
pub(crate) fn start_latents(
    dataset: Arc<Dataset>,
    rows: Vec<ObjectRow>,
    row_len: usize,
    step: u64,
) -> Ticket<Vec<f16>> {
    Ticket::start(async move {
        let (reader, wanted) = (dataset.clone(), rows.clone());
        let (mut latents, missing) = in_turn(move || read_all(&reader, &wanted, row_len)).await?;
        let mut blocks: Vec<(usize, u32)> = missing
            .iter()
            .map(|&at| (rows[at].0, rows[at].1 / BLOCK_ROWS))
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        let read = blocks
            .iter()
            .map(|&(object, block)| read_block(&dataset, ObjectFile::Latents, object, block, step));
        let read = try_join_all(read).await?;
        for at in missing {
            let (object, row) = rows[at];
            let block = blocks
                .binary_search(&(object, row / BLOCK_ROWS))
                .expect("missing blocks were read");
            dataset.copy_row(
                object,
                row,
                &read[block],
                &mut latents[at * row_len..(at + 1) * row_len],
            )?;
        }
        Ok(latents)
    })
}

/// Reads the rows that are on the disk. Returns the latents, and the indices of the missing rows.
fn read_all(
    dataset: &Dataset,
    rows: &[ObjectRow],
    row_len: usize,
) -> Result<(Vec<f16>, Vec<usize>)> {
    let (mut latents, mut missing) = (vec![f16::ZERO; rows.len() * row_len], Vec::new());
    for (at, (&(object, row), out)) in rows
        .iter()
        .zip(latents.chunks_exact_mut(row_len))
        .enumerate()
    {
        if !dataset.read_row_on_disk(object, row, out)? {
            missing.push(at);
        }
    }
    Ok((latents, missing))
}

/// Starts reading the records of rows for `step`. They are returned in no particular order.
pub(crate) fn start_records(
    dataset: &Arc<Dataset>,
    mut rows: Vec<ObjectRow>,
    step: u64,
) -> Vec<Ticket<Vec<(ObjectRow, Record)>>> {
    rows.sort_unstable();
    rows.dedup();
    let same_block =
        |a: &ObjectRow, b: &ObjectRow| (a.0, a.1 / BLOCK_ROWS) == (b.0, b.1 / BLOCK_ROWS);
    let blocks: Vec<Vec<ObjectRow>> = rows
        .chunk_by(same_block)
        .map(<[ObjectRow]>::to_vec)
        .collect();
    let start = |blocks: &[Vec<ObjectRow>]| {
        let (dataset, blocks) = (dataset.clone(), blocks.to_vec());
        Ticket::start(async move {
            let read = blocks
                .into_iter()
                .map(|rows| read_records(&dataset, rows, step));
            Ok(try_join_all(read).await?.into_iter().flatten().collect())
        })
    };
    blocks.chunks(TEXTS_A_TASK).map(start).collect()
}

/// Reads the records of rows of one block.
async fn read_records(
    dataset: &Arc<Dataset>,
    rows: Vec<ObjectRow>,
    step: u64,
) -> Result<Vec<(ObjectRow, Record)>> {
    let (object, block) = (rows[0].0, rows[0].1 / BLOCK_ROWS);
    let bytes = read_block(dataset, ObjectFile::Text, object, block, step).await?;
    let dataset = dataset.clone();
    in_turn(move || {
        let mut records = dataset.decode_text(object, block, &[bytes])?;
        // From the last row to the first: `swap_remove` moves no record with a smaller index.
        let take = |&(object, row): &ObjectRow| {
            (
                (object, row),
                records.swap_remove((row % BLOCK_ROWS) as usize),
            )
        };
        Ok(rows.iter().rev().map(take).collect())
    })
    .await
}

/// Reads one block from the disk, the cache or the network.
async fn read_block(
    dataset: &Dataset,
    file: ObjectFile,
    object: usize,
    block: u32,
    step: u64,
) -> Result<Bytes> {
    let mut request = dataset.request(file, object, block..block + 1)?;
    request.step = step;
    let mut blocks = read(request, dataset.remote(), dataset.cache()).await?;
    Ok(blocks.remove(0))
}
