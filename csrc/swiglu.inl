#include "simd_loop.inl"

// In float32 to 3 ulp: the rounding of x log2 e, which logistic takes, would be felt far below zero.
TAPELM_INLINE vf precise_sigmoid(vf x) {
#if defined(TAPELM_AVX512)
  return reciprocal(exp(-x) + 1.0f, x * -1.44269504088896341f);
#else
  return 1.0f / (exp(-x) + 1.0f);
#endif
}
template <int N>
TAPELM_INLINE Pack<N> precise_sigmoid(const Pack<N>& x) { return each([](vf v) { return precise_sigmoid(v); }, x); }

template <typename T, typename V>
TAPELM_INLINE V sigmoid(V x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    return logistic<T>(x * -1.44269504088896341f);
  else
    return precise_sigmoid(x);
}

// `count` elements of y = gate * sigmoid(gate) * up.
template <typename T>
void swiglu_range(const T* gate, const T* up, T* y, int64_t count, bool far) {
  for_packs<T>(count, [&](int64_t i, auto n) __attribute__((always_inline)) {
    ask_for_pack(gate + i + kPage<T>, n);
    ask_for_pack(up + i + kPage<T>, n);
    const auto a = get(gate + i, n);
    put(y + i, a * sigmoid<T>(a) * get(up + i, n), n, far);
  });
}

// dgate = grad * up * s * (1 + gate * (1 - s)), dup = grad * gate * s with s = sigmoid(gate).
template <typename T>
void swiglu_backward_range(const T* grad, const T* gate, const T* up, T* dgate, T* dup, int64_t count,
                           bool far) {
  for_packs<T>(count, [&](int64_t i, auto n) __attribute__((always_inline)) {
    ask_for_pack(gate + i + kPage<T>, n);
    ask_for_pack(up + i + kPage<T>, n);
    ask_for_pack(grad + i + kPage<T>, n);
    const auto a = get(gate + i, n), s = sigmoid<T>(a), gs = get(grad + i, n) * s;
    put(dgate + i, gs * get(up + i, n) * ((a - a * s) + 1.0f), n, far);
    put(dup + i, gs * a, n, far);
  });
}
