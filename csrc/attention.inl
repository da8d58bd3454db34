// Flash attention (Dao et al. 2022) for one instruction set: blocks of queries against blocks of keys, scores never
// stored beyond a block. All arithmetic is float32 on operands packed once per head:
//   rows     (T, D) row-major: the left operand of a tile
//   panels   [D / NR][T][NR]: the right operand when the sum runs over t
//   columns  [T / NR][D][NR]: the right operand when the sum runs over d (a transpose)
// Rows and columns beyond T and D are zero.

constexpr int64_t BQ = 48;  // queries per block, a multiple of every MR
constexpr int64_t BK = 96;  // keys per block, a multiple of every MR and NR

TAPELM_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename T>
void pack_rows(Strided<T> x, const AttentionShape& s, float scale, float* out) {
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t d = 0; d < s.D; ++d) out[t * s.D + d] = static_cast<float>(x.data[t * x.row + d]) * scale;
  std::fill(out + s.T * s.D, out + round_up(s.T, BK) * s.D, 0.0f);
}

template <typename T>
void pack_panels(Strided<T> x, const AttentionShape& s, float scale, float* out) {
  for (int64_t d0 = 0; d0 < s.D; d0 += NR)
    for (int64_t t = 0; t < s.T; ++t, out += NR) {
      const T* in = x.data + t * x.row + d0;
      const int64_t n = std::min<int64_t>(NR, s.D - d0);
      if (n == NR) {
        store(out, load(in) * scale);
        store(out + W, load(in + W) * scale);
      } else {
        for (int64_t i = 0; i < NR; ++i) out[i] = i < n ? static_cast<float>(in[i]) * scale : 0.0f;
      }
    }
}

template <typename T>
void pack_columns(Strided<T> x, const AttentionShape& s, float* out) {
  for (int64_t t0 = 0; t0 < round_up(s.T, BK); t0 += NR, out += s.D * NR)
    for (int64_t i = 0; i < NR; ++i) {
      const T* in = x.data + (t0 + i) * x.row;
      for (int64_t d = 0; d < s.D; ++d) out[d * NR + i] = t0 + i < s.T ? static_cast<float>(in[d]) : 0.0f;
    }
}

// out[rows][columns of NR] (+)= left * right, both multiples of a tile; `panel` is the distance between right panels.
template <bool ADD>
TAPELM_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const float* left, int64_t row_stride,
                            int64_t step, const float* right, int64_t panel, float* out, int64_t ld) {
  for (int64_t j = 0; j < columns; j += NR, right += panel)
    for (int64_t i = 0; i < rows; i += MR) {
      vf c[MR][2];
      tile<MR>(depth, left + i * row_stride, row_stride, step, right, c);
      float* o = out + i * ld + j;
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r, o += ld) {
        store(o, ADD ? load(o) + c[r][0] : c[r][0]);
        store(o + W, ADD ? load(o + W) + c[r][1] : c[r][1]);
      }
    }
}

// Keys that query t may see inside the block [k0, k0 + BK): sets the scores of the others to -inf.
TAPELM_INLINE void mask_row(float* row, int64_t t, int64_t k0, const AttentionShape& s, const int32_t* documents) {
  const int64_t end = std::min<int64_t>(s.causal ? t + 1 : s.T, s.T) - k0;
  for (int64_t i = std::max<int64_t>(end, 0); i < BK; ++i) row[i] = -__builtin_inff();
  if (documents != nullptr)
    for (int64_t i = 0; i < std::min(end, BK); ++i)
      if (documents[k0 + i] != documents[t]) row[i] = -__builtin_inff();
}

// True when no query of the block shares a document with any key of the block.
inline bool documents_disjoint(const int32_t* documents, int64_t q0, int64_t nq, int64_t k0, int64_t nk) {
  if (documents == nullptr) return false;
  const auto [qmin, qmax] = std::minmax_element(documents + q0, documents + q0 + nq);
  const auto [kmin, kmax] = std::minmax_element(documents + k0, documents + k0 + nk);
  return *qmax < *kmin || *kmax < *qmin;
}

// Dropout factors of BK weights of one query: element index ((b Hq + h) T + t) S4 + key, S4 = T rounded up to 4.
TAPELM_INLINE void dropout_row(const AttentionShape& s, int64_t head, int64_t t, int64_t k0, float* factors) {
  const uint64_t first = static_cast<uint64_t>((head * s.T + t) * round_up(s.T, 4) + k0);
  for (int64_t i = 0; i < BK; i += NR) {
    vu random[2];
    philox(s.seed, (first + i) / 4, random);
    store(factors + i, keep(random[0], s.threshold, s.keep_scale));
    store(factors + i + W, keep(random[1], s.threshold, s.keep_scale));
  }
}

