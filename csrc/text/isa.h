// Whether the AVX2 and AVX-512 variants of csrc/text run, by the rule of csrc/simd.h (which needs PyTorch): where the CPU
// has them, unless TAPELM_ISA forces lower ones.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define TAPELM_TEXT_AVX2 1
#endif

namespace tapelm::text {

#ifdef TAPELM_TEXT_AVX2
inline bool isa_is_forced(const char* name) {
  const char* forced = std::getenv("TAPELM_ISA");
  return forced != nullptr && std::strcmp(forced, name) == 0;
}
#endif

inline bool use_avx2() {
#ifdef TAPELM_TEXT_AVX2
  static const bool chosen = [] {
    return !isa_is_forced("generic") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
  }();
  return chosen;
#else
  return false;
#endif
}

// Those that compress bytes: Intel since Ice Lake, AMD since Zen 4.
inline bool use_avx512() {
#ifdef TAPELM_TEXT_AVX2
  static const bool chosen = use_avx2() && !isa_is_forced("avx2") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
  return chosen;
#else
  return false;
#endif
}

}  // namespace tapelm::text
