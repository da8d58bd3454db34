// GELU in its tanh form (Hendrycks & Gimpel 2016), 0.5 u (1 + tanh(z)) with z = sqrt(2/pi) (u + 0.044715 u^3) and
// u = x + bias, computed as u sigmoid(2 z): the same function with one exponential and no cancellation.
#include "simd_loop.inl"

constexpr float kTwoRootTwoOverPi = 1.5957691216057308f, kCubic = 0.044715f;
constexpr float kMinusLog2 = -1.44269504088896341f * kTwoRootTwoOverPi;  // -2 z log2 e = kMinusLog2 (u + kCubic u^3)

// Beyond 20 gelu is 0 or u: cut off there, +-inf does not become inf * 0. NaN stays.
#if defined(TAPELM_AVX512)
TAPELM_INLINE vf at_least_minus_20(vf u) { return (vf)_mm512_max_ps((__m512)broadcast(-20.0f), (__m512)u); }
TAPELM_INLINE vf at_most_20(vf u) { return (vf)_mm512_min_ps((__m512)broadcast(20.0f), (__m512)u); }
#else
TAPELM_INLINE vf at_least_minus_20(vf u) { return u < -20.0f ? broadcast(-20.0f) : u; }
TAPELM_INLINE vf at_most_20(vf u) { return u > 20.0f ? broadcast(20.0f) : u; }
#endif
template <int N>
TAPELM_INLINE Pack<N> at_most_20(const Pack<N>& u) { return each([](vf x) { return at_most_20(x); }, u); }
template <int N>
TAPELM_INLINE Pack<N> at_least_minus_20(const Pack<N>& u) { return each([](vf x) { return at_least_minus_20(x); }, u); }

template <typename T, typename V>
TAPELM_INLINE V gelu(V u) {
  const V v = at_least_minus_20(u);
  return v * logistic<T>(v * (v * v * (kMinusLog2 * kCubic) + kMinusLog2));
}

template <typename T, typename V>
TAPELM_INLINE V gelu_derivative(V u) {
  const V v = at_most_20(at_least_minus_20(u)), square = v * v;
  const V s = logistic<T>(v * (square * (kMinusLog2 * kCubic) + kMinusLog2));
  const V slope = v * (square * (3.0f * kTwoRootTwoOverPi * kCubic) + kTwoRootTwoOverPi);
  return s * (slope - s * slope) + s;
}

// Software prefetching gains nothing in the backward pass.
template <typename T>
void bias_gelu_rows(const T* x, const T* bias, T* y, int64_t C, int64_t begin, int64_t end, bool far) {
  for (int64_t row = begin; row < end; ++row)
    for_packs<T>(C, [&](int64_t i, auto n) __attribute__((always_inline)) {
      const int64_t at = row * C + i;
      ask_for_pack(x + at + kPage<T>, n);
      put(y + at, gelu<T>(get(x + at, n) + get(bias + i, n)), n, far);
    });
}

// dbias of these rows is added to a float32 sum of C.
template <typename T>
void bias_gelu_backward_rows(const T* grad, const T* x, const T* bias, T* dx, float* dbias, int64_t C, int64_t begin,
                             int64_t end, bool far) {
  for (int64_t row = begin; row < end; ++row)
    for_packs<T>(C, [&](int64_t i, auto n) __attribute__((always_inline)) {
      const int64_t at = row * C + i;
      const auto d = get(grad + at, n) * gelu_derivative<T>(get(x + at, n) + get(bias + i, n));
      put(dx + at, d, n, far);
      put(dbias + i, get(dbias + i, n) + d, n);
    });
}
