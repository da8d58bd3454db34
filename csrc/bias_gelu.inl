// GELU in its tanh form (Hendrycks & Gimpel 2016), 0.5 u (1 + tanh(z)) with z = sqrt(2/pi) (u + 0.044715 u^3) and
// u = x + bias, computed as u sigmoid(2 z): the same function with one exponential and no cancellation.
constexpr float kTwoRootTwoOverPi = 1.5957691216057308f, kCubic = 0.044715f;

TAPELM_INLINE vf sigmoid_2z(vf u) { return 1.0f / (1.0f + exp(-kTwoRootTwoOverPi * (u + kCubic * u * u * u))); }

// -inf is cut off where gelu is 0 anyway, so that it does not become -inf * 0.
TAPELM_INLINE vf gelu(vf u) { return u < -20.0f ? vf{} : u * sigmoid_2z(u); }

TAPELM_INLINE vf gelu_derivative(vf u) {
  const vf s = sigmoid_2z(u);
  const vf d = s + u * s * (1.0f - s) * kTwoRootTwoOverPi * (1.0f + 3.0f * kCubic * u * u);
  return u < -20.0f ? vf{} : (u > 20.0f ? broadcast(1.0f) : d);
}

template <typename T>
void bias_gelu_rows(const T* x, const T* bias, T* y, int64_t C, int64_t begin, int64_t end) {
  const int64_t whole = C / W * W;
  const int rest = static_cast<int>(C - whole);
  for (int64_t row = begin; row < end; ++row) {
    const T* in = x + row * C;
    T* out = y + row * C;
    for (int64_t i = 0; i < whole; i += W) store(out + i, gelu(load(in + i) + load(bias + i)));
    if (rest) store_part(out + whole, gelu(load_part(in + whole, rest) + load_part(bias + whole, rest)), rest);
  }
}

// dbias of these rows is added to a float32 sum of C.
template <typename T>
void bias_gelu_backward_rows(const T* grad, const T* x, const T* bias, T* dx, float* dbias, int64_t C, int64_t begin,
                             int64_t end) {
  const int64_t whole = C / W * W;
  const int rest = static_cast<int>(C - whole);
  for (int64_t row = begin; row < end; ++row) {
    const T* g = grad + row * C;
    const T* in = x + row * C;
    T* out = dx + row * C;
    for (int64_t i = 0; i < whole; i += W) {
      const vf d = load(g + i) * gelu_derivative(load(in + i) + load(bias + i));
      store(out + i, d);
      store(dbias + i, load(dbias + i) + d);
    }
    if (rest) {
      const vf d =
          load_part(g + whole, rest) * gelu_derivative(load_part(in + whole, rest) + load_part(bias + whole, rest));
      store_part(out + whole, d, rest);
      store_part(dbias + whole, load_part(dbias + whole, rest) + d, rest);
    }
  }
}
