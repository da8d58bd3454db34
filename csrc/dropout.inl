#include "simd_loop.inl"

// Elements [begin, end) of a contiguous tensor.
template <typename T>
void dropout_range(const T* x, T* y, uint64_t seed, uint32_t threshold, float scale, int64_t begin, int64_t end,
                   bool far) {
  x += begin;
  y += begin;
  for_kept_twos(
      end - begin, seed, threshold, begin,
      [&](int64_t i, auto n, int s, Kept kept) __attribute__((always_inline)) {
        ask_for(x + i + kPage<T>, s);
        return dropped(get(x + i, n), kept, scale);
      },
      [&](int64_t i, auto n, const auto& v, int, const Kept*) __attribute__((always_inline)) {
        put(y + i, v, n, far);
      });
}
