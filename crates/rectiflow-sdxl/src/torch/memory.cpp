// Tensors over memory owned by Rust: libtorch keeps the owner while any tensor views the memory.
// The C interface of ffi.rs.

#include "guarded.h"

#include <ATen/ATen.h>

// If this fails, the owner is not released.
extern "C" char* rectiflow_tensor_over(void* data, const int64_t* sizes, size_t num_sizes, int8_t kind,
                                       void (*release)(void*), void* owner, at::Tensor** out) {
  return guarded([&] {
    const auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(kind));
    const auto deleter = [release, owner](void*) { release(owner); };
    *out = new at::Tensor(at::from_blob(data, at::IntArrayRef(sizes, num_sizes), deleter, options));
  });
}
