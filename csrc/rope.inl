#include "simd_loop.inl"

// `count` positions of one head: with x = (x1, x2) cut in halves and the same for cos and sin,
//   y1 = x1 cos1 - x2 sin1        y2 = x2 cos2 + x1 sin2
// and the transposed of that map when INVERSE. Positions of x are `stride` elements apart, those of y, cos, sin D.
template <bool INVERSE, typename T>
void rope_positions(const T* x, int64_t stride, const float* cos, const float* sin, T* y, int64_t D, int64_t count,
                    bool far) {
  const int64_t half = D / 2;
  for (int64_t t = 0; t < count; ++t, x += stride, y += D, cos += D, sin += D) {
    for_vectors(half, [&](int64_t i, auto n, int) __attribute__((always_inline)) {
      const vf x1 = get(x + i, n), x2 = get(x + half + i, n);
      const vf sin1 = INVERSE ? -get(sin + half + i, n) : get(sin + i, n);
      const vf sin2 = INVERSE ? -get(sin + i, n) : get(sin + half + i, n);
      put(y + i, x1 * get(cos + i, n) - x2 * sin1, n, far);
      put(y + half + i, x2 * get(cos + half + i, n) + x1 * sin2, n, far);
    });
  }
}
