//! The parts of libtorch that `tch` lacks, in C++ behind a C interface. All kernels and hooks of
//! this crate are here.

pub mod allocator;
pub mod autograd;
pub mod choices;
pub mod counting;
pub(crate) mod few_calls;
pub mod ffi;
pub mod gpu;
pub(crate) mod kernels;
pub mod test_threads;
pub mod vectors;
pub mod waiting;
pub mod write;
