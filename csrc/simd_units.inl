// What a product of matrices reads, for one instruction set: units of 32 bits, a float or, where the CPU multiplies
// pairs of bfloat16 (TAPELM_PAIRS), two bfloat16 that follow each other in depth, the first in the low half. Elsewhere
// bfloat16 is widened when it is packed, and multiplied as float32.

template <typename T>
struct UnitOf { using type = float; };
#if defined(TAPELM_PAIRS)
template <>
struct UnitOf<c10::BFloat16> { using type = uint32_t; };
#endif
template <typename T>
using Unit = typename UnitOf<T>::type;

template <typename T>
constexpr int64_t PAIR = std::is_same_v<Unit<T>, float> ? 1 : 2;  // elements in a unit

// sums + a * b, the step of every product: a unit of the left operand with a vector of the right one's.
TAPELM_INLINE vf multiply_add(vf sums, float a, vf b) { return sums + a * b; }

#if defined(TAPELM_PAIRS)
// sums + a * b over W pairs of bfloat16: lane i gains the two products of the pairs in lane i (even elements in the low
// halves). One instruction of avx512bf16, which takes denormals for zero.
TAPELM_INLINE vf dot_pairs(vf sums, vu a, vu b) {
#if defined(TAPELM_AVX512BF16)
  return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
  return sums + as_float(a << 16) * as_float(b << 16) + as_float(a & 0xffff0000u) * as_float(b & 0xffff0000u);
#endif
}

// Lane i: low[i] and high[i] rounded to bfloat16, an operand of dot_pairs.
TAPELM_INLINE vu round_pairs(vf low, vf high) {
#if defined(TAPELM_AVX512BF16)
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vu)_mm512_permutexvar_epi16(order, halves);
#else
  return ((vu)rounded<c10::BFloat16>(low) >> 16) | (vu)rounded<c10::BFloat16>(high);
#endif
}

TAPELM_INLINE vf multiply_add(vf sums, uint32_t a, vu b) { return dot_pairs(sums, broadcast(a), b); }
#endif
