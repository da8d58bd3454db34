// The backward pass of attention for one instruction set: blocks of keys, each against the blocks of queries that see
// it. Of each block of pairs the weights are computed anew, then their gradients and what these add to dq, dk and dv.

// `row` units or sums for each token of a head, from position `begin` on.
template <typename U>
struct Tokens {
  U* data;
  int64_t begin, row;
  U* at(int64_t t) const { return data + (t - begin) * row; }
};

// Weights and score gradients of a block of pairs, or the rest of it from a pair on: in rows [key][query / PAIR] and,
// of the score gradients, steps [key / PAIR][query]. The block has BACKWARD queries; where a unit is a float, steps are
// rows.
template <typename T>
struct Pairs {
  Unit<T>*weights, *dscore_rows, *dscore_steps;
  Pairs from(int64_t key, int64_t query) const {
    const int64_t row = (key * BACKWARD + query) / PAIR<T>, step = key / PAIR<T> * BACKWARD + query;
    return {weights + row, dscore_rows + row, dscore_steps + step};
  }
};

// Positions of the whole chunks that hold queries, their number, and the floats of the sums of dq at them.
Range query_positions(const AttentionShape& s) { return {query_chunks(s).begin * NR, query_chunks(s).end * NR}; }
int64_t query_tokens(const AttentionShape& s) { return query_positions(s).end - query_positions(s).begin; }
int64_t attention_sum_floats(const AttentionShape& s) { return query_tokens(s) * width_of(s); }

// What a task of the backward pass works on: a key/value head, a query head and a block of their pairs.
template <typename T>
struct BackwardSpace {
  Mask mask;
  Tokens<Unit<T>> k_rows, v_rows, k_steps;                  // of the key/value head
  Tokens<Unit<T>> q_columns, g_columns, q_steps, g_steps;  // of the query head; g is the gradient of the output
  Pairs<T> pairs;
  Tokens<float> lse, delta;   // of the query head; lse in powers of two
  Tokens<float> dq, dk, dv;  // sums
  int64_t floats;

  BackwardSpace(const AttentionShape& s, const int32_t* documents, Space space) : mask(s, documents, space) {
    const int64_t units = width_of(s) / PAIR<T>, block = BACKWARD * BACKWARD / PAIR<T>;
    const auto keys = [&]<typename U>(Tokens<U>& part, int64_t row) {
      part = {space.take<U>(round_up(s.S, NR) * row), 0, row};
    };
    const auto queries = [&]<typename U>(Tokens<U>& part, int64_t row) {
      part = {space.take<U>(query_tokens(s) * row), query_positions(s).begin, row};
    };
    for (Tokens<Unit<T>>* part : {&k_rows, &v_rows, &k_steps}) keys(*part, units);
    for (Tokens<Unit<T>>* part : {&q_columns, &g_columns, &q_steps, &g_steps}) queries(*part, units);
    pairs.weights = space.take<Unit<T>>(block);
    pairs.dscore_rows = space.take<Unit<T>>(block);
    pairs.dscore_steps = PAIR<T> == 1 ? pairs.dscore_rows : space.take<Unit<T>>(block);
    for (Tokens<float>* part : {&lse, &delta}) queries(*part, 1);
    for (Tokens<float>* part : {&dk, &dv}) keys(*part, width_of(s));
    queries(dq, width_of(s));
    floats = space.floats();
  }
};

// Products over d of R keys, given as rows, with the queries of a panel, given as columns; V = 1 leaves out the first
// vector of queries.
template <int V, typename T>
TAPELM_INLINE void panel_products(const AttentionShape& s, const Tokens<Unit<T>>& rows, int64_t key,
                                  const Tokens<Unit<T>>& columns, const Panel& p, vf c[R][V]) {
  const int64_t depth = round_up(s.D, PAIR<T>) / PAIR<T>;
  product_tile<V>(depth, rows.at(key), rows.row, 1, columns.at(p.start) + (2 - V) * W, NR, c);
}

