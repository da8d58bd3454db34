// Flash attention (Dao et al. 2022) for one instruction set: queries against keys in squares of NR x NR, scores never
// stored beyond a block. Scores are computed transposed, [key][query]: the softmax of a query then runs down a lane, and
// a weight is written once in each order that a product over keys or over queries reads (see attention_pack.inl).
#include "attention_pack.inl"

constexpr int64_t FORWARD_KEYS = 256;  // keys per block of the forward pass
constexpr int64_t BACKWARD = 64;       // queries and keys per block of the backward pass; both multiples of NR
constexpr float LOG2E = 1.44269504088896341f;

// Which squares (query chunk, key chunk) of NR x NR are seen; documents are those of one batch row.
struct Mask {
  const AttentionShape& s;
  const int32_t* documents = nullptr;  // [tokens], beyond S the last one
  const int32_t *lowest = nullptr, *highest = nullptr;  // [tokens / NR]

  Mask(const AttentionShape& shape, const int32_t* ids, float* space) : s(shape) {
    if (ids == nullptr) return;
    int32_t* copy = reinterpret_cast<int32_t*>(space);
    const int64_t tokens = round_up(s.S, NR), chunks = tokens / NR;
    std::memcpy(copy, ids, s.S * sizeof(int32_t));
    std::fill(copy + s.S, copy + tokens, ids[s.S - 1]);
    for (int64_t c = 0; c < chunks; ++c) {
      const auto [low, high] = std::minmax_element(copy + c * NR, copy + (c + 1) * NR);
      copy[tokens + c] = *low;
      copy[tokens + chunks + c] = *high;
    }
    documents = copy;
    lowest = copy + tokens;
    highest = lowest + chunks;
  }
  static int64_t floats(const AttentionShape& s) { return 3 * round_up(s.S, NR); }

  bool hidden(int64_t q, int64_t k) const {
    return (s.causal && k > q) || (documents && (highest[q] < lowest[k] || highest[k] < lowest[q]));
  }
  bool whole(int64_t q, int64_t k) const {
    return !(s.causal && k == q) && (k + 1) * NR <= s.S &&
           (!documents || (lowest[q] == highest[k] && highest[q] == lowest[k]));
  }
  Range keys(int64_t q, Range k) const {
    while (k.begin < k.end && hidden(q, k.begin)) ++k.begin;
    while (k.begin < k.end && hidden(q, k.end - 1)) --k.end;
    return k;
  }
  Range queries(Range q, int64_t k) const {
    while (q.begin < q.end && hidden(q.begin, k)) ++q.begin;
    while (q.begin < q.end && hidden(q.end - 1, k)) --q.end;
    return q;
  }
};

// The queries at NR positions of one head as the lanes of two vectors.
struct Panel {
  vi last[2], document[2];  // the last key that a query sees; its document
  vl counter[2][2];         // Philox counters of key 0 of the even and of the odd lanes

  Panel(const Mask& m, int64_t head, int64_t q0) {
    const int64_t row = round_up(m.s.S, 8) / 8, query = head * m.s.T - m.s.first;
    for (int v = 0; v < 2; ++v)
      for (int i = 0; i < W; ++i) {
        const int64_t t = q0 + v * W + i;
        last[v][i] = static_cast<int32_t>(m.s.causal ? std::min(t, m.s.S - 1) : m.s.S - 1);
        document[v][i] = m.documents ? m.documents[t] : 0;
        counter[v][i % 2][i / 2] = static_cast<uint64_t>((query + t) * row);
      }
  }

  TAPELM_INLINE vf seen(vf x, const Mask& m, int v, int64_t key) const {
    vi hidden = vi{} + static_cast<int32_t>(key) > last[v];
    if (m.documents) hidden |= document[v] != m.documents[key];
    return hidden ? broadcast(-__builtin_inff()) : x;
  }

  // Random words of R keys, two in each: element index ((b Hq + h) T + t) S8 + key, S8 = S rounded up to 8.
  TAPELM_INLINE void random(uint64_t seed, int v, int64_t key, vu out[R / 2]) const {
    vl even[4], odd[4];
    philox(seed, counter[v][0] + static_cast<uint64_t>(key / 8), even);
    philox(seed, counter[v][1] + static_cast<uint64_t>(key / 8), odd);
    const int64_t first = R == 8 ? 0 : key % 8 / 2;
#pragma GCC unroll 4
    for (int w = 0; w < R / 2; ++w) out[w] = interleave_words(even[first + w], odd[first + w]);
  }
};

