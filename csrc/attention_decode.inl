// Attention of a few queries to many keys for one instruction set, as in decoding with a cache: keys and values are
// read as they are, once for all query heads of their group, and nothing is packed. A part of the keys is a task; what
// the parts find is put together by attention_merge_parts, so that results do not depend on the number of threads.
#include "simd_loop.inl"

// Lane i of the result is the sum of x[i]. N is a parameter for what other widths do not compile.
template <int N = W>
TAPELM_INLINE vf sums_of(vf x[N]) {
  if constexpr (kRegisters) {
    const auto halve = [&]<int S, int... I>(std::integral_constant<int, S>, std::integer_sequence<int, I...>)
                           __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int i = 0; i < W / 2 / S; ++i) {
        const vf a = x[2 * i], b = x[2 * i + 1];
        x[i] = __builtin_shufflevector(a, b, ((I & S) ? W + I : I)...) +
               __builtin_shufflevector(a, b, ((I & S) ? W + I - S : I + S)...);
      }
    };
    constexpr auto lanes = std::make_integer_sequence<int, W>{};
    halve(std::integral_constant<int, 1>{}, lanes);
    halve(std::integral_constant<int, 2>{}, lanes);
    if constexpr (N >= 8) halve(std::integral_constant<int, 4>{}, lanes);
    if constexpr (N == 16) halve(std::integral_constant<int, 8>{}, lanes);
    return x[0];
  } else {
    vf result = {};
    for (int i = 0; i < W; ++i) result[i] = sum(x[i]);
    return result;
  }
}

// scores[m][j] = queries[m] . key j for j < count, and anything up to the next multiple of W.
template <int M, typename T>
void few_scores(const float* queries, int64_t count, const T* k, int64_t k_row, int64_t D, float* scores) {
  for (int64_t j = 0; j < count; j += W) {
    vf products[M][W];
    for (int i = 0; i < W; ++i) {
      const T* const key = k + std::min(j + i, count - 1) * k_row;
      prefetch_row<0>(key + AHEAD * k_row, D);
      vf c[M] = {};
      for_vectors<1>(D, [&](int64_t d, auto lanes, int) __attribute__((always_inline)) {
        const vf x = get(key + d, lanes);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) c[m] += x * get(queries + m * D + d, lanes);
      });
      for (int m = 0; m < M; ++m) products[m][i] = c[m];
    }
    for (int m = 0; m < M; ++m) store(scores + m * DECODE_KEYS + j, sums_of(products[m]));
  }
}

// sums[m][d] = sum over j < count of weights[m][j] * v[j][d], for N vectors of d; only `lanes` of them if N is 1.
template <int M, int N, typename T, typename Lanes>
TAPELM_INLINE void weighted_vectors(const float* weights, int64_t count, const T* v, int64_t v_row, Lanes lanes,
                                    float* sums, int64_t ld) {
  vf c[M][N] = {};
  for (int64_t j = 0; j < count; ++j, v += v_row)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const vf x = get(v + n * W, lanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) c[m][n] += weights[m * DECODE_KEYS + j] * x;
    }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) put(sums + m * ld + n * W, c[m][n], lanes);
}

// The same for all D.
template <int M, typename T>
void weighted_sums(const float* weights, int64_t count, const T* v, int64_t v_row, int64_t D, float* sums, int64_t ld) {
  constexpr int N = MR == 12 ? 4 : 2;  // M x N sums fit the registers
  int64_t d = 0;
  for (; d + N * W <= D; d += N * W) weighted_vectors<M, N>(weights, count, v + d, v_row, Whole{}, sums + d, ld);
  for (; d + W <= D; d += W) weighted_vectors<M, 1>(weights, count, v + d, v_row, Whole{}, sums + d, ld);
  if (d < D) weighted_vectors<M, 1>(weights, count, v + d, v_row, static_cast<int>(D - d), sums + d, ld);
}

// body(r, M) for rows in blocks of M, which a product takes at a time.
template <typename Body>
TAPELM_INLINE void for_few_rows(int64_t rows, Body body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(r, std::integral_constant<int, 4>{});
  if (rows - r == 3) body(r, std::integral_constant<int, 3>{});
  if (rows - r == 2) body(r, std::integral_constant<int, 2>{});
  if (rows - r == 1) body(r, std::integral_constant<int, 1>{});
}

