// A few rows against a frozen weight for one instruction set: the weight is read once, NF4 in its four bits.
#include "nf4.inl"
#include "simd_dots.inl"

constexpr int64_t kPiece = 1024;  // elements of a weight row at a time; with what they multiply they stay in L1

// The sums of a row of whole blocks, x[m] . w[n] in sums[m]: half[0] and half[1] (M, K / 2) are the elements of x that
// meet the high and the low nibbles. A block's indices choose among the plain codes; its scale multiplies their sum.
template <int M>
TAPELM_INLINE void dots_of_blocks(const Nf4& q, const float* const half[2], int64_t K, int64_t n, float* sums) {
  const vf low = load(kCodes), high = load(kCodes + 16 - W);
  const uint8_t* const bytes = q.packed + n * K / 2;
  vf total[M] = {};
  for (int64_t k = 0; k < K / 2; k += q.block / 2) {
    vf part[M][2] = {};
    for (int64_t i = k; i < k + q.block / 2; i += W) {
      const vi b = __builtin_convertvector(*reinterpret_cast<const bw_any*>(bytes + i), vi);
      const vf first = __builtin_shuffle(low, high, b >> 4), second = __builtin_shuffle(low, high, b & 15);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        part[m][0] += first * load(half[0] + m * K / 2 + i);
        part[m][1] += second * load(half[1] + m * K / 2 + i);
      }
    }
    const vf scale = broadcast(q.scale((n * K + 2 * k) / q.block));
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[m] += (part[m][0] + part[m][1]) * scale;
  }
  for (int m = 0; m < M; ++m) sums[m] = sum(total[m]);
}

// The same for blocks and rows of any size.
TAPELM_INLINE void dots_of_pieces(const Nf4& q, const float* x, int64_t M, int64_t K, int64_t n, float* sums) {
  float w[kPiece];
  vf total[kFewRows][kSums] = {};
  for (int64_t k = 0; k < K; k += kPiece) {
    const int64_t count = std::min(kPiece, K - k);
    dequantize_range(q, n * K + k, count, w);
    for (int64_t m = 0; m < M; ++m)
      for_vectors(count, [&](int64_t i, auto lanes, int s) __attribute__((always_inline)) {
        total[m][s] += get(w + i, lanes) * get(x + m * K + k + i, lanes);
      });
  }
  for (int64_t m = 0; m < M; ++m) sums[m] = sum(total[m]);
}

// y[m][n] = x[m] . w[n] + scaling * u[m] . b[n] for n in [begin, end). x (M, K) and, if K is whole blocks, its halves
// as above, else null; u (M, R) and b (N, R) row-major.
template <typename T>
void few_rows(const Nf4& q, const float* x, const float* const half[2], int64_t M, int64_t K, const T* u, const T* b,
              int64_t R, float scaling, int64_t begin, int64_t end, T* y, int64_t N) {
  for (int64_t n = begin; n < end; ++n) {
    float sums[kFewRows];
    if (half[0] == nullptr)
      dots_of_pieces(q, x, M, K, n, sums);
    else if (M == 1)
      dots_of_blocks<1>(q, half, K, n, sums);
    else if (M == 2)
      dots_of_blocks<2>(q, half, K, n, sums);
    else if (M == 3)
      dots_of_blocks<3>(q, half, K, n, sums);
    else
      dots_of_blocks<4>(q, half, K, n, sums);
    for (int64_t m = 0; m < M; ++m) {
      vf low[kSums] = {};
      for_vectors(R, [&](int64_t i, auto lanes, int s) __attribute__((always_inline)) {
        low[s] += get(u + m * R + i, lanes) * get(b + n * R + i, lanes);
      });
      y[m * N + n] = static_cast<T>(sums[m] + scaling * sum(low));
    }
  }
}

// The same over a dense weight w (N, K).
template <typename T>
void few_rows(const T* w, const float* x, int64_t M, int64_t K, const T* u, const T* b, int64_t R, float scaling,
              int64_t begin, int64_t end, T* y, int64_t N) {
  float sums[kFewRows], low[kFewRows];
  for (int64_t n = begin; n < end; ++n) {
    few_dots(x, M, K, w + n * K, sums);
    few_dots(u, M, R, b + n * R, low);
    for (int64_t m = 0; m < M; ++m) y[m * N + n] = static_cast<T>(sums[m] + scaling * low[m]);
  }
}

// u = x a^T for x (M, K), a (R, K) and u (M, R).
template <typename T>
void few_low_rows(const float* x, int64_t M, int64_t K, const T* a, int64_t R, T* u) {
  float sums[kFewRows];
  for (int64_t r = 0; r < R; ++r) {
    few_dots(x, M, K, a + r * K, sums);
    for (int64_t m = 0; m < M; ++m) u[m * R + r] = static_cast<T>(sums[m]);
  }
}