// The weights [R][NR] of R keys from `key` for the queries of a panel; V = 1 leaves out the first vector of queries,
// all of it hidden.
template <int V, typename T>
TAPELM_INLINE void weigh_tile(const BackwardSpace<T>& w, const Panel& p, int64_t key, bool mixed, float* weights) {
  constexpr int first = 2 - V;
  const Mask& m = w.mask;
  vf c[R][V];
  panel_products<V, T>(m.s, w.k_rows, key, w.q_columns, p, c);
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const vf shift = load(w.lse.at(p.start) + (first + v) * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf x = c[r][v] * (m.s.scale * LOG2E) - shift;
      if (mixed) x = p.seen(x, m, first + v, key + r);
      store(weights + r * NR + v * W, exp2(x));
    }
  }
}

// Weights, after dropout, and score gradients of R keys from `key` and the queries of a panel; V as above. `to` is the
// place of the tile in the block.
template <int V, bool DROPOUT, typename T>
TAPELM_INLINE void differentiate_tile(const BackwardSpace<T>& w, const Panel& p, int64_t key, bool mixed, Pairs<T> to) {
  using Element = std::conditional_t<PAIR<T> == 1, float, T>;  // of a unit
  constexpr int first = 2 - V;
  const AttentionShape& s = w.mask.s;
  float weights[R * NR];
  weigh_tile<V>(w, p, key, mixed, weights);
  vf c[R][V];
  panel_products<V, T>(s, w.v_rows, key, w.g_columns, p, c);
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const int64_t lane = (first + v) * W;
    const vf delta = load(w.delta.at(p.start) + lane);
    vu random[R / 2];
    if constexpr (DROPOUT) p.random(s.seed, first + v, key, random);
#pragma GCC unroll 4
    for (int r0 = 0; r0 < R; r0 += 2) {
      const auto derivative = [&](auto upper) __attribute__((always_inline)) {
        const int r = r0 + upper;
        const vf weight = load(weights + r * NR + v * W);
        vf kept = weight, g = c[r][v];
        if constexpr (DROPOUT) {
          const Kept lanes = kept_of_halves<upper>(random[r0 / 2], s.threshold);
          kept = dropped(kept, lanes);
          g = dropped(g, lanes);
        }
        const vf ds = weight * (g - delta);
        store(reinterpret_cast<Element*>(to.weights + r * BACKWARD / PAIR<T>) + lane, kept);
        store(reinterpret_cast<Element*>(to.dscore_rows + r * BACKWARD / PAIR<T>) + lane, ds);
        return ds;
      };
      const vf even = derivative(std::false_type{}), odd = derivative(std::true_type{});
      if constexpr (PAIR<T> == 2) store_steps(to.dscore_steps + r0 / 2 * BACKWARD + lane, BACKWARD, even, odd);
    }
  }
}

// Weights and score gradients of a panel and chunk k of keys, which `to` is the place of in the block.
template <bool DROPOUT, typename T>
TAPELM_INLINE void differentiate_square(const BackwardSpace<T>& w, const Panel& p, int64_t k, Pairs<T> to) {
  const bool mixed = !w.mask.whole(p.chunk, k);
  for (int64_t i = 0; i < NR; i += R)
    if (w.mask.s.causal && k == p.chunk && i >= W)
      differentiate_tile<1, DROPOUT>(w, p, k * NR + i, mixed, to.from(i, 0));
    else
      differentiate_tile<2, DROPOUT>(w, p, k * NR + i, mixed, to.from(i, 0));
}

// The same of a square that is hidden.
template <typename T>
void clear_square(Pairs<T> to) {
  for (int64_t i = 0; i < NR; ++i) {
    std::memset(to.from(i, 0).weights, 0, NR / PAIR<T> * sizeof(float));
    std::memset(to.from(i, 0).dscore_rows, 0, NR / PAIR<T> * sizeof(float));
  }
  for (int64_t i = 0; i < NR; i += PAIR<T>) std::memset(to.from(i, 0).dscore_steps, 0, NR * sizeof(float));
}

