// Operands and products of attention for one instruction set. A product sums over units (see simd_units.inl); sums are
// float32. Layouts of a head in units, where `width`, the rounded D, is a multiple of NR, tokens are whole chunks of NR
// positions, those that the head's rows stand at among them, and the rest is zero:
//   rows     [tokens][width / PAIR]             left operand when the sum runs over d
//   columns  [tokens / NR][width / PAIR][NR]    right operand when the sum runs over d (a transpose)
//   steps    [tokens / PAIR][width]             either operand when the sum runs over t
// Where a unit is a float, steps are rows.
#include "simd_units.inl"

constexpr int R = W == 16 ? 8 : 4;  // rows of a product tile: R x 2 sums hide the latency of the products

TAPELM_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The elements of a row of a packed head.
TAPELM_INLINE int64_t width_of(const AttentionShape& s) { return round_up(s.D, NR); }

// Memory of a task, handed out in parts that begin at cache lines; where there is none (null) they are only counted, so
// that the type that takes them is also what says how much it needs.
class Space {
 public:
  explicit Space(float* start) : start_(start) {}

  template <typename U>
  U* take(int64_t units) {
    static_assert(sizeof(U) == sizeof(float));
    const int64_t offset = floats_;
    floats_ += round_up(units, 16);
    return start_ ? reinterpret_cast<U*>(start_ + offset) : nullptr;
  }
  int64_t floats() const { return floats_; }

 private:
  float* const start_;
  int64_t floats_ = 0;
};

// c[R][V] = sum over k < depth of a[r * row_stride + k * step] times b[k * ld + v * W ...].
template <int V, typename U>
TAPELM_INLINE void product_tile(int64_t depth, const U* a, int64_t row_stride, int64_t step, const U* b, int64_t ld,
                                vf c[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) c[r][v] = vf{};
  for (int64_t k = 0; k < depth; ++k, a += step, b += ld) {
    const auto b0 = load(b), b1 = load(b + (V - 1) * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const U x = a[r * row_stride];
      c[r][0] = multiply_add(c[r][0], x, b0);
      if constexpr (V == 2) c[r][1] = multiply_add(c[r][1], x, b1);
    }
  }
}

// out[rows][columns] += left * right. depth(i) is the range of units that the tile of rows i ... i + R - 1 sums over.
template <typename U, typename Depth>
TAPELM_INLINE void add_product(int64_t rows, int64_t columns, Depth depth, const U* left, int64_t row_stride,
                               int64_t step, const U* right, int64_t ld, float* out) {
  for (int64_t j = 0; j < columns; j += NR)
    for (int64_t i = 0; i < rows; i += R) {
      const Range k = depth(i);
      if (k.begin >= k.end) continue;
      vf c[R][2];
      product_tile<2>(k.end - k.begin, left + i * row_stride + k.begin * step, row_stride, step,
                      right + k.begin * ld + j, ld, c);
      float* o = out + i * columns + j;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r, o += columns) {
        store(o, load(o) + c[r][0]);
        store(o + W, load(o + W) + c[r][1]);
      }
    }
}

// Rows of one head lie farther apart than the hardware prefetcher follows: software prefetches this many rows ahead.
constexpr int64_t AHEAD = 16;

template <int WRITE, typename T>
TAPELM_INLINE void prefetch_row(const T* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d, WRITE);
}

