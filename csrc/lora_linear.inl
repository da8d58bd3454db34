// A few rows against a frozen weight for one instruction set: the weight is read once, NF4 in its four bits.
#include "nf4.inl"
#include "simd_dots.inl"

constexpr int64_t kGroup = 64;  // elements whose indices are in eight words, within one block if those are so large

// Whether rows of K elements can be read as words: groups in them have one scale, and a vector holds one group or two.
inline bool are_words(const Nf4& q, int64_t K) { return W >= 8 && q.block % kGroup == 0 && K % kGroup == 0; }

// Elements that W words of 32 bits hold the indices of, and the room for a row's.
constexpr int64_t kWords = 8 * W;
inline int64_t words_room(int64_t K) { return (K + kWords - 1) / kWords * kWords; }

// Rows x (M, K) in the order in which the nibbles of words meet them, those of the lowest in all words first: (M,
// words_room(K)), zeros behind K.
inline void order_for_words(const float* x, int64_t M, int64_t K, float* ordered) {
  const int64_t room = words_room(K);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < room; k += kWords)
      for (int64_t nibble = 0; nibble < 8; ++nibble)
        for (int64_t word = 0; word < W; ++word) {
          const int64_t from = k + 8 * word + (nibble ^ 1);  // the high nibble of a byte comes first
          ordered[m * room + k + nibble * W + word] = from < K ? x[m * K + from] : 0.0f;
        }
}

// The scales of the groups of a row, one after the other.
struct Scales {
  const Nf4& q;
  int64_t block, left;  // left: elements of the block that are still to come

  Scales(const Nf4& nf4, int64_t first)
      : q(nf4), block(first / nf4.block), left((block + 1) * nf4.block - first) {}

  TAPELM_INLINE float next() {
    const float scale = q.scale(block);
    left -= kGroup;
    if (left == 0) {
      left = q.block;
      ++block;
    }
    return scale;
  }
  // Of as many groups of words as a vector has, or of one.
  TAPELM_INLINE vf of_words(int64_t groups) {
    const vf first = broadcast(next());
    if (W <= 8 || groups == 1) return first;
    const vf second = broadcast(next());
    vi upper = {};
    for (int i = 8; i < W; ++i) upper[i] = -1;
    return upper ? second : first;
  }
};

// Eight words for each of `groups`, and zeros.
TAPELM_INLINE vi load_words(const uint8_t* p, int64_t groups) {
#if defined(TAPELM_AVX512)  // a branch that is foreseen costs less than a mask
  if (groups == 1) return (vi)_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p)));
  return (vi)_mm512_loadu_si512(p);
#else
  vi words = {};
  std::memcpy(&words, p, groups * (kGroup / 2));
  return words;
#endif
}

// The plain codes of indices in the lowest four bits.
TAPELM_INLINE vf codes(vi index) {
#if defined(TAPELM_AVX512)
  return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)load(kCodes));
#else
  return of_sixteen(kCodes, index & 15);
#endif
}

// sums[m] = x[m] . w[n] for `ordered` rows x. A word's scale multiplies the sum of its codes times their elements.
template <int M>
TAPELM_INLINE void dots_of_words(const Nf4& q, const float* ordered, int64_t K, int64_t n, float* sums) {
  const int64_t room = words_room(K);
  const uint8_t* const row = q.packed + n * K / 2;
  Scales scales(q, n * K);
  vf total[M] = {};
  for (int64_t k = 0; k < K; k += kWords) {
    const int64_t groups = std::min<int64_t>(W / 8, (K - k) / kGroup);
    const vi words = load_words(row + k / 2, groups);
    vf part[M][2] = {};
#pragma GCC unroll 8
    for (int nibble = 0; nibble < 8; ++nibble) {
      const vf w = codes(words >> 4 * nibble);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) part[m][nibble % 2] += w * load(ordered + m * room + k + nibble * W);
    }
    const vf scale = scales.of_words(groups);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[m] += (part[m][0] + part[m][1]) * scale;
  }
  for (int m = 0; m < M; ++m) sums[m] = sum(total[m]);
}

constexpr int64_t kPiece = 1024;  // elements of a weight row at a time; with what they multiply they stay in L1

// sums[m] = x[m] . w[n] for blocks and rows of any size.
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

// y[m][n] = x[m] . w[n] + scaling * u[m] . b[n] for n in [begin, end). x (M, K), and `ordered` as above if are_words;
// u (M, R) and b (N, R) row-major.
template <typename T>
void few_rows(const Nf4& q, const float* x, const float* ordered, int64_t M, int64_t K, const T* u, const T* b,
              int64_t R, float scaling, int64_t begin, int64_t end, T* y, int64_t N) {
  for (int64_t n = begin; n < end; ++n) {
    float sums[kFewRows];
    if (!are_words(q, K))
      dots_of_pieces(q, x, M, K, n, sums);
    else if (M == 1)
      dots_of_words<1>(q, ordered, K, n, sums);
    else if (M == 2)
      dots_of_words<2>(q, ordered, K, n, sums);
    else if (M == 3)
      dots_of_words<3>(q, ordered, K, n, sums);
    else
      dots_of_words<4>(q, ordered, K, n, sums);
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
