// A few rows against a weight for one instruction set.
#include "simd_loop.inl"
#include "simd_dots.inl"

// y[m][n] = x[m] . w[n] + bias[n] for n in [begin, end), for a few rows x (M, K): w (N, K) is read once and not packed.
// y (M, N) row-major; the bias may be null.
template <typename T>
void few_rows(const float* x, int64_t M, int64_t K, const T* w, const T* bias, int64_t begin, int64_t end, T* y,
              int64_t N) {
  float sums[kFewRows];
  for (int64_t n = begin; n < end; ++n) {
    few_dots(x, M, K, w + n * K, sums);
    for (int64_t m = 0; m < M; ++m)
      y[m * N + n] = static_cast<T>(sums[m] + (bias ? static_cast<float>(bias[n]) : 0.0f));
  }
}
