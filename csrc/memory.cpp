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
constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kLeast = size_t{1} << 26;  // may be kept in any case: a program of small ops has no peak to speak of

struct Block {
  void* data;
  size_t bytes;
};

class Memory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmall) return c10::GetCPUAllocator()->allocate(bytes);
    const size_t unit = bytes < 4 * kHugePage ? kSmall / 4 : kHugePage;
    const size_t rounded = (bytes + unit - 1) / unit * unit;
    const std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<Block> block = take(rounded);
    in_use_ += block->bytes;
    peak_ = std::max(peak_, in_use_);
    void* const data = block->data;
    return {data, block.release(), &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* dest, const void* src, size_t count) const override { std::memcpy(dest, src, count); }

 private:
  // A kept block of at least `bytes` and at most a quarter more, or else a new one.
  std::unique_ptr<Block> take(size_t bytes) {
    const auto kept = free_.lower_bound(bytes);
    if (kept != free_.end() && kept->first <= bytes + bytes / 4) {
      std::unique_ptr<Block> block = std::move(kept->second);
      free_.erase(kept);
      kept_ -= block->bytes;
      return block;
    }
    const size_t needed = in_use_ + bytes;
    release_down_to(peak_ > needed ? peak_ - needed : 0);
    void* data = map(bytes);
    if (data == MAP_FAILED) {
      release_down_to(0);
      data = map(bytes);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, data != MAP_FAILED, "not enough memory: tried to allocate ", bytes, " bytes");
#ifdef MADV_HUGEPAGE
    madvise(data, bytes, MADV_HUGEPAGE);  // advice: a system without huge pages may refuse it
#endif
    return std::make_unique<Block>(Block{data, bytes});
  }

  static void* map(size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }

  // Gives the largest kept blocks back to the system until at most `bytes` are kept.
  void release_down_to(size_t bytes) {
    while (kept_ > bytes) {
      const auto largest = std::prev(free_.end());
      munmap(largest->second->data, largest->second->bytes);
      kept_ -= largest->second->bytes;
      free_.erase(largest);
    }
  }

  static void give_back(void* context) {
    std::unique_ptr<Block> block(static_cast<Block*>(context));
    auto& self = static_cast<Memory&>(memory());
    const std::lock_guard<std::mutex> lock(self.mutex_);
    self.in_use_ -= block->bytes;
    self.kept_ += block->bytes;
    const size_t bytes = block->bytes;
    self.free_.emplace(bytes, std::move(block));
  }

  std::mutex mutex_;
  std::multimap<size_t, std::unique_ptr<Block>> free_;
  size_t in_use_ = 0, kept_ = 0, peak_ = kLeast;  // bytes; peak_ is that of in_use_
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
