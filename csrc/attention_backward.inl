// The backward pass of attention for one instruction set: blocks of keys, each against the blocks of queries that see it.

template <typename T>
struct BackwardSpace {
  Unit<T>*k_rows, *v_rows, *k_steps;                        // of the key/value head
  Unit<T>*q_columns, *g_columns, *q_steps, *g_steps;        // of a query head at position 0; g is the output's gradient
  Unit<T>*weights, *dscore_rows, *dscore_steps;             // of a block: rows [key][query / PAIR], steps [key / PAIR][query]
  float *lse, *delta;                                       // [tokens] at position 0; lse in powers of two
  float *dq, *dk, *dv;                                      // sums [tokens][width] at position 0
};

// Weights and score gradients of R keys from `key` and the queries of one panel; V = 1 leaves out the first vector of
// queries, all of it hidden. `weights` and the others point to the place of the tile in the block.
template <typename T, int V, bool DROPOUT>
TAPELM_INLINE void backward_tile(const Mask& m, const Panel& p, const BackwardSpace<T>& w, int64_t q0, int64_t key,
                                 bool mixed, Unit<T>* weights, Unit<T>* dscore_rows, Unit<T>* dscore_steps) {
  using Element = std::conditional_t<PAIR<T> == 1, float, T>;  // of a unit
  constexpr int first = 2 - V;
  const AttentionShape& s = m.s;
  const int64_t row = round_up(s.D, NR) / PAIR<T>, depth = round_up(s.D, PAIR<T>) / PAIR<T>;
  const int64_t column = q0 * row + first * W;
  float weight[R * NR];
  vf c[R][V];
  product_tile<V>(depth, w.k_rows + key * row, row, 1, w.q_columns + column, NR, c);
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const vf shift = load(w.lse + q0 + (first + v) * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf x = c[r][v] * (s.scale * LOG2E) - shift;
      if (mixed) x = p.seen(x, m, first + v, key + r);
      store(weight + r * NR + v * W, exp2(x));
    }
  }
  product_tile<V>(depth, w.v_rows + key * row, row, 1, w.g_columns + column, NR, c);
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const vf delta = load(w.delta + q0 + (first + v) * W);
    const int64_t lane = (first + v) * W;
    vu random[R / 2];
    if constexpr (DROPOUT) p.random(s.seed, first + v, key, random);
#pragma GCC unroll 4
    for (int r0 = 0; r0 < R; r0 += 2) {
      const auto derivative = [&](auto upper) __attribute__((always_inline)) {
        const int r = r0 + upper;
        const vf weight_r = load(weight + r * NR + v * W);
        vf kept = weight_r, g = c[r][v];
        if constexpr (DROPOUT) {
          const Kept lanes = kept_of_halves<upper>(random[r0 / 2], s.threshold);
          kept = dropped(kept, lanes);
          g = dropped(g, lanes);
        }
        const vf ds = weight_r * (g - delta);
        store(reinterpret_cast<Element*>(weights + r * BACKWARD / PAIR<T>) + lane, kept);
        store(reinterpret_cast<Element*>(dscore_rows + r * BACKWARD / PAIR<T>) + lane, ds);
        return ds;
      };
      const vf even = derivative(std::false_type{}), odd = derivative(std::true_type{});
      if constexpr (PAIR<T> == 2) store_steps(dscore_steps + r0 / 2 * BACKWARD + lane, BACKWARD, even, odd);
    }
  }
}

