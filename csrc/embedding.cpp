// Rows of a token table plus rows of a position table, then dropout; the backward sums gradients by token and by
// position in the order of the rows, whatever the threads. The dropout mask is that of dropout.cpp.
#include "autograd.h"
#include "common.h"

#include <vector>

#define TAPELM_KERNELS "embedding.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check(const Tensor& ids, const Tensor& tokens, const Tensor& positions) {
  check_dtype(tokens, "embedding", "tokens");
  check_same_dtype(positions, tokens, "embedding", "positions");
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt,
                   "embedding: ids must be int64 or int32, not ", ids.scalar_type());
  TORCH_CHECK_VALUE(ids.dim() >= 1, "embedding: ids needs at least one dimension");
  TORCH_CHECK_VALUE(tokens.dim() == 2 && positions.dim() == 2 && tokens.size(1) == positions.size(1),
                    "embedding: tokens ", tokens.sizes(), " and positions ", positions.sizes(),
                    " must be matrices of one width");
  TORCH_CHECK_VALUE(ids.size(-1) <= positions.size(0), "embedding: positions has ", positions.size(0),
                    " rows, ids needs ", ids.size(-1));
}

template <typename Body>
void with_ids(const Tensor& ids, Body body) {
  if (ids.scalar_type() == at::kLong)
    body(ids.const_data_ptr<int64_t>());
  else
    body(ids.const_data_ptr<int32_t>());
}

Tensor embedding_forward(const Tensor& ids_, const Tensor& tokens_, const Tensor& positions_, double p,
                         const OptionalTensor& seed) {
  check(ids_, tokens_, positions_);
  const Dropout dropout = make_dropout("embedding", p, seed);
  const Tensor ids = ids_.contiguous(), tokens = tokens_.contiguous(), positions = positions_.contiguous();
  const int64_t vocabulary = tokens.size(0), C = tokens.size(1), time = ids.size(-1);
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(C);
  Tensor y = empty(shape, tokens.scalar_type());
  const bool far = is_far(y, C);
  with_ids(ids, [&](const auto* each) {
    const auto wrong =
        std::find_if(each, each + ids.numel(), [&](int64_t id) { return id < 0 || id >= vocabulary; });
    TORCH_CHECK_VALUE(wrong == each + ids.numel(), "embedding: ids has ", *wrong, "; tokens has ", vocabulary, " rows");
    with_dtype(tokens, [&](auto zero) {
      using T = decltype(zero);
      for_chunks(ids.numel(), rows_per_task(C), [&](int64_t begin, int64_t end) {
        TAPELM_DISPATCH(embedding_rows(each, tokens.const_data_ptr<T>(), positions.const_data_ptr<T>(),
                                       y.mutable_data_ptr<T>(), time, C, dropout, begin, end, far));
      });
    });
  });
  return y;
}

// Rows grouped by key, in ascending order within a group: those of key k are rows[start[k]] ... rows[start[k + 1] - 1].
struct Groups {
  template <typename Key>
  Groups(int64_t keys, int64_t count, Key key) : start(keys + 1), rows(count) {
    for (int64_t row = 0; row < count; ++row) ++start[key(row) + 1];
    for (int64_t k = 0; k < keys; ++k) start[k + 1] += start[k];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t row = 0; row < count; ++row) rows[next[key(row)]++] = row;
  }

  std::vector<int64_t> start, rows;
};

// The sum of each group's rows of grad.
Tensor sum_groups(const Groups& groups, const Tensor& grad, int64_t C, const Dropout& dropout) {
  const int64_t keys = static_cast<int64_t>(groups.start.size()) - 1;
  Tensor out = empty({keys, C}, grad.scalar_type());
  const bool far = is_far(out, C);
  with_dtype(grad, [&](auto zero) {
    using T = decltype(zero);
    for_chunks(keys, rows_per_task(C), [&](int64_t begin, int64_t end) {
      const Scratch sums(C);
      for (int64_t k = begin; k < end; ++k)
        TAPELM_DISPATCH(embedding_sum(grad.const_data_ptr<T>(), groups.rows.data() + groups.start[k],
                                      groups.start[k + 1] - groups.start[k], C, dropout, sums.get(),
                                      out.mutable_data_ptr<T>() + k * C, far));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> embedding_backward(const Tensor& grad_, const Tensor& ids_, const Tensor& tokens,
                                              const Tensor& positions, double p, const OptionalTensor& seed) {
  check(ids_, tokens, positions);
  check_same_dtype(grad_, tokens, "embedding", "grad");
  const Dropout dropout = make_dropout("embedding", p, seed);
  const Tensor grad = grad_.contiguous(), ids = ids_.contiguous();
  const int64_t C = tokens.size(1), count = ids.numel(), time = ids.size(-1);
  TORCH_CHECK_VALUE(grad.numel() == count * C, "embedding: grad ", grad.sizes(), " does not fit ids ", ids.sizes());
  Tensor dtokens;
  with_ids(ids, [&](const auto* each) {
    dtokens = sum_groups(Groups(tokens.size(0), count, [&](int64_t row) { return each[row]; }), grad, C, dropout);
  });
  const Groups by_position(positions.size(0), count, [&](int64_t row) { return row % time; });
  return {dtokens, sum_groups(by_position, grad, C, dropout)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def("embedding_forward(Tensor ids, Tensor tokens, Tensor positions, float dropout_p, Tensor? seed) -> Tensor y");
  m.def(
      "embedding_backward(Tensor grad, Tensor ids, Tensor tokens, Tensor positions, float dropout_p, Tensor? seed) -> "
      "(Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("embedding_forward", &embedding_forward);
  m.impl("embedding_backward", &embedding_backward);
}

TORCH_LIBRARY_IMPL(tapelm, Autograd, m) {
  m.impl("embedding_forward",
         derivative("embedding_backward(grad, ids, tokens, positions, dropout_p, seed) -> tokens, positions"));
  m.impl("embedding_backward", no_derivative());
}

}  // namespace tapelm
