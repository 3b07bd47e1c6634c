// The update of long vectors in memory that is no CPU's, in few calls: libtorch's kernels over lists of tensors.
// A C interface for vectors.rs, without exceptions. Nothing here depends on the device, so the tests compare with the
// loops for a CPU.

#include "guarded.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

using at::Tensor;

extern "C" {

// Parts of vectors [n]: masters in fp32, or their nearest bf16 with the remainder, which is null for fp32; and what
// belongs to these elements, null where it is not used.
struct RectiflowPart {
  const Tensor* master;
  const Tensor* remainder;
  const Tensor* mean;
  const Tensor* mean_square;
  const Tensor* gradient;
  const Tensor* average;
  // Learning rate.
  double rate;
};

struct RectiflowAdamW {
  double beta1, beta2, eps, weight_decay;
  // Index of the update, from 1.
  double update;
};
}

namespace {

using Part = RectiflowPart;
using AdamW = RectiflowAdamW;

// Returns a view of contiguous `x` as `n` numbers of a dtype, `offset` of them after its first.
Tensor view(const Tensor& x, at::ScalarType type, int64_t n, int64_t offset = 0) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(x.storage()), x.key_set(),
                                                      c10::scalarTypeToTypeMeta(type));
  const int64_t stride = 1;
  out.unsafeGetTensorImpl()->set_sizes_and_strides(at::IntArrayRef(n), at::IntArrayRef(stride), x.storage_offset() + offset);
  return out;
}

// Masters of consecutive parts as fp32 numbers, which are written back when it is told to.
class Masters {
 public:
  Masters(const Part* parts, size_t count) {
    int64_t halves = 0;
    for (size_t i = 0; i < count; ++i) halves += parts[i].remainder ? parts[i].master->numel() : 0;
    if (halves > 0) bits_ = at::empty({halves}, parts[0].master->options().dtype(at::kInt));
    int64_t at = 0;
    for (size_t i = 0; i < count; ++i) {
      const auto& part = parts[i];
      const int64_t n = part.master->numel();
      if (!part.remainder) {
        numbers.push_back(*part.master);
        continue;
      }
      nearest_.push_back(view(*part.master, at::kShort, n));
      remainders_.push_back(*part.remainder);
      whole_.push_back(view(bits_, at::kInt, n, at));
      numbers.push_back(view(bits_, at::kFloat, n, at));
      at += n;
    }
    if (halves == 0) return;
    at::_foreach_copy_(whole_, remainders_);
    at::_foreach_add_(whole_, nearest_, 1 << 16);
  }

  // Rounds as halves.rs does.
  void write_back() {
    if (whole_.empty()) return;
    at::_foreach_copy_(remainders_, whole_);
    bits_.add_(0x8000);
    bits_.bitwise_right_shift_(16);
    at::_foreach_copy_(nearest_, whole_);
  }

  std::vector<Tensor> numbers;

 private:
  Tensor bits_;
  std::vector<Tensor> nearest_, remainders_, whole_;
};

std::vector<Tensor> all(const Part* parts, size_t count, const Tensor* Part::*which) {
  std::vector<Tensor> found;
  for (size_t i = 0; i < count; ++i) found.push_back(*(parts[i].*which));
  return found;
}

// Elements of the parts whose masters are fp32 numbers at a time: 256 MiB.
constexpr int64_t GROUP = 1 << 26;

// Calls `act` on groups of consecutive parts.
template <typename Act>
void in_groups(const Part* parts, size_t count, Act act) {
  for (size_t first = 0; first < count;) {
    size_t end = first;
    int64_t n = 0;
    do {
      n += parts[end].gradient ? parts[end].gradient->numel() : parts[end].master->numel();
      ++end;
    } while (end < count && n < GROUP);
    act(parts + first, end - first);
    first = end;
  }
}

// Several consecutive parts can have a rate of their own each; libtorch's fused update has one for all.
void adamw(const Part* parts, size_t count, const AdamW& of) {
  const auto step = at::full({}, of.update, parts[0].mean->options());
  in_groups(parts, count, [&](const Part* group, size_t size) {
    Masters masters(group, size);
    auto gradients = all(group, size, &Part::gradient), means = all(group, size, &Part::mean);
    auto squares = all(group, size, &Part::mean_square);
    const std::vector<Tensor> steps(size, step);
    at::_fused_adamw_(masters.numbers, gradients, means, squares, {}, steps, parts[0].rate, of.beta1, of.beta2,
                      of.weight_decay, of.eps, false, false);
    masters.write_back();
  });
}

