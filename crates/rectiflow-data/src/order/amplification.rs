//! How many rows an epoch fetches for each that it delivers, in `window` and `owned` mode. Pure.

use std::collections::BTreeSet;

use crate::{
    format::block_table::BLOCK_ROWS,
    order::{Order, lanes::LaneWalk, stream::Mode, window::Windows},
};

/// Rows that an epoch fetches, in whole blocks, over the rows that it delivers: the factor by which bytes are fetched
/// more often than they are needed. Deleted rows, which are in the blocks, come on top. In `owned` mode later passes over
/// the shares fetch nothing, if there is room for them on the disks; the other streams are counted in each epoch, though
/// some of their blocks will be on the disk of whoever needs them again.
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
        read += blocks.iter().map(|&(_, _, rows)| u64::from(rows)).sum::<u64>();
    }
    read as f64 / (needed as f64).max(1.0)
}
