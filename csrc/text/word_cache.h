// Ids of words met before. Short words with few ids live in a table of 64-byte buckets, so that finding one costs one
// cache line; the others live in LongWords. Both are bounded: a full table replaces, a full LongWords starts afresh.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "flat_map.h"
#include "huge_pages.h"

namespace tapelm::text {

inline constexpr size_t kShortKey = 15;    // bytes of the longest word in ShortWords
inline constexpr size_t kShortIds = 3;     // most ids of such a word
inline constexpr size_t kLongKey = 128;    // longer words are rare and not worth remembering
inline constexpr ptrdiff_t kKeyOverread = 16;  // bytes that must be readable from the beginning of a word

// A word of at most 15 bytes as two integers: its bytes, zeros, and its length in the last byte.
struct alignas(16) Key {
  uint64_t low;
  uint64_t high;
  bool operator==(const Key& other) const { return ((low ^ other.low) | (high ^ other.high)) == 0; }
};

inline constexpr Key kNoKey{~0ull, ~0ull};  // that of no word

constexpr struct KeyMasks {
  Key bytes[kShortKey + 1]{};  // ones where a word of this length has bytes
  Key length[kShortKey + 1]{};
  constexpr KeyMasks() {
    for (uint32_t n = 0; n <= kShortKey; ++n) {
      bytes[n].low = n >= 8 ? ~0ull : (1ull << 8 * n) - 1;
      bytes[n].high = n <= 8 ? 0 : (1ull << 8 * (n - 8)) - 1;
      length[n].high = uint64_t{n} << 56;
    }
  }
} kKeyMasks;

// Reads kKeyOverread bytes whatever the length (at most kShortKey) is.
inline Key load_key(const uint8_t* word, size_t length) {
  Key key;
  std::memcpy(&key, word, sizeof key);
  key.low &= kKeyMasks.bytes[length].low;
  key.high = (key.high & kKeyMasks.bytes[length].high) | kKeyMasks.length[length].high;
  return key;
}

// The upper bits are the good ones.
inline uint64_t hash_key(Key key) { return (key.low ^ key.high * 0xD6E8FEB86659FD93ull) * 0x9E3779B97F4A7C15ull; }

class ShortWords {
 public:
  // The ids of a word and, last, their number, so that 16 bytes can be copied in one go.
  struct alignas(16) Ids {
    uint32_t values[kShortIds + 1]{};
    uint32_t count() const { return values[kShortIds]; }
  };
  // Two words. The length in the key of a word is never 0, so that a free place, of key and count 0, matches no word.
  struct alignas(64) Bucket {
    Key keys[2]{};
    Ids ids[2]{};

    // The place of `key`, or 2. Both are compared, as which of them it is cannot be predicted.
    unsigned place_of(const Key& key) const {
      const unsigned second = keys[1] == key;
      return (second | (keys[0] == key)) ? second : 2;
    }
  };

  // Where the first bucket of a word is, in which it is nearly always found. Not valid after `insert`.
  struct Homes {
    const Bucket* buckets;
    unsigned shift;
    const Bucket& operator[](uint64_t hash) const { return buckets[hash >> shift]; }
  };
  Homes homes() const { return {buckets_.data(), shift_}; }

  // The ids of `key`, or nullptr.
  const Ids* find(const Key& key, uint64_t hash) const {
    for (const Bucket* bucket = &homes()[hash], *end = bucket + kProbes; bucket != end; ++bucket) {
      if (const unsigned place = bucket->place_of(key); place < 2) return &bucket->ids[place];
    }
    return nullptr;
  }

  // `key` must be absent.
  void insert(const Key& key, uint64_t hash, std::span<const uint32_t> ids) {
    if (2 * (size_ + 1) > kPlaces * bucket_count() && bucket_count() < kMaxBuckets) grow();
    Ids packed;
    std::copy(ids.begin(), ids.end(), packed.values);
    packed.values[kShortIds] = static_cast<uint32_t>(ids.size());
    while (!place(key, hash, packed)) {
      if (bucket_count() >= kMaxBuckets) {
        Bucket& bucket = buckets_[hash >> shift_];
        bucket.keys[hash >> 5 & 1] = key;
        bucket.ids[hash >> 5 & 1] = packed;
        return;
      }
      grow();
    }
    ++size_;
  }

