// Layers on a GPU in few calls: linear layers, attention, the gated GELU, convolutions, each with a backward pass of its
// own, and views that are made without libtorch's dispatcher.
//
// A GPU waits for a processor that calls too slowly. libtorch composes a linear layer of 4 calls and its backward pass of
// 9, of which 1 and 3 start a kernel; the others are views. Here only those that start a kernel remain. The kernels are
// libtorch's own. Nothing here depends on the device, so the tests compare with libtorch's layers on a CPU; a CPU's
// layers are those of products.cpp, attention.cpp and fused.cpp. A C interface without exceptions.

#include "guarded.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <tuple>
#include <vector>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Named: the files of this folder are compiled as one, and products.cpp has a Linear too.
namespace few_calls {

namespace {

// Calls inside of these functions have no graph of their own.
using NoGraph = at::AutoDispatchBelowADInplaceOrView;

// Returns a view of `x`, `offset` elements after its first one.
Tensor view(const Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset = 0) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(x.storage()), x.key_set(),
                                                      x.dtype());
  auto* const impl = out.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(sizes, strides, x.storage_offset() + offset);
  return out;
}

// Returns contiguous [*, d] as [n, d].
Tensor rows(const Tensor& x) {
  const int64_t d = x.size(-1);
  const auto whole = x.is_contiguous() ? x : x.contiguous();
  return view(whole, {whole.numel() / d, d}, {d, 1});
}

// Returns [n, d] as [d, n].
Tensor on_its_side(const Tensor& x) { return view(x, {x.size(1), x.size(0)}, {x.stride(1), x.stride(0)}); }

// Returns contiguous [n, d] as [*, d], shaped as `like` but for the last size.
Tensor shaped(const Tensor& x, const Tensor& like) {
  auto sizes = like.sizes().vec();
  sizes.back() = x.size(1);
  return view(x, sizes, c10::contiguous_strides(sizes));
}

// x w^T + b for [*, in] and [out, in].
struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& w, const std::optional<Tensor>& b) {
    const NoGraph guard;
    context->save_for_backward({x, w});
    context->saved_data["has_bias"] = b.has_value();
    const auto in = rows(x), weight = on_its_side(w);
    return shaped(b ? at::addmm(*b, in, weight) : at::mm(in, weight), x);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const NoGraph guard;
    const auto saved = context->get_saved_variables();
    const auto& [x, w] = std::tie(saved[0], saved[1]);
    const auto g = rows(gradients[0]);
    variable_list found(3);
    if (context->needs_input_grad(0)) found[0] = shaped(at::mm(g, w), x);
    if (context->needs_input_grad(1)) found[1] = at::mm(on_its_side(g), rows(x));
    // Without a bias there is no third edge to query.
    if (context->saved_data["has_bias"].toBool() && context->needs_input_grad(2)) found[2] = at::sum(g, 0);
    return found;
  }
};

// libtorch's kernels of attention without a mask, by its own numbers.
enum Kernel : int64_t { FLASH = 1, CUDNN = 3 };

// Returns contiguous [b, n, h d] as [b, h, n, d].
Tensor heads_of(const Tensor& x, int64_t heads) {
  const auto whole = x.is_contiguous() ? x : x.contiguous();
  const int64_t n = x.size(1), width = x.size(2), d = width / heads;
  return view(whole, {x.size(0), heads, n, d}, {n * width, d, width, 1});
}

// Returns [b, h, n, d] as [b, n, h d]; a copy, if it does not lie so in memory.
Tensor joined(const Tensor& x) {
  const int64_t b = x.size(0), heads = x.size(1), n = x.size(2), d = x.size(3), width = heads * d;
  const std::vector<int64_t> wanted{n * width, d, width, 1};
  const auto lies_so = x.strides() == at::IntArrayRef(wanted);
  const auto whole = lies_so ? x : x.transpose(1, 2).contiguous();
  return view(whole, {b, n, width}, {n * width, width, 1});
}

// What a kernel returns for its backward pass, besides the result and the sums of weights.
struct Rest {
  Tensor first_lengths, second_lengths, seed, offset;
  c10::SymInt num_queries = 0, num_keys = 0;
};