// Rows `even` and `odd` of weights [key][query] as an operand that is summed over keys; `ld` units between its rows.
TAPELM_INLINE void store_steps(float* to, int64_t ld, vf even, vf odd) {
  store(to, even);
  store(to + ld, odd);
}
#if defined(TAPELM_PAIRS)
TAPELM_INLINE void store_steps(uint32_t* to, int64_t, vf even, vf odd) { store(to, round_pairs(even, odd)); }
#endif

template <typename T>
struct ForwardSpace {
  Unit<T>*k_rows, *v_steps, *q_columns, *weights;
  float *scores, *sums;
};

// Scores of R keys from `key`, scaled for exp2, masked where the square is mixed; V = 1 leaves out the first vector,
// all of it hidden. Returns by `top` the largest of each query.
template <int V, typename U>
TAPELM_INLINE void score_tile(const Mask& m, const Panel& p, int64_t key, bool mixed, const U* k, int64_t k_row,
                              int64_t depth, const U* q_columns, float* scores, vf top[2]) {
  constexpr int first = 2 - V;
  vf c[R][V];
  product_tile<V>(depth, k, k_row, 1, q_columns + first * W, NR, c);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if constexpr (V == 1) store(scores + r * NR, broadcast(-__builtin_inff()));
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      vf x = c[r][v] * (m.s.scale * LOG2E);
      if (mixed) x = p.seen(x, m, first + v, key + r);
      top[first + v] = max(top[first + v], x);
      store(scores + r * NR + (first + v) * W, x);
    }
  }
}

// Chunks of NR positions that hold queries.
Range query_chunks(const AttentionShape& s) { return {s.first / NR, (s.first + s.T + NR - 1) / NR}; }

// One panel of queries against all its keys. A NaN score may be lost by the maximum but not by the total.
template <typename T, bool DROPOUT>
void forward_panel(const Mask& m, int64_t head, int64_t q, const ForwardSpace<T>& w, T* out, int64_t out_row, float* lse) {
  const AttentionShape& s = m.s;
  const int64_t q0 = q * NR, width = round_up(s.D, NR), row = width / PAIR<T>, depth = round_up(s.D, PAIR<T>) / PAIR<T>;
  const int64_t chunks = s.causal ? q + 1 : round_up(s.S, NR) / NR;
  const Range rows = {std::max(q0, s.first), std::min(q0 + NR, s.first + s.T)};  // positions of queries
  const Panel p(m, head, q0);
  for (int64_t t = rows.begin; t < rows.end; ++t) prefetch_row<1>(out + (t - s.first) * out_row, s.D);
  const vf none = broadcast(-__builtin_inff());
  vf top[2] = {none, none}, total[2] = {};
  std::memset(w.sums, 0, NR * width * sizeof(float));
  for (int64_t block = 0; block < chunks; block += FORWARD_KEYS / NR) {
    const Range k = m.keys(q, {block, std::min(chunks, block + FORWARD_KEYS / NR)});
    if (k.begin == k.end) continue;
    vf new_top[2] = {top[0], top[1]};
    for (int64_t c = k.begin; c < k.end; ++c) {
      float* scores = w.scores + (c - block) * NR * NR;
      if (m.hidden(q, c)) {
        std::fill(scores, scores + NR * NR, -__builtin_inff());
        continue;
      }
      const bool mixed = !m.whole(q, c);
      for (int64_t i = 0; i < NR; i += R) {
        const int64_t key = c * NR + i;
        if (s.causal && key >= q0 + W)
          score_tile<1>(m, p, key, mixed, w.k_rows + key * row, row, depth, w.q_columns, scores + i * NR, new_top);
        else
          score_tile<2>(m, p, key, mixed, w.k_rows + key * row, row, depth, w.q_columns, scores + i * NR, new_top);
      }
    }
    const float* scores = w.scores + (k.begin - block) * NR * NR;
    Unit<T>* weights = w.weights + (k.begin - block) * NR / PAIR<T> * NR;
    float rescale[NR];
    for (int v = 0; v < 2; ++v) {
      const vf shift = new_top[v] == none ? vf{} : new_top[v];  // a query that has seen nothing has weights of 0
      const vf decay = exp2(top[v] - shift);
      vf sums = {};
      for (int64_t i = 0; i < (k.end - k.begin) * NR; i += R) {
        vu random[R / 2];
        if constexpr (DROPOUT) p.random(s.seed, v, k.begin * NR + i, random);
#pragma GCC unroll 4
        for (int r = 0; r < R; r += 2) {
          vf even = exp2(load(scores + (i + r) * NR + v * W) - shift);
          vf odd = exp2(load(scores + (i + r + 1) * NR + v * W) - shift);
          sums += even;
          sums += odd;
          if constexpr (DROPOUT) {
            even = dropped(even, kept_of_halves<false>(random[r / 2], s.threshold));
            odd = dropped(odd, kept_of_halves<true>(random[r / 2], s.threshold));
          }
          store_steps(weights + (i + r) / PAIR<T> * NR + v * W, NR, even, odd);
        }
      }
      store(rescale + v * W, decay);
      total[v] = total[v] * decay + sums;
      top[v] = new_top[v];
    }
    if (block > 0)
      for (int64_t i = 0; i < NR; ++i)
        if (rescale[i] != 1.0f)
          for (int64_t d = 0; d < width; d += W) store(w.sums + i * width + d, load(w.sums + i * width + d) * rescale[i]);
    const auto visible = [&](int64_t i) -> Range {
      const int64_t end = s.causal ? std::min(k.end * NR, q0 + i + R) : k.end * NR;
      return {k.begin * NR / PAIR<T>, end / PAIR<T>};
    };
    const int64_t start = block * NR / PAIR<T>;
    add_product(NR, width, visible, w.weights - start * NR, 1, NR, w.v_steps, width, w.sums);
  }
  float totals[NR], tops[NR];
  for (int v = 0; v < 2; ++v) {
    store(totals + v * W, total[v]);
    store(tops + v * W, top[v]);
  }
  for (int64_t t = rows.begin; t < rows.end; ++t) {
    const int64_t i = t - q0;
    write_row(w.sums + i * width, s.D, s.keep_scale / totals[i], out + (t - s.first) * out_row);
    lse[t - s.first] = (tops[i] + std::log2(totals[i])) / LOG2E;
  }
}

