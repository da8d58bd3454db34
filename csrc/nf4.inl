// NF4 for one instruction set. Templates only: lora_linear.inl includes this file too.
#include "simd_loop.inl"

typedef uint8_t b16 __attribute__((vector_size(16)));
typedef uint8_t b16_any __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t bw __attribute__((vector_size(W)));
typedef uint8_t bw_any __attribute__((vector_size(W), aligned(1), may_alias));

// The 16 quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, appendix E).
alignas(64) constexpr float kCodes[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// The 15 values halfway between codes as a search tree: level l, which has 2^l, starts at 2^l - 1. Padded, so that a
// vector can be loaded from any level.
struct Bounds {
  float at[32] = {};
  constexpr Bounds() {
    int i = 0;
    for (int step = 16; step > 1; step /= 2)
      for (int k = step / 2; k < 16; k += step) at[i++] = (kCodes[k - 1] + kCodes[k]) / 2;
  }
};
alignas(64) constexpr Bounds kBounds;

// table[index[i]] of a table of eight, and of one of sixteen, whose vectors of eight are its halves; of a vector of
// sixteen the second is never chosen.
#if TAPELM_WIDTH >= 8
TAPELM_INLINE vf of_eight(const float* table, vi index) { return __builtin_shuffle(load(table), index); }
TAPELM_INLINE vf of_sixteen(const float* table, vi index) {
  return __builtin_shuffle(load(table), load(table + 16 - W), index);
}
#else
TAPELM_INLINE vf of_sixteen(const float* table, vi index) {
  return vf{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
TAPELM_INLINE vf of_eight(const float* table, vi index) { return of_sixteen(table, index); }
#endif

// The index of the nearest code; the lower one halfway between two, 15 for NaN.
TAPELM_INLINE vi nearest_code(vf x) {
  vi q = vi{};
#pragma GCC unroll 4
  for (int level = 0; level < 4; ++level) {
    const vf bound = of_eight(kBounds.at + (1 << level) - 1, q);
    q = q + q - ~(vi)(x <= bound);
  }
  return q;
}

constexpr float kLeastScale = 1e-38f;  // what bitsandbytes divides by when a block is zero

// One block of `count` elements into (count + 1) / 2 bytes; returns its scale. bitsandbytes divides in the last block,
// when it is not whole, and multiplies with the reciprocal in the others: a rounding apart, so that both are here.
template <typename T>
float quantize_block(const T* w, int64_t count, bool whole, uint8_t* packed) {
  vf largest[kSums] = {};
  vi nan = vi{};
  for_vectors(count, [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
    const vf x = get(w + i, n);
    largest[s] = max(max(x, -x), largest[s]);
    nan |= (vi)(x != x);
  });
  float absmax = max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
  for (int i = 0; i < W; ++i)
    if (nan[i] != 0) absmax = __builtin_nanf("");
  const float divisor = absmax < kLeastScale ? kLeastScale : absmax;
  const vf scale = broadcast(whole ? 1.0f / divisor : divisor);
  uint8_t index[4096 + W];
  for_vectors(count, [&](int64_t i, auto n, int) __attribute__((always_inline)) {
    const vf x = get(w + i, n);
    const vi q = nearest_code(whole ? x * scale : x / scale);
    *reinterpret_cast<bw_any*>(index + i) = __builtin_convertvector(q, bw);
  });
  index[count] = 7;  // an odd last element shares its byte with a zero
  for (int64_t i = 0; i < (count + 1) / 2; ++i)
    packed[i] = static_cast<uint8_t>(index[2 * i] << 4 | index[2 * i + 1]);
  return whole ? absmax : divisor;
}

// W bytes as 32-bit integers in one instruction; __builtin_convertvector would widen to 16 bits first.
TAPELM_INLINE vi widen_indices(const uint8_t* p) {
#if defined(TAPELM_AVX512)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(TAPELM_AVX2)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const bw_any*>(p), vi);
#endif
}

// The 16 codes times the scale of a block, and 16 elements by their indices.
template <typename T>
struct Table;

template <>
struct Table<float> {
  alignas(64) float entry[16];
  TAPELM_INLINE explicit Table(float scale) {
    for (int i = 0; i < 16; i += W) store(entry + i, load(kCodes + i) * scale);
  }
  TAPELM_INLINE void put16(b16 index, float* out) const {
    uint8_t lanes[16];
    *reinterpret_cast<b16_any*>(lanes) = index;
    for (int i = 0; i < 16; i += W) store(out + i, of_sixteen(entry, widen_indices(lanes + i)));
  }
};

// Both bytes of a bfloat16 are looked up, then interleaved.
template <>
struct Table<bf16> {
  alignas(64) bf16 entry[16];
  b16 low, high;
  TAPELM_INLINE explicit Table(float scale) {
    for (int i = 0; i < 16; i += W) store(entry + i, load(kCodes + i) * scale);
    const b16 a = *reinterpret_cast<const b16_any*>(entry), b = *reinterpret_cast<const b16_any*>(entry + 8);
    low = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    high = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
  TAPELM_INLINE void put16(b16 index, bf16* out) const {
    const b16 a = __builtin_shuffle(low, index), b = __builtin_shuffle(high, index);
    b16_any* const to = reinterpret_cast<b16_any*>(out);
    to[0] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    to[1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
};

// Elements [first, first + count) of the flattened weight.
template <typename T>
void dequantize_range(const Nf4& q, int64_t first, int64_t count, T* out) {
  const int64_t end = first + count;
  for (int64_t i = first; i < end;) {
    const int64_t b = i / q.block, stop = std::min(end, (b + 1) * q.block);
    const Table<T> table(q.scale(b));
    if (i % 2 != 0) {
      *out++ = table.entry[q.packed[i / 2] & 15];
      ++i;
    }
    for (; i + 32 <= stop; i += 32, out += 32) {
      const b16 bytes = *reinterpret_cast<const b16_any*>(q.packed + i / 2);
      const b16 even = bytes >> 4, odd = bytes & 15;
      table.put16(__builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), out);
      table.put16(__builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31),
                  out + 16);
    }
    for (; i < stop; ++i) *out++ = table.entry[i % 2 == 0 ? q.packed[i / 2] >> 4 : q.packed[i / 2] & 15];
  }
}