// Weights and score gradients of a block, given as ranges of chunks; whether any of its pairs is seen.
template <bool DROPOUT, typename T>
bool differentiate_block(const BackwardSpace<T>& w, int64_t head, Range queries, Range keys) {
  const Mask& m = w.mask;
  bool any = false;
  for (int64_t q = queries.begin; q < queries.end; ++q) {
    const Panel p(m, head, q);
    for (int64_t k = keys.begin; k < keys.end && !(m.s.causal && k > q); ++k) {
      const Pairs<T> to = w.pairs.from((k - keys.begin) * NR, (q - queries.begin) * NR);
      if (m.hidden(q, k)) {
        clear_square(to);
      } else {
        differentiate_square<DROPOUT>(w, p, k, to);
        any = true;
      }
    }
  }
  return any;
}

// Adds to dq, dk and dv what the weights and score gradients of a block say.
template <typename T>
void add_block(const BackwardSpace<T>& w, Range queries, Range keys) {
  const Mask& m = w.mask;
  const int64_t width = width_of(m.s), q_start = queries.begin * NR, k_start = keys.begin * NR;
  const auto seen_keys = [&](int64_t i) -> Range {
    const int64_t t = q_start + i;
    const Range k = m.keys(t / NR, keys);
    const int64_t end = m.s.causal ? std::min(k.end * NR, t + R) : k.end * NR;
    return {(k.begin * NR - k_start) / PAIR<T>, (end - k_start) / PAIR<T>};
  };
  const auto seeing_queries = [&](int64_t i) -> Range {
    const int64_t t = k_start + i;
    const Range q = m.queries(queries, t / NR);
    const int64_t begin = m.s.causal ? std::max(q.begin * NR, t) : q.begin * NR;
    return {(begin - q_start) / PAIR<T>, (q.end * NR - q_start) / PAIR<T>};
  };
  const int64_t rows = (queries.end - queries.begin) * NR, columns = (keys.end - keys.begin) * NR;
  const Pairs<T>& from = w.pairs;
  add_product(rows, width, seen_keys, from.dscore_steps, 1, BACKWARD, w.k_steps.at(k_start), width, w.dq.at(q_start));
  add_product(columns, width, seeing_queries, from.weights, BACKWARD / PAIR<T>, 1, w.g_steps.at(q_start), width,
              w.dv.at(k_start));
  add_product(columns, width, seeing_queries, from.dscore_rows, BACKWARD / PAIR<T>, 1, w.q_steps.at(q_start), width,
              w.dk.at(k_start));
}

// delta[t] = sum over d of grad[t][d] * out[t][d], over `scale`, at the positions of the queries.
template <typename T>
void row_products(Strided<T> grad, Strided<T> out, const AttentionShape& s, float scale, Tokens<float> delta) {
  const int64_t whole = s.D / W * W;
  for (int64_t t = grad.begin; t < grad.end; ++t) {
    const T *a = grad.at(t), *b = out.at(t);
    prefetch_row<0>(a + AHEAD * grad.row, s.D);
    prefetch_row<0>(b + AHEAD * out.row, s.D);
    vf sums = {};
    for (int64_t d = 0; d < whole; d += W) sums += load(a + d) * load(b + d);
    float rest = 0.0f;
    for (int64_t d = whole; d < s.D; ++d) rest += static_cast<float>(a[d]) * static_cast<float>(b[d]);
    *delta.at(t) = (sum(sums) + rest) / scale;
  }
}

int64_t attention_backward_blocks(const AttentionShape& s) { return (s.S + BACKWARD - 1) / BACKWARD; }

template <typename T>
int64_t attention_backward_floats(const AttentionShape& s) {
  return BackwardSpace<T>(s, nullptr, Space(nullptr)).floats;
}

// dq of one head from the sums of `splits` tasks, `stride` floats apart.
template <typename T>
void attention_write_dq(const AttentionShape& s, float* sums, int64_t splits, int64_t stride, T* dq, int64_t dq_row) {
  const int64_t floats = attention_sum_floats(s);
  for (int64_t i = 1; i < splits; ++i)
    for (int64_t j = 0; j < floats; j += W) store(sums + j, load(sums + j) + load(sums + i * stride + j));
  write_rows(sums + s.first % NR * width_of(s), s.T, s, s.scale * s.keep_scale, dq, dq_row);
}

