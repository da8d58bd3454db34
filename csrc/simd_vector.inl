// Vectors of W floats for one instruction set; included by simd_targets.h inside that set's namespace.
// Written on the compiler's vector extension: intrinsics only where the compiler finds no equal.

constexpr int W = TAPELM_WIDTH;   // floats per vector
constexpr int MR = TAPELM_ROWS;   // rows of a matrix-product tile: MR x 2 vectors of accumulators fit the registers
constexpr int NR = 2 * W;         // columns of that tile

// Whether vectors are registers, which the CPU can shuffle; else the compiler takes shuffles apart lane by lane, for
// minutes.
#if defined(TAPELM_AVX2) || defined(TAPELM_AVX512) || TAPELM_WIDTH == 4
constexpr bool kRegisters = true;
#else
constexpr bool kRegisters = false;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint64_t vl __attribute__((vector_size(W * 4)));       // W / 2 lanes of 64 bits
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(W * 2), aligned(2), may_alias));

TAPELM_INLINE vf broadcast(float x) { return x - vf{}; }
TAPELM_INLINE vu broadcast(uint32_t x) { return x - vu{}; }
TAPELM_INLINE vf as_float(vu x) { return (vf)x; }

TAPELM_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
TAPELM_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }

TAPELM_INLINE vu load(const uint32_t* p) { return (vu)load(reinterpret_cast<const float*>(p)); }
TAPELM_INLINE void store(uint32_t* p, vu x) { store(reinterpret_cast<float*>(p), as_float(x)); }

// Round to nearest even; NaN stays NaN. The instruction of avx512bf16 takes denormals for zero.
TAPELM_LONG vh narrow(vf x) {
#if defined(TAPELM_AVX512BF16)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  const vu bits = (vu)x;
#if defined(TAPELM_AVX512)
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
  const __m512i half = (__m512i)(bits + 0x7fffu);
  const __m512i rounded = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                         15, 13, 11, 9, 7, 5, 3, 1);
  return (vh)_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, result));
#else
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu nan = (vu)(x != x), result = (rounded & ~nan) | (nan & 0x7fc0u);
  return __builtin_convertvector(result, vh);
#endif
#endif
}

// __builtin_convertvector splits the vector and joins it again. With AVX-512 one permutation moves
// each half to the upper one of its lane and zeros to the lower.
TAPELM_INLINE vf widen(vh bits) {
#if defined(TAPELM_AVX512)
  const __m512i upper = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                         3, 0, 2, 0, 1, 0, 0, 0);
  return (vf)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, upper, _mm512_castsi256_si512((__m256i)bits));
#elif defined(TAPELM_AVX2)
  return as_float((vu)_mm256_cvtepu16_epi32((__m128i)bits) << 16);
#else
  return as_float(__builtin_convertvector(bits, vu) << 16);
#endif
}

TAPELM_INLINE vf load(const c10::BFloat16* p) { return widen(*reinterpret_cast<const vh_any*>(p)); }
TAPELM_INLINE void store(c10::BFloat16* p, vf x) { *reinterpret_cast<vh_any*>(p) = narrow(x); }

// x as it will be read back after a store to T.
template <typename T>
TAPELM_INLINE vf rounded(vf x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) return widen(narrow(x));
  return x;
}

// The first n < W elements; the rest of the vector is `fill`.
#if defined(TAPELM_AVX512)
TAPELM_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
TAPELM_INLINE vf load_part(const float* p, int n, float fill = 0.0f) {
  return (vf)_mm512_mask_loadu_ps((__m512)broadcast(fill), first_lanes(n), p);
}
TAPELM_INLINE vf load_part(const c10::BFloat16* p, int n, float fill = 0.0f) {
  const vf x = widen((vh)_mm256_maskz_loadu_epi16(first_lanes(n), p));
  return (vf)_mm512_mask_mov_ps((__m512)broadcast(fill), first_lanes(n), (__m512)x);
}
TAPELM_INLINE void store_part(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x); }
TAPELM_INLINE void store_part(c10::BFloat16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)narrow(x));
}
#else
TAPELM_INLINE vi first_lanes(int n) {
#if TAPELM_WIDTH == 16
  return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} < n;
