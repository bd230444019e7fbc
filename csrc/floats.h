// bfloat16 and float16 to float32 and back on the CPU: exact, and to nearest even. Selects
// instead of branches and integers instead of F16C, so that every loop over them is a vector.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace fastembed::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FASTEMBED_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTEMBED_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTEMBED_INLINE float widen(float value) { return value; }

FASTEMBED_INLINE float widen(BFloat16 value) {
  return float_of_bits(static_cast<uint32_t>(value.bits) << 16);
}

FASTEMBED_INLINE float widen(Float16 value) {
  constexpr uint32_t kRebias = 112u << 23;    // exponent bias 15 to 127
  constexpr uint32_t kSmallest = 113u << 23;  // 2^-14, the smallest normal float16
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t shifted = magnitude << 13;
  const uint32_t normal = shifted + kRebias;
  // A subnormal's bits are a fraction of 2^-14: put them behind a leading 1, take that away.
  const float subnormal = float_of_bits(shifted + kSmallest) - float_of_bits(kSmallest);
  uint32_t bits = magnitude >= 0x7c00u ? normal + kRebias : normal;  // infinity, NaN
  bits = magnitude < 0x0400u ? bits_of_float(subnormal) : bits;
  return float_of_bits(bits | static_cast<uint32_t>(value.bits & 0x8000u) << 16);
}

FASTEMBED_INLINE void narrow(float value, float& out) { out = value; }

FASTEMBED_INLINE void narrow(float value, BFloat16& out) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  out.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

FASTEMBED_INLINE void narrow(float value, Float16& out) {
  constexpr uint32_t kRebias = 112u << 23;
  constexpr uint32_t kHalf = 126u << 23;  // at 0.5 one float32 step is 2^-24, float16's smallest
  const uint32_t bits = bits_of_float(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - kRebias + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + float_of_bits(kHalf)) - kHalf;
  uint32_t result = magnitude < 113u << 23 ? subnormal : normal;
  result = magnitude >= 143u << 23 ? 0x7c00u : result;  // 2^16 and above
  result = magnitude > 0x7f800000u ? 0x7e00u : result;  // NaN
  out.bits = static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
}

}  // namespace fastembed::cpu
