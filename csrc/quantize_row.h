// A run of pixels of one channel to levels; quantize and gather_crops share it on the CPU.
#pragma once

#include "quantize.h"
#include "simd.h"

namespace fastembed::cpu {

template <class Pixel>
FASTEMBED_INLINE void quantize_row(const Pixel* pixels, int64_t count, Ramp ramp, uint8_t* levels) {
  if (ramp.span <= 0) {
    for (int64_t i = 0; i < count; ++i) levels[i] = step_level(standardize(pixels[i], ramp), ramp);
  } else if (ramp.shift == 0 && ramp.scale == 1) {
    // The percentile rule: standardize would change no bit and cost half of the time.
    for (int64_t i = 0; i < count; ++i) levels[i] = ramp_level(pixels[i], ramp);
  } else {
    for (int64_t i = 0; i < count; ++i) levels[i] = ramp_level(standardize(pixels[i], ramp), ramp);
  }
}

// The levels of all 8-bit pixels: a row of such is looked up, which takes no division.
FASTEMBED_INLINE void byte_levels(const Ramp& ramp, uint8_t* levels) {
  uint8_t pixels[256];
  for (int i = 0; i < 256; ++i) pixels[i] = static_cast<uint8_t>(i);
  quantize_row(pixels, 256, ramp, levels);
}

}  // namespace fastembed::cpu