// Prefetches the rows at `count` positions from t of the next head, which follows this one, into the L2 cache.
template <typename T>
TAPELM_INLINE void prefetch_next_head(Strided<T> x, const AttentionShape& s, int64_t t, int64_t count) {
  const int64_t end = std::min(x.end, t + count);
  t = std::max(t, x.begin);
  for (const T* row = x.head_offset(1).at(t); t < end; ++t, row += x.row)
    for (int64_t d = 0; d < s.D; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

// The first `count` elements of p as W units; the rest is zero.
template <typename T>
TAPELM_INLINE vu load_units(const T* p, int64_t count) {
  if constexpr (PAIR<T> == 1) {
    if (count >= W) return (vu)load(p);
    return count > 0 ? (vu)load_part(p, static_cast<int>(count)) : vu{};
  } else {
    vu x = {};
    if (count >= W * PAIR<T>)
      x = load(reinterpret_cast<const uint32_t*>(p));
    else if (count > 0)
      std::memcpy(&x, p, count * sizeof(T));
    return x;
  }
}

template <typename T>
void pack_rows(Strided<T> x, const AttentionShape& s, Unit<T>* out) {
  const int64_t row = width_of(s) / PAIR<T>, before = x.begin % NR * row;
  std::memset(out, 0, before * sizeof(float));
  out += before;
  for (int64_t t = x.begin; t < x.end; ++t) {
    const T* from = x.at(t);
    prefetch_row<0>(from + AHEAD * x.row, s.D);
    for (int64_t u = 0; u < row; u += W, out += W)
      store(reinterpret_cast<uint32_t*>(out), load_units(from + u * PAIR<T>, s.D - u * PAIR<T>));
  }
  std::memset(out, 0, (round_up(x.end, NR) - x.end) * row * sizeof(float));
}

template <typename T>
void pack_steps(Strided<T> x, const AttentionShape& s, Unit<T>* out) {
  if constexpr (PAIR<T> == 1) {
    pack_rows(x, s, out);
  } else {
    const int64_t width = width_of(s), whole = s.D / W * W, end = round_up(x.end, NR);
    for (int64_t t = x.begin / NR * NR; t < end; t += 2, out += width) {
      const T* low = x.at(t);
      const T* high = low + x.row;
      prefetch_row<0>(low + AHEAD * x.row, s.D);
      prefetch_row<0>(high + AHEAD * x.row, s.D);
      int64_t d = 0;
      if (x.has(t) && x.has(t + 1))
        for (; d < whole; d += W) store(out + d, ((vu)load(low + d) >> 16) | (vu)load(high + d));
      for (; d < width; ++d) {
        const uint32_t a = x.has(t) && d < s.D ? low[d].x : 0, b = x.has(t + 1) && d < s.D ? high[d].x : 0;
        out[d] = a | b << 16;
      }
    }
  }
}

// One stage of the transpose: swaps the off-diagonal S x S blocks of each 2S x 2S block.
template <int S, int... I>
TAPELM_INLINE void exchange(vu x[W], std::integer_sequence<int, I...>) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if ((i & S) == 0) {
      const vu a = x[i], b = x[i + S];
      x[i] = __builtin_shufflevector(a, b, ((I & S) ? W + I - S : I)...);
      x[i + S] = __builtin_shufflevector(a, b, ((I & S) ? W + I : I + S)...);
    }
}

// NR positions from t0: out[unit][NR], the transpose of W x W units at a time.
template <typename T>
void pack_columns(Strided<T> x, const AttentionShape& s, int64_t t0, Unit<T>* out) {
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  const int64_t units = width_of(s) / PAIR<T>;
  for (int64_t half = 0; half < 2; ++half, t0 += W, out += W)
    for (int64_t u = 0; u < units; u += W) {
      vu block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const T* from = x.at(t0 + i) + u * PAIR<T>;
        __builtin_prefetch(from + AHEAD * x.row);
        block[i] = load_units(from, x.has(t0 + i) ? s.D - u * PAIR<T> : 0);
      }
      uint32_t* const to = reinterpret_cast<uint32_t*>(out) + u * NR;
      if constexpr (kRegisters) {
        exchange<1>(block, lanes);
        exchange<2>(block, lanes);
        if constexpr (W >= 8) exchange<4>(block, lanes);
        if constexpr (W == 16) exchange<8>(block, lanes);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(to + i * NR, block[i]);
      } else {
        for (int i = 0; i < W; ++i)
          for (int j = 0; j < W; ++j) to[j * NR + i] = block[i][j];
      }
    }
}

// out[d] = sums[d] * scale, in the type of the result.
template <typename T>
TAPELM_INLINE void write_row(const float* sums, int64_t D, float scale, T* out) {
  int64_t d = 0;
  for (; d + W <= D; d += W) store(out + d, load(sums + d) * scale);
  for (; d < D; ++d) out[d] = static_cast<T>(sums[d] * scale);
}

template <typename T>
void write_rows(const float* sums, int64_t count, const AttentionShape& s, float scale, T* out, int64_t row) {
  for (int64_t t = 0; t < count; ++t, sums += width_of(s), out += row) {
    prefetch_row<1>(out + AHEAD * row, s.D);
    write_row(sums, s.D, scale, out);
  }
}
