#include "simd_loop.inl"

// In float32 to 3 ulp: the rounding of x log2 e, which logistic takes, would be felt far below zero.
template <typename T>
TAPELM_INLINE vf sigmoid(vf x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) return logistic<T>(x * -1.44269504088896341f);
#if defined(TAPELM_AVX512)
  return reciprocal(exp(-x) + 1.0f, x * -1.44269504088896341f);
#else
  return 1.0f / (exp(-x) + 1.0f);
#endif
}

// `count` elements of y = gate * sigmoid(gate) * up.
template <typename T>
void swiglu_range(const T* gate, const T* up, T* y, int64_t count, bool far) {
  for_vectors<2>(count, [&](int64_t i, auto n, int) __attribute__((always_inline)) {
    const vf a = get(gate + i, n);
    put(y + i, a * sigmoid<T>(a) * get(up + i, n), n, far);
  });
}

// dgate = grad * up * s * (1 + gate * (1 - s)), dup = grad * gate * s with s = sigmoid(gate).
template <typename T>
void swiglu_backward_range(const T* grad, const T* gate, const T* up, T* dgate, T* dup, int64_t count,
                           bool far) {
  for_vectors<2>(count, [&](int64_t i, auto n, int) __attribute__((always_inline)) {
    const vf g = get(grad + i, n), a = get(gate + i, n), s = sigmoid<T>(a), gs = g * s;
    put(dgate + i, gs * get(up + i, n) * (1.0f + (a - a * s)), n, far);
    put(dup + i, gs * a, n, far);
  });
}