#elif TAPELM_WIDTH == 8
  return vi{0, 1, 2, 3, 4, 5, 6, 7} < n;
#else
  return vi{0, 1, 2, 3} < n;
#endif
}
#if defined(TAPELM_AVX2)
TAPELM_INLINE vf load_part(const float* p, int n, float fill = 0.0f) {
  const vi kept = first_lanes(n);
  return kept ? (vf)_mm256_maskload_ps(p, (__m256i)kept) : broadcast(fill);
}
TAPELM_INLINE void store_part(float* p, vf x, int n) { _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)x); }

// AVX2 has masks for 32 bits: pairs first, then the last element of an odd number.
TAPELM_INLINE __m128i first_pairs(int n) { return _mm_cmplt_epi32(_mm_setr_epi32(0, 1, 2, 3), _mm_set1_epi32(n / 2)); }
TAPELM_INLINE vf load_part(const c10::BFloat16* p, int n, float fill = 0.0f) {
  vh bits = (vh)_mm_maskload_epi32(reinterpret_cast<const int*>(p), first_pairs(n));
  if (n & 1) bits = vh{0, 1, 2, 3, 4, 5, 6, 7} == static_cast<uint16_t>(n - 1) ? vh{} + p[n - 1].x : bits;
  return first_lanes(n) ? widen(bits) : broadcast(fill);
}
TAPELM_INLINE void store_part(c10::BFloat16* p, vf x, int n) {
  const vh bits = narrow(x);
  _mm_maskstore_epi32(reinterpret_cast<int*>(p), first_pairs(n), (__m128i)bits);
  if (n & 1) p[n - 1].x = bits[n - 1];
}
#else
template <typename T>
TAPELM_LONG vf load_part(const T* p, int n, float fill = 0.0f) {
  T lanes[W] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return first_lanes(n) ? load(lanes) : broadcast(fill);
}
template <typename T>
TAPELM_LONG void store_part(T* p, vf x, int n) {
  T lanes[W];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
}
#endif
#endif

// max(NaN, b) is b and max(a, NaN) is NaN: callers that must propagate NaN put the data second.
TAPELM_INLINE vf max(vf a, vf b) { return a > b ? a : b; }

TAPELM_LONG float sum(vf x) {
#if defined(TAPELM_AVX512)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[W];
  store(lanes, x);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
#endif
}
TAPELM_LONG float max(vf x) {
  float lanes[W];
  store(lanes, x);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
  return lanes[0];
}

// e^x to 2 ulp: x = k ln2 + r with |r| <= ln2 / 2, a degree-6 polynomial in r, k added to the exponent.
// Below -87.3 the result is 0 (a denormal in exact arithmetic), above 88.7 it is inf; NaN propagates.
TAPELM_LONG vf exp(vf x) {
  const vf low = broadcast(-87.3365f);
#if defined(TAPELM_AVX512)
  const vf clamped = (vf)_mm512_min_ps((__m512)broadcast(89.0f), (__m512)x);
  const vf k = (vf)_mm512_roundscale_ps((__m512)(clamped * 1.44269504088896341f), _MM_FROUND_NO_EXC);
#else
  const vf high = broadcast(88.7228f);
  const vf clamped = x < low ? low : (x > high ? high : x);
  const vf magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const vf shifted = clamped * 1.44269504088896341f + magic;
  const vf k = shifted - magic;
#endif
  vf r = clamped - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  vf p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
#if defined(TAPELM_AVX512)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)k);
#else
  // Two halves of the power of two, so that 2^128 does not overflow before the product is formed.
  const vi n = (vi)shifted - (vi)magic;
  const vi half = n >> 1;
  const vf y = p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
  const vf inf = broadcast(__builtin_inff());
  return x < low ? vf{} : (x > high ? inf : y);
#endif
}

// 2^r by its polynomial for 0 <= r <= 1. V is vf or, as in all that is made of them, a Pack of vectors.
template <typename V>
TAPELM_INLINE V power_of_fraction(V r) {
  const V p = ((r * 1.8775766948238015e-3f + 8.989340625703335e-3f) * r + 5.582631751894951e-2f) * r;
  return ((p + 2.4015361070632935e-1f) * r + 6.931530833244324e-1f) * r + 1.0f;
}

