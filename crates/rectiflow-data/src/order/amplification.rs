//! Rows that an epoch fetches per row that it delivers, in `window` and `owned` mode. Pure.

use std::collections::BTreeSet;

use crate::{
    format::block_table::BLOCK_ROWS,
    order::{Order, lanes::LaneWalk, pass::RowSpan, stream::Mode, window::Windows},
};

/// Rows that an epoch fetches, in whole blocks, divided by the rows that it delivers. Deleted rows
/// are fetched with their blocks and not counted here. In `owned` mode later passes over the shares
/// count as fetching nothing, which holds if the disks have room for them. The other streams count
/// in each epoch, although some of their blocks are then on the disk of the rank that needs them.
pub fn amplification(order: &Order, epoch: u64) -> f64 {
    let mut windows = Windows::new(order.clone().into());
    let mut read = 0;
    let mut needed = 0;
    for piece in LaneWalk::new(order, epoch).pieces() {
        let facts = &order.streams()[piece.stream as usize];
        needed += u64::from(piece.len) * u64::from(facts.size);
        if facts.mode != Mode::Owned || facts.owned_pass(piece.first) == 0 {
            read += rows_of_blocks(windows.spans(&piece));
        }
    }
    read as f64 / (needed as f64).max(1.0)
}

/// Rows of the blocks that hold the rows of `spans`.
fn rows_of_blocks(spans: Vec<RowSpan>) -> u64 {
    let mut blocks = BTreeSet::new();
    let mut num_rows = 0;
    for RowSpan { run, rows } in spans {
        let first = (rows.start - run.start) / BLOCK_ROWS;
        let last = (rows.end - 1 - run.start) / BLOCK_ROWS;
        for block in first..=last {
            if blocks.insert((run.start, block)) {
                num_rows += u64::from(BLOCK_ROWS.min(run.end - run.start - block * BLOCK_ROWS));
            }
        }
    }
    num_rows
}
