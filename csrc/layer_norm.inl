// One row of C features: y = (x - mean) * rstd * weight + bias, statistics in float32 in two passes over the row.
template <typename T>
void layer_norm_rows(const T* x, const T* weight, const T* bias, T* y, float* mean, float* rstd, int64_t C, float eps,
                     int64_t begin, int64_t end) {
  const int64_t whole = C / W * W;
  const int rest = static_cast<int>(C - whole);
  for (int64_t row = begin; row < end; ++row) {
    const T* in = x + row * C;
    T* out = y + row * C;
    vf total = {};
    for (int64_t i = 0; i < whole; i += W) total += load(in + i);
    float s = sum(total);
    for (int64_t i = whole; i < C; ++i) s += static_cast<float>(in[i]);
    const float m = s / static_cast<float>(C);
    total = vf{};
    for (int64_t i = 0; i < whole; i += W) {
      const vf d = load(in + i) - m;
      total += d * d;
    }
    s = sum(total);
    for (int64_t i = whole; i < C; ++i) {
      const float d = static_cast<float>(in[i]) - m;
      s += d * d;
    }
    const float r = 1.0f / std::sqrt(s / static_cast<float>(C) + eps);
    for (int64_t i = 0; i < whole; i += W) store(out + i, (load(in + i) - m) * r * load(weight + i) + load(bias + i));
    if (rest)
      store_part(out + whole,
                 (load_part(in + whole, rest) - m) * r * load_part(weight + whole, rest) + load_part(bias + whole, rest),
                 rest);
    mean[row] = m;
    rstd[row] = r;
  }
}

// dx = rstd * (g w - mean(g w) - xhat mean(g w xhat)); dweight, dbias of these rows are added to float32 sums of C.
template <typename T>
void layer_norm_backward_rows(const T* grad, const T* x, const T* weight, const float* mean, const float* rstd, T* dx,
                              float* dweight, float* dbias, int64_t C, int64_t begin, int64_t end) {
  const int64_t whole = C / W * W;
  const int rest = static_cast<int>(C - whole);
  for (int64_t row = begin; row < end; ++row) {
    const T* g = grad + row * C;
    const T* in = x + row * C;
    T* out = dx + row * C;
    const float m = mean[row], r = rstd[row];
    vf sum_gw = {}, sum_gwx = {};
    const auto accumulate = [&](vf gv, vf xv, vf wv) __attribute__((always_inline)) {
      sum_gw += gv * wv;
      sum_gwx += gv * wv * ((xv - m) * r);
    };
    for (int64_t i = 0; i < whole; i += W) {
      const vf gv = load(g + i), xhat = (load(in + i) - m) * r;
      accumulate(gv, load(in + i), load(weight + i));
      store(dweight + i, load(dweight + i) + gv * xhat);
      store(dbias + i, load(dbias + i) + gv);
    }
    if (rest) {
      // Lanes beyond the row hold x = mean, so they add nothing.
      const vf gv = load_part(g + whole, rest), xv = load_part(in + whole, rest, m);
      accumulate(gv, xv, load_part(weight + whole, rest));
      store_part(dweight + whole, load_part(dweight + whole, rest) + gv * ((xv - m) * r), rest);
      store_part(dbias + whole, load_part(dbias + whole, rest) + gv, rest);
    }
    const float a = sum(sum_gw) / static_cast<float>(C), b = sum(sum_gwx) / static_cast<float>(C);
    for (int64_t i = 0; i < whole; i += W)
      store(out + i, (load(g + i) * load(weight + i) - a - (load(in + i) - m) * r * b) * r);
    if (rest)
      store_part(out + whole,
                 (load_part(g + whole, rest) * load_part(weight + whole, rest) - a -
                  (load_part(in + whole, rest) - m) * r * b) * r,
                 rest);
  }
}