// 2^x to 3 ulp: x = n + r with n = floor(x), a degree-5 polynomial in r, n added to the exponent. Below -126 the result
// may be 0 (a denormal in exact arithmetic), from 128 on it is inf; NaN propagates.
#if defined(TAPELM_AVX512)
TAPELM_INLINE vf fraction(vf x) {
  return (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
TAPELM_INLINE vf times_power(vf x, vf n) { return (vf)_mm512_scalef_ps((__m512)x, (__m512)n); }  // x 2^floor(n)

template <typename V>
TAPELM_INLINE V exp2(V x) { return times_power(power_of_fraction(fraction(x)), x); }
#else
TAPELM_LONG vf exp2(vf x) {
  const vf low = broadcast(-126.0f), high = broadcast(128.0f);
  const vf clamped = x < low ? low : (x > high ? high : x);
  const vf magic = broadcast(12582912.0f);  // 1.5 * 2^23, as in exp; r may be 1 instead of 0
  const vf shifted = (clamped - 0.5f) + magic;
  const vf p = power_of_fraction(clamped - (shifted - magic));
  const vi n = (vi)shifted - (vi)magic, half = n >> 1;
  const vf y = p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
  return x < low ? vf{} : y;
}
#endif

// 1 / (1 + 2^t), the sigmoid of -t ln 2, for results of type T: to 4 ulp of this t, or, where AVX-512 can be quicker
// and T is bfloat16, to 2^-12. A NaN stays one.
#if defined(TAPELM_AVX512)
TAPELM_INLINE vf reciprocal(vf x) { return (vf)_mm512_rcp14_ps((__m512)x); }  // to 14 bits

// 1 / d from 14 bits by a Newton step, which is as exact as the division. Where t, of d = 1 + 2^t, is so large that the
// step might meet inf * 0 the result is 0.
TAPELM_INLINE vf reciprocal(vf d, vf t) {
  const vf y = reciprocal(d);
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)t, (__m512)broadcast(126.0f), _CMP_NGT_UQ);
  return (vf)_mm512_maskz_fmadd_ps(kept, (__m512)y, (__m512)(1.0f - d * y), (__m512)y);
}

template <typename T, typename V>
TAPELM_INLINE V logistic(V t) {
  if constexpr (!std::is_same_v<T, c10::BFloat16>) return reciprocal(exp2(t) + 1.0f, t);
  const V r = fraction(t);
  return reciprocal(times_power(((r * 0.07706693f + 0.22764517f) * r + 0.69511672f) * r + 1.0f, t) + 1.0f);
}
#else
template <typename T>
TAPELM_INLINE vf logistic(vf t) { return 1.0f / (1.0f + exp2(t)); }
#endif

// Low 32 bits of each 64-bit lane of a, times m, as 64 bits.
TAPELM_INLINE vl multiply_wide(vl a, uint32_t m) {
#if defined(TAPELM_AVX512)
  return (vl)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(TAPELM_AVX2)
  return (vl)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xffffffffull) * static_cast<uint64_t>(m);
#endif
}

