// Matrix product for one instruction set: packed operands, and register tiles over them (Goto & van de Geijn, 2008).
// The depth is cut into blocks, of which a packed operand holds one after the other, the last one with the addend's
// units behind its own.
#include "matrix_pack.inl"
#include "nf4.inl"

constexpr int64_t KC = 512;   // depth in units: a right panel of KC x NR streams from L2
constexpr int64_t MC = 72;    // rows of a left block that a thread packs and that stays in L2; a multiple of every MR
constexpr int64_t NC = 1024;  // columns when the depth takes several blocks: so that the sums of MC x NC stay in L2
constexpr int64_t SUMS = NC + W;  // row stride of the sums: rows 4096 bytes apart would alias to the same L1 sets

// Elements of depth whose products are summed up one by one; where a unit is a float half as many, as the sums of
// float32 are the less exact the longer they are.
template <typename T>
constexpr int64_t kBlock = PAIR<T> == 1 ? KC / 2 : KC * PAIR<T>;

template <typename T>
ProductShape product_shape() {
  return {MR, MC, NR, NC, kBlock<T>, PAIR<T>, KC + kAddendDepth, W};
}

// c[r][..] = sum over u of a[u][r] * b[u][..]; the sums stay in registers until the end. The loop also prefetches, from
// `next` on, one line every kStride steps: as much of a panel as is a tile's share in a block of MC rows.
template <typename U>
TAPELM_INLINE void packed_tile(int64_t n, const U* a, const U* b, const U* next, vf c[MR][2]) {
  constexpr int64_t kLine = 16, kStride = MC / MR * kLine / NR;
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) c[r][0] = c[r][1] = vf{};
  for (int64_t u = 0; u < n; next += kLine) {
    __builtin_prefetch(next, 0, 2);
    for (const int64_t end = std::min(n, u + kStride); u < end; ++u, a += MR, b += NR) {
      const auto b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        c[r][0] = multiply_add(c[r][0], a[r], b0);
        c[r][1] = multiply_add(c[r][1], a[r], b1);
      }
    }
  }
}

// Adds the sums over the depth of a packed left block to sums[rows].
template <typename U>
TAPELM_INLINE void add_row_sums(const U* packed, int64_t rows, int64_t n, float* sums) {
  for (int64_t i = 0; i < rows; i += MR) {
    float total[MR] = {};
    for (int64_t u = 0; u < n; ++u)
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const U x = packed[i * n + u * MR + r];
        if constexpr (std::is_same_v<U, float>)
          total[r] += x;
        else
          total[r] += c10::detail::fp32_from_bits(x << 16) + c10::detail::fp32_from_bits(x & 0xffff0000u);
      }
    for (int64_t r = 0; r < std::min<int64_t>(MR, rows - i); ++r) sums[i + r] += total[r];
  }
}

// Depth from k0 to the end of its block.
template <typename T, typename Out>
int64_t depth_at(const Product<T, Out>& p, int64_t k0) { return std::min(kBlock<T>, p.K - k0); }

// Units of the block at k0, with the addend's if it is the last.
template <typename T, typename Out>
int64_t units_at(const Product<T, Out>& p, int64_t k0) {
  const int64_t depth = depth_at(p, k0);
  return units<T>(depth) + (p.addend && k0 + depth == p.K ? units<T>(p.addend->depth) : 0);
}

// A panel of NF4, of `depth` from k0 and of the columns from n0: unpacked along the weight's rows, then packed.
template <typename T, typename Out>
void pack_nf4(const Product<T, Out>& p, int64_t k0, int64_t depth, int64_t n0, float* packed) {
  alignas(64) T dense[NR * kBlock<T>];
  const int64_t columns = std::min<int64_t>(NR, p.N - n0), at = k0 * p.right.row + n0 * p.right.column;
  if (p.right.row == 1)
    for (int64_t j = 0; j < columns; ++j) dequantize_range(*p.nf4, at + j * p.right.column, depth, dense + j * depth);
  else
    for (int64_t k = 0; k < depth; ++k) dequantize_range(*p.nf4, at + k * p.right.row, columns, dense + k * NR);
  const Matrix<T> panel = p.right.row == 1 ? Matrix<T>{dense, 1, depth} : Matrix<T>{dense, NR, 1};
  pack_right(panel, 0, depth, 0, columns, packed);
}

