// Flash attention (Dao et al. 2022) for one instruction set: queries against keys in squares of NR x NR, scores never
// stored beyond a block. Scores are computed transposed, [key][query]: the softmax of a query then runs down a lane,
// and a weight is written once in each order that a product over keys or queries reads (see attention_pack.inl).
#include "attention_mask.inl"

constexpr int64_t FORWARD_KEYS = 256;  // keys per block of the forward pass
constexpr int64_t BACKWARD = 64;       // queries and keys per block of the backward pass; both multiples of NR
constexpr float LOG2E = 1.44269504088896341f;

// Rows `even` and `odd` of weights [key][query] as an operand that is summed over keys; `ld` units between its rows.
TAPELM_INLINE void store_steps(float* to, int64_t ld, vf even, vf odd) {
  store(to, even);
  store(to + ld, odd);
}
#if defined(TAPELM_PAIRS)
TAPELM_INLINE void store_steps(uint32_t* to, int64_t, vf even, vf odd) { store(to, round_pairs(even, odd)); }
#endif

// What a task of the forward pass works on: a key/value head, and a panel of queries with a block of its keys.
template <typename T>
struct ForwardSpace {
  Mask mask;
  Unit<T>*k_rows, *v_steps;  // of the key/value head
  Unit<T>* q_columns;        // of the panel
  Unit<T>* weights;          // of the block: [key / PAIR][NR]
  float* scores;             // of the block: [key][NR]
  float* sums;               // of the panel: [NR][width]
  int64_t floats;

  ForwardSpace(const AttentionShape& s, const int32_t* documents, Space space)
      : mask(s, documents, space),
        k_rows(space.take<Unit<T>>(round_up(s.S, NR) * width_of(s) / PAIR<T>)),
        v_steps(space.take<Unit<T>>(round_up(s.S, NR) * width_of(s) / PAIR<T>)),
        q_columns(space.take<Unit<T>>(NR * width_of(s) / PAIR<T>)),
        weights(space.take<Unit<T>>(FORWARD_KEYS / PAIR<T> * NR)),
        scores(space.take<float>(FORWARD_KEYS * NR)),
        sums(space.take<float>(NR * width_of(s))),
        floats(space.floats()) {}
};

// Of each query of a panel its top score so far and the total of its weights, exp2(score - top).
struct Softmax {
  vf top[2], total[2];
};

// Scores of R keys from `key`, scaled for exp2, masked where the square is mixed; V = 1 leaves out the first vector,
// all of it hidden. Raises `top` to the largest of each query.
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

// Scores of a panel against chunks `keys`. Raises `top` to the largest of each query; it may lose a NaN, which the
// total of the weights will not.
template <typename T>
TAPELM_INLINE void score_keys(const ForwardSpace<T>& w, const Panel& p, Range keys, vf top[2]) {
  const Mask& m = w.mask;
  const int64_t row = width_of(m.s) / PAIR<T>, depth = round_up(m.s.D, PAIR<T>) / PAIR<T>;
  for (int64_t c = keys.begin; c < keys.end; ++c) {
    float* const scores = w.scores + (c - keys.begin) * NR * NR;
    if (m.hidden(p.chunk, c)) {
      std::fill(scores, scores + NR * NR, -__builtin_inff());
      continue;
    }
    const bool mixed = !m.whole(p.chunk, c);
    for (int64_t i = 0; i < NR; i += R) {
      const int64_t key = c * NR + i;
      const Unit<T>* const k = w.k_rows + key * row;
      if (m.s.causal && key >= p.start + W)
        score_tile<1>(m, p, key, mixed, k, row, depth, w.q_columns, scores + i * NR, top);
      else
        score_tile<2>(m, p, key, mixed, k, row, depth, w.q_columns, scores + i * NR, top);
    }
  }
}

// Turns the scores of chunks `keys` into weights relative to `top`, which they have raised, and drops some. `decay`
// receives what weights that were relative to the top before are to be multiplied by.
template <typename T, bool DROPOUT>
TAPELM_INLINE void weigh_keys(const ForwardSpace<T>& w, const Panel& p, Range keys, const vf top[2], Softmax& softmax,
                              float decay[NR]) {
  const AttentionShape& s = w.mask.s;
  for (int v = 0; v < 2; ++v) {
    // A query that has seen nothing has weights of 0.
    const vf shift = top[v] == broadcast(-__builtin_inff()) ? vf{} : top[v];
    const vf factor = exp2(softmax.top[v] - shift);
    vf sums = {};
    for (int64_t i = 0; i < (keys.end - keys.begin) * NR; i += R) {
      vu random[R / 2];
      if constexpr (DROPOUT) p.random(s.seed, v, keys.begin * NR + i, random);
#pragma GCC unroll 4
      for (int r = 0; r < R; r += 2) {
        vf even = exp2(load(w.scores + (i + r) * NR + v * W) - shift);
        vf odd = exp2(load(w.scores + (i + r + 1) * NR + v * W) - shift);
        sums += even;
        sums += odd;
        if constexpr (DROPOUT) {
          even = dropped(even, kept_of_halves<false>(random[r / 2], s.threshold));
          odd = dropped(odd, kept_of_halves<true>(random[r / 2], s.threshold));
        }
        store_steps(w.weights + (i + r) / PAIR<T> * NR + v * W, NR, even, odd);
      }
    }
    store(decay + v * W, factor);
    softmax.total[v] = softmax.total[v] * factor + sums;
    softmax.top[v] = top[v];
  }
}

