// Contract: fastembed/ops/masks.py.
#include <algorithm>
#include <cstring>
#include <vector>

// Clang has no target pragma of GCC's kind: there the portable loops are all there is.
#if defined(__x86_64__) && !defined(__clang__)
#define FASTEMBED_WIDE_LOOPS
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "filter.h"
#include "kernels.h"
#include "simd.h"

namespace fastembed::cpu {
namespace {

// What a level becomes outside of the mask: the table, and where there is one that gives all
// of its 256 entries, a linear form, which is a vector where a look-up is not.
struct Fade {
  const uint8_t* table;
  bool linear;
  uint16_t factor, offset;
};

struct Source {
  const uint8_t* pixels;  // top left of the crop, rows of `pitch` pixels
  const int32_t* ids;     // likewise
  const Fade* fade;
  int64_t height, width, pitch;
  int64_t stride;  // width, rounded up to 16: of a plane's row in the scratch memory
  int32_t id;
};

// One axis of a resize in pairs of taps, the first of them even.
struct Taps {
  const int32_t* first;    // [size], in pairs of pixels
  const int32_t* last;     // [size], in pixels: one past the last that has a weight
  const int32_t* weights;  // [size, pairs, 2], two 16-bit weights each: low parts, high parts
  int64_t size, pairs;
  int bits;
};

struct Ring {
  uint8_t* bytes;  // [pairs, columns, 2]
  int64_t pairs;
};

struct Scratch {
  uint8_t* inside;   // [stride]
  uint8_t* block;    // [16, 3, stride]
  int16_t* pairs;    // [pairs of columns, 3, 16 rows, 2]
  uint8_t* columns;  // [3, out_stride, 16 rows]
  uint8_t* rows;     // [16, 3, the larger stride]
  uint8_t* levels;   // [3, out_stride]
  Ring ring;
  int64_t out_stride;  // size, rounded up to 16
};

struct Target {
  const void* table;
  void* out;
  int64_t size, value_bytes;
};

FASTEMBED_INLINE uint8_t faded_level(uint8_t level, uint16_t factor, uint16_t offset) {
  const uint16_t scaled = static_cast<uint16_t>(static_cast<uint32_t>(level << 8) * factor >> 16);
  return static_cast<uint8_t>(static_cast<uint16_t>(scaled + offset) >> 8);
}

// Not FASTEMBED_SIMD: the compiler finds no pmaddwd by itself, and a function that names it can
// only be inlined into one for the same instruction set.
#ifdef FASTEMBED_WIDE_LOOPS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl")
namespace avx512 {
#define FASTEMBED_LANES 16
#include "masks_simd.h"
#undef FASTEMBED_LANES
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#define FASTEMBED_LANES 8
#include "masks_simd.h"
#undef FASTEMBED_LANES
}  // namespace avx2
#pragma GCC pop_options
#endif
namespace portable {
#define FASTEMBED_LANES 4
#include "masks_simd.h"
#undef FASTEMBED_LANES
}  // namespace portable

using Resize = decltype(&portable::resize);

Resize choose() {
#ifdef FASTEMBED_WIDE_LOOPS
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return avx512::resize;
  }
  if (__builtin_cpu_supports("avx2")) return avx2::resize;
#endif
  return portable::resize;
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

// The memory behind a Taps; grows, and is filled anew for every crop.
class TapTable {
 public:
  FASTEMBED_INLINE Taps fill(int64_t length, int64_t size, bool cubic, bool narrow) {
    const Axis axis = make_axis(length, size, cubic);
    const int64_t taps = most_taps(axis);
    first_.resize(size);
    last_.resize(size);
    real_.assign(size * taps, 0);
    double largest = 0;
    for (int64_t i = 0; i < size; ++i) {
      const double center = center_of(axis, i);
      const int32_t first = first_of(axis, center), last = last_of(axis, center);
      double* weights = real_.data() + taps * i;
      for (int32_t j = first; j < last; ++j) {
        weights[j - first] = raw_weight(axis, cubic, center, j);
      }
      double total = 0;
      for (int32_t k = 0; k < last - first; ++k) total += weights[k];
      for (int32_t k = 0; k < last - first; ++k) {
        weights[k] /= total;
        largest = std::max(largest, weights[k]);
      }
      first_[i] = first;
      last_[i] = last;
    }
    const int bits = narrow ? narrow_bits(largest) : kWeightBits;
    const int64_t pairs = taps / 2 + 1;
    packed_.assign(size * pairs * 2, 0);
    for (int64_t i = 0; i < size; ++i) {
      int32_t* packed = packed_.data() + 2 * pairs * i;
      const int32_t odd = first_[i] & 1;
      for (int32_t k = 0; k < last_[i] - first_[i]; ++k) {
        const int32_t weight = fixed_weight(real_[taps * i + k], bits);
        const int32_t low = narrow ? weight : weight & 0x7fff, high = narrow ? 0 : weight >> 15;
        const int32_t at = k + odd, shift = at % 2 * 16;
        packed[at / 2 * 2] |= static_cast<int32_t>((static_cast<uint32_t>(low) & 0xffff) << shift);
        packed[at / 2 * 2 + 1] |=
            static_cast<int32_t>((static_cast<uint32_t>(high) & 0xffff) << shift);
      }
      first_[i] /= 2;
    }
    return {first_.data(), last_.data(), packed_.data(), size, pairs, bits};
  }

