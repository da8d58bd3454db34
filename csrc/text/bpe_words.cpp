// Bpe::encode_words: the ids of words whose ends are known.
//
// Words are looked up in groups: first all their buckets are asked for, then, when they have arrived, read.
#include <algorithm>
#include <cstring>

#include "bpe.h"
#include "isa.h"

#ifdef TAPELM_TEXT_AVX2
#include <immintrin.h>
#endif

namespace tapelm::text {
namespace {

constexpr size_t kGroup = 32;

}  // namespace

#ifdef TAPELM_TEXT_AVX2

// As encode_words_anywhere, with half the instructions: a key is made, and compared with both of a bucket, in one go.
[[gnu::target("avx2,bmi,bmi2")]]
uint32_t* Bpe::encode_words_avx2(const Words& words, EncoderState& state, uint32_t* write) const {
  // Offset in a bucket of the ids of the key that equals, by which of the four halves of keys do; 0 for none.
  static constexpr uint8_t kFirst = offsetof(ShortWords::Bucket, ids), kSecond = kFirst + sizeof(ShortWords::Ids);
  static constexpr uint8_t kIdsAt[16] = {0, 0, 0, kFirst, 0,       0,       0,       kFirst,
                                         0, 0, 0, kFirst, kSecond, kSecond, kSecond, 0};
  const auto load = [](const Key& key) { return _mm_load_si128(reinterpret_cast<const __m128i*>(&key)); };
  __m128i keys[kGroup];
  uint64_t hashes[kGroup];
  const ptrdiff_t readable = words.text_end - words.text - kKeyOverread;
  auto homes = state.short_words.homes();
  uint32_t begin = 0;
  for (size_t first = 0; first < words.count; first += kGroup) {
    const size_t group = std::min(kGroup, words.count - first);
    const uint32_t* const ends = words.ends + first;
    const uint32_t group_begin = begin;
    for (size_t i = 0; i < group; ++i) {
      const uint32_t length = ends[i] - begin;
      __m128i key = load(kNoKey);
      if ((length <= kShortKey) & (begin <= readable)) [[likely]] {
        key = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words.text + begin));
        key = _mm_or_si128(_mm_and_si128(key, load(kKeyMasks.bytes[length])), load(kKeyMasks.length[length]));
      }
      begin = ends[i];
      keys[i] = key;
      hashes[i] = hash_key({static_cast<uint64_t>(_mm_cvtsi128_si64(key)),
                            static_cast<uint64_t>(_mm_extract_epi64(key, 1))});
      __builtin_prefetch(&homes[hashes[i]]);
    }
    for (size_t i = 0; i < group; ++i) {
      const auto* const bucket = reinterpret_cast<const char*>(&homes[hashes[i]]);
      const __m256i equal = _mm256_cmpeq_epi64(_mm256_broadcastsi128_si256(keys[i]),
                                               _mm256_load_si256(reinterpret_cast<const __m256i*>(bucket)));
      const uint8_t at = kIdsAt[_mm256_movemask_pd(_mm256_castsi256_pd(equal))];
      if (at != 0) [[likely]] {
        std::memcpy(write, bucket + at, sizeof(ShortWords::Ids));
        write += reinterpret_cast<const ShortWords::Ids*>(bucket + at)->count();
      } else {
        const uint32_t from = i > 0 ? ends[i - 1] : group_begin;
        write = encode_rare_word(words.word(from, ends[i]), state, write);
        homes = state.short_words.homes();
      }
    }
  }
  return write;
}

#endif

uint32_t* Bpe::encode_words_anywhere(const Words& words, EncoderState& state, uint32_t* write) const {
  Key keys[kGroup];
  uint64_t hashes[kGroup];
  const ptrdiff_t readable = words.text_end - words.text - kKeyOverread;
  auto homes = state.short_words.homes();
  uint32_t begin = 0;
  for (size_t first = 0; first < words.count; first += kGroup) {
    const size_t group = std::min(kGroup, words.count - first);
    const uint32_t* const ends = words.ends + first;
    const uint32_t group_begin = begin;
    for (size_t i = 0; i < group; ++i) {
      const uint32_t length = ends[i] - begin;
      keys[i] = ((length <= kShortKey) & (begin <= readable)) ? load_key(words.text + begin, length) : kNoKey;
      begin = ends[i];
      hashes[i] = hash_key(keys[i]);
      __builtin_prefetch(&homes[hashes[i]]);
    }
    for (size_t i = 0; i < group; ++i) {
      const auto& bucket = homes[hashes[i]];
      if (const unsigned place = bucket.place_of(keys[i]); place < 2) [[likely]] {
        std::memcpy(write, &bucket.ids[place], sizeof(ShortWords::Ids));
        write += bucket.ids[place].count();
      } else {
        const uint32_t from = i > 0 ? ends[i - 1] : group_begin;
        write = encode_rare_word(words.word(from, ends[i]), state, write);
        homes = state.short_words.homes();
      }
    }
  }
  return write;
}

uint32_t* Bpe::encode_words(const Words& words, EncoderState& state, uint32_t* write) const {
#ifdef TAPELM_TEXT_AVX2
  if (use_avx2()) return encode_words_avx2(words, state, write);
#endif
  return encode_words_anywhere(words, state, write);
}

// A word that is not in the first bucket of the short words. There must be room for as many ids as bytes.
uint32_t* Bpe::encode_rare_word(std::string_view word, EncoderState& state, uint32_t* write) const {
  Key key;
  uint64_t hash = 0, long_hash = 0;
  const bool is_short = word.size() <= kShortKey;
  if (is_short) {
    uint8_t padded[kKeyOverread] = {};
    std::copy(word.begin(), word.end(), padded);
    key = load_key(padded, word.size());
    hash = hash_key(key);
    if (const auto* ids = state.short_words.find(key, hash)) return std::copy_n(ids->values, ids->count(), write);
  }
  if (word.size() <= kLongKey) {
    long_hash = LongWords::hash(word);
    const auto ids = state.long_words.find(word, long_hash);
    if (!ids.empty()) return std::copy(ids.begin(), ids.end(), write);
  }
  merge_word(word, state);
  const auto ids = state.word.from(0);
  if (is_short && ids.size() <= kShortIds) {
    state.short_words.insert(key, hash, ids);
  } else if (word.size() <= kLongKey) {
    state.long_words.insert(word, long_hash, ids);
  }
  return std::copy(ids.begin(), ids.end(), write);
}

}  // namespace tapelm::text
