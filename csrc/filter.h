// The weights of the resize modes. CPU and CUDA compile this same text, in float64 and without
// contraction, so they round to the same integers as Pillow and torch do.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTEMBED_HOST_DEVICE_INLINE __host__ __device__ __forceinline__
#else
#define FASTEMBED_HOST_DEVICE_INLINE inline __attribute__((always_inline))
#endif

namespace fastembed {

constexpr int kWeightBits = 22;

// One axis of a resize: `length` pixels to `size`.
struct Axis {
  double scale, stretch, support;
  int32_t length;
};

FASTEMBED_HOST_DEVICE_INLINE Axis make_axis(int64_t length, int64_t size, bool cubic) {
  const double scale = static_cast<double>(length) / static_cast<double>(size);
  const double stretch = scale < 1 ? 1 : scale;  // enlarging interpolates, shrinking averages
  return {scale, stretch, (cubic ? 2.0 : 1.0) * stretch, static_cast<int32_t>(length)};
}

FASTEMBED_HOST_DEVICE_INLINE double center_of(const Axis& axis, int64_t i) {
  return (static_cast<double>(i) + 0.5) * axis.scale;
}

// The pixels that output i reads: from first_of to before last_of.
FASTEMBED_HOST_DEVICE_INLINE int32_t first_of(const Axis& axis, double center) {
  const int32_t first = static_cast<int32_t>(center - axis.support + 0.5);
  return first < 0 ? 0 : first;
}

FASTEMBED_HOST_DEVICE_INLINE int32_t last_of(const Axis& axis, double center) {
  const int32_t last = static_cast<int32_t>(center + axis.support + 0.5);
  return last > axis.length ? axis.length : last;
}

// An upper bound of last_of - first_of.
FASTEMBED_HOST_DEVICE_INLINE int32_t most_taps(const Axis& axis) {
  const int32_t taps = 2 * static_cast<int32_t>(axis.support + 1) + 1;
  return taps > axis.length ? axis.length : taps;
}

// What pixel j weighs before the weights are divided by their sum.
FASTEMBED_HOST_DEVICE_INLINE double raw_weight(const Axis& axis, bool cubic, double center,
                                               int32_t j) {
  double x = (static_cast<double>(j) - center + 0.5) * (1.0 / axis.stretch);
  x = x < 0 ? -x : x;
  if (!cubic) return x < 1 ? 1 - x : 0.0;
  const double near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1;
  const double far = (((x - 5) * x + 8) * x - 4) * -0.5;
  return x < 1 ? near : x < 2 ? far : 0.0;
}

// Rounded half away from zero.
FASTEMBED_HOST_DEVICE_INLINE int32_t fixed_weight(double weight, int bits) {
  const double scaled = weight * static_cast<double>(1 << bits);
  return static_cast<int32_t>(scaled + (weight < 0 ? -0.5 : 0.5));
}

// The most bits, up to 22, at which the axis' largest weight stays below 2^15.
FASTEMBED_HOST_DEVICE_INLINE int narrow_bits(double largest) {
  int bits = 0;
  while (bits < kWeightBits &&
         static_cast<int32_t>(0.5 + largest * static_cast<double>(1 << (bits + 1))) < 1 << 15) {
    ++bits;
  }
  return bits;
}

// Whether the vertical pass comes first, by Pillow 13's rule.
FASTEMBED_HOST_DEVICE_INLINE bool is_tall(int64_t height, int64_t width, int64_t size) {
  return height > size && height - size > 2 * (width - size);
}

}  // namespace fastembed
