// Matrix product for one instruction set: the packed, blocked loops of Goto & van de Geijn (2008). The right operand is
// packed once, a range of columns at a time, and shared by the threads; each thread packs blocks of the left one and
// runs over both with register tiles.
#include "matrix_pack.inl"
#include "simd_loop.inl"
#include "simd_dots.inl"

constexpr int64_t KC = 512;   // depth in units: a right panel of KC x NR streams from L2, each unit of it used MC times
constexpr int64_t MC = 72;    // rows: a left block of MC x KC stays in L2; a multiple of every MR
constexpr int64_t NC = 1024;  // columns when the depth takes several blocks: so that the sums of MC x NC stay in L2
constexpr int64_t SUMS = NC + W;  // row stride of the sums: rows 4096 bytes apart would alias to the same L1 sets

// Elements of depth whose products are summed up one by one; where a unit is a float half as many, as the sums of
// float32 are the less exact the longer they are.
template <typename T>
constexpr int64_t kBlock = PAIR<T> == 1 ? KC / 2 : KC * PAIR<T>;

template <typename T>
ProductShape product_shape() {
  return {MR, MC, NR, NC, kBlock<T>, PAIR<T>, (KC + kAddendDepth) * MC + MC * SUMS};
}

// c[r][..] = sum over u of a[u][r] * b[u][..]; the sums stay in registers until the end. The loop also prefetches this
// tile's share of the next panel, which lies in L3 when the right operand exceeds L2: one line every kStride steps. The
// share is for a block of MC rows; most blocks have one tile fewer and leave the rest to the hardware prefetcher.
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

// One left block (rows m0 .. m0 + rows, all K) against the packed right columns: out[rows][columns] (+= with `add`).
// `right` holds the depth blocks one after another, each (units, columns rounded up to NR), the last one with the
// addend's units behind its own. Sums over several depth blocks wait in `space`, so that `out` is written once, in its
// own type.
template <typename T, typename Out>
void multiply_rows(Matrix<T> left, int64_t m0, int64_t rows, int64_t K, const float* right_, int64_t columns,
                   const T* bias, bool add, Out* out, int64_t ld, float* row_sums, const Addend<T>* addend,
                   float* space) {
  const Unit<T>* const right = reinterpret_cast<const Unit<T>*>(right_);
  const int64_t padded = (columns + NR - 1) / NR * NR;
  Unit<T>* const packed = reinterpret_cast<Unit<T>*>(space);
  float* const sums = space + (KC + kAddendDepth) * MC;
  if (row_sums) std::fill(row_sums, row_sums + rows, 0.0f);
  for (int64_t k0 = 0; k0 < K; k0 += kBlock<T>) {
    const int64_t depth = std::min(kBlock<T>, K - k0), own = units<T>(depth);
    const bool first = k0 == 0, last = k0 + depth == K;
    const int64_t n = own + (last && addend ? units<T>(addend->depth) : 0);
    pack_left(left, m0, rows, k0, depth, n, packed);
    if (n > own) pack_left(addend->left, m0, rows, 0, addend->depth, n, packed + own * MR);
    if (row_sums) add_row_sums(packed, rows, n, row_sums);
    for (int64_t j = 0; j < columns; j += NR) {
      const int64_t width = std::min<int64_t>(NR, columns - j);
      const int n0 = static_cast<int>(std::min<int64_t>(W, width)), n1 = static_cast<int>(width - n0);
      const Unit<T>* panel = right + units<T>(k0) * padded + j * n;
      for (int64_t i = 0; i < rows; i += MR) {
        const int64_t m = std::min<int64_t>(MR, rows - i);
        Out* const o = out + i * ld + j;
        float* const s = sums + i * SUMS + j;
        if (last)
          for (int64_t r = 0; r < m; ++r) __builtin_prefetch(o + r * ld, 1);
        vf c[MR][2];
        packed_tile(n, packed + i * n, panel, panel + n * NR + i / MR * n * NR / (MC / MR), c);
        if (!first) {
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) {
            c[r][0] += load(s + r * SUMS);
            c[r][1] += load(s + r * SUMS + W);
          }
        }
        if (!last) {
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) {
            store(s + r * SUMS, c[r][0]);
            store(s + r * SUMS + W, c[r][1]);
          }
          continue;
        }
        const auto bias_at = [&](int64_t k, int n) __attribute__((always_inline)) {
          return bias == nullptr || n == 0 ? vf{} : n == W ? load(bias + k) : load_part(bias + k, n);
        };
        const vf b0 = bias_at(j, n0), b1 = bias_at(j + W, n1);
        if (m == MR && width == NR) {
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

// y[m][n] = x[m] . w[n] + bias[n] for n in [begin, end), for a few rows x (M, K): w (N, K) is read once and not packed.
// y (M, N) row-major; the bias may be null.
template <typename T>
void few_rows(const float* x, int64_t M, int64_t K, const T* w, const T* bias, int64_t begin, int64_t end, T* y,
              int64_t N) {
  float sums[kFewRows];
  for (int64_t n = begin; n < end; ++n) {
    few_dots(x, M, K, w + n * K, sums);
    for (int64_t m = 0; m < M; ++m)
      y[m * N + n] = static_cast<T>(sums[m] + (bias ? static_cast<float>(bias[n]) : 0.0f));
  }
}