// One block of depth of one panel of the right operand to its place: that of column j among `padded` from n0, where all
// blocks lie one after the other, or with 0 where there is one block at a time.
template <typename T, typename Out>
void pack_panel(const Product<T, Out>& p, int64_t k0, int64_t n0, int64_t j, int64_t padded, float* packed) {
  const int64_t depth = depth_at(p, k0), own = units<T>(depth), n = units_at(p, k0);
  packed += units<T>(k0) * padded + j * n;
  if (p.nf4)
    pack_nf4(p, k0, depth, n0 + j, packed);
  else
    pack_right(p.right, k0, depth, n0 + j, p.N, packed);
  if (n > own) pack_right(p.addend->right, 0, p.addend->depth, n0 + j, p.N, packed + own * NR);
}

// One block of depth of rows m0 .. m0 + rows of the left operand, with their sums for p.row_sums if they are wanted.
template <typename T, typename Out>
void pack_block(const Product<T, Out>& p, int64_t m0, int64_t rows, int64_t k0, bool row_sums, float* packed_) {
  Unit<T>* const packed = reinterpret_cast<Unit<T>*>(packed_);
  const int64_t depth = depth_at(p, k0), own = units<T>(depth), n = units_at(p, k0);
  pack_left(p.left, m0, rows, k0, depth, n, packed);
  if (n > own) pack_left(p.addend->left, m0, rows, 0, p.addend->depth, n, packed + own * MR);
  if (p.row_sums && row_sums) add_row_sums(packed, rows, n, p.row_sums + m0);
}

// Rows begin .. end, whole tiles, of the `rows` from m0 of the left operand, all of the depth, to their place.
template <typename T, typename Out>
void pack_rows(const Product<T, Out>& p, int64_t m0, int64_t rows, int64_t begin, int64_t end, float* packed) {
  const int64_t padded = (rows + MR - 1) / MR * MR;
  for (int64_t k0 = 0; k0 < p.K; k0 += kBlock<T>) {
    const int64_t n = units_at(p, k0);
    pack_block(p, m0 + begin, end - begin, k0, true, packed + begin * n);
    packed += padded * n;
  }
}

