//! Single rows, for the later passes of `owned` mode: from blocks on a disk that are read whole
//! only once.
//!
//! The first read of a block in a process reads all of it and verifies its checksum, later reads
//! take only the requested rows. A block that is no longer on the disk is fetched whole over the
//! network. Text is small and always read in whole blocks. One request here is for rows of one data
//! set, whatever their blocks.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use futures_util::future::try_join_all;
use half::f16;

use crate::{
    dataset::{
        Dataset,
        batch_latents::BatchLatents,
        fetch::{Ticket, in_turn, read},
        index::{BlockKey, ObjectRow, blocks_of},
    },
    error::Result,
    format::{block_table::BLOCK_ROWS, record::Record},
    remote::request::ObjectFile,
};

/// Blocks of text that one task reads; many tasks run at once.
const TEXTS_A_TASK: usize = 16;

/// Starts reading the latents of rows into `latents`, `[rows, C, h, w]`, for `step`.
pub(crate) fn start_latents(
    dataset: Arc<Dataset>,
    rows: Vec<ObjectRow>,
    mut latents: BatchLatents,
    step: u64,
) -> Ticket<BatchLatents> {
    Ticket::start(async move {
        let reader = dataset.clone();
        let wanted = rows.clone();
        let row_len = latents.len() / rows.len();
        let (mut latents, missing) = in_turn(move || {
            let missing = read_all(&reader, &wanted, &mut latents)?;
            Ok((latents, missing))
        })
        .await?;
        let blocks = blocks_of(missing.iter().map(|&at| rows[at]));
        let read = read_latents(&dataset, blocks, step).await?;
        for at in missing {
            let (object, row) = rows[at];
            let block = &read[&(object, row / BLOCK_ROWS)];
            let out = &mut latents[at * row_len..(at + 1) * row_len];
            dataset.copy_row(object, row, block, out)?;
        }
        Ok(latents)
    })
}

/// Reads blocks of latents.
async fn read_latents(
    dataset: &Dataset,
    blocks: Vec<BlockKey>,
    step: u64,
) -> Result<HashMap<BlockKey, Bytes>> {
    let mut reading = Vec::with_capacity(blocks.len());
    for &(object, block) in &blocks {
        reading.push(read_block(
            dataset,
            ObjectFile::Latents,
            object,
            block,
            step,
        ));
    }
    let read = try_join_all(reading).await?;
    Ok(blocks.into_iter().zip(read).collect())
}

/// Reads the rows that are on the disk into `latents`. Returns the indices of the missing rows.
fn read_all(dataset: &Dataset, rows: &[ObjectRow], latents: &mut [f16]) -> Result<Vec<usize>> {
    let row_len = latents.len() / rows.len();
    let mut missing = Vec::new();
    for (at, &(object, row)) in rows.iter().enumerate() {
        let out = &mut latents[at * row_len..(at + 1) * row_len];
        if !dataset.read_row_on_disk(object, row, out)? {
            missing.push(at);
        }
    }
    Ok(missing)
}

/// Starts reading the records of rows for `step`. They are returned in no particular order.
pub(crate) fn start_records(
    dataset: &Arc<Dataset>,
    mut rows: Vec<ObjectRow>,
    step: u64,
) -> Vec<Ticket<Vec<(ObjectRow, Record)>>> {
    rows.sort_unstable();
    rows.dedup();
    let blocks: Vec<Vec<ObjectRow>> = rows
        .chunk_by(is_same_block)
        .map(<[ObjectRow]>::to_vec)
        .collect();
    let mut tickets = Vec::new();
    for blocks in blocks.chunks(TEXTS_A_TASK) {
        let reading = read_records_of(dataset.clone(), blocks.to_vec(), step);
        tickets.push(Ticket::start(reading));
    }
    tickets
}

fn is_same_block(a: &ObjectRow, b: &ObjectRow) -> bool {
    (a.0, a.1 / BLOCK_ROWS) == (b.0, b.1 / BLOCK_ROWS)
}

/// Reads the records of rows, one list per block.
async fn read_records_of(
    dataset: Arc<Dataset>,
    blocks: Vec<Vec<ObjectRow>>,
    step: u64,
) -> Result<Vec<(ObjectRow, Record)>> {
    let mut reading = Vec::with_capacity(blocks.len());
    for rows in blocks {
        reading.push(read_records(&dataset, rows, step));
    }
    Ok(try_join_all(reading).await?.into_iter().flatten().collect())
}

/// Reads the records of rows of one block.
async fn read_records(
    dataset: &Arc<Dataset>,
    rows: Vec<ObjectRow>,
    step: u64,
) -> Result<Vec<(ObjectRow, Record)>> {
    let (object, row) = rows[0];
    let block = row / BLOCK_ROWS;
    let bytes = read_block(dataset, ObjectFile::Text, object, block, step).await?;
    let dataset = dataset.clone();
    in_turn(move || {
        let mut records = dataset.decode_text(object, block, &[bytes])?;
        let mut taken = Vec::with_capacity(rows.len());
        // From the last row to the first: `swap_remove` moves no record with a smaller index.
        for (object, row) in rows.into_iter().rev() {
            let record = records.swap_remove((row % BLOCK_ROWS) as usize);
            taken.push(((object, row), record));
        }
        Ok(taken)
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
