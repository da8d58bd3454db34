// Rows of LayerNorm (CENTRED) and RMSNorm, of x or (ADD) of r = residual + dropout(x); included by the norms' .inl.
#include "simd_loop.inl"

// Sums over a row of its distances from shift and of their squares.
template <bool CENTRED>
struct RowSums {
  float shift;
  vf distances[kSums] = {}, squares[kSums] = {};

  TAPELM_INLINE void add(vf v, int s) {
    const vf d = v - shift;
    if constexpr (CENTRED) distances[s] += d;
    squares[s] += d * d;
  }
  TAPELM_INLINE void add(const Two& v, int s) {
    add(v.first, s);
    add(v.second, s + 1);
  }
};

// mean and (variance + eps)^-1/2 of a row from its sums: one reading of the row unless the mean is so far from shift that
// the difference of the two would lose more than four bits.
template <bool CENTRED, typename T>
TAPELM_INLINE void row_statistics(const T* x, int64_t C, float eps, const RowSums<CENTRED>& sums, float& mean, float& rstd) {
  float square = sum(sums.squares) / static_cast<float>(C);
  mean = 0.0f;
  if constexpr (CENTRED) {
    const float distance = sum(sums.distances) / static_cast<float>(C);
    mean = sums.shift + distance;
    square -= distance * distance;
    if (!(square * 16.0f >= distance * distance)) {  // also when both overflowed
      vf deviations[kSums] = {};
      for_vectors(C, [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
        const vf d = get(x + i, n, mean) - mean;
        deviations[s] += d * d;
      });
      square = sum(deviations) / static_cast<float>(C);
    }
  }
  rstd = 1.0f / std::sqrt(square + eps);
}

// Rows are processed in blocks that are read twice, the second time from L1. The statistics of one row overlap with the
// loads of the next, and (COLD) the next block is prefetched: in the forward of add + norm one tensor in each of two
// passes, else all in the second. A block is 8 KB of each tensor, which leaves room in L1 for weights and sums, or one
// row if that is larger; several rows are an even number, because the backward pass processes pairs.
template <typename T>
int64_t rows_of_block(int64_t C) {
  const int64_t rows = std::clamp<int64_t>(8192 / (std::max<int64_t>(C, 1) * sizeof(T)), 1, kBlockRows);
  return rows > 1 ? rows / 2 * 2 : 1;
}

template <bool CENTRED, bool ADD, bool COLD, typename T>
void norm_rows(const NormForward<T>& a, int64_t begin, int64_t end) {
  const int64_t C = a.C, block = rows_of_block<T>(C);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t last = std::min(first + block, end);
    float means[kBlockRows], rstds[kBlockRows];
    for (int64_t row = first; row < last; ++row) {
      const T* const in = a.x + row * C;
      const float shift = CENTRED && C > 0 ? static_cast<float>((ADD ? a.residual : a.x)[row * C]) : 0.0f;
      RowSums<CENTRED> sums{shift};
      const int64_t next = (std::min(row + block, end - 1) - row) * C;
      if constexpr (ADD) {
        // The statistics are those of r as it is rounded when stored. Lanes beyond the row hold shift.
        const T* const base = a.residual + row * C;
        T* const total = a.r + row * C;
        const auto added = [&](int64_t i, auto n, int s, vf x) __attribute__((always_inline)) {
          if constexpr (COLD) ask_for(in + next + i, s);
          return get(base + i, n, shift) + x;
        };
        const auto write = [&](int64_t i, auto n, const auto& v, int s, const Kept* = nullptr) __attribute__((always_inline)) {
          put(total + i, v, n, false);
          sums.add(rounded<T>(v), s);
        };
        if (a.dropout.active)
          for_kept_twos(
              C, a.dropout.seed, a.dropout.threshold, row * C,
              [&](int64_t i, auto n, int s, Kept kept) __attribute__((always_inline)) {
                return added(i, n, s, dropped(get(in + i, n), kept, a.dropout.scale));
              },
              write);
        else
          for_twos(
              C, [&](int64_t i, auto n, int s) __attribute__((always_inline)) { return added(i, n, s, get(in + i, n)); },
              write);
      } else {
        for_vectors(C, [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
          sums.add(get(in + i, n, shift), s);
        });
      }
      float &mean = means[row - first], &rstd = rstds[row - first];
      row_statistics((ADD ? a.r : a.x) + row * C, C, a.eps, sums, mean, rstd);
      if constexpr (CENTRED) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
    for (int64_t row = first; row < last; ++row) {
      const T* const from = (ADD ? a.r : a.x) + row * C;
      const float mean = means[row - first], rstd = rstds[row - first];
      const int64_t next = std::min(row + block, end - 1) * C;
      const auto value = [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
        if constexpr (COLD) ask_for((ADD ? a.residual : a.x) + next + i, s);
        const vf y = (get(from + i, n) - mean) * rstd * get(a.weight + i, n);
        return CENTRED ? y + get(a.bias + i, n) : y;
      };
      if (a.far)
        put_row(a.y + row * C, C, true, value);
      else
        put_row(a.y + row * C, C, false, value);
    }
  }
}

