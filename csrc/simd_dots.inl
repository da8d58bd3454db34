// A few rows against one row of a weight, which is read once; included after simd_loop.inl and matrix_product.h.

// sums[m] = x[m] . w for x (M, K) row-major.
template <int M, typename T, typename W_>
TAPELM_INLINE void dots(const T* x, int64_t K, const W_* w, float* sums) {
  constexpr int S = M == 1 ? 4 : 2;
  vf total[M][S] = {};
  for_vectors<S>(K, [&](int64_t i, auto lanes, int s) __attribute__((always_inline)) {
    const vf of_w = get(w + i, lanes);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[m][s] += of_w * get(x + m * K + i, lanes);
  });
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    for (int s = S / 2; s > 0; s /= 2)
      for (int i = 0; i < s; ++i) total[m][i] += total[m][i + s];
    sums[m] = sum(total[m][0]);
  }
}

// The same for 1 to kFewRows rows.
template <typename T, typename W_>
TAPELM_INLINE void few_dots(const T* x, int64_t M, int64_t K, const W_* w, float* sums) {
  static_assert(kFewRows == 4);
  if (M == 1)
    dots<1>(x, K, w, sums);
  else if (M == 2)
    dots<2>(x, K, w, sums);
  else if (M == 3)
    dots<3>(x, K, w, sums);
  else
    dots<4>(x, K, w, sums);
}