int64_t attention_forward_blocks(const AttentionShape& s) { return query_chunks(s).end - query_chunks(s).begin; }

template <typename T>
int64_t attention_forward_floats(const AttentionShape& s) {
  const int64_t tokens = round_up(s.S, NR), width = round_up(s.D, NR);
  return 2 * tokens * width / PAIR<T> + 2 * NR * width + 2 * FORWARD_KEYS * NR + Mask::floats(s);
}

// The query heads of one key/value head; of `splits` tasks, this one takes every splits-th panel of queries.
template <typename T>
void attention_forward_group(const AttentionShape& s, int64_t head, int64_t group, const int32_t* documents, Split split,
                             Strided<T> q, Strided<T> k, Strided<T> v, T* out, int64_t out_row, float* lse, float* space) {
  const int64_t tokens = round_up(s.S, NR), width = round_up(s.D, NR);
  const Range panels = query_chunks(s);
  const Mask mask(s, documents, space);
  space += Mask::floats(s);
  ForwardSpace<T> w;
  w.k_rows = reinterpret_cast<Unit<T>*>(space);
  w.v_steps = w.k_rows + tokens * width / PAIR<T>;
  w.q_columns = w.v_steps + tokens * width / PAIR<T>;
  w.weights = w.q_columns + NR * width;
  w.scores = reinterpret_cast<float*>(w.weights + FORWARD_KEYS * NR);
  w.sums = w.scores + FORWARD_KEYS * NR;
  pack_rows(k, s, w.k_rows);
  pack_steps(v, s, w.v_steps);
  for (int64_t g = 0; g < group; ++g)
    for (int64_t panel = panels.begin + split.index; panel < panels.end; panel += split.count) {
      pack_columns(q.head_offset(g), s, panel * NR, w.q_columns);
      prefetch_next_head(q.head_offset(g), s, panel * NR, NR);
      if (g == 0) {
        prefetch_next_head(k, s, panel * NR, NR);
        prefetch_next_head(v, s, panel * NR, NR);
      }
      (s.dropout ? forward_panel<T, true> : forward_panel<T, false>)(mask, head + g, panel, w, out + g * s.D, out_row,
                                                                     lse + g * s.T);
    }
}
#include "attention_backward.inl"
#include "attention_decode.inl"
