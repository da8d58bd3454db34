#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

namespace tapelm {
namespace {

constexpr size_t kSmall = size_t{1} << 20;  // below this the C library keeps freed memory itself
constexpr size_t kUnit = size_t{1} << 16;
constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kSegment = size_t{1} << 30;  // of addresses: pages that were never used take no memory

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

struct Block {
  char* data;
  size_t bytes;
};

class Memory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmall) return c10::GetCPUAllocator()->allocate(bytes);
    const size_t rounded = round_up(bytes, kUnit);
    const std::lock_guard<std::mutex> lock(mutex_);
    char* const data = take(rounded);
    return {data, new Block{data, rounded}, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* dest, const void* src, size_t count) const override { std::memcpy(dest, src, count); }

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
    auto& self = static_cast<Memory&>(memory());
    const std::lock_guard<std::mutex> lock(self.mutex_);
    self.insert(block->data, block->bytes);
  }

  std::mutex mutex_;
  std::map<char*, size_t> free_;  // bytes by address, no two of them neighbours
};

}  // namespace

c10::Allocator& memory() {
  static Memory* const instance = new Memory;  // never destroyed: tensors may outlive every static object
  return *instance;
}

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_generic(sizes, &memory(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

}  // namespace tapelm
