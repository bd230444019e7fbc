// Intensity to level, ranks to percentiles. CPU and CUDA compile this same text, so they
// round alike; the build turns off contraction to fused multiply-add on both.
#pragma once

#include <cstring>

#include "kernels.h"

#ifdef __CUDACC__
#define FASTEMBED_HOST_DEVICE __host__ __device__
#else
#define FASTEMBED_HOST_DEVICE
#endif

namespace fastembed {

FASTEMBED_HOST_DEVICE inline float standardize(float x, const Ramp& ramp) {
  return (x - ramp.shift) / ramp.scale;
}

// A ramp without width: everything above lo is white.
FASTEMBED_HOST_DEVICE inline uint8_t step_level(float z, const Ramp& ramp) {
  return z > ramp.lo ? 255 : 0;
}

FASTEMBED_HOST_DEVICE inline uint8_t ramp_level(float z, const Ramp& ramp) {
  float clipped = z > ramp.lo ? z : ramp.lo;  // NaN compares false: it becomes lo, level 0
  clipped = clipped < ramp.hi ? clipped : ramp.hi;
  // Adding 1.5 * 2^23 rounds half to even and leaves the integer in the lowest bits. Unlike
  // a conversion it is defined for every input, and needs no SSE 4.1 to be a vector.
  const float rounded = (clipped - ramp.lo) / ramp.span * 255.0f + 12582912.0f;
  uint32_t bits;
  memcpy(&bits, &rounded, sizeof bits);
  return static_cast<uint8_t>(bits);
}

FASTEMBED_HOST_DEVICE inline uint8_t level(float x, const Ramp& ramp) {
  const float z = standardize(x, ramp);
  return ramp.span <= 0 ? step_level(z, ramp) : ramp_level(z, ramp);
}

// Between two neighbours in the sorted order, from the nearer one: NumPy's rounding.
FASTEMBED_HOST_DEVICE inline float interpolate(float below, float above, double fraction) {
  const float gap = above - below;
  return fraction < 0.5 ? below + gap * static_cast<float>(fraction)
                        : above - gap * static_cast<float>(1 - fraction);
}

}  // namespace fastembed
