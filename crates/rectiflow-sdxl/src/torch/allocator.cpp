// The memory of large CPU tensors: one region of addresses, in which each block takes the smallest
// gap that fits, and adjacent gaps merge. allocator.rs has the reasons. A C interface.

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#ifdef __linux__

#include <sys/mman.h>
#include <sys/sysinfo.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t HUGE_PAGE = size_t{2} << 20;
// Smaller blocks are allocated by the C library.
constexpr size_t LEAST_BYTES = 64 << 10;
// Size of the region in multiples of the machine's memory: gaps occupy addresses.
constexpr size_t TIMES_MEMORY = 4;

using Address = uintptr_t;

// Gaps between blocks; no two are adjacent. Sizes are multiples of a page.
class Gaps {
 public:
  // Takes `bytes` from the smallest gap that fits; returns 0 if none does.
  Address take(size_t bytes) {
    const auto found = by_size_.lower_bound({bytes, 0});
    if (found == by_size_.end()) return 0;
    const auto [size, at] = *found;
    by_size_.erase(found);
    by_address_.erase(at);
    if (size > bytes) insert(at + bytes, size - bytes);
    return at;
  }

  // Adds a gap, merged with adjacent ones.
  void add(Address at, size_t bytes) {
    auto behind = by_address_.lower_bound(at);
    if (behind != by_address_.end() && behind->first == at + bytes) {
      bytes += behind->second;
      behind = erase(behind);
    }
    if (behind != by_address_.begin()) {
      const auto before = std::prev(behind);
      if (before->first + before->second == at) {
        at = before->first;
        bytes += before->second;
        erase(before);
      }
    }
    insert(at, bytes);
  }

  // Returns the pages of large gaps to the system; the gaps remain.
  void empty() const {
    for (auto gap = by_size_.lower_bound({HUGE_PAGE, 0}); gap != by_size_.end(); ++gap) {
      madvise(reinterpret_cast<void*>(gap->second), gap->first, MADV_DONTNEED);
    }
  }

  // Removes the gap that ends at `end`, if it exists, and returns its begin; otherwise returns
  // `end`.
  Address take_last(Address end) {
    if (by_address_.empty()) return end;
    const auto last = std::prev(by_address_.end());
    if (last->first + last->second != end) return end;
    const auto at = last->first;
    erase(last);
    return at;
  }

 private:
  using ByAddress = std::map<Address, size_t>;

  void insert(Address at, size_t bytes) {
    by_address_[at] = bytes;
    by_size_.insert({bytes, at});
  }

  ByAddress::iterator erase(ByAddress::iterator gap) {
    by_size_.erase({gap->second, gap->first});
    return by_address_.erase(gap);
  }

  ByAddress by_address_;
  std::set<std::pair<size_t, Address>> by_size_;
};

class Region final : public at::Allocator {
 public:
  // Never destroyed: static tensors can outlive it otherwise.
  static Region& only() {
    static auto* region = new Region();
    return *region;
  }

  bool is_reserved() const { return begin_ != 0; }

  at::DataPtr allocate(size_t num_bytes) override {
    if (num_bytes < LEAST_BYTES) return small_->allocate(num_bytes);
    const size_t bytes = (num_bytes + PAGE - 1) / PAGE * PAGE;
    void* data = take(bytes);
    TORCH_CHECK(data, "can't allocate memory: you tried to allocate ", num_bytes, " bytes, of ", memory_,
                " in this machine");
    return {data, data, &release, at::Device(at::DeviceType::CPU)};
  }

  at::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  void empty_gaps() {
    const std::lock_guard guard(lock_);
    gaps_.empty();
  }

  // Returns the bytes from the region's begin to the end of the last block.
  size_t reach() {
    const std::lock_guard guard(lock_);
    return end_ - begin_;
  }

 private:
  Region() {
    struct sysinfo machine = {};
    if (sysinfo(&machine) != 0) return;
    memory_ = (machine.totalram + machine.totalswap) * machine.mem_unit;
    size_ = memory_ / PAGE * PAGE * TIMES_MEMORY;
    void* mapped = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return;
    madvise(mapped, size_, MADV_HUGEPAGE);  // advice: not all systems have them
    begin_ = end_ = reinterpret_cast<Address>(mapped);
  }

  static void release(void* data) {
    if (data != nullptr) only().free(data);
  }

  void* take(size_t bytes) {
    const std::lock_guard guard(lock_);
    // The system would overcommit, and kill the process on use.
    if (bytes > memory_ - std::min(memory_, in_use_bytes_)) return nullptr;
    Address at = gaps_.take(bytes);
    if (at == 0) {
      at = gaps_.take_last(end_);
      if (bytes > begin_ + size_ - at) {
        if (at < end_) gaps_.add(at, end_ - at);
        return nullptr;
      }
      end_ = at + bytes;
    }
    in_use_[at] = bytes;
    in_use_bytes_ += bytes;
    return reinterpret_cast<void*>(at);
  }

  void free(void* data) {
    const std::lock_guard guard(lock_);
    const auto found = in_use_.find(reinterpret_cast<Address>(data));
    if (found == in_use_.end()) return small_->raw_deallocate(data);
    const auto [at, bytes] = *found;
    in_use_.erase(found);
    in_use_bytes_ -= bytes;
    gaps_.add(at, bytes);
  }

  at::Allocator* small_ = c10::GetDefaultCPUAllocator();
  std::mutex lock_;
  // Blocks and gaps lie from begin_ to end_; the region has size_ bytes.
  Address begin_ = 0, end_ = 0;
  size_t size_ = 0, memory_ = 0, in_use_bytes_ = 0;
  Gaps gaps_;
  std::unordered_map<Address, size_t> in_use_;
};

std::atomic<bool> is_packed{false};

}  // namespace

extern "C" {

void rectiflow_pack_tensors() {
  // There is no region where addresses are limited.
  if (!Region::only().is_reserved()) return;
  c10::SetCPUAllocator(&Region::only(), /*priority=*/1);
  is_packed = true;
}

void rectiflow_empty_gaps() {
  if (is_packed) Region::only().empty_gaps();
}

size_t rectiflow_reach() { return Region::only().reach(); }

}  // extern "C"

#else

extern "C" void rectiflow_pack_tensors() {}
extern "C" void rectiflow_empty_gaps() {}
extern "C" size_t rectiflow_reach() { return 0; }

#endif
