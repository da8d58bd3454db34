// Attention, forward and backward: causal, grouped queries, document masks, dropout keyed by (seed, element).
#include "autograd.h"
#include "common.h"

namespace tapelm {

struct Range {
  int64_t begin, end;
};

// One of `count` tasks that a head is cut into.
struct Split {
  int64_t index, count;
};

struct AttentionShape {
  int64_t Hq, T, S, D;
  int64_t first;  // the position among the keys at which query 0 stands
  bool causal, dropout;
  float scale;
  uint64_t seed;
  uint32_t threshold;
  float keep_scale;
};

// One head of a (B, H, T, D) tensor whose last dimension is contiguous; its rows stand at positions [begin, end).
template <typename T>
struct Strided {
  const T* data;
  int64_t row, head, begin, end;
  Strided head_offset(int64_t h) const { return {data + h * head, row, head, begin, end}; }
  const T* at(int64_t t) const { return data + (t - begin) * row; }
  bool has(int64_t t) const { return begin <= t && t < end; }
};

// A key/value head and the `heads` query heads that read it, whose number in the whole batch begins at `first`: what
// the forward pass reads and writes of them.
template <typename T>
struct ForwardGroup {
  int64_t first, heads;
  const int32_t* documents;  // of the batch row, or null
  Strided<T> q, k, v;
  T* out;
  int64_t out_row;
  float* lse;
};

// The same for the backward pass. With the whole group dk and dv have a single writer. The sums of dq go to `dq_sums`,
// as those of one of several tasks, or into dq if that is null.
template <typename T>
struct BackwardGroup {
  int64_t first, heads;
  const int32_t* documents;
  Strided<T> grad, q, k, v, out;
  const float* lse;
  T* dq;
  int64_t dq_row;
  T *dk, *dv;
  int64_t dk_row;
  float* dq_sums;
};

constexpr int64_t DECODE_KEYS = 256;  // keys of one task of attention_decode.inl

}  // namespace tapelm

#define TAPELM_KERNELS "attention.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

Tensor last_contiguous(const Tensor& x) { return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

template <typename T>
Strided<T> head_of(const Tensor& x, int64_t b, int64_t h, int64_t begin = 0) {
  return {x.const_data_ptr<T>() + b * x.stride(0) + h * x.stride(1), x.stride(2), x.stride(1), begin,
          begin + x.size(2)};
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double dropout_p,
           const std::optional<Tensor>& seed, const std::optional<Tensor>& documents) {
  check_dtype(q, "attention", "q");
  check_same_dtype(k, q, "attention", "k");
  check_same_dtype(v, q, "attention", "v");
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention: q, k and v must be (B, H, T, D)");
  TORCH_CHECK_VALUE(k.sizes() == v.sizes(), "attention: k and v differ in shape: ", k.sizes(), " and ", v.sizes());
  TORCH_CHECK_VALUE(q.size(0) == k.size(0) && q.size(3) == k.size(3), "attention: q ", q.sizes(), " and k ", k.sizes(),
                    " must agree in B and D");
  TORCH_CHECK_VALUE(k.size(2) > 0 || q.size(2) == 0, "attention: q has ", q.size(2), " rows and k none");
  TORCH_CHECK_VALUE(k.size(2) >= q.size(2) || !(causal || documents.has_value()), "attention: q has ", q.size(2),
                    " rows and k ", k.size(2), ", but queries are the last of the keys' positions where causal or "
                    "document_ids say what they see");
  TORCH_CHECK_VALUE(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0,
                    "attention: the query heads (", q.size(1), ") must be a multiple of the key heads (", k.size(1),
                    ")");
  TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p < 1.0, "attention: dropout_p must be in [0, 1), not ", dropout_p);
  TORCH_CHECK_VALUE(dropout_p == 0.0 || seed.has_value(), "attention: dropout needs a seed");
  if (seed.has_value())
    TORCH_CHECK_TYPE(seed->scalar_type() == at::kLong && seed->numel() == 1, "attention: seed must be one int64");
  if (documents.has_value()) {
    TORCH_CHECK_TYPE(documents->scalar_type() == at::kInt, "attention: document_ids must be int32");
    TORCH_CHECK_VALUE(documents->dim() == 2 && documents->size(0) == q.size(0) && documents->size(1) == k.size(2),
                      "attention: document_ids must have shape (B, S)");
  }
}

AttentionShape shape_of(const Tensor& q, const Tensor& k, bool causal, double scale, double dropout_p,
                        const std::optional<Tensor>& seed, const Tensor& documents) {
  return {q.size(1),
          q.size(2),
          k.size(2),
          q.size(3),
          causal || documents.defined() ? k.size(2) - q.size(2) : 0,
          causal,
          dropout_p > 0.0,
          static_cast<float>(scale),
          dropout_p > 0.0 ? static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) : 0,
          dropout_threshold(dropout_p),
          dropout_scale(dropout_p)};
}