// Packs keys and values, whose gradients are 0 yet.
template <typename T>
void load_keys(const BackwardSpace<T>& w, const BackwardGroup<T>& x) {
  const AttentionShape& s = w.mask.s;
  pack_rows(x.k, s, w.k_rows.data);
  pack_rows(x.v, s, w.v_rows.data);
  pack_steps(x.k, s, w.k_steps.data);
  for (const Tokens<float>& sums : {w.dk, w.dv})
    std::memset(sums.data, 0, round_up(s.S, NR) * width_of(s) * sizeof(float));
}

// Packs query head g of the group with its gradient; its dq is 0 yet. Where no query stands weights are 0.
template <typename T>
void load_queries(const BackwardSpace<T>& w, const BackwardGroup<T>& x, int64_t g) {
  const AttentionShape& s = w.mask.s;
  const Strided<T> q = x.q.head_offset(g), grad = x.grad.head_offset(g);
  const Range positions = query_positions(s);
  for (int64_t t = positions.begin; t < positions.end; t += NR) {
    pack_columns(q, s, t, w.q_columns.at(t));
    pack_columns(grad, s, t, w.g_columns.at(t));
  }
  pack_steps(q, s, w.q_steps.data);
  pack_steps(grad, s, w.g_steps.data);
  std::fill(w.lse.data, w.lse.at(positions.end), __builtin_inff());
  std::fill(w.delta.data, w.delta.at(positions.end), 0.0f);
  row_products(grad, x.out.head_offset(g), s, s.keep_scale, w.delta);
  for (int64_t t = 0; t < s.T; ++t) *w.lse.at(s.first + t) = x.lse[g * s.T + t] * LOG2E;
  std::memset(w.dq.data, 0, attention_sum_floats(s) * sizeof(float));
}

// Of split.count tasks, this one takes every split.count-th block of keys.
template <typename T>
void attention_backward_group(const AttentionShape& s, const BackwardGroup<T>& x, Split split, float* space) {
  constexpr int64_t BLOCK = BACKWARD / NR;
  BackwardSpace<T> w(s, x.documents, Space(space));
  const Range panels = query_chunks(s);
  const int64_t chunks = round_up(s.S, NR) / NR;
  load_keys(w, x);
  for (int64_t g = 0; g < x.heads; ++g) {
    if (x.dq_sums) w.dq.data = x.dq_sums + g * attention_sum_floats(s);
    load_queries(w, x, g);
    for (int64_t kb = split.index * BLOCK; kb < chunks; kb += split.count * BLOCK) {
      for (const Strided<T> each : {x.q.head_offset(g), x.grad.head_offset(g), x.out.head_offset(g)})
        prefetch_next_head(each, s, kb * NR, BACKWARD);
      if (g == 0)
        for (const Strided<T> each : {x.k, x.v}) prefetch_next_head(each, s, kb * NR, BACKWARD);
      const Range keys = {kb, std::min(chunks, kb + BLOCK)};
      for (int64_t qb = std::max(panels.begin, s.causal ? kb : 0); qb < panels.end; qb += BLOCK) {
        const Range queries = {qb, std::min(panels.end, qb + BLOCK)};
        if ((s.dropout ? differentiate_block<true, T> : differentiate_block<false, T>)(w, x.first + g, queries, keys))
          add_block(w, queries, keys);
      }
    }
    if (!x.dq_sums) attention_write_dq(s, w.dq.data, 1, 0, x.dq + g * s.D, x.dq_row);
  }
  for (int64_t t = split.index * BACKWARD; t < s.S; t += split.count * BACKWARD) {
    const int64_t count = std::min(BACKWARD, s.S - t);
    write_rows(w.dk.at(t), count, s, s.scale * s.keep_scale, x.dk + t * x.dk_row, x.dk_row);
    write_rows(w.dv.at(t), count, s, s.keep_scale, x.dv + t * x.dk_row, x.dk_row);
  }
}
