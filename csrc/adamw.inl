#include "simd_loop.inl"

// Float lanes over short runs, their sums in double: the error does not grow with n.
template <typename T>
double sum_of_squares(const T* x, int64_t n) {
  constexpr int64_t RUN = 64 * W;
  double s = 0.0;
  int64_t i = 0;
  while (i + W <= n) {
    vf total = {};
    for (const int64_t end = std::min(n, i + RUN); i + W <= end; i += W) total += load(x + i) * load(x + i);
    s += sum(total);
  }
  for (; i < n; ++i) s += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return s;
}

TAPELM_INLINE vf square_root(vf x) {
#if defined(TAPELM_AVX512)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(TAPELM_AVX2)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < W; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// 16 random bits are added below the last bit of a bfloat16, the rest is cut: up with the probability of what is cut.
TAPELM_INLINE vf round_stochastically(vf x, vu random) {
  const vf rounded = as_float(((vu)x + (random & 0xffffu)) & 0xffff0000u);
  return x == x ? rounded : x;
}

// 8-bit moments: a block of kBlock elements has a float32 scale, its largest magnitude; an element is a tiny float of
// 3 mantissa bits relative to it, 8 steps per octave. code c > 0 is the float with the bits (c + BIAS) << 20, and the
// largest code is 1. The first moment has a sign and 16 octaves, the second, never negative, 32.
typedef uint8_t vb __attribute__((vector_size(W)));
typedef uint8_t vb_any __attribute__((vector_size(W), aligned(1), may_alias));

TAPELM_INLINE vu load_codes(const uint8_t* p) {
#if defined(TAPELM_AVX512)
  return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(TAPELM_AVX2)
  return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const vb_any*>(p), vu);
#endif
}

template <bool SIGNED>
constexpr uint32_t kLargest = SIGNED ? 127 : 255;
template <bool SIGNED>
constexpr uint32_t kBias = (127u << 3) - kLargest<SIGNED>;

template <bool SIGNED>
TAPELM_INLINE void dequantize(const uint8_t* codes, float scale, float* x) {
  for (int64_t i = 0; i < kBlock; i += W) {
    const vu code = load_codes(codes + i);
    const vu magnitude = code & kLargest<SIGNED>;
    const vf tiny = as_float((magnitude + kBias<SIGNED>) << 20);
    vf value = (magnitude != 0u ? tiny : vf{}) * scale;
    if constexpr (SIGNED) value = as_float((vu)value | ((code & 128u) << 24));
    store(x + i, value);
  }
}

// Returns the scale. The first moment is rounded to nearest. The second changes by less than a step of its code at a
// time and would never move: it is rounded stochastically, and from a value above 0 never to 0, which would make the
// update huge. An inf or NaN makes the scale, and so the block, inf or NaN.
template <bool SIGNED>
TAPELM_INLINE float quantize(const float* x, const uint32_t* random, uint8_t* codes) {
  vu largest = broadcast(0x00800000u);  // the smallest normal number: 1 / scale is finite
  for (int64_t i = 0; i < kBlock; i += W) {
    // Magnitudes as integers are ordered as the floats are, NaN above inf.
    const vu magnitude = (vu)load(x + i) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  uint32_t top = 0;
  for (int i = 0; i < W; ++i) top = std::max(top, static_cast<uint32_t>(largest[i]));
  float scale;
  std::memcpy(&scale, &top, sizeof(scale));
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < kBlock; i += W) {
    const vu bits = (vu)load(x + i), magnitude = bits & 0x7fffffffu;
    vu code = (vu)(as_float(magnitude) * inverse) & 0x7fffffffu;
    if constexpr (SIGNED)
      code = code + 0x80000u;
    else
      code = code + ((vu)load(reinterpret_cast<const float*>(random + i)) >> 16 << 4);
    constexpr uint32_t least = kBias<SIGNED> + (SIGNED ? 0 : 1);
    code = code >> 20;
    code = (code > least ? code : broadcast(least)) - kBias<SIGNED>;
    code = code < kLargest<SIGNED> ? code : broadcast(kLargest<SIGNED>);
    code = magnitude != 0u ? code : vu{};
    if constexpr (SIGNED) code = code | (bits >> 31 << 7);
    *reinterpret_cast<vb_any*>(codes + i) = __builtin_convertvector(code, vb);
  }
  return scale;
}