// What one block of depth brings to rows m0 .. m0 + rows and columns n0 .. n0 + columns, of packed operands. Sums over
// several blocks wait in `sums`, rows `apart`, so that the result is written once, in its own type. Of the operand that
// is shared, from the L3 cache, each tile prefetches some of what comes next, its share or, of rows, somewhat more.
template <typename T, typename Out>
TAPELM_INLINE void multiply_block(const Product<T, Out>& p, int64_t m0, int64_t rows, int64_t n0, int64_t columns,
                                  int64_t k0, const float* left_, const float* right_, bool left_is_shared, float* sums,
                                  int64_t apart) {
  const Unit<T>* const left = reinterpret_cast<const Unit<T>*>(left_);
  const Unit<T>* const right = reinterpret_cast<const Unit<T>*>(right_);
  const bool first = k0 == 0, last = k0 + kBlock<T> >= p.K;
  const int64_t n = units_at(p, k0);
  Out* const out = p.out + m0 * p.ld + n0;
  for (int64_t j = 0; j < columns; j += NR) {
    const int64_t width = std::min<int64_t>(NR, columns - j);
    const int w0 = static_cast<int>(std::min<int64_t>(W, width)), w1 = static_cast<int>(width - w0);
    const Unit<T>* const panel = right + j * n;
    for (int64_t i = 0; i < rows; i += MR) {
      const int64_t m = std::min<int64_t>(MR, rows - i);
      Out* const o = out + i * p.ld + j;
      float* const s = sums + i * apart + j;
      if (last)
        for (int64_t r = 0; r < m; ++r) __builtin_prefetch(o + r * p.ld, 1);
      vf c[MR][2];
      const Unit<T>* const tile = left + i * n;
      const Unit<T>* const next =
          left_is_shared ? tile + MR * n + j * n * MR / columns : panel + NR * n + i * n * NR / MC;
      packed_tile(n, tile, panel, next, c);
      if (!first) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
          c[r][0] += load(s + r * apart);
          c[r][1] += load(s + r * apart + W);
        }
      }
      if (!last) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
          store(s + r * apart, c[r][0]);
          store(s + r * apart + W, c[r][1]);
        }
        continue;
      }
      const auto bias_at = [&](int64_t k, int lanes) __attribute__((always_inline)) {
        return p.bias == nullptr || lanes == 0 ? vf{} : lanes == W ? load(p.bias + k) : load_part(p.bias + k, lanes);
      };
      const vf b0 = bias_at(n0 + j, w0), b1 = bias_at(n0 + j + W, w1);
      if (m == MR && width == NR) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
          Out* const to = o + r * p.ld;
          store(to, c[r][0] + b0 + (p.add ? load(to) : vf{}));
          store(to + W, c[r][1] + b1 + (p.add ? load(to + W) : vf{}));
        }
      } else {
        vf edge[MR][2];
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
          edge[r][0] = c[r][0] + b0;
          edge[r][1] = c[r][1] + b1;
        }
        for (int64_t r = 0; r < m; ++r) {
          Out* const to = o + r * p.ld;
          store_part(to, edge[r][0] + (p.add ? load_part(to, w0) : vf{}), w0);
          if (w1) store_part(to + W, edge[r][1] + (p.add ? load_part(to + W, w1) : vf{}), w1);
        }
      }
    }
  }
}

// Rows m0 .. m0 + rows, at most MC, and columns n0 .. n0 + columns of the product, of packed columns that all threads
// read.
template <typename T, typename Out>
void multiply_rows(const Product<T, Out>& p, int64_t m0, int64_t rows, int64_t n0, int64_t columns, const float* right,
                   float* space) {
  const int64_t padded = (columns + NR - 1) / NR * NR;
  float* const sums = space + (KC + kAddendDepth) * MC;
  for (int64_t k0 = 0; k0 < p.K; k0 += kBlock<T>) {
    pack_block(p, m0, rows, k0, n0 == 0, space);
    multiply_block(p, m0, rows, n0, columns, k0, space, right + units<T>(k0) * padded, false, sums, SUMS);
  }
}

// Rows begin .. end, whole tiles, of the `rows` from m0 that are packed and that all threads read, and columns n0 .. n0
// + columns of the product: a tile of rows at a time, as the packed columns stay in L2.
template <typename T, typename Out>
void multiply_columns(const Product<T, Out>& p, int64_t m0, int64_t rows, int64_t begin, int64_t end, int64_t n0,
                      int64_t columns, const float* left, float* space) {
  const int64_t wide = (columns + NR - 1) / NR * NR, padded = (rows + MR - 1) / MR * MR, apart = wide + W;
  float* const sums = space + (KC + kAddendDepth) * wide;
  for (int64_t k0 = 0; k0 < p.K; k0 += kBlock<T>) {
    const int64_t n = units_at(p, k0);
    for (int64_t j = 0; j < columns; j += NR) pack_panel(p, k0, n0, j, 0, space);
    for (int64_t i = begin; i < end; i += MR)
      multiply_block(p, m0 + i, std::min<int64_t>(MR, end - i), n0, columns, k0, left + i * n, space, true,
                     sums + (i - begin) * apart, apart);
    left += n * padded;
  }
}
