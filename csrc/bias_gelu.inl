// GELU in its tanh form (Hendrycks & Gimpel 2016), 0.5 u (1 + tanh(z)) with z = sqrt(2/pi) (u + 0.044715 u^3) and
// u = x + bias, computed as u sigmoid(2 z): the same function with one exponential and no cancellation.
#include "simd_loop.inl"

constexpr float kTwoRootTwoOverPi = 1.5957691216057308f, kCubic = 0.044715f;

// Beyond 20 gelu is 0 or u: cut off there, +-inf does not become inf * 0. NaN stays.
TAPELM_INLINE vf at_least_minus_20(vf u) { return u < -20.0f ? broadcast(-20.0f) : u; }

template <typename T>
TAPELM_INLINE vf gelu(vf u) {
  const vf v = at_least_minus_20(u);
  return v * sigmoid<T>(v * (v * v * (kTwoRootTwoOverPi * kCubic) + kTwoRootTwoOverPi));
}

template <typename T>
TAPELM_INLINE vf gelu_derivative(vf u) {
  const vf low = at_least_minus_20(u), v = low > 20.0f ? broadcast(20.0f) : low;
  const vf square = v * v;
  const vf s = sigmoid<T>(v * (square * (kTwoRootTwoOverPi * kCubic) + kTwoRootTwoOverPi));
  const vf slope = v * (square * (3.0f * kTwoRootTwoOverPi * kCubic) + kTwoRootTwoOverPi);
  return s * (slope - s * slope) + s;
}

template <typename T>
void bias_gelu_rows(const T* x, const T* bias, T* y, int64_t C, int64_t begin, int64_t end, bool far) {
  for (int64_t row = begin; row < end; ++row) {
    for_vectors<2>(C, [&](int64_t i, auto n, int) __attribute__((always_inline)) {
      put(y + row * C + i, gelu<T>(get(x + row * C + i, n) + get(bias + i, n)), n, far);
    });
  }
}

// dbias of these rows is added to a float32 sum of C.
template <typename T>
void bias_gelu_backward_rows(const T* grad, const T* x, const T* bias, T* dx, float* dbias, int64_t C, int64_t begin,
                             int64_t end, bool far) {
  for (int64_t row = begin; row < end; ++row) {
    for_vectors<2>(C, [&](int64_t i, auto n, int) __attribute__((always_inline)) {
      const int64_t at = row * C + i;
      const vf d = get(grad + at, n) * gelu_derivative<T>(get(x + at, n) + get(bias + i, n));
      put(dx + at, d, n, far);
      put(dbias + i, get(dbias + i, n) + d, n);
    });
  }
}
