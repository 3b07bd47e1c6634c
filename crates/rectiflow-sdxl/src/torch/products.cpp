// Products of matrices and convolutions that libtorch 2.13 leaves to a library or a dtype that is slower on some
// processors: fp32 linear layers by oneDNN, linear layers and convolutions of bf16 numbers in fp32, convolutions of
// single pixels as products. All sum in fp32; choices.rs has the table of what is used where. A C interface without
// exceptions.

#include "guarded.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <cstring>
#include <string_view>
#include <vector>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

using Pointwise = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                         c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

// Returns oneDNN's operator for x w^T + b; empty in a libtorch without oneDNN.
const std::optional<c10::TypedOperatorHandle<Pointwise>>& onednn() {
  static const auto found = []() -> std::optional<c10::TypedOperatorHandle<Pointwise>> {
    const auto schema = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!schema) return std::nullopt;
    return schema->typed<Pointwise>();
  }();
  return found;
}

// x w^T + b in fp32, by oneDNN or by libtorch's choice.
Tensor product(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, bool by_onednn) {
  if (!by_onednn) return at::linear(x, w, b);
  return onednn()->call(x, w, b, "none", c10::List<std::optional<at::Scalar>>(), "");
}

Tensor wide(const Tensor& x) { return x.to(at::kFloat); }

// x w^T + b for [*, in] and [out, in], calculated in fp32. Inputs in bf16 are widened.
struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& w, const std::optional<Tensor>& b,
                        bool by_onednn) {
    context->save_for_backward({x, w});
    context->saved_data["has_bias"] = b.has_value();
    context->saved_data["by_onednn"] = by_onednn;
    const auto bias = b ? std::optional<Tensor>(wide(*b)) : std::nullopt;
    const auto y = product(wide(x).reshape({-1, x.size(-1)}), wide(w), bias, by_onednn);
    auto shape = x.sizes().vec();
    shape.back() = w.size(0);
    return y.to(x.scalar_type()).view(shape);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto& x = saved[0];
    const auto& w = saved[1];
    const bool by_onednn = context->saved_data["by_onednn"].toBool();
    const auto g = wide(gradients[0]).reshape({-1, w.size(0)});
    variable_list result(4);
    if (context->needs_input_grad(0)) {
      const auto of_x = product(g, wide(w).t(), std::nullopt, by_onednn);
      result[0] = of_x.to(x.scalar_type()).view(x.sizes());
    }
    if (context->needs_input_grad(1)) {
      const auto rows = wide(x).reshape({-1, x.size(-1)});
      result[1] = product(g.t(), rows.t(), std::nullopt, by_onednn).to(w.scalar_type());
    }
    // Without a bias there is no third edge to query.
    if (context->saved_data["has_bias"].toBool() && context->needs_input_grad(2)) result[2] = g.sum(0).to(w.scalar_type());
    return result;
  }
};

// A convolution in bf16 with stride and padding of equal sides, calculated in fp32.
struct WideConvolution : torch::autograd::Function<WideConvolution> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& w, const Tensor& b, int64_t stride,
                        int64_t padding) {
    context->save_for_backward({x, w});
    context->saved_data["stride"] = stride;
    context->saved_data["padding"] = padding;
    const std::vector<int64_t> strides(2, stride), paddings(2, padding), none(2, 0), one(2, 1);
    const auto y = at::convolution(wide(x), wide(w), wide(b), strides, paddings, one, false, none, 1);
    return y.to(x.scalar_type());
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto& x = saved[0];
    const auto& w = saved[1];
    const std::vector<int64_t> strides(2, context->saved_data["stride"].toInt());
    const std::vector<int64_t> paddings(2, context->saved_data["padding"].toInt()), none(2, 0), one(2, 1);
    const std::array<bool, 3> needed{context->needs_input_grad(0), context->needs_input_grad(1),
                                     context->needs_input_grad(2)};
    const std::vector<int64_t> bias{w.size(0)};
    const auto [of_x, of_w, of_b] = at::convolution_backward(wide(gradients[0]), wide(x), wide(w), bias, strides, paddings,
                                                             one, false, none, 1, needed);
    variable_list result(5);
    const auto narrow = [&](const Tensor& found) { return found.defined() ? found.to(x.scalar_type()) : found; };
    result[0] = narrow(of_x);
    result[1] = narrow(of_w);
    result[2] = narrow(of_b);
    return result;
  }
};

// A convolution of single pixels, [b, in, h, w] and [out, in, 1, 1], as products of fp32 matrices. Inputs in bf16
// are widened.
struct PointwiseConvolution : torch::autograd::Function<PointwiseConvolution> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& w, const Tensor& b) {
    context->save_for_backward({x, w});
    const auto pixels = wide(x).flatten(2), weight = matrix(w, x.size(0));
    const auto y = at::baddbmm(wide(b).view({1, -1, 1}), weight, pixels);
    auto shape = x.sizes().vec();
    shape[1] = w.size(0);
    return y.to(x.scalar_type()).view(shape);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto& x = saved[0];
    const auto& w = saved[1];
    const auto g = wide(gradients[0]).flatten(2);
    const auto stored = x.scalar_type();
    variable_list result(3);
    if (context->needs_input_grad(0)) result[0] = matrix(w, x.size(0)).mT().bmm(g).to(stored).view(x.sizes());
    if (context->needs_input_grad(1)) {
      result[1] = g.bmm(wide(x).flatten(2).mT()).sum(0).to(stored).view(w.sizes());
    }
    if (context->needs_input_grad(2)) result[2] = g.sum({0, 2}).to(stored);
    return result;
  }

 private:
  // Returns the weight [out, in], once for each of a batch.
  static Tensor matrix(const Tensor& w, int64_t batch) {
    return wide(w).view({w.size(0), w.size(1)}).expand({batch, -1, -1});
  }
};

// Copies contiguous memory with all threads: libtorch copies it with one.
void copy_all(const Tensor& from, const Tensor& to) {
  char* target = static_cast<char*>(to.mutable_data_ptr());
  const char* source = static_cast<const char*>(from.const_data_ptr());
  constexpr int64_t GRAIN = 1 << 18;
  at::parallel_for(0, static_cast<int64_t>(to.nbytes()), GRAIN, [&](int64_t begin, int64_t end) {
    std::memcpy(target + begin, source + begin, end - begin);
  });
  to.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

extern "C" {

int rectiflow_has_linear() { return onednn().has_value(); }

char* rectiflow_linear(const Tensor* x, const Tensor* w, const Tensor* b, int by_onednn, Tensor** out) {
  return guarded([&] {
    *out = new Tensor(Linear::apply(*x, *w, b ? std::optional<Tensor>(*b) : std::nullopt, by_onednn != 0));
  });
}

char* rectiflow_wide_convolution(const Tensor* x, const Tensor* w, const Tensor* b, int64_t stride, int64_t padding,
                                 Tensor** out) {
  return guarded([&] { *out = new Tensor(WideConvolution::apply(*x, *w, *b, stride, padding)); });
}

char* rectiflow_pointwise_convolution(const Tensor* x, const Tensor* w, const Tensor* b, Tensor** out) {
  return guarded([&] { *out = new Tensor(PointwiseConvolution::apply(*x, *w, *b)); });
}

// Copies `from` to `to`: contiguous CPU tensors of one dtype and size in different memory.
char* rectiflow_copy(const Tensor* from, const Tensor* to) {
  return guarded([&] { copy_all(*from, *to); });
}

}  // extern "C"