int64_t attention_forward_floats(const AttentionShape& s) {
  const int64_t t = round_up(s.T, BK), d = round_up(s.D, NR);
  return 2 * t * s.D + t * d + BQ * (BK + d) + 2 * BQ + BK;
}

template <typename T>
void attention_forward_head(const AttentionShape& s, int64_t head, const int32_t* documents, Strided<T> q, Strided<T> k,
                            Strided<T> v, T* out, int64_t out_row, float* lse, float* space) {
  const int64_t padded = round_up(s.T, BK), width = round_up(s.D, NR);
  float* rows = space;
  float* columns = rows + padded * s.D;
  float* panels = columns + padded * s.D;
  float* score = panels + padded * width;
  float* sum_pv = score + BQ * BK;
  float* top = sum_pv + BQ * width;
  float* total = top + BQ;
  float* factors = total + BQ;
  pack_rows(q, s, s.scale, rows);
  pack_columns(k, s, columns);
  pack_panels(v, s, 1.0f, panels);

  for (int64_t q0 = 0; q0 < s.T; q0 += BQ) {
    const int64_t nq = std::min(BQ, s.T - q0), row_end = round_up(nq, MR);
    std::fill(sum_pv, sum_pv + BQ * width, 0.0f);
    std::fill(top, top + BQ, -__builtin_inff());
    std::fill(total, total + BQ, 0.0f);
    const int64_t k_end = s.causal ? q0 + nq : s.T;
    for (int64_t k0 = 0; k0 < k_end; k0 += BK) {
      const int64_t nk = std::min(BK, k_end - k0);
      if (documents_disjoint(documents, q0, nq, k0, nk)) continue;
      multiply<false>(row_end, nk, s.D, rows + q0 * s.D, s.D, 1, columns + k0 * s.D, s.D * NR, score, BK);
      for (int64_t i = 0; i < nq; ++i) {
        float* row = score + i * BK;
        mask_row(row, q0 + i, k0, s, documents);
        vf highest = load(row);
        for (int64_t j = W; j < BK; j += W) highest = max(highest, load(row + j));
        float new_top = std::max(top[i], max(highest));
        if (new_top == -__builtin_inff()) {
          // Nothing visible yet, unless it was a NaN that the maximum lost.
          if (std::none_of(row, row + BK, [](float x) { return x != x; })) {
            std::fill(row, row + BK, 0.0f);
            continue;
          }
          new_top = __builtin_nanf("");
        }
        const float rescale = std::exp(top[i] - new_top);
        vf weights = {};
        for (int64_t j = 0; j < BK; j += W) {
          const vf w = exp(load(row + j) - new_top);
          weights += w;
          store(row + j, w);
        }
        total[i] = total[i] * rescale + sum(weights);
        top[i] = new_top;
        if (rescale != 1.0f)
          for (int64_t j = 0; j < width; j += W) store(sum_pv + i * width + j, load(sum_pv + i * width + j) * rescale);
        if (s.dropout) {
          dropout_row(s, head, q0 + i, k0, factors);
          for (int64_t j = 0; j < BK; j += W) store(row + j, load(row + j) * load(factors + j));
        }
      }
      multiply<true>(row_end, width, nk, score, BK, 1, panels + k0 * NR, s.T * NR, sum_pv, width);
    }
    for (int64_t i = 0; i < nq; ++i) {
      const float inverse = 1.0f / total[i];
      T* o = out + (q0 + i) * out_row;
      for (int64_t d = 0; d < s.D; ++d) o[d] = static_cast<T>(sum_pv[i * width + d] * inverse);
      lse[q0 + i] = top[i] + std::log(total[i]);
    }
  }
}

int64_t attention_backward_floats(const AttentionShape& s) {
  const int64_t t = round_up(s.T, BK), d = round_up(s.D, NR);
  return 4 * t * s.D + 6 * t * d + t + 2 * BQ * BK + BK;
}

