#include "simd_loop.inl"

// Rows [begin, end) of y = dropout(tokens[ids[row]] + positions[row % time]), C elements each.
template <typename T, typename Id>
void embedding_rows(const Id* ids, const T* tokens, const T* positions, T* y, int64_t time, int64_t C,
                    const Dropout& dropout, int64_t begin, int64_t end, bool far) {
  for (int64_t row = begin; row < end; ++row) {
    const T *const token = tokens + static_cast<int64_t>(ids[row]) * C, *const position = positions + row % time * C;
    T* const out = y + row * C;
    const auto sum = [&](int64_t i, auto n) __attribute__((always_inline)) {
      return get(token + i, n) + get(position + i, n);
    };
    if (dropout.active)
      for_kept_twos(
          C, dropout.seed, dropout.threshold, row * C,
          [&](int64_t i, auto n, int, Kept kept) __attribute__((always_inline)) {
            return dropped(sum(i, n), kept, dropout.scale);
          },
          [&](int64_t i, auto n, const auto& v, int, const Kept*) __attribute__((always_inline)) {
            put(out + i, v, n, far);
          });
    else
      put_row(out, C, far, [&](int64_t i, auto n, int) __attribute__((always_inline)) { return sum(i, n); });
  }
}

// out (C) = the sum of `count` rows of grad after dropout, in the order given; `sums` is space for C floats.
template <typename T>
void embedding_sum(const T* grad, const int64_t* rows, int64_t count, int64_t C, const Dropout& dropout, float* sums,
                   T* out, bool far) {
  if (count == 0)
    for_vectors(C, [&](int64_t i, auto n, int) __attribute__((always_inline)) { put(out + i, vf{}, n, far); });
  for (int64_t k = 0; k < count; ++k) {
    const int64_t row = rows[k];
    const auto added = [&](int64_t i, auto n, vf g) __attribute__((always_inline)) {
      return k == 0 ? g : get(sums + i, n) + g;
    };
    const auto write = [&](int64_t i, auto n, const auto& total, int, const Kept* = nullptr)
                           __attribute__((always_inline)) {
      if (k + 1 < count)
        put(sums + i, total, n, false);
      else
        put(out + i, total, n, far);
    };
    if (dropout.active)
      for_kept_twos(
          C, dropout.seed, dropout.threshold, row * C,
          [&](int64_t i, auto n, int, Kept kept) __attribute__((always_inline)) {
            return added(i, n, dropped(get(grad + row * C + i, n), kept, dropout.scale));
          },
          write);
    else
      for_twos(
          C,
          [&](int64_t i, auto n, int) __attribute__((always_inline)) {
            return added(i, n, get(grad + row * C + i, n));
          },
          write);
  }
}
