// Matrix product for one instruction set: the packed, blocked loops of Goto & van de Geijn (2008). The right operand is
// packed once, NC columns of it at a time, and shared by the threads; each thread packs MC x KC blocks of the left one
// and runs over both with register tiles. Packing turns bfloat16 into float32, so that both cost the same.

constexpr int64_t KC = 512;   // depth: a right panel of KC x NR streams from L2, each float of it used MC times
constexpr int64_t MC = 72;    // rows: a left block of MC x KC stays in L2; a multiple of every MR
constexpr int64_t NC = 1024;  // columns: so that the sums of MC x NC stay in L2 as well

int64_t linear_row_block() { return MC; }
int64_t linear_depth_block() { return KC; }
int64_t linear_column_block() { return NC; }
int64_t linear_panel() { return NR; }
int64_t linear_space_floats() { return KC * MC + MC * NC; }

typedef float v4 __attribute__((vector_size(16)));
typedef float v2 __attribute__((vector_size(8)));
typedef float v4_any __attribute__((vector_size(16), aligned(4), may_alias));
typedef float v2_any __attribute__((vector_size(8), aligned(4), may_alias));
typedef uint16_t h4 __attribute__((vector_size(8)));
typedef uint16_t h4_any __attribute__((vector_size(8), aligned(2), may_alias));
typedef uint32_t u4 __attribute__((vector_size(16)));

TAPELM_INLINE v4 load4(const float* p) { return *reinterpret_cast<const v4_any*>(p); }
TAPELM_INLINE v4 load4(const c10::BFloat16* p) {
  const h4 bits = *reinterpret_cast<const h4_any*>(p);
  return (v4)(__builtin_convertvector(bits, u4) << 16);
}
TAPELM_INLINE void store4(float* p, v4 x) { *reinterpret_cast<v4_any*>(p) = x; }
TAPELM_INLINE void store2(float* p, v2 x) { *reinterpret_cast<v2_any*>(p) = x; }

// Four (or with PAIR two) rows of `in`, four elements of each, as columns: out[k * ROWS + r].
template <int ROWS, bool PAIR, typename T>
TAPELM_INLINE void transpose(const T* in, int64_t stride, float* out) {
  const v4 a = load4(in), b = load4(in + stride);
  const v4 ab01 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab23 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  if constexpr (PAIR) {
    store2(out, __builtin_shufflevector(ab01, ab01, 0, 1));
    store2(out + ROWS, __builtin_shufflevector(ab01, ab01, 2, 3));
    store2(out + 2 * ROWS, __builtin_shufflevector(ab23, ab23, 0, 1));
    store2(out + 3 * ROWS, __builtin_shufflevector(ab23, ab23, 2, 3));
  } else {
    const v4 c = load4(in + 2 * stride), d = load4(in + 3 * stride);
    const v4 cd01 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd23 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store4(out, __builtin_shufflevector(ab01, cd01, 0, 1, 4, 5));
    store4(out + ROWS, __builtin_shufflevector(ab01, cd01, 2, 3, 6, 7));
    store4(out + 2 * ROWS, __builtin_shufflevector(ab23, cd23, 0, 1, 4, 5));
    store4(out + 3 * ROWS, __builtin_shufflevector(ab23, cd23, 2, 3, 6, 7));
  }
}

// ROWS rows of `in`, `depth` contiguous elements each, interleaved: out[k * ROWS + r]. Sixteen elements at a time, so
// that few lines are in use at once: rows a power of two apart fall into the same cache set.
template <int ROWS, typename T>
void interleave(const T* in, int64_t stride, int64_t depth, float* out) {
  static_assert(ROWS % 2 == 0);
  const int64_t whole = depth / 16 * 16;
  for (int64_t k = 0; k < whole; k += 16) {
    for (int64_t r = 0; r < ROWS / 4 * 4; r += 4)
      for (int64_t q = k; q < k + 16; q += 4) transpose<ROWS, false>(in + r * stride + q, stride, out + q * ROWS + r);
    if constexpr (ROWS % 4 != 0)
      for (int64_t q = k; q < k + 16; q += 4)
        transpose<ROWS, true>(in + (ROWS - 2) * stride + q, stride, out + q * ROWS + ROWS - 2);
  }
  for (int64_t k = whole; k < depth; ++k)
    for (int64_t r = 0; r < ROWS; ++r) out[k * ROWS + r] = static_cast<float>(in[r * stride + k]);
}

// right(k, n) for k in [k0, k0 + depth), one panel of NR columns from n0: out[k][NR], columns beyond `columns` zero.
template <typename T>
void pack_right(Matrix<T> right, int64_t k0, int64_t depth, int64_t n0, int64_t columns, float* out) {
  const int64_t n = std::min<int64_t>(NR, columns - n0);
  const T* in = right.data + k0 * right.row + n0 * right.column;
  if (right.column == 1 && n == NR) {
    for (int64_t k = 0; k < depth; ++k, in += right.row, out += NR) {
      store(out, load(in));
      store(out + W, load(in + W));
    }
  } else if (right.row == 1 && n == NR) {
    interleave<NR>(in, right.column, depth, out);
  } else {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < NR; ++j)
        out[k * NR + j] = j < n ? static_cast<float>(in[k * right.row + j * right.column]) : 0.0f;
  }
}

