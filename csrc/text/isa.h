// The instruction sets, which of them TAPELM_ISA allows, and whether the AVX2 and AVX-512 variants of csrc/text run.
// Needs no PyTorch; csrc/simd.h, which does, chooses among the variants of the kernels.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define TAPELM_TEXT_AVX2 1
#endif

namespace tapelm {

enum class Isa { generic, avx2, avx512, avx512bf16 };

// The one that TAPELM_ISA={generic,avx2,avx512,avx512bf16} forces (tests, debugging), if any.
inline std::optional<Isa> forced_isa() {
  static const std::optional<Isa> forced = []() -> std::optional<Isa> {
    const char* const value = std::getenv("TAPELM_ISA");
    const std::string names[] = {"generic", "avx2", "avx512", "avx512bf16"}, name = value == nullptr ? "" : value;
    if (name.empty()) return std::nullopt;
    const auto found = std::find(std::begin(names), std::end(names), name);
    if (found == std::end(names))
      throw std::invalid_argument("TAPELM_ISA must be generic, avx2, avx512 or avx512bf16, not '" + name + "'");
    return static_cast<Isa>(found - std::begin(names));
  }();
  return forced;
}

namespace text {

inline bool use_avx2() {
#ifdef TAPELM_TEXT_AVX2
  static const bool chosen = forced_isa().value_or(Isa::avx2) >= Isa::avx2 && __builtin_cpu_supports("avx2") &&
                             __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                             __builtin_cpu_supports("lzcnt");
  return chosen;
#else
  return false;
#endif
}

// Those that compress bytes: Intel since Ice Lake, AMD since Zen 4.
inline bool use_avx512() {
#ifdef TAPELM_TEXT_AVX2
  static const bool chosen = use_avx2() && forced_isa().value_or(Isa::avx512) >= Isa::avx512 &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512vbmi2");
  return chosen;
#else
  return false;
#endif
}

}  // namespace text
}  // namespace tapelm
