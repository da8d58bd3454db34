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

// mean and (variance + eps)^-1/2 of a row from its sums: one reading of the row unless the mean is so far from shift
// that the difference of the two would lose more than four bits.
template <bool CENTRED, typename T>
TAPELM_INLINE void row_statistics(const T* x, int64_t C, float eps, const RowSums<CENTRED>& sums, float& mean,
                                  float& rstd) {
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
// readings, else all in the second. A block is 8 KB of each tensor, which leaves room in L1 for weights and sums, or
// one row if that is larger; several rows are an even number, because the backward pass processes pairs.
template <typename T>
int64_t rows_of_block(int64_t C) {
  const int64_t rows = std::clamp<int64_t>(8192 / (std::max<int64_t>(C, 1) * sizeof(T)), 1, kBlockRows);
  return rows > 1 ? rows / 2 * 2 : 1;
}

// The first element, near which the others are expected.
template <bool CENTRED, typename T>
TAPELM_INLINE float shift_of(const T* row, int64_t C) {
  return CENTRED && C > 0 ? static_cast<float>(row[0]) : 0.0f;
}

template <bool CENTRED, typename T>
TAPELM_INLINE RowSums<CENTRED> sums_of(const T* x, int64_t C) {
  RowSums<CENTRED> sums{shift_of<CENTRED>(x, C)};
  for_vectors(C, [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
    sums.add(get(x + i, n, sums.shift), s);
  });
  return sums;
}

// Writes r = residual + dropout(x) of a row and sums it as it is rounded when stored. (COLD) x is prefetched `ahead`.
template <bool CENTRED, bool COLD, typename T>
TAPELM_INLINE RowSums<CENTRED> add_and_sum(const NormForward<T>& a, int64_t row, int64_t ahead) {
  const int64_t C = a.C;
  const T *const x = a.x + row * C, *const residual = a.residual + row * C;
  T* const r = a.r + row * C;
  RowSums<CENTRED> sums{shift_of<CENTRED>(residual, C)};
  const auto added = [&](int64_t i, auto n, int s, vf kept) __attribute__((always_inline)) {
    if constexpr (COLD) ask_for(x + ahead + i, s);
    return get(residual + i, n, sums.shift) + kept;  // lanes beyond the row hold shift
  };
  const auto take = [&](int64_t i, auto n, const auto& v, int s, const Kept* = nullptr) __attribute__((always_inline)) {
    put(r + i, v, n, false);
    sums.add(rounded<T>(v), s);
  };
  if (a.dropout.active) {
    const auto value = [&](int64_t i, auto n, int s, Kept kept) __attribute__((always_inline)) {
      return added(i, n, s, dropped(get(x + i, n), kept, a.dropout.scale));
    };
    for_kept_twos(C, a.dropout.seed, a.dropout.threshold, row * C, value, take);
  } else {
    const auto value = [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
      return added(i, n, s, get(x + i, n));
    };
    for_twos(C, value, take);
  }
  return sums;
}

template <bool CENTRED, bool ADD, bool COLD, typename T>
void norm_rows(const NormForward<T>& a, int64_t begin, int64_t end) {
  const int64_t C = a.C, block = rows_of_block<T>(C);
  const T* const normalised = ADD ? a.r : a.x;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t last = std::min(first + block, end);
    float means[kBlockRows], rstds[kBlockRows];
    for (int64_t row = first; row < last; ++row) {
      float &mean = means[row - first], &rstd = rstds[row - first];
      RowSums<CENTRED> sums;
      if constexpr (ADD)
        sums = add_and_sum<CENTRED, COLD>(a, row, (std::min(row + block, end - 1) - row) * C);
      else
        sums = sums_of<CENTRED>(a.x + row * C, C);
      row_statistics(normalised + row * C, C, a.eps, sums, mean, rstd);
      if constexpr (CENTRED) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
    for (int64_t row = first; row < last; ++row) {
      const T* const from = normalised + row * C;
      const T* const next = (ADD ? a.residual : a.x) + std::min(row + block, end - 1) * C;
      const float mean = means[row - first], rstd = rstds[row - first];
      const auto value = [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
        if constexpr (COLD) ask_for(next + i, s);
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

// What the backward pass needs of a row beside its elements: with g = grad and h = (x - mean) rstd the mean of g w by
// rstd and that of g w h by rstd^2, a factor of x - mean.
struct RowTerms { float mean, rstd, of_g, of_gh; };

// The backward pass of the rows of a task:
//   d = rstd * (g w - mean(g w) - h mean(g w h)) + grad_r, the middle term only when CENTRED,
// is dx; `dropped` is d where the dropout kept x; g h and, when CENTRED, g are added to the sums dweight and dbias.
template <bool CENTRED, bool ADD, bool COLD, typename T>
struct NormBackwardRows {
  const NormBackward<T>& a;
  float *const dweight, *const dbias;
  const int64_t end, block;  // of the rows of the task; rows of a block

  // First reading of a row, during which (COLD) its grad_r is prefetched.
  TAPELM_INLINE RowTerms terms_of(int64_t row) const {
    const int64_t C = a.C;
    const T *const grad = a.grad + row * C, *const x = a.x + row * C;
    const T* const grad_r = a.grad_r ? a.grad_r + row * C : grad;
    const float mean = CENTRED ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    vf sums[kSums] = {}, products[kSums] = {};
    for_vectors(C, [&](int64_t i, auto n, int s) __attribute__((always_inline)) {
      if constexpr (COLD && ADD) ask_for(grad_r + i, s);
      const vf g = get(grad + i, n) * get(a.weight + i, n);
      products[s] += g * (get(x + i, n) - mean);
      if constexpr (CENTRED) sums[s] += g;
    });
    return {mean, rstd, CENTRED ? sum(sums) / static_cast<float>(C) * rstd : 0.0f,
            sum(products) / static_cast<float>(C) * rstd * rstd * rstd};
  }

  // The vectors at i of d of COUNT rows, whose parts of dweight and dbias are added to the sums together.
  template <int COUNT, typename Part>
  TAPELM_INLINE void derive(int64_t row, const RowTerms* terms, int64_t i, Part n, int s, vf (&d)[COUNT]) const {
    vf sum_gh = get(dweight + i, n), sum_g = {};
    if constexpr (CENTRED) sum_g = get(dbias + i, n);
    for (int r = 0; r < COUNT; ++r) {
      const int64_t at = (row + r) * a.C + i, next = std::min(row + r + block, end - 1) * a.C + i;
      if constexpr (COLD) {
        ask_for(a.grad + next, s);
        ask_for(a.x + next, s);
      }
      const auto& [mean, rstd, of_g, of_gh] = terms[r];
      const vf g = get(a.grad + at, n), distance = get(a.x + at, n) - mean, scaled = g * rstd;
      sum_gh += scaled * distance;
      if constexpr (CENTRED) sum_g += g;
      d[r] = CENTRED ? scaled * get(a.weight + i, n) - of_g : scaled * get(a.weight + i, n);
      d[r] -= distance * of_gh;
      if constexpr (ADD)
        if (a.grad_r != nullptr) d[r] += get(a.grad_r + at, n);
    }
    put(dweight + i, sum_gh, n);
    if constexpr (CENTRED) put(dbias + i, sum_g, n);
  }

  template <int COUNT>
  TAPELM_INLINE void write(int64_t row, const RowTerms* of_rows) const {
    const int64_t C = a.C;
    RowTerms terms[COUNT];
    std::copy_n(of_rows, COUNT, terms);
    vf d[COUNT], next[COUNT];
    int64_t i = 0;
    for (; i + 2 * W <= C; i += 2 * W) {
      derive(row, terms, i, Whole{}, 0, d);
      derive(row, terms, i + W, Whole{}, 1, next);
      for (int r = 0; r < COUNT; ++r) put(a.dx + (row + r) * C + i, Two{d[r], next[r]}, Whole{}, a.far);
    }
    for_vectors<1>(C - i, [&](int64_t at, auto n, int) __attribute__((always_inline)) {
      derive(row, terms, i + at, n, 0, d);
      for (int r = 0; r < COUNT; ++r) put(a.dx + (row + r) * C + i + at, d[r], n, a.far);
    });
  }

  TAPELM_INLINE vf drop(vf d, const Kept* kept) const { return dropped(d, kept[0], a.dropout.scale); }
  TAPELM_INLINE Two drop(const Two& d, const Kept* kept) const {
    return {drop(d.first, kept), drop(d.second, kept + 1)};
  }

  TAPELM_INLINE void write_and_drop(int64_t row, const RowTerms* of_row) const {
    const RowTerms terms = *of_row;
    const auto value = [&](int64_t i, auto n, int s, Kept) __attribute__((always_inline)) {
      vf d[1];
      derive(row, &terms, i, n, s, d);
      return d[0];
    };
    const auto take = [&](int64_t i, auto n, const auto& d, int, const Kept* kept) __attribute__((always_inline)) {
      put(a.dx + row * a.C + i, d, n, a.far);
      put(a.dropped + row * a.C + i, drop(d, kept), n, a.far);
    };
    for_kept_twos(a.C, a.dropout.seed, a.dropout.threshold, row * a.C, value, take);
  }
};

template <bool CENTRED, bool ADD, bool COLD, typename T>
void norm_backward_rows(const NormBackward<T>& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
  const NormBackwardRows<CENTRED, ADD, COLD, T> rows{a, dweight, dbias, end, rows_of_block<T>(a.C)};
  for (int64_t first = begin; first < end; first += rows.block) {
    const int64_t last = std::min(first + rows.block, end);
    RowTerms terms[kBlockRows];
    for (int64_t row = first; row < last; ++row) terms[row - first] = rows.terms_of(row);
    int64_t row = first;
    if (ADD && a.dropout.active)
      for (; row < last; ++row) rows.write_and_drop(row, terms + (row - first));
    for (; row + 1 < last; row += 2) rows.template write<2>(row, terms + (row - first));
    if (row < last) rows.template write<1>(row, terms + (row - first));
  }
}

template <bool CENTRED, bool ADD, typename T>
void norm_backward_rows(const NormBackward<T>& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
  (a.cold ? norm_backward_rows<CENTRED, ADD, true, T>
          : norm_backward_rows<CENTRED, ADD, false, T>)(a, begin, end, dweight, dbias);
}