// A block of queries against a block of keys, given as ranges of chunks: adds to dq, dk and dv.
template <typename T, bool DROPOUT>
void backward_block(const Mask& m, int64_t head, Range queries, Range keys, const BackwardSpace<T>& w) {
  const AttentionShape& s = m.s;
  const int64_t width = round_up(s.D, NR), q_start = queries.begin * NR, k_start = keys.begin * NR;
  bool any = false;
  for (int64_t q = queries.begin; q < queries.end; ++q) {
    const Panel p(m, head, q * NR);
    for (int64_t k = keys.begin; k < keys.end && !(s.causal && k > q); ++k) {
      const int64_t k0 = k * NR, at = (k0 - k_start) * BACKWARD / PAIR<T>;
      const int64_t place = at + (q * NR - q_start) / PAIR<T>, step_place = at + q * NR - q_start;
      if (m.hidden(q, k)) {
        for (int64_t i = 0; i < NR; ++i) {
          std::memset(w.weights + place + i * BACKWARD / PAIR<T>, 0, NR / PAIR<T> * sizeof(float));
          std::memset(w.dscore_rows + place + i * BACKWARD / PAIR<T>, 0, NR / PAIR<T> * sizeof(float));
        }
        for (int64_t i = 0; i < NR / PAIR<T>; ++i)
          std::memset(w.dscore_steps + step_place + i * BACKWARD, 0, NR * sizeof(float));
        continue;
      }
      any = true;
      const bool mixed = !m.whole(q, k);
      for (int64_t i = 0; i < NR; i += R) {
        const int64_t rows = place + i * BACKWARD / PAIR<T>, steps = step_place + i * BACKWARD / PAIR<T>;
        if (s.causal && k == q && i >= W)
          backward_tile<T, 1, DROPOUT>(m, p, w, q * NR, k0 + i, mixed, w.weights + rows, w.dscore_rows + rows,
                                       w.dscore_steps + steps);
        else
          backward_tile<T, 2, DROPOUT>(m, p, w, q * NR, k0 + i, mixed, w.weights + rows, w.dscore_rows + rows,
                                       w.dscore_steps + steps);
      }
    }
  }
  if (!any) return;
  const auto seen_keys = [&](int64_t i) -> Range {
    const int64_t t = q_start + i;
    const Range k = m.keys(t / NR, keys);
    const int64_t end = s.causal ? std::min(k.end * NR, t + R) : k.end * NR;
    return {(k.begin * NR - k_start) / PAIR<T>, (end - k_start) / PAIR<T>};
  };
  const auto seeing_queries = [&](int64_t i) -> Range {
    const int64_t t = k_start + i;
    const Range q = m.queries(queries, t / NR);
    const int64_t begin = s.causal ? std::max(q.begin * NR, t) : q.begin * NR;
    return {(begin - q_start) / PAIR<T>, (q.end * NR - q_start) / PAIR<T>};
  };
  const int64_t rows = (queries.end - queries.begin) * NR, columns = (keys.end - keys.begin) * NR;
  const int64_t q_step = q_start / PAIR<T> * width, k_step = k_start / PAIR<T> * width;
  add_product(rows, width, seen_keys, w.dscore_steps, 1, BACKWARD, w.k_steps + k_step, width, w.dq + q_start * width);
  add_product(columns, width, seeing_queries, w.weights, BACKWARD / PAIR<T>, 1, w.g_steps + q_step, width,
              w.dv + k_start * width);
  add_product(columns, width, seeing_queries, w.dscore_rows, BACKWARD / PAIR<T>, 1, w.q_steps + q_step, width,
              w.dk + k_start * width);
}

// delta[t] = sum over d of grad[t][d] * out[t][d], over `scale`, at the positions of the queries.
template <typename T>
void row_products(Strided<T> grad, Strided<T> out, const AttentionShape& s, float scale, float* delta) {
  const int64_t whole = s.D / W * W;
  for (int64_t t = grad.begin; t < grad.end; ++t) {
    const T *a = grad.at(t), *b = out.at(t);
    prefetch_row<0>(a + AHEAD * grad.row, s.D);
    prefetch_row<0>(b + AHEAD * out.row, s.D);
    vf sums = {};
    for (int64_t d = 0; d < whole; d += W) sums += load(a + d) * load(b + d);
    float rest = 0.0f;
    for (int64_t d = whole; d < s.D; ++d) rest += static_cast<float>(a[d]) * static_cast<float>(b[d]);
    delta[t] = (sum(sums) + rest) / scale;
  }
}

int64_t attention_backward_blocks(const AttentionShape& s) { return (s.S + BACKWARD - 1) / BACKWARD; }

// Positions of whole chunks that hold queries, and sums of dq at them.
int64_t query_tokens(const AttentionShape& s) { return attention_forward_blocks(s) * NR; }
int64_t attention_sum_floats(const AttentionShape& s) { return query_tokens(s) * round_up(s.D, NR); }

template <typename T>
int64_t attention_backward_floats(const AttentionShape& s) {
  const int64_t queries = attention_sum_floats(s), keys = round_up(s.S, NR) * round_up(s.D, NR);
  return (3 * keys + 4 * queries) / PAIR<T> + 2 * keys + queries + 2 * query_tokens(s) + 3 * BACKWARD * BACKWARD +
         Mask::floats(s);
}

// dq of one head from the sums of `splits` tasks, `stride` floats apart.
template <typename T>
void attention_write_dq(const AttentionShape& s, float* sums, int64_t splits, int64_t stride, T* dq, int64_t dq_row) {
  for (int64_t i = 1; i < splits; ++i)
    for (int64_t j = 0; j < attention_sum_floats(s); j += W) store(sums + j, load(sums + j) + load(sums + i * stride + j));
  write_rows(sums + s.first % NR * round_up(s.D, NR), s.T, s, s.scale * s.keep_scale, dq, dq_row);
}

