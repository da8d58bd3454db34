// The only place that chooses an instruction set.
//
// Every kernel file (x.inl) is written once, on the vectors of simd_vector.inl, and compiled once per instruction set
// by simd_targets.h into the namespaces generic, avx2, avx512 and avx512bf16. TAPELM_DISPATCH calls the one that
// isa() chooses, TAPELM_DISPATCH_PRODUCT, for matrix products and attention, that of product_isa().
// `generic` has no instruction beyond the compiler's baseline. On x86 it has the vector width and the pairs of bfloat16
// of the widest variant, so that this logic is executed by the tests on any machine; that of widened bfloat16 is
// executed by avx2. On other CPUs it is the only one, of vectors of 128 bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define TAPELM_X86 1
#endif

#include <c10/util/BFloat16.h>

#include "text/isa.h"

namespace tapelm {

inline Isa best_isa() {
#ifdef TAPELM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}

// Whether the dot product of bfloat16 pairs is slower than two float32 products. Emerald Rapids does one in the time of
// four float32 instructions (measured), and so, we assume, do all of Intel's CPUs with AMX; Cooper Lake has no
// other way.
inline bool has_slow_dot_product() {
#ifdef TAPELM_X86
  return __builtin_cpu_is("intel") && !__builtin_cpu_is("cooperlake");
#else
  return false;
#endif
}

// Whether the CPU multiplies bfloat16 matrices in tiles: bit 24 of edx in cpuid leaf 7.
inline bool has_amx() {
#ifdef TAPELM_X86
  static const bool found = [] {  // once: on a virtual machine cpuid is a call of the host
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 24 & 1) != 0;
  }();
  return found;
#else
  return false;
#endif
}

// Whether MKL uses AVX-512 here: on other vendors' CPUs it stays with AVX2, half as fast.
inline bool mkl_has_avx512() {
#ifdef TAPELM_X86
  return best_isa() >= Isa::avx512 && __builtin_cpu_is("intel");
#else
  return false;
#endif
}

inline bool isa_is_forced() { return forced_isa().has_value(); }

[[gnu::noinline, gnu::cold]] inline Isa choose_isa() {
  const Isa wanted = forced_isa().value_or(best_isa());
  if (wanted > best_isa())
    throw std::invalid_argument("TAPELM_ISA=" + std::string(std::getenv("TAPELM_ISA")) +
                                " is not supported by this CPU");
  return wanted;
}

// The best one, chosen at the first call, or the one that TAPELM_ISA forces. Small: some loops call it for each block.
inline Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

// isa(), but avx512, which multiplies float32, where the dot product of avx512bf16 is the slower one. Its rounding then
// keeps denormal numbers, which the instruction of avx512bf16 flushes to zero.
inline Isa product_isa() {
  static const Isa chosen =
      isa() == Isa::avx512bf16 && !isa_is_forced() && has_slow_dot_product() ? Isa::avx512 : isa();
  return chosen;
}

}  // namespace tapelm

#ifdef TAPELM_X86
#define TAPELM_DISPATCH_ON(isa, call)                    \
  ((isa) == ::tapelm::Isa::avx512bf16 ? avx512bf16::call \
   : (isa) == ::tapelm::Isa::avx512   ? avx512::call     \
   : (isa) == ::tapelm::Isa::avx2     ? avx2::call       \
                                      : generic::call)
#else
#define TAPELM_DISPATCH_ON(isa, call) (generic::call)
#endif
#define TAPELM_DISPATCH(call) TAPELM_DISPATCH_ON(::tapelm::isa(), call)
#define TAPELM_DISPATCH_PRODUCT(call) TAPELM_DISPATCH_ON(::tapelm::product_isa(), call)

#define TAPELM_INLINE __attribute__((always_inline)) inline
