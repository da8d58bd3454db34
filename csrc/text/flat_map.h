// Open-addressing hash map from uint64 keys to small values; keys of all ones are reserved for empty slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tapelm::text {

inline uint64_t mix(uint64_t x) {
  x ^= x >> 32;
  x *= 0x9E3779B97F4A7C15ull;
  x ^= x >> 29;
  x *= 0xD6E8FEB86659FD93ull;
  return x ^ (x >> 32);
}

inline uint64_t pair_key(uint32_t left, uint32_t right) { return static_cast<uint64_t>(left) << 32 | right; }

template <typename Value>
class FlatMap {
 public:
  FlatMap() : slots_(16) {}

  const Value* find(uint64_t key) const {
    for (size_t i = mix(key) & mask();; i = (i + 1) & mask()) {
      if (slots_[i].key == key) return &slots_[i].value;
      if (slots_[i].key == kEmpty) return nullptr;
    }
  }

  // The value of `key`, inserted as `fresh` when it is new.
  Value& get(uint64_t key, const Value& fresh) {
    if (2 * (size_ + 1) > slots_.size()) grow();
    size_t i = mix(key) & mask();
    while (slots_[i].key != key) {
      if (slots_[i].key == kEmpty) {
        slots_[i] = {key, fresh};
        ++size_;
        break;
      }
      i = (i + 1) & mask();
    }
    return slots_[i].value;
  }

  size_t size() const { return size_; }

  // Room for `count` keys without growing on the way.
  void reserve(size_t count) {
    while (slots_.size() < 2 * (count + 1)) grow();
  }

 private:
  static constexpr uint64_t kEmpty = ~0ull;
  struct Slot {
    uint64_t key = kEmpty;
    Value value{};
  };

  size_t mask() const { return slots_.size() - 1; }

  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.key == kEmpty) continue;
      size_t i = mix(slot.key) & mask();
      while (slots_[i].key != kEmpty) i = (i + 1) & mask();
      slots_[i] = slot;
    }
  }

  std::vector<Slot> slots_;
  size_t size_ = 0;
};

}  // namespace tapelm::text
