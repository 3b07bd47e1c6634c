// Chains of elementwise operations in one pass over memory, where libtorch uses an operation, a
// pass and a result for each: the gated GELU of the transformer blocks, and the group norm with the
// SiLU of the residual blocks. Intermediate results are recomputed in the backward pass instead of
// kept. CPU only. A C interface without exceptions.

#include "fused.h"

#include "guarded.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstring>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace fused {

namespace plain {
constexpr int64_t LANES = 4;
#include "fused_loops.h"
}  // namespace plain

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RECTIFLOW_HAS_TARGETS 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int64_t LANES = 8;
#include "fused_loops.h"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace avx512 {
constexpr int64_t LANES = 16;
#include "fused_loops.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

#define RECTIFLOW_LOOPS(set)                                                                            \
  Loops<T> {                                                                                            \
    set::gated<T>, set::gated_backward<T>, set::norm_silu<T>, set::norm_silu_backward<T>, set::softmax<T>, \
        set::weights_and_gradients, set::softmax_backward<T>, set::weights_on_their_side<T>             \
  }

// Returns the number of fp32 lanes of the processor's vectors.
int64_t lanes() {
#ifdef RECTIFLOW_HAS_TARGETS
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wide) return 16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

template <typename T>
const Loops<T>& loops() {
  static const Loops<T> chosen = [] {
#ifdef RECTIFLOW_HAS_TARGETS
    if (lanes() == 16) return RECTIFLOW_LOOPS(avx512);
    if (lanes() == 8) return RECTIFLOW_LOOPS(avx2);
#endif
    return RECTIFLOW_LOOPS(plain);
  }();
  return chosen;
}

template const Loops<float>& loops();
template const Loops<Half>& loops();

}  // namespace fused

namespace {

using fused::Group;
using fused::Half;
using fused::loops;

template <typename T>
const T* numbers(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* writable(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename Act>
void by_type(at::ScalarType type, Act act) {
  type == at::kFloat ? act(float{}) : act(Half{});
}

constexpr int64_t GRAIN = 1 << 15;  // least work for a second thread

// value * gelu(gate) for [*, 2 d], values first.
struct GatedGelu : torch::autograd::Function<GatedGelu> {
  static Tensor forward(AutogradContext* context, const Tensor& given) {
    const auto x = given.contiguous();
    context->save_for_backward({x});
    auto shape = x.sizes().vec();
    const auto d = shape.back() /= 2;
    auto out = at::empty(shape, x.options());
    by_type(x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      at::parallel_for(0, x.numel() / (2 * d), at::divup(GRAIN, 2 * d), [&](int64_t begin, int64_t end) {
        for (auto row = begin; row < end; ++row)
          loops<T>().gated(numbers<T>(x) + row * 2 * d, d, writable<T>(out) + row * d);
      });
    });
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto x = context->get_saved_variables()[0];
    const auto g = gradients[0].contiguous();
    const auto d = x.size(-1) / 2;
    auto out = at::empty_like(x);
    by_type(x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      at::parallel_for(0, x.numel() / (2 * d), at::divup(GRAIN, 2 * d), [&](int64_t begin, int64_t end) {
        for (auto row = begin; row < end; ++row)
          loops<T>().gated_backward(numbers<T>(x) + row * 2 * d, numbers<T>(g) + row * d, d,
                                    writable<T>(out) + row * 2 * d);
      });
    });
    return {out};
  }
};

// silu(group_norm(x)) for [b, c, h, w] with fp32 weights.
struct NormSilu : torch::autograd::Function<NormSilu> {
  static Tensor forward(AutogradContext* context, const Tensor& given, const Tensor& weight, const Tensor& bias,
                        int64_t num_groups, double eps) {
    const auto x = given.contiguous();
    auto out = at::empty_like(x);
    auto mean = at::empty({x.size(0), num_groups}, weight.options()), rstd = at::empty_like(mean);
    for_each_group(x, weight, bias, num_groups, [&](auto type, int64_t index, const Group& group, int64_t start) {
      using T = decltype(type);
      loops<T>().norm_silu(group, numbers<T>(x) + start, writable<T>(out) + start, static_cast<float>(eps),
                           writable<float>(mean) + index, writable<float>(rstd) + index);
    });
    context->save_for_backward({x, weight, bias, mean, rstd});
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto& [x, weight, bias, mean, rstd] = std::tie(saved[0], saved[1], saved[2], saved[3], saved[4]);
    const auto g = gradients[0].contiguous();
    const auto num_groups = mean.size(1);
    auto out = at::empty_like(x);
    auto of_weight = at::empty({x.size(0), x.size(1)}, weight.options()), of_bias = at::empty_like(of_weight);
    for_each_group(x, weight, bias, num_groups, [&](auto type, int64_t index, const Group& group, int64_t start) {
      using T = decltype(type);
      thread_local std::vector<float> room;
      room.resize(group.channels * group.pixels);
      const auto channel = index * group.channels;
      loops<T>().norm_silu_backward(group, numbers<T>(x) + start, numbers<T>(g) + start, numbers<float>(mean)[index],
                                    numbers<float>(rstd)[index], writable<T>(out) + start,
                                    writable<float>(of_weight) + channel, writable<float>(of_bias) + channel,
                                    room.data());
    });
    return {out, of_weight.sum(0), of_bias.sum(0), Tensor(), Tensor()};
  }

 private:
  // Calls `act` with the index of each group of each sample, the group's weights, and the index of
  // its first number.
  template <typename Act>
  static void for_each_group(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t num_groups, Act act) {
    const auto channels = x.size(1) / num_groups, pixels = x.size(2) * x.size(3);
    const auto size = channels * pixels;
    const auto grain = at::divup(GRAIN, size);
    by_type(x.scalar_type(), [&](auto type) {
      at::parallel_for(0, x.size(0) * num_groups, grain, [&](int64_t begin, int64_t end) {
        for (auto index = begin; index < end; ++index) {
          const auto channel = index % num_groups * channels;
          const Group group{numbers<float>(weight) + channel, numbers<float>(bias) + channel, channels, pixels};
          act(type, index, group, index * size);
        }
      });
    });
  }
};

}  // namespace

extern "C" {

// Returns true if the processor's vectors are wide enough for a gain.
int rectiflow_has_fused() { return fused::lanes() > 4; }

char* rectiflow_gated_gelu(const Tensor* x, Tensor** out) {
  return guarded([&] { *out = new Tensor(GatedGelu::apply(*x)); });
}

char* rectiflow_norm_silu(const Tensor* x, const Tensor* weight, const Tensor* bias, int64_t num_groups, double eps,
                          Tensor** out) {
  return guarded([&] { *out = new Tensor(NormSilu::apply(*x, *weight, *bias, num_groups, eps)); });
}

}  // extern "C"
