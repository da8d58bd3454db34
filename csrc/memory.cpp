#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>

namespace tapelm {
namespace {

constexpr size_t kSmall = size_t{1} << 20;  // smaller blocks are the C library's, which reuses those itself
constexpr size_t kUnit = size_t{1} << 16;
constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kSegment = size_t{1} << 30;  // of addresses: pages that were never used take no memory

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

struct Block {
  char* data;
  size_t bytes;
};

struct Segment {
  void* mapped;  // start of the mapping of `bytes` and a huge page for alignment
  size_t bytes;
};

class Memory final : public c10::Allocator {
 public:
  static Memory& instance();

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmall) return c10::GetCPUAllocator()->allocate(bytes);
    const size_t rounded = round_up(bytes, kUnit);
    const std::lock_guard<std::mutex> lock(mutex_);
    char* const data = take(rounded);
    return {data, new Block{data, rounded}, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* dest, const void* src, size_t count) const override { std::memcpy(dest, src, count); }

  // Unmaps the segments in which nothing lives; the pages of what is free in the others go back to the system as well.
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto segment = segments_.begin(); segment != segments_.end();) {
      const auto free = free_.find(segment->first);
      if (free == free_.end() || free->second != segment->second.bytes) {
        ++segment;
        continue;
      }
      munmap(segment->second.mapped, segment->second.bytes + kHugePage);
      free_.erase(free);
      segment = segments_.erase(segment);
    }
    for (const auto& [data, bytes] : free_) madvise(data, bytes, MADV_DONTNEED);
  }

  // Bytes of all segments, and of what is free in them.
  std::pair<int64_t, int64_t> sizes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::pair<int64_t, int64_t> sizes{0, 0};
    for (const auto& [data, segment] : segments_) sizes.first += static_cast<int64_t>(segment.bytes);
    for (const auto& [data, bytes] : free_) sizes.second += static_cast<int64_t>(bytes);
    return sizes;
  }

 private:
  // The beginning of the first free block that is large enough.
  char* take(size_t bytes) {
    const auto fits = [bytes](const auto& block) { return block.second >= bytes; };
    auto found = std::find_if(free_.begin(), free_.end(), fits);
    if (found == free_.end()) found = grow(bytes);
    const auto [data, size] = *found;
    free_.erase(found);
    if (size > bytes) free_.emplace(data + bytes, size - bytes);
    return data;
  }

  std::map<char*, size_t>::iterator grow(size_t bytes) {
    size_t size = std::max(round_up(bytes, kHugePage), kSegment);
    void* mapped = map(size + kHugePage);
    if (mapped == MAP_FAILED) {
      size = round_up(bytes, kHugePage);
      mapped = map(size + kHugePage);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, mapped != MAP_FAILED, "not enough memory: tried to allocate ", bytes, " bytes");
    char* const data = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(mapped), kHugePage));
#ifdef MADV_HUGEPAGE
    madvise(data, size, MADV_HUGEPAGE);  // advice: a system without huge pages may refuse it
#endif
    segments_.emplace(data, Segment{mapped, size});
    return insert(data, size);
  }

  static void* map(size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }

  // Joined with the free neighbours.
  std::map<char*, size_t>::iterator insert(char* data, size_t bytes) {
    const auto next = free_.find(data + bytes);
    if (next != free_.end()) {
      bytes += next->second;
      free_.erase(next);
    }
    const auto after = free_.lower_bound(data);
    if (after != free_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second == data) {
        before->second += bytes;
        return before;
      }
    }
    return free_.emplace(data, bytes).first;
  }

  static void give_back(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    Memory& self = instance();
    const std::lock_guard<std::mutex> lock(self.mutex_);
    self.insert(block->data, block->bytes);
  }

  std::mutex mutex_;
  std::map<char*, size_t> free_;  // bytes by address, no two of them neighbours
  std::map<char*, Segment> segments_;  // by the address of their first block; no two touch
};

Memory& Memory::instance() {
  static Memory* const memory = new Memory;  // never destroyed: tensors may outlive every static object
  return *memory;
}

}  // namespace

c10::Allocator& memory() { return Memory::instance(); }

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_generic(sizes, &memory(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  const c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
  return at::detail::empty_strided_generic(sizes, strides, &memory(), cpu, dtype);
}

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def("empty_cache() -> ()", [] { Memory::instance().release(); });
  m.def("memory_sizes() -> (int, int)", [] {
    const auto [held, free] = Memory::instance().sizes();
    return std::make_tuple(held, free);
  });
}

}  // namespace tapelm
