// NF4 quantization of weights in blocks (Dettmers et al. 2023), byte for byte that of bitsandbytes.
#include "common.h"
#include "nf4.h"

#include <ATen/ops/mean.h>

#define TAPELM_KERNELS "nf4.inl"
#include "simd_targets.h"

namespace tapelm {

template <typename T>
void nf4_dequantize_range(const Nf4& q, int64_t first, int64_t count, T* out) {
  TAPELM_DISPATCH(dequantize_range(q, first, count, out));
}

template void nf4_dequantize_range(const Nf4&, int64_t, int64_t, float*);
template void nf4_dequantize_range(const Nf4&, int64_t, int64_t, bf16*);

namespace {

constexpr int64_t kGrain = 16384;  // elements per task

void check_block_size(int64_t size, const char* op) {
  TORCH_CHECK_VALUE(size >= 32 && size <= 4096 && (size & (size - 1)) == 0, op,
                    ": block_size must be a power of two from 32 to 4096, not ", size);
}

void check_part(const Tensor& t, at::ScalarType dtype, int64_t size, const char* op, const char* name) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, op, ": ", name, " is ", t.scalar_type(), " but ", dtype, " is needed");
  TORCH_CHECK_VALUE(t.numel() == size && t.is_contiguous(), op, ": ", name, " must be contiguous and have ", size,
                    " elements, not ", t.numel());
}

// The scales of scales: each block's mean-free scales divided by their largest, as indices into the 256 sorted values
// of a map. As bitsandbytes does on the CPU, quotients are first rounded to a grid of 65536 values; then the nearest
// value of the map is chosen, the lower one of two.
class ScaleQuantizer {
 public:
  explicit ScaleQuantizer(const float* map) {
    for (int i = 0; i < 255; ++i) middle_[i] = 0.5f * (map[i] + map[i + 1]);
    for (int i = 0, code = 0; i < 256; ++i) start_[i] = static_cast<uint8_t>(code = advance(code, 256 * i));
  }

  float quantize(const float* scales, float offset, int64_t count, uint8_t* out) const {
    float values[kNested], largest = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      values[i] = scales[i] - offset;
      largest = std::fabs(values[i]) > largest ? std::fabs(values[i]) : largest;
    }
    for (int64_t i = 0; i < count; ++i) {
      const float x = values[i] * (1.0f / largest);
      // Rounded before the sum, as in Nf4::scale. NaN (largest is 0) becomes 0.
      const volatile float scaled = (x + 1.0f) * 0.5f * 65535.0f;
      const float place = scaled + 0.5f;
      const int grid = place > 0.0f ? static_cast<int>(std::min(place, 65535.0f)) : 0;
      out[i] = static_cast<uint8_t>(advance(start_[grid / 256], grid));
    }
    return largest;
  }

 private:
  int advance(int code, int grid) const {
    const float value = 2.0f * static_cast<float>(grid) / 65535.0f - 1.0f;
    while (code < 255 && middle_[code] < value) ++code;
    return code;
  }

  float middle_[255];
  uint8_t start_[256];
};

std::tuple<Tensor, Tensor, Tensor, Tensor> nf4_quantize(const Tensor& w_, int64_t block_size,
                                                        const std::optional<Tensor>& map) {
  check_dtype(w_, "nf4_quantize", "w");
  check_block_size(block_size, "nf4_quantize");
  const Tensor w = w_.contiguous();
  const int64_t numel = w.numel(), blocks = chunk_count(numel, block_size);
  Tensor packed = empty({chunk_count(numel, 2), 1}, at::kByte), absmax = empty({blocks}, at::kFloat);
  with_dtype(w, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, blocks, chunk_count(kGrain, block_size), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * block_size, count = std::min(block_size, numel - first);
        absmax.mutable_data_ptr<float>()[b] =
            TAPELM_DISPATCH(quantize_block(w.const_data_ptr<T>() + first, count, count == block_size,
                                           packed.mutable_data_ptr<uint8_t>() + first / 2));
      }
    });
  });
  if (!map.has_value()) return {packed, absmax, empty({0}, at::kFloat), empty({0}, at::kFloat)};
  check_part(*map, at::kFloat, 256, "nf4_quantize", "map");
  Tensor absmax8 = empty({blocks}, at::kByte), nested = empty({chunk_count(blocks, kNested)}, at::kFloat);
  const Tensor offset = blocks ? at::mean(absmax) : at::zeros({}, absmax.options());
  const ScaleQuantizer quantizer(map->const_data_ptr<float>());
  at::parallel_for(0, nested.numel(), chunk_count(kGrain, kNested), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      nested.mutable_data_ptr<float>()[i] = quantizer.quantize(
          absmax.const_data_ptr<float>() + i * kNested, offset.const_data_ptr<float>()[0],
          std::min(kNested, blocks - i * kNested), absmax8.mutable_data_ptr<uint8_t>() + i * kNested);
  });
  return {packed, absmax8, nested, offset};
}

Tensor nf4_dequantize(const Tensor& packed, at::TensorList state, int64_t block_size, at::IntArrayRef shape,
                      at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16,
                   "nf4_dequantize: dtype must be float32 or bfloat16 on the CPU, not ", dtype);
  Tensor out = empty(shape, dtype);
  const Nf4 q = nf4_view(packed, state, block_size, out.numel(), "nf4_dequantize");
  with_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    // Tasks begin at a block, so that they begin at a byte.
    const int64_t blocks = chunk_count(out.numel(), block_size);
    at::parallel_for(0, blocks, chunk_count(kGrain, block_size), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * block_size, last = std::min(end * block_size, out.numel());
      nf4_dequantize_range(q, first, last - first, out.mutable_data_ptr<T>() + first);
    });
  });
  return out;
}

}  // namespace

Nf4 nf4_view(const Tensor& packed, at::TensorList state, int64_t block_size, int64_t numel, const char* op) {
  check_block_size(block_size, op);
  const int64_t blocks = chunk_count(numel, block_size);
  check_part(packed, at::kByte, chunk_count(numel, 2), op, "packed");
  TORCH_CHECK_VALUE(state.size() == 1 || state.size() == 4, op,
                    ": state must be [absmax] or [absmax, nested_absmax, offset, map]");
  Nf4 q{.packed = packed.const_data_ptr<uint8_t>(), .block = block_size};
  if (state.size() == 1) {
    check_part(state[0], at::kFloat, blocks, op, "absmax");
    q.absmax = state[0].const_data_ptr<float>();
    return q;
  }
  check_part(state[0], at::kByte, blocks, op, "absmax");
  check_part(state[1], at::kFloat, chunk_count(blocks, kNested), op, "nested_absmax");
  check_part(state[2], at::kFloat, 1, op, "offset");
  check_part(state[3], at::kFloat, 256, op, "map");
  q.absmax8 = state[0].const_data_ptr<uint8_t>();
  q.nested = state[1].const_data_ptr<float>();
  q.offset = state[2].const_data_ptr<float>()[0];
  q.map = state[3].const_data_ptr<float>();
  return q;
}

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def("nf4_quantize(Tensor w, int block_size, Tensor? map) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("nf4_dequantize(Tensor packed, Tensor[] state, int block_size, int[] shape, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("nf4_quantize", &nf4_quantize);
  m.impl("nf4_dequantize", &nf4_dequantize);
}

}  // namespace tapelm
