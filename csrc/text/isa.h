// Whether the AVX2 variants of csrc/text run, by the rule of csrc/simd.h (which needs PyTorch): where the CPU has them,
// unless TAPELM_ISA=generic.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define TAPELM_TEXT_AVX2 1
#endif

namespace tapelm::text {

inline bool use_avx2() {
#ifdef TAPELM_TEXT_AVX2
  static const bool chosen = [] {
    const char* forced = std::getenv("TAPELM_ISA");
    return (forced == nullptr || std::strcmp(forced, "generic") != 0) && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
  }();
  return chosen;
#else
  return false;
#endif
}

}  // namespace tapelm::text
