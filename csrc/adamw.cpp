// AdamW (Loshchilov & Hutter 2019) over a list of tensors in one parallel pass, and the global gradient norm.
//
// Both implementations, this and the Triton kernels, give the same bits: the arithmetic is in the same order, and
// neither contracts a product and a sum into one rounding.
#include "common.h"
#include "simd.h"

namespace tapelm {

struct AdamWStep {
  float grad_scale, rate1, beta2, rate2, eps;  // rate1 = 1 - beta1
  float decay;                    // 1 - lr * weight_decay
  float step_size;                // lr / (1 - beta1^step)
  float inverse_root_correction2; // 1 / sqrt(1 - beta2^step)
  uint64_t key;                   // of the random words
  bool bypass_cache;              // for parameters that are only written
};

constexpr int64_t kBlock = 256;  // elements of an 8-bit moment that share a scale

// How a parameter and its moments are stored. A half-precision parameter without a master is rounded stochastically.
template <typename T, typename G, bool MASTER, bool EIGHT_BITS>
struct AdamWRange {
  using Param = T;
  using Moment = std::conditional_t<EIGHT_BITS, uint8_t, float>;
  static constexpr bool master_weights = MASTER, eight_bits = EIGHT_BITS;
  static constexpr bool stochastic = !MASTER && !std::is_same_v<T, float>;

  T* param;
  const G* grad;
  Moment *exp_avg, *exp_avg_sq;
  float *master, *exp_avg_scale, *exp_avg_sq_scale;  // null where there is none
  uint64_t first;                                    // index of the first element among the random words
  int64_t n;
};

}  // namespace tapelm

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#define TAPELM_KERNELS "adamw.inl"
#include "simd_targets.h"
#pragma GCC pop_options

namespace tapelm {
namespace {

constexpr int64_t kChunk = 1 << 16;            // elements per task; a multiple of kBlock
constexpr int64_t kBeyondCache = int64_t{1} << 21;  // elements of a step that evicts its own results from the cache

// The chunks of all tensors in one list, so that many small tensors and a few large ones load the threads alike.
struct Chunk {
  size_t tensor;
  int64_t begin, end;
};

std::vector<Chunk> chunks_of(at::TensorList tensors) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < tensors.size(); ++t)
    for (int64_t i = 0; i < tensors[t].numel(); i += kChunk)
      chunks.push_back({t, i, std::min(tensors[t].numel(), i + kChunk)});
  return chunks;
}

Tensor grad_norm(at::TensorList grads_) {
  std::vector<Tensor> grads;
  grads.reserve(grads_.size());
  for (const Tensor& g : grads_) {
    check_dtype(g, "grad_norm", "grads");
    grads.push_back(g.contiguous());
  }
  const std::vector<Chunk> chunks = chunks_of(grads);
  std::vector<double> partial(chunks.size());
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = chunks[c];
      const Tensor& g = grads[chunk.tensor];
      with_dtype(g, [&](auto zero) {
        const auto* data = g.const_data_ptr<decltype(zero)>() + chunk.begin;
        partial[c] = TAPELM_DISPATCH(sum_of_squares(data, chunk.end - chunk.begin));
      });
    }
  });
  double total = 0.0;
  for (const double p : partial) total += p;
  return at::scalar_tensor(std::sqrt(total), at::dtype(at::kFloat));
}

// `list` has a contiguous tensor of `dtype` for each of `params`, with the parameter's size or one element per block.
void check_state(at::TensorList list, at::TensorList params, at::ScalarType dtype, bool per_block, const char* name) {
  TORCH_CHECK_VALUE(list.size() == params.size(), "adamw: ", name, " has ", list.size(), " tensors for ", params.size(),
                    " params");
  for (size_t i = 0; i < list.size(); ++i) {
    TORCH_CHECK_TYPE(list[i].scalar_type() == dtype, "adamw: ", name, " is ", list[i].scalar_type(), " but ", dtype,
                     " is needed");
    const int64_t n = params[i].numel(), needed = per_block ? chunk_count(n, kBlock) : n;
    TORCH_CHECK_VALUE(list[i].is_contiguous() && list[i].numel() == needed, "adamw: ", name,
                      " must be contiguous with ", needed, " elements, but has ", list[i].numel());
  }
}

// What a step is given for each parameter; empty lists are those that its kind of step does without.
struct Lists {
  at::TensorList params, grads, exp_avg, exp_avg_sq, masters, exp_avg_scale, exp_avg_sq_scale;
  at::IntArrayRef first_word;

  bool has_masters() const { return !masters.empty(); }
  bool has_eight_bits() const { return !exp_avg_scale.empty(); }
  bool is_random() const { return has_eight_bits() || (params[0].scalar_type() != at::kFloat && !has_masters()); }
};