// softmax(q k^T / sqrt(d)) v for [b, n, h d] and [b, m, h d].
struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads,
                        int64_t kernel, bool is_trained) {
    const NoGraph guard;
    const auto queries = heads_of(q, heads), keys = heads_of(k, heads), values = heads_of(v, heads);
    Tensor out, sums, ignored;
    Rest rest;
    if (q.is_cpu()) {
      std::tie(out, sums) = at::_scaled_dot_product_flash_attention_for_cpu(queries, keys, values);
    } else if (kernel == CUDNN) {
      std::tie(out, sums, rest.first_lengths, rest.second_lengths, rest.num_queries, rest.num_keys, rest.seed, rest.offset,
               ignored) = at::_scaled_dot_product_cudnn_attention(queries, keys, values, {}, is_trained);
    } else {
      std::tie(out, sums, rest.first_lengths, rest.second_lengths, rest.num_queries, rest.num_keys, rest.seed, rest.offset,
               ignored) = at::_scaled_dot_product_flash_attention(queries, keys, values);
    }
    const auto mixed = joined(out);
    context->saved_data["heads"] = heads;
    context->saved_data["kernel"] = kernel;
    context->saved_data["num_queries"] = rest.num_queries;
    context->saved_data["num_keys"] = rest.num_keys;
    context->save_for_backward({q, k, v, mixed, sums, rest.first_lengths, rest.second_lengths, rest.seed, rest.offset});
    return mixed;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const NoGraph guard;
    const auto saved = context->get_saved_variables();
    const auto heads = context->saved_data["heads"].toInt(), kernel = context->saved_data["kernel"].toInt();
    const auto g = heads_of(gradients[0], heads), out = heads_of(saved[3], heads);
    const auto q = heads_of(saved[0], heads), k = heads_of(saved[1], heads), v = heads_of(saved[2], heads);
    const auto& [sums, first, second, seed, offset] = std::tie(saved[4], saved[5], saved[6], saved[7], saved[8]);
    const auto num_queries = context->saved_data["num_queries"].toSymInt();
    const auto num_keys = context->saved_data["num_keys"].toSymInt();
    std::tuple<Tensor, Tensor, Tensor> found;
    if (q.is_cpu()) {
      found = at::_scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, out, sums, 0.0, false);
    } else if (kernel == CUDNN) {
      found = at::_scaled_dot_product_cudnn_attention_backward_symint(g, q, k, v, out, sums, seed, offset, Tensor(), first,
                                                                      second, num_queries, num_keys, 0.0, false);
    } else {
      found = at::_scaled_dot_product_flash_attention_backward_symint(g, q, k, v, out, sums, first, second, num_queries,
                                                                      num_keys, 0.0, false, seed, offset);
    }
    return {joined(std::get<0>(found)), joined(std::get<1>(found)), joined(std::get<2>(found)), Tensor(), Tensor(),
            Tensor()};
  }
};

// value * gelu(gate) for [*, 2 d], values first.
struct GatedGelu : torch::autograd::Function<GatedGelu> {
  static Tensor half(const Tensor& both, int64_t which) {
    const int64_t d = both.size(-1) / 2;
    return view(both, {both.numel() / (2 * d), d}, {2 * d, 1}, which * d);
  }

  static Tensor forward(AutogradContext* context, const Tensor& in) {
    const NoGraph guard;
    const auto both = in.contiguous();
    const auto activated = at::gelu(half(both, 1));
    context->save_for_backward({both, activated});
    return shaped(at::mul(half(both, 0), activated), both);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const NoGraph guard;
    const auto saved = context->get_saved_variables();
    const auto& [both, activated] = std::tie(saved[0], saved[1]);
    const auto g = rows(gradients[0]);
    auto found = at::empty_like(both);
    auto of_value = half(found, 0), of_gate = half(found, 1);
    at::mul_out(of_value, g, activated);
    at::gelu_backward_out(of_gate, at::mul(g, half(both, 0)), half(both, 1));
    return {found};
  }
};

}  // namespace

extern "C" {

char* rectiflow_few_linear(const Tensor* x, const Tensor* w, const Tensor* b, Tensor** out) {
  return guarded([&] { *out = new Tensor(Linear::apply(*x, *w, b ? std::optional<Tensor>(*b) : std::nullopt)); });
}

// Returns no tensor where libtorch would choose a kernel that is not used here.
char* rectiflow_few_attention(const Tensor* q, const Tensor* k, const Tensor* v, int64_t heads, Tensor** out) {
  return guarded([&] {
    const auto kernel = at::_fused_sdp_choice(heads_of(*q, heads), heads_of(*k, heads), heads_of(*v, heads));
    if (kernel != FLASH && kernel != CUDNN) return;
    const bool is_trained =
        at::GradMode::is_enabled() && (q->requires_grad() || k->requires_grad() || v->requires_grad());
    *out = new Tensor(Attention::apply(*q, *k, *v, heads, kernel, is_trained));
  });
}

char* rectiflow_few_gated_gelu(const Tensor* both, Tensor** out) {
  return guarded([&] { *out = new Tensor(GatedGelu::apply(*both)); });
}

// The convolution runs with channels last in memory, and so does what follows it.
char* rectiflow_last_convolution(const Tensor* x, const Tensor* w, const Tensor* b, int64_t stride, int64_t padding,
                                 Tensor** out) {
  return guarded([&] {
    const auto pixels = x->contiguous(at::MemoryFormat::ChannelsLast);
    const std::vector<int64_t> strides(2, stride), paddings(2, padding), none(2, 0), one(2, 1);
    *out = new Tensor(at::convolution(pixels, *w, *b, strides, paddings, one, false, none, 1));
  });
}

}  // extern "C"

}  // namespace few_calls
