// What the CPU kernels of blend_crops share: a crop, its fade and the weights of its axes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "filter.h"
#include "kernels.h"
#include "simd.h"

namespace fastembed::cpu {
namespace {

struct Source {
  const uint8_t* pixels;  // top left of the crop, rows of `pitch` pixels
  const int32_t* ids;     // likewise
  int64_t height, width, pitch;
  int32_t id;
};

// What a level becomes outside of the mask: the table, and where there is one that gives all
// of its 256 entries, a linear form, which is a vector where a look-up is not.
struct Fade {
  const uint8_t* table;
  bool linear;
  uint16_t factor, offset;
};

FASTEMBED_INLINE uint8_t faded_level(uint8_t level, uint16_t factor, uint16_t offset) {
  const uint16_t scaled = static_cast<uint16_t>(static_cast<uint32_t>(level << 8) * factor >> 16);
  return static_cast<uint8_t>(static_cast<uint16_t>(scaled + offset) >> 8);
}

Fade make_fade(const uint8_t* table) {
  // The least-squares slope of the table, then its neighbours, nearest first.
  int64_t moment = 0, square = 0;
  for (int32_t level = 0; level < 256; ++level) {
    moment += (2 * level - 255) * table[level];
    square += (2 * level - 255) * level;
  }
  const int32_t slope = static_cast<int32_t>((moment * 65536 + square / 2) / square);
  for (int32_t step = 0; step < 128; ++step) {
    const int32_t factor = slope + (step % 2 ? step / 2 + 1 : -step / 2);
    if (factor < 0 || factor > 65535) continue;
    int32_t low = 0, high = 65535;
    for (int32_t level = 0; level < 256 && low <= high; ++level) {
      const int32_t scaled = level * factor >> 8;
      low = std::max(low, table[level] * 256 - scaled);
      high = std::min(high, table[level] * 256 + 255 - scaled);
    }
    if (low <= high) {
      return {table, true, static_cast<uint16_t>(factor), static_cast<uint16_t>(low)};
    }
  }
  return {table, false, 0, 0};
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// The integer weights of one axis. An output's first tap is at a multiple of what a kernel adds
// at once, and so is the number of taps.
struct Weights {
  const int32_t* first;  // [size], in units of so many pixels
  const int32_t* last;   // [size], in pixels: one past the last that has a weight
  const int32_t* value;  // [taps, size], 0 for a tap beyond the filter
  int64_t size, taps;
  int bits;
};

struct FloatWeights {
  const int32_t *first, *last;
  const float* value;  // [taps, size]
  int64_t size, taps;
};

// Loops over outputs inside of loops over taps: so they are vectors, and still an output's
// weights are added in their order.
template <bool kCubic>
FASTEMBED_INLINE void raw_weights(const Axis axis, int64_t size, int64_t taps,
                                  const int32_t* __restrict begin, const int32_t* __restrict first,
                                  const int32_t* __restrict last, double* __restrict weights,
                                  double* __restrict total, double* __restrict most) {
  for (int64_t i = 0; i < size; ++i) total[i] = most[i] = 0;
  for (int64_t k = 0; k < taps; ++k) {
    double* __restrict weight = weights + k * size;
    for (int64_t i = 0; i < size; ++i) {
      const int32_t j = begin[i] + static_cast<int32_t>(k);
      // A factor, since the compiler makes a branch of a selection, and then no vectors.
      const double within = (j >= first[i]) & (j < last[i]);
      weight[i] = within * raw_weight(axis, kCubic, center_of(axis, i), j);
      total[i] += weight[i];
      most[i] = weight[i] > most[i] ? weight[i] : most[i];
    }
  }
}

FASTEMBED_SIMD void raw_weights(const Axis axis, bool cubic, int64_t size, int64_t taps,
                                const int32_t* begin, const int32_t* first, const int32_t* last,
                                double* weights, double* total, double* most) {
  if (cubic) return raw_weights<true>(axis, size, taps, begin, first, last, weights, total, most);
  raw_weights<false>(axis, size, taps, begin, first, last, weights, total, most);
}

FASTEMBED_SIMD void fixed_weights(const double* __restrict weights, const double* __restrict total,
                                  int64_t size, int64_t taps, int bits, int32_t* __restrict fixed) {
  for (int64_t k = 0; k < taps; ++k) {
    for (int64_t i = 0; i < size; ++i) {
      fixed[k * size + i] = fixed_weight(weights[k * size + i] / total[i], bits);
    }
  }
}

FASTEMBED_SIMD void float_weights(const double* __restrict weights, const double* __restrict total,
                                  int64_t size, int64_t taps, float* __restrict values) {
  for (int64_t k = 0; k < taps; ++k) {
    for (int64_t i = 0; i < size; ++i) {
      values[k * size + i] = static_cast<float>(weights[k * size + i] / total[i]);
    }
  }
}

// The memory behind a Weights; grows, and is filled anew for every crop.
class WeightTable {
 public:
  template <int32_t kUnit>
  Weights fill(int64_t length, int64_t size, bool cubic, bool narrow) {
    const int64_t taps = fill_raw<kUnit>(make_axis(length, size, cubic), size, cubic);
    int bits = kWeightBits;
    if (narrow) {
      double largest = 0;  // division is monotonic: it keeps the largest
      for (int64_t i = 0; i < size; ++i) largest = std::max(largest, most_[i] / total_[i]);
      bits = narrow_bits(largest);
    }
    fixed_.resize(taps * size);
    fixed_weights(raw_.data(), total_.data(), size, taps, bits, fixed_.data());
    return {units_.data(), last_.data(), fixed_.data(), size, taps, bits};
  }

  FloatWeights fill_floats(int64_t length, int64_t size) {
    const int64_t taps = fill_raw<1>(make_axis(length, size, false), size, false);
    floats_.resize(taps * size);
    float_weights(raw_.data(), total_.data(), size, taps, floats_.data());
    return {first_.data(), last_.data(), floats_.data(), size, taps};
  }

 private:
  // The number of taps.
  template <int32_t kUnit>
  int64_t fill_raw(const Axis& axis, int64_t size, bool cubic) {
    for (auto* ints : {&first_, &last_, &units_, &begin_}) ints->resize(size);
    for (auto* doubles : {&total_, &most_}) doubles->resize(size);
    int32_t taps = 1;
    for (int64_t i = 0; i < size; ++i) {
      const double center = center_of(axis, i);
      first_[i] = first_of(axis, center);
      last_[i] = last_of(axis, center);
      units_[i] = first_[i] / kUnit;
      begin_[i] = units_[i] * kUnit;
      taps = std::max(taps, last_[i] - begin_[i]);
    }
    taps = static_cast<int32_t>(round_up(taps, kUnit));
    raw_.resize(taps * size);
    raw_weights(axis, cubic, size, taps, begin_.data(), first_.data(), last_.data(), raw_.data(),
                total_.data(), most_.data());
    return taps;
  }

  std::vector<int32_t> first_, last_, units_, begin_, fixed_;
  std::vector<double> raw_, total_, most_;
  std::vector<float> floats_;
};

}  // namespace
}  // namespace fastembed::cpu
