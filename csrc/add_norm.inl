#include "simd_loop.inl"

// One row of C features: r = residual + dropout(x), then the norm of r as it was rounded when stored.
// CENTRED: y = (r - mean) * rstd * weight + bias; otherwise y = r * rstd * weight with the mean square in rstd.
template <bool CENTRED, typename T>
void add_norm_rows(const T* x, const T* residual, const T* weight, const T* bias, T* y, T* r, float* mean, float* rstd,
                   int64_t C, float eps, const Dropout& dropout, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* in = x + row * C;
    const T* base = residual + row * C;
    T* total = r + row * C;
    T* out = y + row * C;
    if (dropout.active) {
      for_random_vectors(C, dropout.seed, row * C, [&](int64_t i, auto n, vu random) __attribute__((always_inline)) {
        put(total + i, get(base + i, n) + dropped(get(in + i, n), random, dropout.threshold, dropout.scale), n);
      });
    } else {
      for_vectors(C, [&](int64_t i, auto n, int) __attribute__((always_inline)) {
        put(total + i, get(base + i, n) + get(in + i, n), n);
      });
    }
    float m = 0.0f;
    if constexpr (CENTRED) {
      vf sums[kSums] = {};
      for_vectors(C, [&](int64_t i, auto n, int s) __attribute__((always_inline)) { sums[s] += get(total + i, n); });
      mean[row] = m = sum(sums) / static_cast<float>(C);
    }
    vf squares[kSums] = {};
    for_vectors(C, [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
      const vf d = get(total + i, n, m) - m;
      squares[s] += d * d;
    });
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(C) + eps);
    rstd[row] = scale;
    for_vectors(C, [&](int64_t i, auto n, int) __attribute__((always_inline)) {
      vf h = (get(total + i, n) - m) * scale * get(weight + i, n);
      if constexpr (CENTRED) h += get(bias + i, n);
      put(out + i, h, n);
    });
  }
}

// d = rstd * (g w - mean(g w) - h mean(g w h)) + grad_r, the middle term only when CENTRED, is dresidual; dx is d where
// the dropout kept x. grad_r may be null (zero); dx is null without dropout, where it equals dresidual.
// dweight, dbias of these rows are added to float32 sums of C.
template <bool CENTRED, typename T>
void add_norm_backward_rows(const T* grad, const T* grad_r, const T* r, const T* weight, const float* mean,
                            const float* rstd, T* dresidual, T* dx, float* dweight, float* dbias, int64_t C,
                            const Dropout& dropout, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* g = grad + row * C;
    const T* gr = grad_r == nullptr ? nullptr : grad_r + row * C;
    const T* in = r + row * C;
    T* out = dresidual + row * C;
    const float m = CENTRED ? mean[row] : 0.0f, scale = rstd[row];
    vf sums[kSums] = {}, products[kSums] = {};
    for_vectors(C, [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
      const vf gv = get(g + i, n), gh = gv * ((get(in + i, n) - m) * scale), w = get(weight + i, n);
      products[s] += gh * w;
      put(dweight + i, get(dweight + i, n) + gh, n);
      if constexpr (CENTRED) {
        sums[s] += gv * w;
        put(dbias + i, get(dbias + i, n) + gv, n);
      }
    });
    const float a = sum(sums) / static_cast<float>(C), b = sum(products) / static_cast<float>(C) * scale;
    const auto derivative = [&](int64_t i, auto n) __attribute__((always_inline)) {
      const vf d = (get(g + i, n) * get(weight + i, n) - a - (get(in + i, n) - m) * b) * scale;
      return gr == nullptr ? d : d + get(gr + i, n);
    };
    if (dx != nullptr) {
      for_random_vectors(C, dropout.seed, row * C, [&](int64_t i, auto n, vu random) __attribute__((always_inline)) {
        const vf d = derivative(i, n);
        put(out + i, d, n);
        put(dx + row * C + i, dropped(d, random, dropout.threshold, dropout.scale), n);
      });
    } else {
      for_vectors(C, [&](int64_t i, auto n, int) __attribute__((always_inline)) { put(out + i, derivative(i, n), n); });
    }
  }
}
