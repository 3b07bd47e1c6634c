//! Every command that reads a checkpoint, on checkpoints whose base has moved and on damaged ones,
//! and single files whose tensors are not those of their hash.

mod damaged;
mod fixture;
mod moved;
mod single_files;