// left(m, k) for a block of rows: panels of MR rows, each out[k][MR], rows beyond `rows` zero. The loop order follows
// memory: along k for a row-major operand, along the rows for a transposed one, whose next lines are asked for early
// because a stride of whole pages is beyond the hardware's own prefetching.
template <typename T>
void pack_left(Matrix<T> left, int64_t m0, int64_t rows, int64_t k0, int64_t depth, float* out) {
  const T* in = left.data + m0 * left.row + k0 * left.column;
  const int64_t whole = rows / MR * MR;
  if (whole < rows) {
    float* to = out + whole * depth;
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t r = 0; r < MR; ++r)
        to[k * MR + r] = whole + r < rows ? static_cast<float>(in[(whole + r) * left.row + k * left.column]) : 0.0f;
  }
  if (left.row == 1) {
    constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T);
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = in + k * left.column;
      if (k + kAhead < depth)
        for (int64_t i = 0; i < whole; i += kLine) __builtin_prefetch(from + kAhead * left.column + i);
      for (int64_t i = 0; i < whole; i += MR) {
        float* to = out + i * depth + k * MR;
        for (int64_t r = 0; r < MR; ++r) to[r] = static_cast<float>(from[i + r]);
      }
    }
  } else if (left.column == 1) {
    for (int64_t i = 0; i < whole; i += MR) interleave<MR>(in + i * left.row, left.row, depth, out + i * depth);
  } else {
    for (int64_t i = 0; i < whole; ++i)
      for (int64_t k = 0; k < depth; ++k)
        out[i / MR * MR * depth + k * MR + i % MR] = static_cast<float>(in[i * left.row + k * left.column]);
  }
}

// Adds the sums over k of a packed left block to sums[rows].
TAPELM_INLINE void add_row_sums(const float* packed, int64_t rows, int64_t depth, float* sums) {
  for (int64_t i = 0; i < rows; i += MR) {
    float total[MR] = {};
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t r = 0; r < MR; ++r) total[r] += packed[i * depth + k * MR + r];
    for (int64_t r = 0; r < std::min<int64_t>(MR, rows - i); ++r) sums[i + r] += total[r];
  }
}

// One left block (rows m0 .. m0 + rows, all K) against the packed right columns: out[rows][columns] (+= with `add`).
// `right` holds the depth blocks one after another, each (depth, columns rounded up to NR). Sums over several depth
// blocks wait in `space`, so that `out` is written once, in its own type.
template <typename T, typename Out>
void multiply_rows(Matrix<T> left, int64_t m0, int64_t rows, int64_t K, const float* right, int64_t columns,
                   const T* bias, bool add, Out* out, int64_t ld, float* row_sums, float* space) {
  const int64_t padded = (columns + NR - 1) / NR * NR;
  float* const packed = space;
  float* const sums = space + KC * MC;
  if (row_sums) std::fill(row_sums, row_sums + rows, 0.0f);
  for (int64_t k0 = 0; k0 < K; k0 += KC) {
    const int64_t depth = std::min(KC, K - k0);
    const bool first = k0 == 0, last = k0 + depth == K;
    pack_left(left, m0, rows, k0, depth, packed);
    if (row_sums) add_row_sums(packed, rows, depth, row_sums);
    for (int64_t j = 0; j < columns; j += NR) {
      const int64_t n = std::min<int64_t>(NR, columns - j);
      const int n0 = static_cast<int>(std::min<int64_t>(W, n)), n1 = static_cast<int>(n - n0);
      const float* panel = right + k0 * padded + j * depth;
      const vf b0 = bias ? load_part(bias + j, n0) : vf{}, b1 = bias && n1 ? load_part(bias + j + W, n1) : vf{};
      for (int64_t i = 0; i < rows; i += MR) {
        const int64_t m = std::min<int64_t>(MR, rows - i);
        Out* const o = out + i * ld + j;
        float* const s = sums + i * NC + j;
        if (last)
          for (int64_t r = 0; r < m; ++r) __builtin_prefetch(o + r * ld, 1);
        vf c[MR][2];
        tile<MR>(depth, packed + i * depth, 1, MR, panel, c);
        if (!first) {
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) {
            c[r][0] += load(s + r * NC);
            c[r][1] += load(s + r * NC + W);
          }
        }
        if (!last) {
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) {
            store(s + r * NC, c[r][0]);
            store(s + r * NC + W, c[r][1]);
          }
        } else if (m == MR && n == NR) {
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) {
            Out* const to = o + r * ld;
            store(to, c[r][0] + b0 + (add ? load(to) : vf{}));
            store(to + W, c[r][1] + b1 + (add ? load(to + W) : vf{}));
          }
        } else {
          vf edge[MR][2];
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) {
            edge[r][0] = c[r][0] + b0;
            edge[r][1] = c[r][1] + b1;
          }
          for (int64_t r = 0; r < m; ++r) {
            Out* const to = o + r * ld;
            store_part(to, edge[r][0] + (add ? load_part(to, n0) : vf{}), n0);
            if (n1) store_part(to + W, edge[r][1] + (add ? load_part(to + W, n1) : vf{}), n1);
          }
        }
      }
    }
  }
}