const int32_t* documents_of(const Tensor& documents, int64_t b) {
  return documents.defined() ? documents.const_data_ptr<int32_t>() + b * documents.stride(0) : nullptr;
}

// Tasks that each head is cut into, so that the threads get equal shares also of few heads: at most one per block.
int64_t splits_of(int64_t heads, int64_t blocks) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  int64_t splits = 1;
  while (splits < blocks && heads * splits % threads != 0 && heads * splits < 8 * threads) ++splits;
  return splits;
}

// The least number of tasks per thread: waking another thread for less than some 50 us does not pay.
int64_t grain_of(const AttentionShape& s, int64_t group, int64_t splits) {
  return 1 + (int64_t{1} << 22) * splits / (group * s.T * s.S * s.D);
}

// (B, H, T, D) stored as (B, T, H, D): the layout that the projection after attention reads without a copy.
Tensor empty_heads(const Tensor& like) {
  const int64_t H = like.size(1), T = like.size(2), D = like.size(3);
  return empty_strided(like.sizes(), {T * H * D, D, H * D, 1}, like.scalar_type());
}

// Whether keys and values are better read as they are than packed for squares of queries and keys. Where no keys
// precede the queries they are packed, so that a row is the same bit for bit however many follow it.
bool is_decoding(const AttentionShape& s, at::ScalarType dtype) {
  return s.T <= (dtype == at::kFloat ? 16 : 8) && s.S > s.T && !s.dropout;
}