// Updates the moments. Writes the sums of g^2 / max(v, eps^2) of the parts, with the corrected second moment.
void advance(const Part* parts, size_t count, const AdamW& of, double* excess) {
  const double correction = 1 - std::pow(of.beta2, of.update);
  std::vector<Tensor> norms;
  in_groups(parts, count, [&](const Part* group, size_t size) {
    const auto gradients = all(group, size, &Part::gradient);
    const auto means = all(group, size, &Part::mean), squares = all(group, size, &Part::mean_square);
    at::_foreach_lerp_(means, gradients, 1 - of.beta1);
    at::_foreach_mul_(squares, of.beta2);
    at::_foreach_addcmul_(squares, gradients, gradients, 1 - of.beta2);
    auto roots = at::_foreach_div(squares, correction);
    at::_foreach_clamp_min_(roots, of.eps * of.eps);
    at::_foreach_sqrt_(roots);
    const auto shares = at::_foreach_div(gradients, roots);
    for (auto& norm : at::_foreach_norm(shares, 2, at::kDouble)) norms.push_back(std::move(norm));
  });
  const auto found = at::stack(norms).square().cpu();
  std::copy_n(found.const_data_ptr<double>(), count, excess);
}

// Applies weight decay and the step, each part at its rate.
void apply(const Part* parts, size_t count, const AdamW& of) {
  const double correction1 = 1 - std::pow(of.beta1, of.update);
  const double correction2 = std::sqrt(1 - std::pow(of.beta2, of.update));
  in_groups(parts, count, [&](const Part* group, size_t size) {
    std::vector<at::Scalar> keep, steps;
    for (size_t i = 0; i < size; ++i) {
      keep.emplace_back(1 - group[i].rate * of.weight_decay);
      steps.emplace_back(-group[i].rate / correction1);
    }
    Masters masters(group, size);
    at::_foreach_mul_(masters.numbers, keep);
    auto denominators = at::_foreach_sqrt(all(group, size, &Part::mean_square));
    at::_foreach_div_(denominators, correction2);
    at::_foreach_add_(denominators, of.eps);
    at::_foreach_addcdiv_(masters.numbers, all(group, size, &Part::mean), denominators, steps);
    masters.write_back();
  });
}

}  // namespace

extern "C" {

// All parts have the rate of the first.
char* rectiflow_adamw(const RectiflowPart* parts, size_t count, const RectiflowAdamW* of) {
  return guarded([&] {
    const at::NoGradGuard guard;
    adamw(parts, count, *of);
  });
}

char* rectiflow_advance(const RectiflowPart* parts, size_t count, const RectiflowAdamW* of, double* excess) {
  return guarded([&] {
    const at::NoGradGuard guard;
    advance(parts, count, *of, excess);
  });
}

char* rectiflow_apply(const RectiflowPart* parts, size_t count, const RectiflowAdamW* of) {
  return guarded([&] {
    const at::NoGradGuard guard;
    apply(parts, count, *of);
  });
}

// Moves the averages towards the masters.
char* rectiflow_lerp(const RectiflowPart* parts, size_t count, double weight) {
  return guarded([&] {
    const at::NoGradGuard guard;
    in_groups(parts, count, [&](const Part* group, size_t size) {
      at::_foreach_lerp_(all(group, size, &Part::average), Masters(group, size).numbers, weight);
    });
  });
}

// The sum of the squares of all vectors, with one wait.
char* rectiflow_square_norm(const Tensor* const* vectors, size_t count, double* sum) {
  return guarded([&] {
    const at::NoGradGuard guard;
    std::vector<Tensor> list;
    for (size_t i = 0; i < count; ++i) list.push_back(*vectors[i]);
    *sum = at::stack(at::_foreach_norm(list, 2, at::kDouble)).square().sum().item<double>();
  });
}

char* rectiflow_scale(const Tensor* const* vectors, size_t count, double factor) {
  return guarded([&] {
    const at::NoGradGuard guard;
    std::vector<Tensor> list;
    for (size_t i = 0; i < count; ++i) list.push_back(*vectors[i]);
    at::_foreach_mul_(list, factor);
  });
}

// A view of a vector's `sizes` elements from `offset` on, made without the dispatcher.
char* rectiflow_part_of(const Tensor* vector, int64_t offset, const int64_t* sizes, size_t num_sizes, Tensor** out) {
  return guarded([&] {
    const at::IntArrayRef shape(sizes, num_sizes);
    const auto strides = c10::contiguous_strides(shape);
    const int64_t stride = vector->stride(0), n = c10::multiply_integers(shape);
    TORCH_CHECK(vector->dim() == 1 && stride == 1 && offset >= 0 && offset + n <= vector->size(0),
                "elements ", offset, " to ", offset + n, " of a vector of ", vector->sizes());
    auto part = view(*vector, vector->scalar_type(), n, offset);
    part.unsafeGetTensorImpl()->set_sizes_and_strides(shape, strides);
    *out = new Tensor(std::move(part));
  });
}

}  // extern "C"