 private:
  using Buckets = std::vector<Bucket, HugePageAllocator<Bucket>>;
  static constexpr size_t kPlaces = 2;  // in a bucket
  static constexpr size_t kProbes = 4;
  static constexpr unsigned kFirstBits = 10;
  static constexpr size_t kMaxBuckets = 1u << 19;  // 32 MiB

  size_t bucket_count() const { return size_t{1} << (64 - shift_); }

  bool place(const Key& key, uint64_t hash, const Ids& ids) {
    for (Bucket* bucket = &buckets_[hash >> shift_], *end = bucket + kProbes; bucket != end; ++bucket) {
      for (size_t i = 0; i < kPlaces; ++i) {
        if (bucket->ids[i].count() != 0) continue;
        bucket->keys[i] = key;
        bucket->ids[i] = ids;
        return true;
      }
    }
    return false;
  }

  // Doubles the table; a word that finds no room in the new one (hardly ever) is forgotten.
  void grow() {
    Buckets old(2 * bucket_count() + kProbes);
    old.swap(buckets_);
    --shift_;
    size_ = 0;
    for (const Bucket& bucket : old) {
      for (size_t i = 0; i < kPlaces; ++i) {
        if (bucket.ids[i].count() != 0) size_ += place(bucket.keys[i], hash_key(bucket.keys[i]), bucket.ids[i]);
      }
    }
  }

  unsigned shift_ = 64 - kFirstBits;
  Buckets buckets_ = Buckets((size_t{1} << kFirstBits) + kProbes);
  size_t size_ = 0;
};

class LongWords {
 public:
  static uint64_t hash(std::string_view word) {
    uint64_t hash = 0x243F6A8885A308D3ull ^ word.size();
    const char* p = word.data();
    size_t left = word.size();
    for (; left >= 8; p += 8, left -= 8) {
      uint64_t chunk;
      std::memcpy(&chunk, p, 8);
      hash = mix(hash ^ chunk);
    }
    uint64_t tail = 0;
    std::memcpy(&tail, p, left);
    return mix(hash ^ tail);
  }

  // Empty when the word is not known.
  std::span<const uint32_t> find(std::string_view word, uint64_t hash) const {
    const size_t mask = slots_.size() - 1;
    for (size_t i = hash & mask; slots_[i].id_count != 0; i = (i + 1) & mask) {
      const Slot& slot = slots_[i];
      if (slot.hash == hash && slot.length == word.size() &&
          std::memcmp(bytes_.data() + slot.bytes, word.data(), word.size()) == 0) {
        return {ids_.data() + slot.ids, slot.id_count};
      }
    }
    return {};
  }

  void insert(std::string_view word, uint64_t hash, std::span<const uint32_t> ids) {
    if (bytes_.size() + 4 * ids_.size() + sizeof(Slot) * slots_.size() > kMaxBytes) *this = LongWords();
    if (2 * (size_ + 1) > slots_.size()) grow();
    place({hash, static_cast<uint32_t>(bytes_.size()), static_cast<uint32_t>(ids_.size()),
           static_cast<uint32_t>(word.size()), static_cast<uint32_t>(ids.size())});
    bytes_.insert(bytes_.end(), word.begin(), word.end());
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    ++size_;
  }

 private:
  struct Slot {
    uint64_t hash = 0;
    uint32_t bytes = 0;  // offset into bytes_
    uint32_t ids = 0;    // offset into ids_
    uint32_t length = 0;
    uint32_t id_count = 0;  // 0: free, as no word has no ids
  };
  static constexpr size_t kMaxBytes = 32u << 20;

  void place(const Slot& slot) {
    const size_t mask = slots_.size() - 1;
    size_t i = slot.hash & mask;
    while (slots_[i].id_count != 0) i = (i + 1) & mask;
    slots_[i] = slot;
  }

  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.id_count != 0) place(slot);
    }
  }

  std::vector<Slot> slots_ = std::vector<Slot>(1u << 10);
  std::vector<char> bytes_;
  std::vector<uint32_t> ids_;
  size_t size_ = 0;
};

}  // namespace tapelm::text