template <typename T>
void decode(const AttentionShape& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& documents, T* out,
            float* lse) {
  const int64_t Hkv = k.size(1), rows = s.Hq / Hkv * s.T, groups = q.size(0) * Hkv;
  const int64_t parts = chunk_count(s.S, DECODE_KEYS), row = s.D + 2;
  const int64_t stride = chunk_count(rows * row, 32) * 32;  // of tasks: no pair of cache lines is two threads'
  const Scratch found(groups * parts * stride);
  // Another thread pays from some 15 us on, of which reading takes as long as the products of 8 rows.
  // A few chunks for each thread: what documents hide is cheap, and single tasks would lie among other threads'.
  const bool pays = groups * s.S * s.D * (rows + 8) >= int64_t{1} << 20;
  const int64_t tasks = groups * parts, chunk = pays ? chunk_count(tasks, 4 * at::get_num_threads()) : tasks;
  for_chunks(tasks, chunk, [&](int64_t first, int64_t last) {
    const Scratch space(TAPELM_DISPATCH_PRODUCT(attention_decode_floats(s, rows)));
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / parts / Hkv, kv = task / parts % Hkv, key = task % parts * DECODE_KEYS;
      TAPELM_DISPATCH_PRODUCT(attention_decode_part<T>(
          s, rows, {key, std::min(s.S, key + DECODE_KEYS)}, documents_of(documents, b),
          head_of<T>(q, b, kv * (s.Hq / Hkv), s.first), head_of<T>(k, b, kv), head_of<T>(v, b, kv),
          found.get() + task * stride, space.get()));
    }
  });
  for (int64_t i = 0; i < groups * rows; ++i) {  // (b, h, t) in this order
    T* const to = out + ((i / s.T / s.Hq * s.T + i % s.T) * s.Hq + i / s.T % s.Hq) * s.D;
    TAPELM_DISPATCH_PRODUCT(attention_merge_parts<T>(s, found.get() + i / rows * parts * stride + i % rows * row, parts,
                                                     stride, to, lse + i));
  }
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q_, const Tensor& k_, const Tensor& v_, bool causal,
                                             double scale, double dropout_p, const std::optional<Tensor>& seed,
                                             const std::optional<Tensor>& document_ids) {
  check(q_, k_, v_, causal, dropout_p, seed, document_ids);
  const Tensor q = last_contiguous(q_), k = last_contiguous(k_), v = last_contiguous(v_);
  const Tensor documents = document_ids.has_value() ? document_ids->contiguous() : Tensor();
  const AttentionShape s = shape_of(q, k, causal, scale, dropout_p, seed, documents);
  const int64_t B = q.size(0), Hkv = k.size(1), group = Hkv ? s.Hq / Hkv : 1;
  Tensor out = empty_heads(q);
  Tensor lse = empty({B, s.Hq, s.T}, at::kFloat);
  if (out.numel() == 0) return {out, lse.zero_()};
  const int64_t splits = splits_of(B * Hkv, TAPELM_DISPATCH_PRODUCT(attention_forward_blocks(s)));
  with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    T* out_data = out.mutable_data_ptr<T>();
    float* lse_data = lse.mutable_data_ptr<float>();
    if (is_decoding(s, q.scalar_type())) return decode(s, q, k, v, documents, out_data, lse_data);
    at::parallel_for(0, B * Hkv * splits, grain_of(s, group, splits), [&](int64_t first, int64_t last) {
      const Scratch space(TAPELM_DISPATCH_PRODUCT(attention_forward_floats<T>(s)));
      for (int64_t task = first; task < last; ++task) {
        const int64_t b = task / splits / Hkv, kv = task / splits % Hkv, h = kv * group, head = b * s.Hq + h;
        const ForwardGroup<T> heads = {
            .first = head,
            .heads = group,
            .documents = documents_of(documents, b),
            .q = head_of<T>(q, b, h, s.first),
            .k = head_of<T>(k, b, kv),
            .v = head_of<T>(v, b, kv),
            .out = out_data + (b * s.T * s.Hq + h) * s.D,
            .out_row = s.Hq * s.D,
            .lse = lse_data + head * s.T,
        };
        TAPELM_DISPATCH_PRODUCT(attention_forward_group<T>(s, heads, {task % splits, splits}, space.get()));
      }
    });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_, const Tensor& q_, const Tensor& k_,
                                                      const Tensor& v_, const Tensor& out_, const Tensor& lse_,
                                                      bool causal, double scale, double dropout_p,
                                                      const std::optional<Tensor>& seed,
                                                      const std::optional<Tensor>& document_ids) {
  check(q_, k_, v_, causal, dropout_p, seed, document_ids);
  check_same_dtype(grad_, q_, "attention", "grad");
  TORCH_CHECK_VALUE(grad_.sizes() == q_.sizes() && out_.sizes() == q_.sizes(),
                    "attention: grad and out must have the shape of q");
  const Tensor q = last_contiguous(q_), k = last_contiguous(k_), v = last_contiguous(v_);
  const Tensor grad = last_contiguous(grad_), out = last_contiguous(out_), lse = lse_.contiguous();
  const Tensor documents = document_ids.has_value() ? document_ids->contiguous() : Tensor();
  const AttentionShape s = shape_of(q, k, causal, scale, dropout_p, seed, documents);
  const int64_t B = q.size(0), Hkv = k.size(1), group = Hkv ? s.Hq / Hkv : 1;
  Tensor dq = empty_heads(q), dk = empty_heads(k), dv = empty_heads(v);
  if (q.numel() == 0) return {dq, dk.zero_(), dv.zero_()};
  const int64_t splits = splits_of(B * Hkv, TAPELM_DISPATCH_PRODUCT(attention_backward_blocks(s)));
  const int64_t size = TAPELM_DISPATCH_PRODUCT(attention_sum_floats(s));  // of a head's sums of dq
  const Scratch dq_sums(splits > 1 ? splits * B * s.Hq * size : 0);
  with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    T* dq_data = dq.mutable_data_ptr<T>();
    T* dk_data = dk.mutable_data_ptr<T>();
    T* dv_data = dv.mutable_data_ptr<T>();
    at::parallel_for(0, B * Hkv * splits, grain_of(s, group, splits), [&](int64_t first, int64_t last) {
      const Scratch space(TAPELM_DISPATCH_PRODUCT(attention_backward_floats<T>(s)));
      for (int64_t task = first; task < last; ++task) {
        const int64_t b = task / splits / Hkv, kv = task / splits % Hkv, h = kv * group, head = b * s.Hq + h;
        const int64_t kv_start = (b * s.S * Hkv + kv) * s.D;
        const BackwardGroup<T> heads = {
            .first = head,
            .heads = group,
            .documents = documents_of(documents, b),
            .grad = head_of<T>(grad, b, h, s.first),
            .q = head_of<T>(q, b, h, s.first),
            .k = head_of<T>(k, b, kv),
            .v = head_of<T>(v, b, kv),
            .out = head_of<T>(out, b, h, s.first),
            .lse = lse.const_data_ptr<float>() + head * s.T,
            .dq = dq_data + (b * s.T * s.Hq + h) * s.D,
            .dq_row = s.Hq * s.D,
            .dk = dk_data + kv_start,
            .dv = dv_data + kv_start,
            .dk_row = Hkv * s.D,
            .dq_sums = splits > 1 ? dq_sums.get() + (task % splits * B * s.Hq + head) * size : nullptr,
        };
        TAPELM_DISPATCH_PRODUCT(attention_backward_group<T>(s, heads, {task % splits, splits}, space.get()));
      }
    });
    if (splits > 1)
      at::parallel_for(0, B * s.Hq, 1, [&](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; ++head)
          TAPELM_DISPATCH_PRODUCT(attention_write_dq<T>(s, dq_sums.get() + head * size, splits, B * s.Hq * size,
                                                dq_data + (head / s.Hq * s.T * s.Hq + head % s.Hq) * s.D, s.Hq * s.D));
      });
  });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, float dropout_p, Tensor? seed, "
      "Tensor? document_ids) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale, "
      "float dropout_p, Tensor? seed, Tensor? document_ids) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("attention_forward", &attention_forward);
  m.impl("attention_backward", &attention_backward);
}

TORCH_LIBRARY_IMPL(tapelm, Autograd, m) {
  m.impl("attention_forward", derivative("attention_backward(grad, q, k, v, out, lse, causal, scale, dropout_p, seed, "
                                         "document_ids) -> q, k, v"));
  m.impl("attention_backward", no_derivative());
}

}  // namespace tapelm
