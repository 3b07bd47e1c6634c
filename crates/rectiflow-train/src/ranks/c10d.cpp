// torch's collectives (c10d) behind a C interface, which tch lacks. No C++ exception leaves this
// file: a function that can fail returns null or a text that the caller frees, and its result
// through its last argument.
//
// A collective returns a work immediately. rf_work_wait waits for a limited time, so the caller can
// check on its peers in between. Compiled against a libtorch with CUDA and the headers of NCCL
// (crates/link-libtorch.rs), the same source supports GPUs.

#include "guarded.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

using Millis = std::chrono::milliseconds;
using c10d::Backend;
using c10d::Store;
using c10d::Work;

struct rf_store {
  c10::intrusive_ptr<Store> store;
};
struct rf_group {
  c10::intrusive_ptr<Backend> backend;
};
struct rf_work {
  c10::intrusive_ptr<Work> work;
  // c10d keeps references to vectors of tensors only during the call, so the tensors themselves are
  // kept here.
  std::vector<at::Tensor> tensors;
};

namespace {

// Time limit of Gloo and NCCL for a collective. In practice the caller decides when to give up.
constexpr auto kForever = std::chrono::hours(24 * 365);

std::vector<uint8_t> bytes(const uint8_t* data, size_t length) {
  return {data, data + length};
}

// Copies bytes into memory from malloc, to be freed with rf_free.
void give(const std::vector<uint8_t>& value, uint8_t** data, size_t* length) {
  *length = value.size();
  *data = static_cast<uint8_t*>(malloc(value.empty() ? 1 : value.size()));
  if (!value.empty()) {
    memcpy(*data, value.data(), value.size());
  }
}

} // namespace

extern "C" {

void rf_free(void* memory) {
  free(memory);
}

// Connects to the key-value store at host:port, which this process serves if is_server. All keys
// get the prefix.
char* rf_store_open(const char* host, uint16_t port, bool is_server, int64_t timeout_ms, const char* prefix, rf_store** opened) {
  return guarded([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = is_server;
    options.waitWorkers = false;
    options.timeout = Millis(timeout_ms);
    c10::intrusive_ptr<Store> store = c10::make_intrusive<c10d::TCPStore>(host, options);
    *opened = new rf_store{c10::make_intrusive<c10d::PrefixStore>(prefix, store)};
  });
}

void rf_store_close(rf_store* store) {
  delete store;
}

char* rf_store_set(rf_store* store, const char* key, const uint8_t* data, size_t length) {
  return guarded([&] { store->store->set(key, bytes(data, length)); });
}

// Sets a key unless it is already set, and returns its value afterwards.
char* rf_store_set_once(
    rf_store* store, const char* key, const uint8_t* data, size_t length, size_t* found_length, uint8_t** found) {
  return guarded([&] { give(store->store->compareSet(key, {}, bytes(data, length)), found, found_length); });
}

// Waits for a key and returns its value.
char* rf_store_get(rf_store* store, const char* key, int64_t timeout_ms, size_t* found_length, uint8_t** found) {
  return guarded([&] {
    store->store->wait({key}, Millis(timeout_ms));
    give(store->store->get(key), found, found_length);
  });
}

// Sets `has` to whether the key is set.
char* rf_store_has(rf_store* store, const char* key, bool* has) {
  return guarded([&] { *has = store->store->check({key}); });
}

// Returns whether this build has NCCL, for collectives between GPUs.
bool rf_has_nccl() {
#ifdef USE_C10D_NCCL
  return true;
#else
  return false;
#endif
}

// Joins the processes that meet at the store; Gloo fails if they do not within the timeout, NCCL
// meets in the first collective. Gloo uses `interface` (the name of a network interface) if it is
// not empty, else `address` (of this machine), else the address of the machine's host name.
char* rf_group_open(
    rf_store* store, bool nccl, int rank, int ranks, const char* interface, const char* address, int64_t timeout_ms,
    rf_group** opened) {
  return guarded([&] {
    if (nccl) {
#ifdef USE_C10D_NCCL
      auto options = c10d::ProcessGroupNCCL::Options::create();
      options->timeout = std::chrono::duration_cast<Millis>(kForever);
      *opened = new rf_group{c10::make_intrusive<c10d::ProcessGroupNCCL>(store->store, rank, ranks, options)};
      return;
#else
      throw std::runtime_error("this build has no NCCL");
#endif
    }
    auto options = c10d::ProcessGroupGloo::Options::create(Millis(timeout_ms));
    std::string name = interface, host = address;
    options->devices.push_back(
        !name.empty()   ? c10d::ProcessGroupGloo::createDeviceForInterface(name)
        : !host.empty() ? c10d::ProcessGroupGloo::createDeviceForHostname(host)
                        : c10d::ProcessGroupGloo::createDefaultDevice());
    auto gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(store->store, rank, ranks, options);
    gloo->setTimeout(std::chrono::duration_cast<Millis>(kForever));
    *opened = new rf_group{gloo};
  });
}

void rf_group_close(rf_group* group) {
  delete group;
}

// Sums a tensor over all ranks, in place.
char* rf_all_reduce(rf_group* group, at::Tensor* tensor, rf_work** begun) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{*tensor};
    *begun = new rf_work{group->backend->allreduce(tensors), tensors};
  });
}

// Copies the tensor of rank `from` to all ranks.
char* rf_broadcast(rf_group* group, at::Tensor* tensor, int from, rf_work** begun) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = from;
    *begun = new rf_work{group->backend->broadcast(tensors, options), tensors};
  });
}

// `all` holds an equal piece for each rank; `piece` becomes the sum over all ranks of this rank's
// piece. NCCL only: Gloo's own is an all-reduce of the whole vector.
char* rf_reduce_scatter(rf_group* group, at::Tensor* piece, at::Tensor* all, rf_work** begun) {
  return guarded([&] {
    *begun = new rf_work{group->backend->_reduce_scatter_base(*piece, *all), {*piece, *all}};
  });
}

// `all` becomes the pieces of all ranks, in the order of the ranks.
char* rf_all_gather(rf_group* group, at::Tensor* all, at::Tensor* piece, rf_work** begun) {
  return guarded([&] {
    *begun = new rf_work{group->backend->_allgather_base(*all, *piece), {*all, *piece}};
  });
}

// Sends piece r of `in` to rank r; piece r of `out` is received from rank r. The pieces are equally
// long.
char* rf_all_to_all(rf_group* group, at::Tensor* out, at::Tensor* in, rf_work** begun) {
  return guarded([&] {
    std::vector<int64_t> equal;
    *begun = new rf_work{group->backend->alltoall_base(*out, *in, equal, equal), {*out, *in}};
  });
}

// Waits for at most `timeout_ms`, and sets `done` to whether the work is done.
char* rf_work_wait(rf_work* work, int64_t timeout_ms, bool* done) {
  return guarded([&] {
    const auto end = std::chrono::steady_clock::now() + Millis(timeout_ms);
    auto pause = std::chrono::microseconds(20);
    *done = false;
    while (!work->work->isCompleted()) {
      if (std::chrono::steady_clock::now() >= end) {
        return;
      }
      std::this_thread::sleep_for(pause);
      pause = std::min(pause * 2, std::chrono::microseconds(500));
    }
    work->work->wait(); // rethrows the exception of the work; with NCCL makes the current stream wait
    *done = true;
  });
}

void rf_work_free(rf_work* work) {
  delete work;
}

} // extern "C"