template <bool CENTRED, bool ADD, typename T>
void norm_rows(const NormForward<T>& a, int64_t begin, int64_t end) {
  (a.cold ? norm_rows<CENTRED, ADD, true, T> : norm_rows<CENTRED, ADD, false, T>)(a, begin, end);
}

// d = rstd * (g w - mean(g w) - h mean(g w h)) + grad_r, the middle term only when CENTRED, is dx; `dropped` is d where
// the dropout kept x. dweight and, when CENTRED, dbias are added to the float32 sums. Blocks of rows as above; grad_r is
// prefetched while its own block is read for the first time.
template <bool CENTRED, bool ADD, bool COLD, typename T>
void norm_backward_rows(const NormBackward<T>& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
  const int64_t C = a.C, block = rows_of_block<T>(C);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t last = std::min(first + block, end);
    float means[kBlockRows], rstds[kBlockRows], of_g[kBlockRows], of_gh[kBlockRows];
    for (int64_t row = first; row < last; ++row) {
      const T *const grad = a.grad + row * C, *const x = a.x + row * C;
      const T* const grad_r = a.grad_r ? a.grad_r + row * C : grad;
      const float mean = CENTRED ? a.mean[row] : 0.0f, rstd = a.rstd[row];
      vf sums[kSums] = {}, products[kSums] = {};
      for_vectors(C, [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
        if constexpr (COLD && ADD) ask_for(grad_r + i, s);
        const vf g = get(grad + i, n) * get(a.weight + i, n);
        products[s] += g * ((get(x + i, n) - mean) * rstd);
        if constexpr (CENTRED) sums[s] += g;
      });
      means[row - first] = mean;
      rstds[row - first] = rstd;
      of_g[row - first] = CENTRED ? sum(sums) / static_cast<float>(C) * rstd : 0.0f;
      of_gh[row - first] = sum(products) / static_cast<float>(C) * rstd;
    }
    // d of one or two rows, whose dweight and dbias are added to the sums together.
    const auto derive = [&](int64_t row, auto rows, int64_t i, auto n, int s, vf (&d)[2]) __attribute__((always_inline)) {
      vf sum_gh = get(dweight + i, n), sum_g = {};
      if constexpr (CENTRED) sum_g = get(dbias + i, n);
      for (int r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * C + i, k = row - first + r, next = std::min(row + r + block, end - 1) * C + i;
        if constexpr (COLD) {
          ask_for(a.grad + next, s);
          ask_for(a.x + next, s);
        }
        const vf g = get(a.grad + at, n), h = (get(a.x + at, n) - means[k]) * rstds[k];
        sum_gh += g * h;
        if constexpr (CENTRED) sum_g += g;
        d[r] = g * get(a.weight + i, n) * rstds[k] - h * of_gh[k];
        if constexpr (CENTRED) d[r] -= of_g[k];
        if constexpr (ADD)
          if (a.grad_r != nullptr) d[r] += get(a.grad_r + at, n);
      }
      put(dweight + i, sum_gh, n);
      if constexpr (CENTRED) put(dbias + i, sum_g, n);
    };
    const auto write = [&](int64_t row, auto rows) __attribute__((always_inline)) {
      vf d[2], next[2];
      int64_t i = 0;
      for (; i + 2 * W <= C; i += 2 * W) {
        derive(row, rows, i, Whole{}, 0, d);
        derive(row, rows, i + W, Whole{}, 1, next);
        for (int r = 0; r < rows; ++r) put(a.dx + (row + r) * C + i, Two{d[r], next[r]}, Whole{}, a.far);
      }
      for_vectors<1>(C - i, [&](int64_t at, auto n, int) __attribute__((always_inline)) {
        derive(row, rows, i + at, n, 0, d);
        for (int r = 0; r < rows; ++r) put(a.dx + (row + r) * C + i + at, d[r], n, a.far);
      });
    };
    const auto drop = [&](const auto& v, const Kept* kept) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<decltype(v), const Two&>)
        return Two{dropped(v.first, kept[0], a.dropout.scale), dropped(v.second, kept[1], a.dropout.scale)};
      else
        return dropped(v, kept[0], a.dropout.scale);
    };
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;
    int64_t row = first;
    if (ADD && a.dropout.active)
      for (; row < last; ++row)
        for_kept_twos(
            C, a.dropout.seed, a.dropout.threshold, row * C,
            [&](int64_t i, auto n, int s, Kept) __attribute__((always_inline)) {
              vf d[2];
              derive(row, one, i, n, s, d);
              return d[0];
            },
            [&](int64_t i, auto n, const auto& v, int, const Kept* kept) __attribute__((always_inline)) {
              put(a.dx + row * C + i, v, n, a.far);
              put(a.dropped + row * C + i, drop(v, kept), n, a.far);
            });
    for (; row + 1 < last; row += 2) write(row, two);
    if (row < last) write(row, one);
  }
}

template <bool CENTRED, bool ADD, typename T>
void norm_backward_rows(const NormBackward<T>& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
  (a.cold ? norm_backward_rows<CENTRED, ADD, true, T>
          : norm_backward_rows<CENTRED, ADD, false, T>)(a, begin, end, dweight, dbias);
}
