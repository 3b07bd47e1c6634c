// Tensors over memory that somebody else owns: libtorch keeps the owner for as long as any tensor views the memory.
//
// The C interface of mapped.rs. Where making the tensor fails the owner stays, unreleased. A C++ exception never leaves a function: it becomes a message and a null pointer.

#include <ATen/ATen.h>
#include <cstring>
#include <exception>

extern "C" at::Tensor *rectiflow_tensor_over(void *data, const int64_t *sizes, size_t num_sizes, int8_t kind,
                                             void (*release)(void *), void *owner, char *message, size_t capacity) {
  try {
    auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(kind));
    auto deleter = [release, owner](void *) { release(owner); };
    return new at::Tensor(at::from_blob(data, at::IntArrayRef(sizes, num_sizes), deleter, options));
  } catch (const std::exception &error) {
    std::strncpy(message, error.what(), capacity - 1);
    return nullptr;
  }
}
