// A growing array of ids that is not cleared when it grows, and that realloc may move without copying its pages.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <span>
#include <utility>

#include "huge_pages.h"

namespace tapelm::text {

class IdBuffer {
 public:
  IdBuffer() = default;
  IdBuffer(IdBuffer&& other) noexcept { swap(other); }
  IdBuffer& operator=(IdBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~IdBuffer() { std::free(data_); }

  // Room for `count` ids more, to be written from the returned address on and counted by `commit`.
  uint32_t* reserve(size_t count) {
    if (count > capacity_ - size_) resize(size_ + count > 2 * capacity_ ? size_ + count : 2 * capacity_);
    return data_ + size_;
  }
  void commit(const uint32_t* end) { size_ = static_cast<size_t>(end - data_); }

  void push_back(uint32_t id) {
    *reserve(1) = id;
    ++size_;
  }
  void clear() { size_ = 0; }

  // Gives back what was reserved and not used.
  void shrink() {
    if (size_ < capacity_) resize(size_);
  }

  uint32_t* data() { return data_; }
  const uint32_t* data() const { return data_; }
  size_t room() const { return capacity_ - size_; }
  size_t size() const { return size_; }
  std::span<const uint32_t> from(size_t begin) const { return {data_ + begin, size_ - begin}; }

 private:
  void swap(IdBuffer& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

  void resize(size_t capacity) {
    void* moved = std::realloc(data_, (capacity + 1) * sizeof(uint32_t));
    if (moved == nullptr) throw std::bad_alloc();
    if (capacity > capacity_) prefer_huge_pages(moved, capacity * sizeof(uint32_t));
    data_ = static_cast<uint32_t*>(moved);
    capacity_ = capacity;
  }

  uint32_t* data_ = nullptr;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

}  // namespace tapelm::text