// One key/value head with the `group` query heads that read it, so that dk and dv have a single writer; of split.count
// tasks, this one takes every split.count-th block of keys. Its sums of dq go to `dq_sums`, or into dq if that is null.
template <typename T>
void attention_backward_group(const AttentionShape& s, int64_t head, int64_t group, const int32_t* documents, Split split,
                              Strided<T> grad, Strided<T> q, Strided<T> k, Strided<T> v, Strided<T> out, const float* lse,
                              T* dq, int64_t dq_row, T* dk, T* dv, int64_t dk_row, float* dq_sums, float* space) {
  const int64_t tokens = round_up(s.S, NR), width = round_up(s.D, NR), size = tokens * width, chunks = tokens / NR;
  const int64_t block = BACKWARD / NR, q_size = attention_sum_floats(s);
  const Range panels = query_chunks(s);
  const int64_t base = panels.begin * NR;  // position of the first row of what is kept of the queries
  const Mask mask(s, documents, space);
  space += Mask::floats(s);
  BackwardSpace<T> w;
  const auto units = [&](int64_t n) {
    Unit<T>* start = reinterpret_cast<Unit<T>*>(space);
    space += n;
    return start;
  };
  w.k_rows = units(size / PAIR<T>);
  w.v_rows = units(size / PAIR<T>);
  w.k_steps = units(size / PAIR<T>);
  w.q_columns = units(q_size / PAIR<T>) - base * width / PAIR<T>;
  w.g_columns = units(q_size / PAIR<T>) - base * width / PAIR<T>;
  w.q_steps = units(q_size / PAIR<T>) - base * width / PAIR<T>;
  w.g_steps = units(q_size / PAIR<T>) - base * width / PAIR<T>;
  w.weights = units(BACKWARD * BACKWARD / PAIR<T>);
  w.dscore_rows = units(BACKWARD * BACKWARD / PAIR<T>);
  w.dscore_steps = PAIR<T> == 1 ? w.dscore_rows : units(BACKWARD * BACKWARD / PAIR<T>);
  w.lse = space - base;
  w.delta = w.lse + query_tokens(s);
  w.dk = space + 2 * query_tokens(s);
  w.dv = w.dk + size;
  float* own_dq = w.dv + size;
  pack_rows(k, s, w.k_rows);
  pack_rows(v, s, w.v_rows);
  pack_steps(k, s, w.k_steps);
  std::memset(w.dk, 0, 2 * size * sizeof(float));
  std::fill(w.lse + base, w.lse + panels.end * NR, __builtin_inff());  // where no query stands weights are 0
  std::fill(w.delta + base, w.delta + panels.end * NR, 0.0f);
  for (int64_t g = 0; g < group; ++g) {
    const Strided<T> qh = q.head_offset(g), gh = grad.head_offset(g);
    float* const sums = dq_sums ? dq_sums + g * q_size : own_dq;
    w.dq = sums - base * width;
    std::memset(sums, 0, q_size * sizeof(float));
    for (int64_t t = base; t < panels.end * NR; t += NR) {
      pack_columns(qh, s, t, w.q_columns + t * width / PAIR<T>);
      pack_columns(gh, s, t, w.g_columns + t * width / PAIR<T>);
    }
    pack_steps(qh, s, w.q_steps + base * width / PAIR<T>);
    pack_steps(gh, s, w.g_steps + base * width / PAIR<T>);
    row_products(gh, out.head_offset(g), s, s.keep_scale, w.delta);
    for (int64_t t = 0; t < s.T; ++t) w.lse[s.first + t] = lse[g * s.T + t] * LOG2E;
    for (int64_t kb = split.index * block; kb < chunks; kb += split.count * block) {
      for (const Strided<T> x : {qh, gh, out.head_offset(g)}) prefetch_next_head(x, s, kb * NR, BACKWARD);
      if (g == 0)
        for (const Strided<T> x : {k, v}) prefetch_next_head(x, s, kb * NR, BACKWARD);
      for (int64_t qb = std::max(panels.begin, s.causal ? kb : 0); qb < panels.end; qb += block)
        (s.dropout ? backward_block<T, true> : backward_block<T, false>)(
            mask, head + g, {qb, std::min(panels.end, qb + block)}, {kb, std::min(chunks, kb + block)}, w);
    }
    if (!dq_sums) attention_write_dq(s, sums, 1, 0, dq + g * s.D, dq_row);
  }
  for (int64_t t = split.index * BACKWARD; t < s.S; t += split.count * BACKWARD) {
    const int64_t count = std::min(BACKWARD, s.S - t);
    write_rows(w.dk + t * width, count, s, s.scale * s.keep_scale, dk + t * dk_row, dk_row);
    write_rows(w.dv + t * width, count, s, s.keep_scale, dv + t * dk_row, dk_row);
  }
}
