//! What `tch` lacks of libtorch, in C++ behind a C interface. All of this crate's kernels and hooks are here.

pub mod allocator;
pub mod autograd;
pub mod ffi;
pub(crate) mod kernels;
pub mod write;
