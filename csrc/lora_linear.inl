// A few rows against an NF4 weight for one instruction set: the weight is read once, in its four bits.
#include "nf4.inl"

constexpr int64_t kPiece = 1024;  // elements of a weight row at a time; with what they multiply they stay in L1
constexpr int kMostRows = 4;

// y[m][n] = x[m] . w[n] + scaling * u[m] . b[n] for n in [begin, end). x (M, K), u (M, R) and b (N, R) row-major.
template <typename T>
void few_rows(const Nf4& q, const float* x, int64_t M, int64_t K, const T* u, const T* b, int64_t R, float scaling,
              int64_t begin, int64_t end, T* y, int64_t N) {
  float w[kPiece];
  for (int64_t n = begin; n < end; ++n) {
    vf total[kMostRows][kSums] = {};
    for (int64_t k = 0; k < K; k += kPiece) {
      const int64_t count = std::min(kPiece, K - k);
      dequantize_range(q, n * K + k, count, w);
      for (int64_t m = 0; m < M; ++m)
        for_vectors(count, [&](int64_t i, auto lanes, int s) __attribute__((always_inline)) {
          total[m][s] += get(w + i, lanes) * get(x + m * K + k + i, lanes);
        });
    }
    for (int64_t m = 0; m < M; ++m) {
      vf low[kSums] = {};
      for_vectors(R, [&](int64_t i, auto lanes, int s) __attribute__((always_inline)) {
        low[s] += get(u + m * R + i, lanes) * get(b + n * R + i, lanes);
      });
      y[m * N + n] = static_cast<T>(sum(total[m]) + scaling * sum(low));
    }
  }
}
