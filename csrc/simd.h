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

// Loops written in AVX-512's own instructions, those that Ice Lake and Zen 4 brought; has_avx512()
// chooses them.
#if defined(__x86_64__) && defined(__linux__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the values that its own intrinsics leave undefined on purpose (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include <cstdlib>
#include <cstring>

#define FASTEMBED_AVX512                                                            \
  __attribute__((                                                                   \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,bmi2," \
             "popcnt")))

namespace fastembed::cpu {

// The environment variable FASTEMBED_SIMD=avx512|avx2|portable is the most that hand-written loops
// may use, so that tests see all of them on one machine; read once.
inline bool has_avx512() {
  static const bool has = [] {
    const char* most = std::getenv("FASTEMBED_SIMD");
    return (most == nullptr || std::strcmp(most, "avx512") == 0) &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  }();
  return has;
}

}  // namespace fastembed::cpu
#endif
