// Run-time choice of instruction set for the CPU kernels.
#pragma once

// The compiler makes one copy of a FASTEMBED_SIMD function per instruction set and the loader
// picks one on the machine that runs. What the function calls must be FASTEMBED_INLINE: a
// call that stays a call leaves for code of the lowest instruction set.
//
// x86-64-v4 is AVX-512 with the byte and word instructions: float16 takes half the time that
// it takes with plain avx512f, uint16 three quarters. GCC knows the name from version 12 on.
#if defined(__x86_64__) && defined(__linux__)
#if !defined(__clang__) && __GNUC__ >= 12
#define FASTEMBED_SIMD __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define FASTEMBED_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define FASTEMBED_SIMD
#endif
#define FASTEMBED_INLINE inline __attribute__((always_inline))