// sums[NR][width] times a factor for each row.
TAPELM_INLINE void scale_rows(float* sums, int64_t width, const float factors[NR]) {
  for (int64_t i = 0; i < NR; ++i, sums += width)
    if (factors[i] != 1.0f)
      for (int64_t d = 0; d < width; d += W) store(sums + d, load(sums + d) * factors[i]);
}

// Adds the weighted values of chunks `keys` to the sums of a panel.
template <typename T>
TAPELM_INLINE void add_values(const ForwardSpace<T>& w, const Panel& p, Range keys) {
  const AttentionShape& s = w.mask.s;
  const int64_t first = keys.begin * NR, width = width_of(s);
  const auto seen = [&](int64_t i) -> Range {
    const int64_t end = s.causal ? std::min(keys.end * NR, p.start + i + R) : keys.end * NR;
    return {0, (end - first) / PAIR<T>};
  };
  add_product(NR, width, seen, w.weights, 1, NR, w.v_steps + first / PAIR<T> * width, width, w.sums);
}

template <typename T>
TAPELM_INLINE void write_panel(const ForwardSpace<T>& w, const Panel& p, const Softmax& softmax, T* out,
                               int64_t out_row, float* lse) {
  const AttentionShape& s = w.mask.s;
  float totals[NR], tops[NR];
  for (int v = 0; v < 2; ++v) {
    store(totals + v * W, softmax.total[v]);
    store(tops + v * W, softmax.top[v]);
  }
  const Range queries = p.queries(s);
  for (int64_t t = queries.begin; t < queries.end; ++t) {
    const int64_t i = t - p.start;
    write_row(w.sums + i * width_of(s), s.D, s.keep_scale / totals[i], out + (t - s.first) * out_row);
    lse[t - s.first] = (tops[i] + std::log2(totals[i])) / LOG2E;
  }
}

// One panel of queries against all its keys, block by block.
template <typename T, bool DROPOUT>
void forward_panel(const ForwardSpace<T>& w, const Panel& p, T* out, int64_t out_row, float* lse) {
  constexpr int64_t BLOCK = FORWARD_KEYS / NR;
  const AttentionShape& s = w.mask.s;
  const int64_t width = width_of(s), chunks = s.causal ? p.chunk + 1 : round_up(s.S, NR) / NR;
  const Range queries = p.queries(s);
  for (int64_t t = queries.begin; t < queries.end; ++t) prefetch_row<1>(out + (t - s.first) * out_row, s.D);
  std::memset(w.sums, 0, NR * width * sizeof(float));
  const vf none = broadcast(-__builtin_inff());
  Softmax softmax = {{none, none}, {}};
  for (int64_t block = 0; block < chunks; block += BLOCK) {
    const Range keys = w.mask.keys(p.chunk, {block, std::min(chunks, block + BLOCK)});
    if (keys.begin == keys.end) continue;
    vf top[2] = {softmax.top[0], softmax.top[1]};
    float decay[NR];
    score_keys(w, p, keys, top);
    weigh_keys<T, DROPOUT>(w, p, keys, top, softmax, decay);
    if (block > 0) scale_rows(w.sums, width, decay);
    add_values(w, p, keys);
  }
  write_panel(w, p, softmax, out, out_row, lse);
}

// Chunks of NR positions that hold queries.
Range query_chunks(const AttentionShape& s) { return {s.first / NR, (s.first + s.T + NR - 1) / NR}; }

int64_t attention_forward_blocks(const AttentionShape& s) { return query_chunks(s).end - query_chunks(s).begin; }

template <typename T>
int64_t attention_forward_floats(const AttentionShape& s) {
  return ForwardSpace<T>(s, nullptr, Space(nullptr)).floats;
}

// Of split.count tasks, this one takes every split.count-th panel of queries.
template <typename T>
void attention_forward_group(const AttentionShape& s, const ForwardGroup<T>& x, Split split, float* space) {
  const ForwardSpace<T> w(s, x.documents, Space(space));
  const Range panels = query_chunks(s);
  pack_rows(x.k, s, w.k_rows);
  pack_steps(x.v, s, w.v_steps);
  for (int64_t g = 0; g < x.heads; ++g)
    for (int64_t panel = panels.begin + split.index; panel < panels.end; panel += split.count) {
      const Strided<T> q = x.q.head_offset(g);
      pack_columns(q, s, panel * NR, w.q_columns);
      prefetch_next_head(q, s, panel * NR, NR);
      if (g == 0)
        for (const Strided<T> each : {x.k, x.v}) prefetch_next_head(each, s, panel * NR, NR);
      (s.dropout ? forward_panel<T, true> : forward_panel<T, false>)(w, Panel(w.mask, x.first + g, panel),
                                                                     x.out + g * s.D, x.out_row, x.lse + g * s.T);
    }
}
#include "attention_backward.inl"
#include "attention_decode.inl"