// One key/value head with the `group` query heads that read it, so that dk and dv have a single writer.
template <typename T>
void attention_backward_group(const AttentionShape& s, int64_t head, int64_t group, const int32_t* documents,
                              Strided<T> grad, Strided<T> q, Strided<T> k, Strided<T> v, Strided<T> out,
                              const float* lse, T* dq, int64_t dq_row, T* dk, T* dv, int64_t dk_row, float* space) {
  const int64_t padded = round_up(s.T, BK), width = round_up(s.D, NR);
  float* q_rows = space;
  float* g_rows = q_rows + padded * s.D;
  float* k_columns = g_rows + padded * s.D;
  float* v_columns = k_columns + padded * s.D;
  float* k_panels = v_columns + padded * s.D;
  float* q_panels = k_panels + padded * width;
  float* g_panels = q_panels + padded * width;
  float* sum_dq = g_panels + padded * width;
  float* sum_dk = sum_dq + padded * width;
  float* sum_dv = sum_dk + padded * width;
  float* delta = sum_dv + padded * width;
  float* weight = delta + padded;
  float* dscore = weight + BQ * BK;
  float* factors = dscore + BQ * BK;
  pack_columns(k, s, k_columns);
  pack_columns(v, s, v_columns);
  pack_panels(k, s, 1.0f, k_panels);
  std::fill(sum_dk, sum_dk + 2 * padded * width, 0.0f);
  std::fill(factors, factors + BK, 1.0f);

  for (int64_t g = 0; g < group; ++g) {
    const Strided<T> qh = q.head_offset(g), gh = grad.head_offset(g), oh = out.head_offset(g);
    pack_rows(qh, s, s.scale, q_rows);
    pack_rows(gh, s, 1.0f, g_rows);
    pack_panels(qh, s, s.scale, q_panels);
    pack_panels(gh, s, 1.0f, g_panels);
    std::fill(sum_dq, sum_dq + padded * width, 0.0f);
    for (int64_t t = 0; t < s.T; ++t) {
      float d = 0.0f;
      for (int64_t i = 0; i < s.D; ++i) d += g_rows[t * s.D + i] * static_cast<float>(oh.data[t * oh.row + i]);
      delta[t] = d;
    }
    for (int64_t k0 = 0; k0 < s.T; k0 += BK) {
      const int64_t nk = std::min(BK, s.T - k0);
      for (int64_t q0 = s.causal ? k0 / BQ * BQ : 0; q0 < s.T; q0 += BQ) {
        const int64_t nq = std::min(BQ, s.T - q0), row_end = round_up(nq, MR);
        const int64_t visible = s.causal ? std::min(nk, q0 + nq - k0) : nk;
        if (visible <= 0 || documents_disjoint(documents, q0, nq, k0, nk)) continue;
        multiply<false>(row_end, visible, s.D, q_rows + q0 * s.D, s.D, 1, k_columns + k0 * s.D, s.D * NR, weight, BK);
        multiply<false>(row_end, visible, s.D, g_rows + q0 * s.D, s.D, 1, v_columns + k0 * s.D, s.D * NR, dscore, BK);
        for (int64_t i = 0; i < nq; ++i) {
          float* w = weight + i * BK;
          float* ds = dscore + i * BK;
          mask_row(w, q0 + i, k0, s, documents);
          if (s.dropout) dropout_row(s, head + g, q0 + i, k0, factors);
          const float shift = lse[g * s.T + q0 + i], center = delta[q0 + i];
          const int64_t computed = round_up(visible, NR);
          for (int64_t j = 0; j < computed; j += W) {
            const vf p = exp(load(w + j) - shift), f = load(factors + j);
            store(w + j, p * f);
            store(ds + j, p * (load(ds + j) * f - center));
          }
          std::fill(w + computed, w + BK, 0.0f);
          std::fill(ds + computed, ds + BK, 0.0f);
        }
        multiply<true>(row_end, width, visible, dscore, BK, 1, k_panels + k0 * NR, s.T * NR, sum_dq + q0 * width, width);
        const int64_t key_end = round_up(visible, MR);
        multiply<true>(key_end, width, nq, weight, 1, BK, g_panels + q0 * NR, s.T * NR, sum_dv + k0 * width, width);
        multiply<true>(key_end, width, nq, dscore, 1, BK, q_panels + q0 * NR, s.T * NR, sum_dk + k0 * width, width);
      }
    }
    for (int64_t t = 0; t < s.T; ++t)
      for (int64_t d = 0; d < s.D; ++d)
        dq[g * s.D + t * dq_row + d] = static_cast<T>(sum_dq[t * width + d] * s.scale);
  }
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t d = 0; d < s.D; ++d) {
      dk[t * dk_row + d] = static_cast<T>(sum_dk[t * width + d]);
      dv[t * dk_row + d] = static_cast<T>(sum_dv[t * width + d]);
    }
}
