//! What `tch` lacks of libtorch, in C++ behind a C interface. All of this crate's kernels and hooks are here.

pub mod allocator;
pub mod autograd;
pub(crate) mod kernels;
