// Loops over fp32 and bf16 numbers, in the best instruction set of this processor. Implemented in
// fused.cpp; fused_loops.h describes each.

#pragma once

#include <cstdint>

namespace fused {

using Half = uint16_t;  // the bits of a bf16 number

// Channels that a group norm normalises together.
struct Group {
  const float* weight;
  const float* bias;
  int64_t channels, pixels;
};

template <typename T>
struct Loops {
  void (*gated)(const T* row, int64_t d, T* out);
  void (*gated_backward)(const T* row, const T* gradient, int64_t d, T* out);
  void (*norm_silu)(const Group& group, const T* x, T* out, float eps, float* mean, float* rstd);
  void (*norm_silu_backward)(const Group& group, const T* x, const T* gradient, float mean, float rstd, T* out,
                             float* weight_gradient, float* bias_gradient, float* room);
  float (*softmax)(float* row, int64_t m, float scale, T* out, int64_t width);
  void (*weights_and_gradients)(float* row, float* gradient, int64_t m, float scale, float log_sum, float delta);
  float (*softmax_backward)(float* row, const float* gradient, int64_t m, float scale, float delta, T* out,
                            int64_t width);
  void (*weights_on_their_side)(const float* row, const float* gradient, int64_t n, float scale, const float* log_sums,
                                const float* delta, T* weights, T* gradients, int64_t width);
};

// T is float or Half.
template <typename T>
const Loops<T>& loops();

}  // namespace fused
