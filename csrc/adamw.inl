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

// One pass over n elements: clip, decay, moments, update. `master` is the float32 weight; when the parameter is
// bfloat16 it is updated and its rounded copy written to `param`, otherwise the two are the same memory.
template <typename T>
void adamw_range(T* param, const T* grad, float* exp_avg, float* exp_avg_sq, float* master, AdamWStep s, int64_t n) {
  const auto update = [&](vf p, vf g, vf& m, vf& v) __attribute__((always_inline)) {
    g = g * s.grad_scale;
    m = m + (g - m) * (1.0f - s.beta1);
    v = v * s.beta2 + g * g * (1.0f - s.beta2);
    return p * s.decay - s.step_size * (m / (square_root(v) * s.inverse_root_correction2 + s.eps));
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vf m = load(exp_avg + i), v = load(exp_avg_sq + i);
    const vf p = update(load(master + i), load(grad + i), m, v);
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
    store(master + i, p);
    if constexpr (!std::is_same_v<T, float>) store(param + i, p);
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    vf m = load_part(exp_avg + i, rest), v = load_part(exp_avg_sq + i, rest);
    const vf p = update(load_part(master + i, rest), load_part(grad + i, rest), m, v);
    store_part(exp_avg + i, m, rest);
    store_part(exp_avg_sq + i, v, rest);
    store_part(master + i, p, rest);
    if constexpr (!std::is_same_v<T, float>) store_part(param + i, p, rest);
  }
}
