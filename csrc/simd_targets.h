// Compiles TAPELM_KERNELS (a file name in quotes) once per instruction set. No include guard: one use per op file.
#ifndef TAPELM_KERNELS
#error "define TAPELM_KERNELS before including simd_targets.h"
#endif
#include "simd.h"

// On x86 only the tests and CPUs of before 2013 run this one: it is compiled quickly instead, and functions of many
// instructions are called, not inlined. So that the logic of pairs is executed by the tests on any machine, it has them
// too. Elsewhere its vectors are the 128 bits that other CPUs have. Armv8 has 32 of them: GCC takes one for each row of
// the left operand, so that tiles of 8 rows fit, and 3 of the sums of 12 rows were on the stack.
#ifdef TAPELM_X86
#pragma GCC push_options
#pragma GCC optimize("O1")
#define TAPELM_LONG __attribute__((noinline)) inline
#define TAPELM_PAIRS 1
#define TAPELM_WIDTH 16
#define TAPELM_ROWS 6
#else
#define TAPELM_LONG TAPELM_INLINE
#define TAPELM_WIDTH 4
#define TAPELM_ROWS 8
#endif
#define TAPELM_TARGET generic
namespace tapelm::generic {
#include "simd_vector.inl"
#include TAPELM_KERNELS
}  // namespace tapelm::generic
#undef TAPELM_PAIRS
#undef TAPELM_WIDTH
#undef TAPELM_TARGET
#undef TAPELM_ROWS

#ifdef TAPELM_X86
#undef TAPELM_LONG
#define TAPELM_LONG TAPELM_INLINE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define TAPELM_AVX2 1
#define TAPELM_WIDTH 8
#define TAPELM_TARGET avx2
#define TAPELM_ROWS 6
namespace tapelm::avx2 {
#include "simd_vector.inl"
#include TAPELM_KERNELS
}  // namespace tapelm::avx2
#undef TAPELM_AVX2
#undef TAPELM_WIDTH
#undef TAPELM_TARGET
#undef TAPELM_ROWS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define TAPELM_AVX512 1
#define TAPELM_WIDTH 16
#define TAPELM_TARGET avx512
#define TAPELM_ROWS 12
namespace tapelm::avx512 {
#include "simd_vector.inl"
#include TAPELM_KERNELS
}  // namespace tapelm::avx512
#undef TAPELM_TARGET
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#define TAPELM_AVX512BF16 1
#define TAPELM_PAIRS 1
#define TAPELM_TARGET avx512bf16
namespace tapelm::avx512bf16 {
#include "simd_vector.inl"
#include TAPELM_KERNELS
}  // namespace tapelm::avx512bf16
#undef TAPELM_AVX512BF16
#undef TAPELM_PAIRS
#undef TAPELM_AVX512
#undef TAPELM_WIDTH
#undef TAPELM_TARGET
#undef TAPELM_ROWS
#pragma GCC pop_options

#endif
#undef TAPELM_LONG
#undef TAPELM_KERNELS
