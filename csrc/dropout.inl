// A choice, not a product with 0: a dropped inf or NaN is 0.
TAPELM_INLINE vf dropped(vf x, vu random, uint32_t threshold, float scale) {
  return random >= broadcast(threshold) ? x * scale : vf{};
}

// Elements [begin, end) of a contiguous tensor; begin is a multiple of 2 W, the random stream's granularity.
template <typename T>
void dropout_range(const T* x, T* y, uint64_t seed, uint32_t threshold, float scale, int64_t begin, int64_t end) {
  vu random[2];
  int64_t i = begin;
  for (; i + 2 * W <= end; i += 2 * W) {
    philox(seed, static_cast<uint64_t>(i) / 4, random);
    store(y + i, dropped(load(x + i), random[0], threshold, scale));
    store(y + i + W, dropped(load(x + i + W), random[1], threshold, scale));
  }
  if (i < end) {
    philox(seed, static_cast<uint64_t>(i) / 4, random);
    for (int half = 0; half < 2 && i < end; ++half, i += W) {
      const int n = static_cast<int>(std::min<int64_t>(W, end - i));
      store_part(y + i, dropped(load_part(x + i, n), random[half], threshold, scale), n);
    }
  }
}