// Philox4x32-7 (Salmon et al. 2011) for W / 2 counters: the four words of each, in the low halves of the lanes; what
// the high halves hold is whatever is cheapest. Not inlined where 64-bit products are many instructions: the compiler
// takes minutes over them, off x86 too.
#if defined(TAPELM_AVX2) || defined(TAPELM_AVX512)
TAPELM_INLINE
#else
__attribute__((noinline)) inline
#endif
void philox(uint64_t seed, vl counter, vl words[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  // The first round, in which the upper half of the counter is 0.
  vl c0 = (counter >> 32) ^ static_cast<uint64_t>(k0), c1 = vl{}, c3 = multiply_wide(counter, 0xD2511F53u);
  vl c2 = (c3 >> 32) ^ static_cast<uint64_t>(k1);
#pragma GCC unroll 6
  for (int round = 1; round < 7; ++round) {
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
    const vl p0 = multiply_wide(c0, 0xD2511F53u), p1 = multiply_wide(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(k0);
    c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(k1);
    c1 = p1;
    c3 = p0;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Lane i of both: even[i / 2] or odd[i / 2], low halves.
TAPELM_INLINE vu interleave_words(vl even, vl odd) { return (vu)((even & 0xffffffffull) | (odd << 32)); }

// The same for W / 2 successive counters from `counter`: 2 W random words in their order, four of each counter.
TAPELM_INLINE void philox(uint64_t seed, uint64_t counter, vu out[2]) {
  // Lane 2 j has counter j and lane 2 j + 1 counter W / 4 + j, so that one unpacking of pairs restores the order.
#if TAPELM_WIDTH == 16
  const vl counters = counter + vl{0, 4, 1, 5, 2, 6, 3, 7};
#elif TAPELM_WIDTH == 8
  const vl counters = counter + vl{0, 2, 1, 3};
#else
  const vl counters = counter + vl{0, 1};
#endif
  vl words[4];
  philox(seed, counters, words);
  const vl even = (vl)interleave_words(words[0], words[1]), odd = (vl)interleave_words(words[2], words[3]);
#if TAPELM_WIDTH == 16
  out[0] = (vu)__builtin_shufflevector(even, odd, 0, 8, 2, 10, 4, 12, 6, 14);
  out[1] = (vu)__builtin_shufflevector(even, odd, 1, 9, 3, 11, 5, 13, 7, 15);
#elif TAPELM_WIDTH == 8
  out[0] = (vu)__builtin_shufflevector(even, odd, 0, 4, 2, 6);
  out[1] = (vu)__builtin_shufflevector(even, odd, 1, 5, 3, 7);
#else
  out[0] = (vu)__builtin_shufflevector(even, odd, 0, 2);
  out[1] = (vu)__builtin_shufflevector(even, odd, 1, 3);
#endif
}

// Which lanes a dropout keeps.
#if defined(TAPELM_AVX512)
typedef __mmask16 Kept;
#else
typedef vi Kept;
#endif

// Of 2 W elements, whose random numbers are the halves of the words in memory order.
TAPELM_LONG void kept_lanes(vu words, uint32_t threshold, Kept kept[2]) {
#if defined(TAPELM_AVX512)
  const __mmask32 both =
      _mm512_cmpge_epu16_mask((__m512i)words, _mm512_set1_epi16(static_cast<int16_t>(threshold)));
  kept[0] = static_cast<__mmask16>(both);
  kept[1] = static_cast<__mmask16>(both >> 16);
#else
  uint16_t numbers[2 * W];
  __builtin_memcpy(numbers, &words, sizeof words);
  for (int v = 0; v < 2; ++v) {
    vh half;
    __builtin_memcpy(&half, numbers + v * W, sizeof half);
    kept[v] = __builtin_convertvector(half, vu) >= broadcast(threshold);
  }
#endif
}

// Of W elements, whose random numbers are the lower (UPPER: upper) halves of the words.
template <bool UPPER>
TAPELM_INLINE Kept kept_of_halves(vu words, uint32_t threshold) {
  const vu number = UPPER ? words >> 16 : words & 0xffffu;
#if defined(TAPELM_AVX512)
  return _mm512_cmpge_epu32_mask((__m512i)number, (__m512i)broadcast(threshold));
#else
  return number >= broadcast(threshold);
#endif
}

// Lane i of the result is lane i + n.
TAPELM_LONG Kept shifted(Kept kept, int n) {
#if defined(TAPELM_AVX512)
  return static_cast<Kept>(kept >> n);
#else
  Kept result = {};
  for (int i = n; i < W; ++i) result[i - n] = kept[i];
  return result;
#endif
}

// x * scale, or 0 where it is not kept: a choice, so that a dropped inf or NaN is 0.
TAPELM_INLINE vf dropped(vf x, Kept kept, float scale) {
#if defined(TAPELM_AVX512)
  return (vf)_mm512_maskz_mul_ps(kept, (__m512)x, (__m512)broadcast(scale));
#else
  return kept ? x * scale : vf{};
#endif
}
TAPELM_INLINE vf dropped(vf x, Kept kept) {
#if defined(TAPELM_AVX512)
  return (vf)_mm512_maskz_mov_ps(kept, (__m512)x);
#else
  return kept ? x : vf{};
#endif
}
