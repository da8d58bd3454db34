#include "split_ascii.h"

#include <array>
#include <bit>
#include <cstring>

#include "isa.h"

#ifdef TAPELM_TEXT_AVX2
#include <immintrin.h>
#endif

namespace tapelm::text {

#ifdef TAPELM_TEXT_AVX2

namespace {

constexpr size_t kBlock = 64;
constexpr size_t kLookAhead = 3;              // bytes read beyond a block
constexpr size_t kMaxOffset = size_t{1} << 31;  // ends must fit into 32 bits

// One bit per byte of a block, the first byte lowest.
struct Masks {
  uint64_t letter = 0, digit = 0, space = 0, blank = 0, apostrophe = 0, high = 0;
};

}  // namespace

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt")
#endif
namespace avx2 {
namespace {

template <int shift>
inline void classify_half(const uint8_t* p, Masks& masks) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const auto bits = [](__m256i v) {
    return static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(v))) << shift;
  };
  // first <= byte < first + count, by moving the range to the lowest signed values.
  const auto in_range = [](__m256i v, int first, int count) {
    const __m256i moved = _mm256_add_epi8(v, _mm256_set1_epi8(static_cast<char>(-128 - first)));
    return _mm256_cmpgt_epi8(_mm256_set1_epi8(static_cast<char>(-128 + count)), moved);
  };
  const __m256i lower = _mm256_or_si256(bytes, _mm256_set1_epi8(0x20));
  const __m256i blank = _mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(' '));
  masks.letter |= bits(in_range(lower, 'a', 26));
  masks.digit |= bits(in_range(bytes, '0', 10));
  masks.blank |= bits(blank);
  masks.space |= bits(_mm256_or_si256(blank, in_range(bytes, '\t', 5)));
  masks.apostrophe |= bits(_mm256_cmpeq_epi8(bytes, _mm256_set1_epi8('\'')));
  masks.high |= bits(bytes);
}

inline Masks classify(const uint8_t* block) {
  Masks masks;
  classify_half<0>(block, masks);
  classify_half<32>(block + 32, masks);
  return masks;
}

// Writes place + the number of every bit that is set, and up to seven values more.
inline void write_places(uint64_t bits, uint32_t place, uint32_t* write) {
  for (auto left = std::popcount(bits); left > 0; left -= 8) {
    for (size_t k = 0; k < 8; ++k) {
      *write++ = place + static_cast<uint32_t>(_tzcnt_u64(bits));
      bits = _blsr_u64(bits);
    }
  }
}

#include "split_ascii.inl"

}  // namespace
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push( \
        __attribute__((target("avx512bw,avx512vl,avx512vbmi2,bmi,bmi2,lzcnt,popcnt"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512bw,avx512vl,avx512vbmi2,bmi,bmi2,lzcnt,popcnt")
#endif
namespace avx512 {
namespace {

inline Masks classify(const uint8_t* block) {
  const __m512i bytes = _mm512_loadu_si512(block);
  const auto in_range = [](__m512i v, int first, int count) {
    return _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8(static_cast<char>(first))),
                                  _mm512_set1_epi8(static_cast<char>(count)));
  };
  Masks masks;
  masks.letter = in_range(_mm512_or_si512(bytes, _mm512_set1_epi8(0x20)), 'a', 26);
  masks.digit = in_range(bytes, '0', 10);
  masks.blank = _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(' '));
  masks.space = masks.blank | in_range(bytes, '\t', 5);
  masks.apostrophe = _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8('\''));
  masks.high = _mm512_movepi8_mask(bytes);
  return masks;
}

// Writes place + the number of every bit that is set, and up to 15 values more.
inline void write_places(uint64_t bits, uint32_t place, uint32_t* write) {
  alignas(64) static constexpr auto kNumbers = [] {
    std::array<uint8_t, 64> numbers{};
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<uint8_t>(i);
    return numbers;
  }();
  const __m512i set = _mm512_maskz_compress_epi8(bits, _mm512_load_si512(kNumbers.data()));
  const auto sixteen = [&](__m128i numbers, uint32_t* to) {
    const __m512i first = _mm512_set1_epi32(static_cast<int>(place));
    _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_cvtepu8_epi32(numbers), first));
  };
  const auto count = std::popcount(bits);
  sixteen(_mm512_castsi512_si128(set), write);
  if (count <= 16) return;
  sixteen(_mm512_extracti32x4_epi32(set, 1), write + 16);
  if (count <= 32) return;
  sixteen(_mm512_extracti32x4_epi32(set, 2), write + 32);
  sixteen(_mm512_extracti32x4_epi32(set, 3), write + 48);
}

#include "split_ascii.inl"

}  // namespace
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

AsciiSplitter gpt2_ascii_splitter() {
  return use_avx512() ? avx512::split_gpt2 : use_avx2() ? avx2::split_gpt2 : nullptr;
}

#else

AsciiSplitter gpt2_ascii_splitter() { return nullptr; }

#endif

}  // namespace tapelm::text
