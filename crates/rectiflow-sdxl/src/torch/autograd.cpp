// Autograd functions of libtorch that tch does not expose: nodes whose backward pass is written in
// Rust. A C interface for autograd.rs. No C++ exception leaves this file: every fallible function
// returns null or a text that the caller frees.

#include "guarded.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

extern "C" {
// A Rust closure. `call` takes ownership of the tensors. It returns 0 and a tensor (or null), or
// another number and a reason in `failure`.
struct RectiflowClosure {
  void* data;
  int (*call)(void* data, Tensor** tensors, size_t num_tensors, Tensor** result, std::string* failure);
  void (*drop)(void* data);
};
}

namespace {

class Closure {
 public:
  explicit Closure(RectiflowClosure closure) : closure_(closure) {}
  Closure(const Closure&) = delete;
  Closure& operator=(const Closure&) = delete;
  ~Closure() { closure_.drop(closure_.data); }

  Tensor operator()(variable_list tensors) const {
    std::vector<Tensor*> owned;
    owned.reserve(tensors.size());
    for (auto& tensor : tensors) owned.push_back(new Tensor(std::move(tensor)));
    Tensor* result = nullptr;
    std::string failure;
    const int code = closure_.call(closure_.data, owned.data(), owned.size(), &result, &failure);
    std::unique_ptr<Tensor> given(result);
    if (code != 0) throw std::runtime_error(failure);
    return given ? std::move(*given) : Tensor();
  }

 private:
  RectiflowClosure closure_;
};

// Keeps the inputs of a calculation instead of its intermediate results, and recomputes those in
// the backward pass. The parameters are inputs of the node too, so that a backward pass for some of
// them alone reaches the node.
class Checkpoint : public Node {
 public:
  explicit Checkpoint(RectiflowClosure closure) : run(closure) {}

  variable_list apply(variable_list&& gradients) override {
    variable_list result(num_outputs());
    if (!gradients[0].defined()) return result;
    variable_list fresh;
    for (auto& saved : inputs) {
      const auto input = saved.unpack();
      fresh.push_back(input.detach().set_requires_grad(input.requires_grad()));
    }
    Tensor again;
    {
      at::AutoGradMode on(true);
      again = run(fresh);
    }
    variable_list wanted;
    std::vector<size_t> places;
    for (size_t place = 0; place < result.size(); ++place) {
      const auto& tensor = place < fresh.size() ? fresh[place] : parameters[place - fresh.size()];
      if (tensor.requires_grad() && task_should_compute_output(place)) {
        wanted.push_back(tensor);
        places.push_back(place);
      }
    }
    if (wanted.empty() || !again.requires_grad()) return result;
    fresh.clear();
    auto found = torch::autograd::grad({std::move(again)}, wanted, {std::move(gradients[0])}, false, false, true);
    for (size_t i = 0; i < places.size(); ++i) result[places[i]] = std::move(found[i]);
    return result;
  }

  void release_variables() override {
    for (auto& saved : inputs) saved.reset_data();
  }

  std::string name() const override { return "RectiflowCheckpoint"; }

  Closure run;
  std::vector<SavedVariable> inputs;
  variable_list parameters;
};

// Replaces libtorch's accumulation of a leaf's gradient: passes each complete gradient to Rust and
// keeps nothing.
class Sink : public Node {
 public:
  // Runs before all other nodes that are ready, as AccumulateGrad does, so that a complete gradient
  // is freed at once.
  explicit Sink(RectiflowClosure closure) : Node(UINT64_MAX), take(closure) {}

  variable_list apply(variable_list&& gradients) override {
    if (gradients[0].defined()) take({std::move(gradients[0])});
    return {};
  }

  std::string name() const override { return "RectiflowSink"; }

  Closure take;
};

variable_list list(Tensor* const* tensors, size_t num_tensors) {
  variable_list all;
  for (size_t i = 0; i < num_tensors; ++i) all.push_back(*tensors[i]);
  return all;
}

}  // namespace

extern "C" {

void rectiflow_free_text(char* text) { std::free(text); }

void rectiflow_fail(std::string* failure, const char* text, size_t length) { failure->assign(text, length); }

// Returns the closure's result on `inputs`, which the backward pass recalculates. Owns the closure,
// also after an error.
char* rectiflow_checkpoint(RectiflowClosure closure, Tensor* const* inputs, size_t num_inputs,
                           Tensor* const* parameters, size_t num_parameters, Tensor** out) {
  return guarded([&] {
    auto node = c10::make_intrusive<Checkpoint>(closure);
    const auto given = list(inputs, num_inputs);
    auto all = given;
    node->parameters = list(parameters, num_parameters);
    all.insert(all.end(), node->parameters.begin(), node->parameters.end());
    Tensor result;
    {
      at::NoGradGuard off;
      result = node->run(given);
    }
    if (at::GradMode::is_enabled() && torch::autograd::compute_requires_grad(all)) {
      result = result.variable_data();
      for (const auto& input : given) node->inputs.emplace_back(input, false);
      node->set_next_edges(torch::autograd::collect_next_edges(all));
      torch::autograd::set_history(result, node);
    }
    *out = new Tensor(std::move(result));
  });
}

// Passes each gradient of `leaf` to the closure until the handle is dropped. Owns the closure.
char* rectiflow_sink(RectiflowClosure closure, const Tensor* leaf, void** handle) {
  return guarded([&] {
    c10::intrusive_ptr<Node> sink = c10::make_intrusive<Sink>(closure);
    TORCH_CHECK(leaf->is_leaf() && leaf->requires_grad(), "only a leaf that requires a gradient can have a sink");
    sink->add_input_metadata(*leaf);
    torch::autograd::impl::set_grad_accumulator(*leaf, c10::weak_intrusive_ptr<Node>(sink));
    *handle = new c10::intrusive_ptr<Node>(std::move(sink));
  });
}

void rectiflow_drop_sink(void* handle) { delete static_cast<c10::intrusive_ptr<Node>*>(handle); }

}  // extern "C"
