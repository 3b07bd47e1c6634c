// Counts the calls of libtorch's dispatcher and the bytes of tensors without numbers (device "meta"). A C interface for
// counting.rs.
//
// tch has no meta device. It names the devices that it does not know MPS; so here MPS's factories make meta tensors, and
// a model "on MPS" is one on meta, which takes the paths of every device that is no CPU. Where libtorch's C++ has no meta
// kernel (Python has), this file has one that allocates and copies as CUDA's kernel does: which results, in which memory
// layout, after which copies to another layout.

#include "guarded.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using Mask = std::array<bool, 3>;

namespace {

// What one part of a step calls.
struct Calls {
  // Calls below autograd, by operation: an operation that is made of others counts as those.
  std::map<std::string, int64_t> operations;
  // Copies to another memory layout, by the operation in which they happen: their number and bytes.
  std::map<std::string, std::array<int64_t, 2>> layout_copies;
  // All calls of the dispatcher, those inside of other operations too.
  int64_t dispatched = 0;
  // Times that the processor waits for a number.
  int64_t waits = 0;

  void add(const Calls& other) {
    for (const auto& [name, count] : other.operations) operations[name] += count;
    for (const auto& [name, copies] : other.layout_copies) {
      auto& sum = layout_copies[name];
      sum[0] += copies[0];
      sum[1] += copies[1];
    }
    dispatched += other.dispatched;
    waits += other.waits;
  }
};

// A step until now. Calls after a node of the backward pass belong to it once the next node begins; those after the last
// one are the update.
struct Step {
  std::mutex lock;
  bool is_on = false;
  bool is_backward = false;
  Calls forward, backward, latest;
  int64_t nodes = 0;
  int64_t live_bytes = 0, peak_bytes = 0;
};

Step& step() {
  static auto* const the_step = new Step();
  return *the_step;
}

// What the dispatcher tells of its calls, while a step is counted.
at::CallbackHandle observer = at::INVALID_CALLBACK_HANDLE;

// The counted operation that this thread is in.
thread_local const char* inside = nullptr;

struct Entered : at::ObserverContext {};

// Whether an operation is made of others that autograd sees one by one.
bool is_composite(const c10::OperatorName& name) {
  static auto* const known = new std::map<c10::OperatorName, bool, bool (*)(const c10::OperatorName&, const c10::OperatorName&)>(
      [](const c10::OperatorName& a, const c10::OperatorName& b) {
        return std::tie(a.name, a.overload_name) < std::tie(b.name, b.overload_name);
      });
  static std::mutex lock;
  const std::lock_guard guard(lock);
  const auto found = known->find(name);
  if (found != known->end()) return found->second;
  const auto handle = c10::Dispatcher::singleton().findOp(name);
  const bool composite =
      handle && handle->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
  known->emplace(name, composite);
  return composite;
}

// Small tensors, and vectors, have no layout worth a name.
constexpr int64_t LARGE = 1 << 12;

void note_copy(Calls& calls, const at::RecordFunction& call) {
  const auto inputs = call.inputs();
  if (inputs.size() < 2 || !inputs[0].isTensor() || !inputs[1].isTensor()) return;
  const auto& to = inputs[0].toTensor();
  const auto& from = inputs[1].toTensor();
  if (!to.defined() || !from.defined() || to.dim() < 3 || to.numel() < LARGE) return;
  if (to.sizes() != from.sizes() || to.strides() == from.strides()) return;
  // Tensors that repeat numbers, and single pixels, whose strides say nothing.
  if (!from.is_non_overlapping_and_dense() || (to.is_contiguous() && from.is_contiguous())) return;
  auto& sum = calls.layout_copies[inside ? inside : call.name()];
  sum[0] += 1;
  sum[1] += to.numel() * static_cast<int64_t>(to.element_size() + from.element_size());
}

std::unique_ptr<at::ObserverContext> enter(const at::RecordFunction& call) {
  auto& now = step();
  const std::lock_guard guard(now.lock);
  if (!now.is_on) return nullptr;
  if (call.scope() == at::RecordScope::BACKWARD_FUNCTION) {
    (now.is_backward ? now.backward : now.forward).add(now.latest);
    now.latest = {};
    now.is_backward = true;
    now.nodes += 1;
    return nullptr;
  }
  const auto name = call.operator_name();
  if (!name) return nullptr;
  now.latest.dispatched += 1;
  const std::string_view whole = name->name;
  if (whole == "aten::copy_") note_copy(now.latest, call);
  if (whole == "aten::_local_scalar_dense") now.latest.waits += 1;
  if (inside || is_composite(*name)) return nullptr;
  now.latest.operations[name->name] += 1;
  inside = call.name();
  return std::make_unique<Entered>();
}

void leave(const at::RecordFunction&, at::ObserverContext* entered) {
  if (entered) inside = nullptr;
}

// Counts the bytes of meta tensors.
struct Bytes : c10::Allocator {
  static void release(void* size) {
    const std::unique_ptr<int64_t> owned(static_cast<int64_t*>(size));
    auto& now = step();
    const std::lock_guard guard(now.lock);
    now.live_bytes -= *owned;
  }
  c10::DataPtr allocate(size_t n) override {
    auto& now = step();
    const std::lock_guard guard(now.lock);
    now.live_bytes += static_cast<int64_t>(n);
    now.peak_bytes = std::max(now.peak_bytes, now.live_bytes);
    return {nullptr, new int64_t(static_cast<int64_t>(n)), &release, at::Device(at::kMeta)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, std::size_t) const override {}
};

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::empty(size, at::TensorOptions().dtype(dtype).device(at::kMeta), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::empty_strided(size, stride, at::TensorOptions().dtype(dtype).device(at::kMeta));
}

at::Scalar number(const Tensor& x) {
  // A norm above every limit, so that a gradient is clipped.
  return at::isFloatingType(x.scalar_type()) ? at::Scalar(2.0) : at::Scalar(int64_t{1});
}

// cuDNN's convolutions run in the layout of their pixels or of their weight, channels last if either is so.
at::MemoryFormat layout_of(const Tensor& x, const Tensor& w) {
  const bool last = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                    w.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

Tensor convolution(const Tensor& x, const Tensor& w, const OptionalTensor&, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef, bool, at::IntArrayRef, int64_t) {
  const auto layout = layout_of(x, w);
  const auto pixels = x.contiguous(layout), weight = w.contiguous(layout);
  std::vector<int64_t> size{x.size(0), w.size(0)};
  for (int64_t side = 0; side < 2; ++side)
    size.push_back((x.size(2 + side) + 2 * padding[side] - w.size(2 + side)) / stride[side] + 1);
  return at::empty(size, x.options().memory_format(layout));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& g, const Tensor& x, const Tensor& w,
                                                        at::OptionalIntArrayRef, at::IntArrayRef, at::IntArrayRef,
                                                        at::IntArrayRef, bool, at::IntArrayRef, int64_t, Mask wanted) {
  const auto layout = layout_of(x, w);
  const auto gradient = g.contiguous(layout);
  Tensor of_x, of_w, of_b;
  if (wanted[0]) {
    const auto weight = w.contiguous(layout);
    of_x = at::empty(x.sizes(), x.options().memory_format(layout));
  }
  if (wanted[1]) {
    const auto pixels = x.contiguous(layout);
    of_w = at::empty(w.sizes(), w.options().memory_format(layout));
  }
  if (wanted[2]) of_b = at::empty({w.size(0)}, w.options());
  return {of_x, of_w, of_b};
}

// CUDA's group norm runs with channels first, whatever its input.
std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& x, const OptionalTensor&, const OptionalTensor&, int64_t n,
                                              int64_t, int64_t, int64_t groups, double) {
  const auto first = x.contiguous();
  return {at::empty_like(first), at::empty({n, groups}, x.options()), at::empty({n, groups}, x.options())};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(const Tensor& g, const Tensor& x, const Tensor&, const Tensor&,
                                                       const OptionalTensor& w, int64_t, int64_t c, int64_t, int64_t,
                                                       Mask wanted) {
  const auto gradient = g.contiguous(), first = x.contiguous();
  const auto options = w && w->defined() ? w->options() : x.options();
  return {wanted[0] ? at::empty_like(first) : Tensor(), wanted[1] ? at::empty({c}, options) : Tensor(),
          wanted[2] ? at::empty({c}, options) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, at::IntArrayRef shape, const OptionalTensor&,
                                              const OptionalTensor&, double) {
  const auto rows = x.contiguous();
  auto size = x.sizes().vec();
  for (size_t i = size.size() - shape.size(); i < size.size(); ++i) size[i] = 1;
  const auto options = x.options().dtype(at::kFloat);
  return {at::empty_like(rows), at::empty(size, options), at::empty(size, options)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& g, const Tensor& x, at::IntArrayRef, const Tensor&,
                                                       const Tensor&, const OptionalTensor& w, const OptionalTensor& b,
                                                       Mask wanted) {
  const auto gradient = g.contiguous(), rows = x.contiguous();
  return {wanted[0] ? at::empty_like(rows) : Tensor(), wanted[1] ? at::empty_like(*w) : Tensor(),
          wanted[2] ? at::empty_like(*b) : Tensor()};
}

// Flash attention, which takes no mask.
int64_t attention_choice(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor& mask, double, bool,
                         std::optional<double>, bool) {
  constexpr int64_t MATH = 0, FLASH = 1;
  return mask && mask->defined() ? MATH : FLASH;
}

// [b, h, n, d] in the memory of [b, n, h, d].
Tensor heads_like(const Tensor& x) { return at::empty_like(x.transpose(1, 2).contiguous()).transpose(1, 2); }

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> flash(
    const Tensor& q, const Tensor& k, const Tensor&, double, bool, bool, std::optional<double>) {
  const auto numbers = at::empty({2}, q.options().dtype(at::kLong));
  return {heads_like(q), at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat)),
          Tensor(),      Tensor(),
          q.size(2),     k.size(2),
          numbers,       at::empty({0}, q.options()),
          Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor&, const Tensor& sums, const Tensor&, const Tensor&,
                                                  int64_t, int64_t, double, bool, const Tensor&, const Tensor&,
                                                  std::optional<double>) {
  // Its fp32 sums of the queries' gradients, and a number for each query.
  const auto of_queries = at::empty(q.sizes(), q.options().dtype(at::kFloat)), deltas = at::empty_like(sums);
  const auto rows = g.transpose(1, 2).contiguous();
  return {heads_like(q), heads_like(k), heads_like(v)};
}

void fused_adamw(TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, double, double, double, double,
                 double, bool, bool, const OptionalTensor&, const OptionalTensor&) {}

std::vector<Tensor> norms(TensorList all, const at::Scalar&, std::optional<at::ScalarType> dtype) {
  std::vector<Tensor> found;
  for (const auto& x : all) found.push_back(at::empty({}, x.options().dtype(dtype.value_or(x.scalar_type()))));
  return found;
}

void scale(TensorList, const at::Scalar&) {}

// libtorch warns of a kernel that takes another's place, which is meant here.
struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

void register_kernels() {
  Silence silence;
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  static torch::Library mps(torch::Library::IMPL, "aten", c10::DispatchKey::MPS, __FILE__, __LINE__);
  mps.impl("empty.memory_format", empty);
  mps.impl("empty_strided", empty_strided);
  static torch::Library meta(torch::Library::IMPL, "aten", c10::DispatchKey::Meta, __FILE__, __LINE__);
  meta.impl("_local_scalar_dense", number);
  meta.impl("convolution", convolution);
  meta.impl("convolution_backward", convolution_backward);
  meta.impl("native_group_norm", group_norm);
  meta.impl("native_group_norm_backward", group_norm_backward);
  meta.impl("native_layer_norm", layer_norm);
  meta.impl("native_layer_norm_backward", layer_norm_backward);
  meta.impl("_fused_sdp_choice", attention_choice);
  meta.impl("_scaled_dot_product_flash_attention", flash);
  meta.impl("_scaled_dot_product_flash_attention_backward", flash_backward);
  meta.impl("_fused_adamw_", fused_adamw);
  meta.impl("_foreach_norm.Scalar", norms);
  meta.impl("_foreach_mul_.Scalar", scale);
}

std::string quoted(const std::string& name) { return '"' + name + '"'; }

std::string json(const Calls& calls) {
  std::ostringstream out;
  out << "{\"dispatched\":" << calls.dispatched << ",\"waits\":" << calls.waits << ",\"operations\":{";
  const char* comma = "";
  for (const auto& [name, count] : calls.operations) {
    out << comma << quoted(name) << ':' << count;
    comma = ",";
  }
  out << "},\"layout_copies\":{";
  comma = "";
  for (const auto& [name, copies] : calls.layout_copies) {
    out << comma << quoted(name) << ":[" << copies[0] << ',' << copies[1] << ']';
    comma = ",";
  }
  out << "}}";
  return out.str();
}

}  // namespace

extern "C" {

// Makes the meta device usable. Called once, before its first tensor.
char* rectiflow_counting_install() {
  return guarded([&] {
    static Bytes bytes;
    c10::SetAllocator(c10::kMeta, &bytes, 1);
    // Copies to a device ask for its index, which is the guard's answer.
    static const c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::MPS> guard;
    c10::impl::registerDeviceGuard(c10::DeviceType::MPS, &guard);
    register_kernels();
    observer = at::addGlobalCallback(at::RecordFunctionCallback(enter, leave)
                                         .needsInputs(true)
                                         .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION}));
    at::disableCallback(observer);
  });
}

// Begins a count. The peak begins with the bytes that are alive.
void rectiflow_counting_begin() {
  auto& now = step();
  const std::lock_guard guard(now.lock);
  now.forward = now.backward = now.latest = {};
  now.is_backward = false;
  now.nodes = 0;
  now.peak_bytes = now.live_bytes;
  now.is_on = true;
  at::reenableCallback(observer);
}

// Ends a count. Returns it as JSON, which the caller frees. Calls cost nothing afterwards.
char* rectiflow_counting_end() {
  at::disableCallback(observer);
  auto& now = step();
  const std::lock_guard guard(now.lock);
  now.is_on = false;
  std::ostringstream out;
  out << "{\"forward\":" << json(now.is_backward ? now.forward : now.latest)
      << ",\"backward\":" << json(now.backward)
      << ",\"update\":" << json(now.is_backward ? now.latest : Calls())
      << ",\"nodes\":" << now.nodes << ",\"live_bytes\":" << now.live_bytes << ",\"peak_bytes\":" << now.peak_bytes << '}';
  return strdup(out.str().c_str());
}

}  // extern "C"