// Up to kBlock elements at `at`: clip, decay, moments, update.
template <typename Range>
TAPELM_INLINE void adamw_block(const Range& r, const AdamWStep& s, int64_t at, int64_t count) {
  using T = typename Range::Param;
  constexpr bool MASTER = Range::master_weights, EIGHT = Range::eight_bits;
  alignas(64) uint32_t random[kBlock];
  alignas(64) float m_block[kBlock], v_block[kBlock];
  alignas(64) uint8_t m_codes[kBlock], v_codes[kBlock];
  float *m, *v;
  if constexpr (EIGHT) {
    // A short last block is filled up with zeros.
    std::memcpy(m_codes, r.exp_avg + at, count);
    std::memcpy(v_codes, r.exp_avg_sq + at, count);
    std::memset(m_codes + count, 0, kBlock - count);
    std::memset(v_codes + count, 0, kBlock - count);
    dequantize<true>(m_codes, r.exp_avg_scale[at / kBlock], m = m_block);
    dequantize<false>(v_codes, r.exp_avg_sq_scale[at / kBlock], v = v_block);
  } else {
    m = r.exp_avg + at;
    v = r.exp_avg_sq + at;
  }
  if constexpr (EIGHT || Range::stochastic)
    for (int64_t i = 0; i < kBlock; i += 2 * W) {
      vu words[2];
      philox(s.key, (r.first + at + i) / 4, words);
      store(reinterpret_cast<float*>(random + i), (vf)words[0]);
      store(reinterpret_cast<float*>(random + i + W), (vf)words[1]);
    }
  T* param = r.param + at;
  [[maybe_unused]] const bool far =
      MASTER && s.bypass_cache && reinterpret_cast<uintptr_t>(param) % (2 * W) == 0;
  const auto update = [&](int64_t i, auto k) __attribute__((always_inline)) {
    vf p, new_m = get(m + i, k), new_v = get(v + i, k);
    if constexpr (MASTER)
      p = get(r.master + at + i, k);
    else
      p = get(param + i, k);
    const vf g = get(r.grad + at + i, k) * s.grad_scale;
    new_m = new_m + (g - new_m) * s.rate1;
    new_v = new_v * s.beta2 + g * g * s.rate2;
    p = p * s.decay - s.step_size * (new_m / (square_root(new_v) * s.inverse_root_correction2 + s.eps));
    put(m + i, new_m, k);
    put(v + i, new_v, k);
    if constexpr (MASTER) put(r.master + at + i, p, k);
    if constexpr (Range::stochastic) p = round_stochastically(p, (vu)load(reinterpret_cast<float*>(random + i)));
    if constexpr (MASTER)
      put(param + i, p, k, far);
    else
      put(param + i, p, k);
  };
  int64_t i = 0;
  for (; i + W <= count; i += W) update(i, Whole{});
  if (i < count) update(i, static_cast<int>(count - i));
  if constexpr (EIGHT) {
    r.exp_avg_scale[at / kBlock] = quantize<true>(m_block, random, m_codes);
    r.exp_avg_sq_scale[at / kBlock] = quantize<false>(v_block, random, v_codes);
    std::memcpy(r.exp_avg + at, m_codes, count);
    std::memcpy(r.exp_avg_sq + at, v_codes, count);
  }
}

template <typename Range>
void adamw_range(const Range& r, const AdamWStep& s) {
  for (int64_t at = 0; at < r.n; at += kBlock) adamw_block(r, s, at, std::min(kBlock, r.n - at));
#if defined(TAPELM_AVX512) || defined(TAPELM_AVX2)
  if (Range::master_weights && s.bypass_cache) _mm_sfence();
#endif
}
