//! Rows that an epoch fetches per row that it delivers, in `window` and `owned` mode. Pure.

use std::collections::BTreeSet;

use crate::{
    format::block_table::BLOCK_ROWS,
    order::{Order, lanes::LaneWalk, stream::Mode, window::Windows},
};

/// Rows that an epoch fetches, in whole blocks, divided by the rows that it delivers. Deleted rows
/// are fetched with their blocks and not counted here. In `owned` mode later passes over the shares
/// count as fetching nothing, which holds if the disks have room for them. The other streams count
/// in each epoch, although some of their blocks are then on the disk of the rank that needs them.
pub fn amplification(order: &Order, epoch: u64) -> f64 {
    let mut windows = Windows::new(order.clone().into());
    let (mut read, mut needed) = (0, 0);
    for piece in LaneWalk::new(order, epoch).pieces() {
        let facts = &order.streams()[piece.stream as usize];
        needed += u64::from(piece.len) * u64::from(facts.size);
        if facts.mode == Mode::Owned && facts.owned_pass(piece.first) > 0 {
            continue;
        }
        let mut blocks = BTreeSet::new();
        for span in windows.spans(&piece) {
            let block = |row: u32| (row - span.run.start) / BLOCK_ROWS;
            for block in block(span.rows.start)..=block(span.rows.end - 1) {
                let rows = span.run.end - span.run.start - block * BLOCK_ROWS;
                blocks.insert((span.run.start, block, rows.min(BLOCK_ROWS)));
            }
        }
        read += blocks
            .iter()
            .map(|&(_, _, rows)| u64::from(rows))
            .sum::<u64>();
    }
    read as f64 / (needed as f64).max(1.0)
}