// Replaces `count` scores, of which only the first `seen` are seen, by weights exp2(score - top), the rest by 0.
TAPELM_INLINE void scores_to_weights(float* scores, int64_t count, int64_t seen, float* top, float* total) {
  std::fill(scores + seen, scores + round_up(count, W), -__builtin_inff());
  vf tops = broadcast(-__builtin_inff()), sums = {};
  for (int64_t j = 0; j < seen; j += W) tops = max(tops, load(scores + j));
  *top = max(tops);
  const vf shift = broadcast(*top == -__builtin_inff() ? 0.0f : *top);
  for (int64_t j = 0; j < count; j += W) {
    const vf weight = exp2(load(scores + j) - shift);
    sums += weight;
    store(scores + j, weight);
  }
  *total = sum(sums);
}

int64_t attention_decode_floats(const AttentionShape& s, int64_t rows) { return rows * (s.D + DECODE_KEYS); }

// Of `keys`, the range outside which no query has one of its document.
Range keys_of_documents(const AttentionShape& s, Range keys, const int32_t* documents) {
  const auto foreign = [&](int64_t key) {
    return std::find(documents + s.first, documents + s.first + s.T, documents[key]) == documents + s.first + s.T;
  };
  while (keys.begin < keys.end && foreign(keys.begin)) ++keys.begin;
  while (keys.begin < keys.end && foreign(keys.end - 1)) --keys.end;
  return keys;
}

// Of `rows` = group * T queries, head by head, against the keys in [keys.begin, keys.end), DECODE_KEYS at most: for
// each query its top score, the total of its weights and D sums of values go to result[rows][D + 2]. Keys at the ends
// that no query sees are not read.
template <typename T>
void attention_decode_part(const AttentionShape& s, int64_t rows, Range keys, const int32_t* documents, Strided<T> q,
                           Strided<T> k, Strided<T> v, float* result, float* space) {
  float* const queries = space;  // [rows][D], scaled for exp2
  float* const scores = space + rows * s.D;
  if (documents) keys = keys_of_documents(s, keys, documents);
  const int64_t count = keys.end - keys.begin, ld = s.D + 2;
  const auto seen = [&](int64_t r) {  // how many of these keys `causal` leaves for row r
    return s.causal ? std::clamp<int64_t>(s.first + r % s.T + 1 - keys.begin, 0, count) : count;
  };
  for (int64_t r = 0; r < rows; ++r) {
    const T* const from = q.head_offset(r / s.T).at(s.first + r % s.T);
    for_vectors<1>(s.D, [&](int64_t d, auto lanes, int) __attribute__((always_inline)) {
      put(queries + r * s.D + d, get(from + d, lanes) * (s.scale * LOG2E), lanes);
    });
  }
  for_few_rows(rows, [&](int64_t r, auto n) {
    few_scores<n>(queries + r * s.D, count, k.at(keys.begin), k.row, s.D, scores + r * DECODE_KEYS);
  });
  for (int64_t r = 0; r < rows; ++r) {
    float *const row = scores + r * DECODE_KEYS, *const found = result + r * ld;
    if (documents)
      for (int64_t j = 0; j < count; ++j)
        if (documents[keys.begin + j] != documents[s.first + r % s.T]) row[j] = -__builtin_inff();
    scores_to_weights(row, count, seen(r), found, found + 1);
  }
  for_few_rows(rows, [&](int64_t r, auto n) {
    int64_t most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, seen(r + i));
    weighted_sums<n>(scores + r * DECODE_KEYS, most, v.at(keys.begin), v.row, s.D, result + r * ld + 2, ld);
  });
}

// One query of what `parts` tasks have found, `stride` floats apart; the sums are added up in the first part's.
template <typename T>
void attention_merge_parts(const AttentionShape& s, float* found, int64_t parts, int64_t stride, T* out, float* lse) {
  float top = -__builtin_inff(), total = 0.0f;
  for (int64_t p = 0; p < parts; ++p) top = std::max(top, found[p * stride]);
  const float shift = top == -__builtin_inff() ? 0.0f : top;
  float* const sums = found + 2;
  for (int64_t p = 0; p < parts; ++p) {
    const float* const part = found + p * stride;
    const float factor = part[0] == shift ? 1.0f : std::exp2(part[0] - shift);
    total += factor * part[1];
    for (int64_t d = 0; d < s.D; ++d) sums[d] = factor * part[2 + d] + (p > 0 ? sums[d] : 0.0f);
  }
  write_row(sums, s.D, 1.0f / total, out);
  *lse = (top + std::log2(total)) / LOG2E;
}