 private:
  std::vector<int32_t> first_, last_, packed_;
  std::vector<double> real_;
};

int64_t round_up(int64_t value) { return (value + 15) / 16 * 16; }

}  // namespace

void blend_crops(const BlendCrops& op) {
  static const Resize resize = choose();
  const Fade fade = make_fade(op.background);
  TapTable row_table, column_table;
  std::vector<uint8_t> bytes;
  std::vector<int16_t> shorts;
  for (int64_t s = 0; s < op.crops; ++s) {
    const Crop& crop = op.crop[s];
    const int64_t corner = crop.top * op.width + crop.left;
    const Source source{op.image + 3 * corner, op.ids + corner, &fade,
                        crop.height,           crop.width,      op.width,
                        round_up(crop.width),  crop.id};
    const Taps columns = column_table.fill(crop.width, op.size, op.cubic, op.narrow);
    const Taps rows = row_table.fill(crop.height, op.size, op.cubic, op.narrow);
    const bool down_first = op.tall_first && is_tall(crop.height, crop.width, op.size);

    // Pairs past the last pixel are read, with weights of 0.
    const int64_t stride = source.stride, out_stride = round_up(op.size);
    const int64_t wide = std::max(stride, out_stride);
    const int64_t ring_width = 3 * (down_first ? stride : out_stride);
    const int64_t ring_pairs = rows.pairs + 8;
    shorts.resize((stride / 2 + columns.pairs) * 96);
    bytes.resize(stride + 48 * stride + 48 * out_stride + 48 * wide + 3 * out_stride +
                 2 * ring_pairs * ring_width);
    Scratch scratch{};
    scratch.inside = bytes.data();
    scratch.block = scratch.inside + stride;
    scratch.columns = scratch.block + 48 * stride;
    scratch.rows = scratch.columns + 48 * out_stride;
    scratch.levels = scratch.rows + 48 * wide;
    scratch.ring = {scratch.levels + 3 * out_stride, ring_pairs};
    scratch.pairs = shorts.data();
    scratch.out_stride = out_stride;
    const Target target{op.table,
                        static_cast<uint8_t*>(op.out) + s * 3 * op.size * op.size * op.value_bytes,
                        op.size, op.value_bytes};
    resize(op.narrow, down_first, source, columns, rows, scratch, target);
  }
}

}  // namespace fastembed::cpu
