#include "simd_loop.inl"

// One row of C features: y = x * rstd * weight with rstd = (mean(x^2) + eps)^-1/2 in float32.
template <typename T>
void rms_norm_rows(const T* x, const T* weight, T* y, float* rstd, int64_t C, float eps, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* in = x + row * C;
    T* out = y + row * C;
    vf squares[kSums] = {};
    for_vectors(C, [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
      const vf v = get(in + i, n);
      squares[s] += v * v;
    });
    const float r = 1.0f / std::sqrt(sum(squares) / static_cast<float>(C) + eps);
    for_vectors(C, [&](int64_t i, auto n, int) __attribute__((always_inline)) {
      put(out + i, get(in + i, n) * r * get(weight + i, n), n);
    });
    rstd[row] = r;
  }
}

// dx = rstd * (g w - h mean(g w h)) with h = x rstd; dweight of these rows is added to a float32 sum of C.
template <typename T>
void rms_norm_backward_rows(const T* grad, const T* x, const T* weight, const float* rstd, T* dx, float* dweight,
                            int64_t C, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* g = grad + row * C;
    const T* in = x + row * C;
    T* out = dx + row * C;
    const float r = rstd[row];
    vf products[kSums] = {};
    for_vectors(C, [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
      const vf gh = get(g + i, n) * (get(in + i, n) * r);
      products[s] += gh * get(weight + i, n);
      put(dweight + i, get(dweight + i, n) + gh, n);
    });
    const float b = sum(products) / static_cast<float>(C) * r;
    for_vectors(C, [&](int64_t i, auto n, int) __attribute__((always_inline)) {
      put(out + i, (get(g + i, n) * get(weight + i, n) - get(in + i, n) * b) * r, n);
    });
  }
}
