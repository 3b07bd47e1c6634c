//! SDXL on libtorch.
