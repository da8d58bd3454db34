// What a query of attention sees and what dropout leaves of it, for one instruction set.
#include "attention_pack.inl"

// Which squares (query chunk, key chunk) of NR x NR are seen; documents are those of one batch row.
struct Mask {
  const AttentionShape& s;
  const int32_t* documents = nullptr;  // [tokens], beyond S the last one
  const int32_t *lowest = nullptr, *highest = nullptr;  // [tokens / NR]

  Mask(const AttentionShape& shape, const int32_t* ids, Space& space) : s(shape) {
    const int64_t tokens = round_up(s.S, NR), chunks = tokens / NR;
    int32_t* const copy = space.take<int32_t>(tokens);
    int32_t* const low = space.take<int32_t>(chunks);
    int32_t* const high = space.take<int32_t>(chunks);
    if (ids == nullptr) return;
    std::copy(ids, ids + s.S, copy);
    std::fill(copy + s.S, copy + tokens, ids[s.S - 1]);
    for (int64_t c = 0; c < chunks; ++c) {
      const auto [least, most] = std::minmax_element(copy + c * NR, copy + (c + 1) * NR);
      low[c] = *least;
      high[c] = *most;
    }
    documents = copy;
    lowest = low;
    highest = high;
  }

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
  int64_t chunk, start;     // its chunk and the first of its positions
  vi last[2], document[2];  // the last key that a query sees; its document
  vl counter[2][2];         // Philox counters of key 0 of the even and of the odd lanes

  Panel(const Mask& m, int64_t head, int64_t q) : chunk(q), start(q * NR) {
    const int64_t row = round_up(m.s.S, 8) / 8, query = head * m.s.T - m.s.first;
    for (int v = 0; v < 2; ++v)
      for (int i = 0; i < W; ++i) {
        const int64_t t = start + v * W + i;
        last[v][i] = static_cast<int32_t>(m.s.causal ? std::min(t, m.s.S - 1) : m.s.S - 1);
        document[v][i] = m.documents ? m.documents[t] : 0;
        counter[v][i % 2][i / 2] = static_cast<uint64_t>((query + t) * row);
      }
  }

  // Its positions that hold queries.
  Range queries(const AttentionShape& s) const {
    return {std::max(start, s.first), std::min(start + NR, s.first + s.T)};
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
