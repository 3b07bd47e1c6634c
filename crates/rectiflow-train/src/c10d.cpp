// torch's collectives (c10d) behind a C interface: what tch lacks. Every function that can fail takes `error`, where a
// message from malloc is left, the first line of what was thrown; the caller frees it with rf_free.
//
// A collective returns a work at once; rf_work_wait waits for it a while at a time, so that the caller can look after
// its peers in between. With NCCL (feature `nccl`, which needs the headers of CUDA and NCCL) the same source serves GPUs.

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
  // c10d keeps references to vectors of tensors only as long as the call lasts, the tensors themselves are kept here.
  std::vector<at::Tensor> tensors;
};

namespace {

// The whole of a collective is never longer than this to Gloo and NCCL themselves: the caller decides when to give up.
constexpr auto kForever = std::chrono::hours(24 * 365);

template <typename R, typename F>
R guarded(char** error, R failed, F body) {
  try {
    return body();
  } catch (const std::exception& e) {
    std::string text = e.what();
    *error = strdup(text.substr(0, text.find('\n')).c_str());
  } catch (...) {
    *error = strdup("an exception that is no std::exception");
  }
  return failed;
}

std::vector<uint8_t> bytes(const uint8_t* data, size_t length) {
  return {data, data + length};
}

uint8_t* copied(const std::vector<uint8_t>& value, size_t* length) {
  *length = value.size();
  auto* copy = static_cast<uint8_t*>(malloc(value.empty() ? 1 : value.size()));
  if (!value.empty()) {
    memcpy(copy, value.data(), value.size());
  }
  return copy;
}

} // namespace

extern "C" {

void rf_free(void* memory) {
  free(memory);
}

// A connection to the key-value store at host:port, which this process serves if is_server. Keys get the prefix.
rf_store* rf_store_open(const char* host, uint16_t port, bool is_server, int64_t timeout_ms, const char* prefix, char** error) {
  return guarded<rf_store*>(error, nullptr, [&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = is_server;
    options.waitWorkers = false;
    options.timeout = Millis(timeout_ms);
    c10::intrusive_ptr<Store> store = c10::make_intrusive<c10d::TCPStore>(host, options);
    return new rf_store{c10::make_intrusive<c10d::PrefixStore>(prefix, store)};
  });
}

void rf_store_close(rf_store* store) {
  delete store;
}

int rf_store_set(rf_store* store, const char* key, const uint8_t* data, size_t length, char** error) {
  return guarded(error, -1, [&] {
    store->store->set(key, bytes(data, length));
    return 0;
  });
}

// Sets a key that nobody has set yet. Gives what it holds then.
uint8_t* rf_store_set_once(rf_store* store, const char* key, const uint8_t* data, size_t length, size_t* found, char** error) {
  return guarded<uint8_t*>(error, nullptr, [&] {
    return copied(store->store->compareSet(key, {}, bytes(data, length)), found);
  });
}

// Waits for a key, and gives what it holds.
uint8_t* rf_store_get(rf_store* store, const char* key, int64_t timeout_ms, size_t* found, char** error) {
  return guarded<uint8_t*>(error, nullptr, [&] {
    store->store->wait({key}, Millis(timeout_ms));
    return copied(store->store->get(key), found);
  });
}

// 1 if somebody has set the key, 0 if not, -1 on an error.
int rf_store_has(rf_store* store, const char* key, char** error) {
  return guarded(error, -1, [&] { return store->store->check({key}) ? 1 : 0; });
}

// Whether this build has collectives between GPUs.
bool rf_has_nccl() {
#ifdef USE_C10D_NCCL
  return true;
#else
  return false;
#endif
}

// Joins the processes that meet at the store. Gloo works over `interface` (a network interface's name) where one is
// given, else over `address` (this machine's own), else over whatever the machine's name stands for.
rf_group* rf_group_open(rf_store* store, bool nccl, int rank, int ranks, const char* interface, const char* address, char** error) {
  return guarded<rf_group*>(error, nullptr, [&]() -> rf_group* {
    if (nccl) {
#ifdef USE_C10D_NCCL
      auto options = c10d::ProcessGroupNCCL::Options::create();
      options->timeout = std::chrono::duration_cast<Millis>(kForever);
      return new rf_group{c10::make_intrusive<c10d::ProcessGroupNCCL>(store->store, rank, ranks, options)};
#else
      throw std::runtime_error("this build has no NCCL");
#endif
    }
    auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::duration_cast<Millis>(kForever));
    std::string name = interface, host = address;
    options->devices.push_back(
        !name.empty()   ? c10d::ProcessGroupGloo::createDeviceForInterface(name)
        : !host.empty() ? c10d::ProcessGroupGloo::createDeviceForHostname(host)
                        : c10d::ProcessGroupGloo::createDefaultDevice());
    return new rf_group{c10::make_intrusive<c10d::ProcessGroupGloo>(store->store, rank, ranks, options)};
  });
}

void rf_group_close(rf_group* group) {
  delete group;
}

// Sum over all ranks, in place.
rf_work* rf_all_reduce(rf_group* group, at::Tensor* tensor, char** error) {
  return guarded<rf_work*>(error, nullptr, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    return new rf_work{group->backend->allreduce(tensors), tensors};
  });
}

// The tensor of rank `from` on all ranks.
rf_work* rf_broadcast(rf_group* group, at::Tensor* tensor, int from, char** error) {
  return guarded<rf_work*>(error, nullptr, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = from;
    return new rf_work{group->backend->broadcast(tensors, options), tensors};
  });
}

// `all` holds an equal piece for each rank; `piece` becomes the sum of this rank's. NCCL only: Gloo's own is an all-reduce
// of the whole.
rf_work* rf_reduce_scatter(rf_group* group, at::Tensor* piece, at::Tensor* all, char** error) {
  return guarded<rf_work*>(error, nullptr, [&] {
    return new rf_work{group->backend->_reduce_scatter_base(*piece, *all), {*piece, *all}};
  });
}

// `all` becomes the pieces of all ranks in their order.
rf_work* rf_all_gather(rf_group* group, at::Tensor* all, at::Tensor* piece, char** error) {
  return guarded<rf_work*>(error, nullptr, [&] {
    return new rf_work{group->backend->_allgather_base(*all, *piece), {*all, *piece}};
  });
}

// Piece r of `in` goes to rank r; piece r of `out` is what rank r had for this one. Equal pieces.
rf_work* rf_all_to_all(rf_group* group, at::Tensor* out, at::Tensor* in, char** error) {
  return guarded<rf_work*>(error, nullptr, [&] {
    std::vector<int64_t> equal;
    return new rf_work{group->backend->alltoall_base(*out, *in, equal, equal), {*out, *in}};
  });
}

// 1 if the work is done, 0 if it is not after `timeout_ms`, -1 on an error.
int rf_work_wait(rf_work* work, int64_t timeout_ms, char** error) {
  return guarded(error, -1, [&] {
    const auto end = std::chrono::steady_clock::now() + Millis(timeout_ms);
    auto pause = std::chrono::microseconds(20);
    while (!work->work->isCompleted()) {
      if (std::chrono::steady_clock::now() >= end) {
        return 0;
      }
      std::this_thread::sleep_for(pause);
      pause = std::min(pause * 2, std::chrono::microseconds(500));
    }
    work->work->wait(); // throws what the work threw; for NCCL makes the current stream wait
    return 1;
  });
}

void rf_work_free(rf_work* work) {
  delete work;
}

} // extern "C"