void check(const Lists& x) {
  const size_t n = x.params.size();
  TORCH_CHECK_VALUE(x.grads.size() == n, "adamw: grads has ", x.grads.size(), " tensors for ", n, " params");
  const at::ScalarType dtype = x.params[0].scalar_type(), grad_dtype = x.grads[0].scalar_type();
  check_dtype(x.params[0], "adamw", "params");
  TORCH_CHECK_TYPE(grad_dtype == dtype || grad_dtype == at::kFloat, "adamw: grads is ", grad_dtype, " but ", dtype,
                   " or float is needed");
  TORCH_CHECK_VALUE(!x.has_masters() || dtype != at::kFloat,
                    "adamw: masters are for bfloat16 parameters, and only for them");
  const bool random = x.is_random();
  TORCH_CHECK_VALUE(!random || x.first_word.size() == n, "adamw: first_word must have an index for each parameter");
  for (size_t i = 0; i < n; ++i) {
    check_same_dtype(x.params[i], x.params[0], "adamw", "params");
    check_same_dtype(x.grads[i], x.grads[0], "adamw", "grads");
    TORCH_CHECK_VALUE(x.params[i].is_contiguous(), "adamw: params must be contiguous");
    TORCH_CHECK_VALUE(x.grads[i].sizes() == x.params[i].sizes(), "adamw: grads must have the shapes of params");
    TORCH_CHECK_VALUE(!random || x.first_word[i] % 4 == 0, "adamw: first_word must be multiples of 4");
  }
  const at::ScalarType moment_dtype = x.has_eight_bits() ? at::kByte : at::kFloat;
  check_state(x.exp_avg, x.params, moment_dtype, false, "exp_avg");
  check_state(x.exp_avg_sq, x.params, moment_dtype, false, "exp_avg_sq");
  if (x.has_masters()) check_state(x.masters, x.params, at::kFloat, false, "masters");
  if (x.has_eight_bits()) {
    check_state(x.exp_avg_scale, x.params, at::kFloat, true, "exp_avg_scale");
    check_state(x.exp_avg_sq_scale, x.params, at::kFloat, true, "exp_avg_sq_scale");
  }
}

// The elements of a chunk in all of the lists; `grads` are contiguous.
template <typename Range, typename T, typename G>
Range range_of(const Lists& x, const std::vector<Tensor>& grads, const Chunk& chunk) {
  using Moment = typename Range::Moment;
  const auto [t, begin, end] = chunk;
  return {
      x.params[t].mutable_data_ptr<T>() + begin,
      grads[t].const_data_ptr<G>() + begin,
      x.exp_avg[t].mutable_data_ptr<Moment>() + begin,
      x.exp_avg_sq[t].mutable_data_ptr<Moment>() + begin,
      x.has_masters() ? x.masters[t].mutable_data_ptr<float>() + begin : nullptr,
      x.has_eight_bits() ? x.exp_avg_scale[t].mutable_data_ptr<float>() + begin / kBlock : nullptr,
      x.has_eight_bits() ? x.exp_avg_sq_scale[t].mutable_data_ptr<float>() + begin / kBlock : nullptr,
      x.is_random() ? static_cast<uint64_t>(x.first_word[t] + begin) : 0,
      end - begin,
  };
}

// Updates all parameters, of type T with gradients of type G.
template <typename T, typename G, bool MASTER>
void update(const Lists& x, const AdamWStep& s) {
  std::vector<Tensor> grads;
  grads.reserve(x.grads.size());
  for (const Tensor& grad : x.grads) grads.push_back(grad.contiguous());
  const std::vector<Chunk> chunks = chunks_of(x.params);

  // Backwards: the gradients that the norm has read last are still in the cache.
  const auto run = [&]<typename Range>(std::type_identity<Range>) {
    at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t c = last - 1; c >= first; --c) {
        const Range range = range_of<Range, T, G>(x, grads, chunks[c]);
        TAPELM_DISPATCH(adamw_range(range, s));
      }
    });
  };
  if (x.has_eight_bits())
    run(std::type_identity<AdamWRange<T, G, MASTER, true>>{});
  else
    run(std::type_identity<AdamWRange<T, G, MASTER, false>>{});
}

void adamw_step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                 at::TensorList masters, at::TensorList exp_avg_scale, at::TensorList exp_avg_sq_scale,
                 at::IntArrayRef first_word, const Tensor& grad_scale, double lr, double beta1, double beta2,
                 double eps, double weight_decay, int64_t step, int64_t key) {
  if (params.empty()) return;
  TORCH_CHECK_VALUE(step >= 1, "adamw: step counts from 1");
  const Lists x{params, grads, exp_avg, exp_avg_sq, masters, exp_avg_scale, exp_avg_sq_scale, first_word};
  check(x);
  int64_t elements = 0;
  for (const Tensor& param : params) elements += param.numel();
  const AdamWStep s{
      grad_scale.item<float>(),
      static_cast<float>(1.0 - beta1),
      static_cast<float>(beta2),
      static_cast<float>(1.0 - beta2),
      static_cast<float>(eps),
      static_cast<float>(1.0 - lr * weight_decay),
      static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(step)))),
      static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, static_cast<double>(step)))),
      static_cast<uint64_t>(key),
      elements > kBeyondCache,
  };
  if (params[0].scalar_type() == at::kFloat) return update<float, float, false>(x, s);
  with_dtype(grads[0], [&](auto zero) {
    using G = decltype(zero);
    if (x.has_masters())
      update<bf16, G, true>(x, s);
    else
      update<bf16, G, false>(x, s);
  });
}

// Zeros for a moment or a master of the parameter `like`, on huge pages.
Tensor adamw_state(const Tensor& like, at::ScalarType dtype) { return empty(like.sizes(), dtype).zero_(); }

Tensor adamw_state_elsewhere(const Tensor& like, at::ScalarType dtype) {
  return at::zeros(like.sizes(), like.options().dtype(dtype));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def("grad_norm(Tensor[] grads) -> Tensor");
  m.def(
      "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] "
      "masters, Tensor(e!)[] exp_avg_scale, Tensor(f!)[] exp_avg_sq_scale, int[] first_word, Tensor grad_scale, float "
      "lr, float beta1, float beta2, float eps, float weight_decay, int step, int key) -> ()");
  m.def("adamw_state(Tensor like, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("grad_norm", &grad_norm);
  m.impl("adamw_step_", &adamw_step_);
  m.impl("adamw_state", &adamw_state);
}

TORCH_LIBRARY_IMPL(tapelm, CompositeExplicitAutograd, m) { m.impl("adamw_state", &adamw_state_elsewhere); }

}  // namespace tapelm
