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

#include "kernels.h"
#include "masks.h"
#include "simd.h"

namespace fastembed::cpu {
namespace {

struct Target {
  const void* table;
  void* out;
  int64_t size, value_bytes;
};

namespace pairs {

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
  int64_t stride, out_stride;  // width and size, rounded up to 16
};

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

// The memory behind a Taps.
class TapTable {
 public:
  Taps fill(const Weights& weights, bool narrow) {
    const int64_t size = weights.size, pairs = weights.taps / 2;
    packed_.assign(size * pairs * 2, 0);
    for (int64_t i = 0; i < size; ++i) {
      int32_t* packed = packed_.data() + 2 * pairs * i;
      for (int64_t k = 0; k < weights.taps; ++k) {
        const int32_t weight = weights.value[k * size + i];
        const int32_t low = narrow ? weight : weight & 0x7fff, high = narrow ? 0 : weight >> 15;
        const int shift = k % 2 * 16;
        packed[k / 2 * 2] |= static_cast<int32_t>((static_cast<uint32_t>(low) & 0xffff) << shift);
        packed[k / 2 * 2 + 1] |=
            static_cast<int32_t>((static_cast<uint32_t>(high) & 0xffff) << shift);
      }
    }
    return {weights.first, weights.last, packed_.data(), size, pairs, weights.bits};
  }

 private:
  std::vector<int32_t> packed_;
};

template <decltype(portable::resize)* kResize>
class Resizer {
 public:
  static constexpr int32_t kUnit = 2;

  explicit Resizer(const BlendCrops& op) : table_(op.table), fade_(make_fade(op.background)) {}

  void operator()(const Source& source, const Weights& column_weights, const Weights& row_weights,
                  bool narrow, bool down_first, Target target) {
    const Taps columns = column_table_.fill(column_weights, narrow);
    const Taps rows = row_table_.fill(row_weights, narrow);
    // Pairs past the last pixel are read, with weights of 0.
    const int64_t stride = round_up(source.width, 16), out_stride = round_up(target.size, 16);
    const int64_t wide = std::max(stride, out_stride);
    const int64_t ring_width = 3 * (down_first ? stride : out_stride);
    const int64_t ring_pairs = rows.pairs + 8;
    shorts_.resize((stride / 2 + columns.pairs) * 96);
    bytes_.resize(stride + 48 * stride + 48 * out_stride + 48 * wide + 3 * out_stride +
                  2 * ring_pairs * ring_width);
    Scratch scratch{};
    scratch.inside = bytes_.data();
    scratch.block = scratch.inside + stride;
    scratch.columns = scratch.block + 48 * stride;
    scratch.rows = scratch.columns + 48 * out_stride;
    scratch.levels = scratch.rows + 48 * wide;
    scratch.ring = {scratch.levels + 3 * out_stride, ring_pairs};
    scratch.pairs = shorts_.data();
    scratch.stride = stride;
    scratch.out_stride = out_stride;
    target.table = table_;
    kResize(narrow, down_first, source, fade_, columns, rows, scratch, target);
  }

 private:
  const void* table_;
  Fade fade_;
  TapTable row_table_, column_table_;
  std::vector<uint8_t> bytes_;
  std::vector<int16_t> shorts_;
};

}  // namespace pairs

#ifdef FASTEMBED_WIDE_LOOPS
namespace vnni {

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")
// In GCC 12's headers, not here: what is undefined there has no lane that counts.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "masks_vnni.h"
#pragma GCC diagnostic pop
#pragma GCC pop_options

// A weight's four bytes that are its digits; the fourth is 0 and is not kept.
template <int kDigits>
FASTEMBED_INLINE void split_digits(const Weights& weights, int64_t padded, int32_t* to) {
  for (int64_t k = 0; k < weights.taps; k += 4, to += kDigits * padded) {
    const int32_t* __restrict value = weights.value + k * weights.size;
    int32_t* __restrict digits = to;
#pragma GCC ivdep
    for (int64_t i = 0; i < weights.size; ++i) {
      uint32_t packed[kDigits] = {};
      for (int p = 0; p < 4; ++p) {
        int32_t rest = value[p * weights.size + i];
        for (int d = 0; d < kDigits; ++d) {
          const int32_t digit = static_cast<int8_t>(rest);
          packed[d] |= static_cast<uint32_t>(digit & 255) << 8 * p;
          rest = (rest - digit) >> 8;
        }
      }
      for (int d = 0; d < kDigits; ++d) digits[d * padded + i] = static_cast<int32_t>(packed[d]);
    }
  }
}

FASTEMBED_SIMD void split_two_digits(const Weights& weights, int64_t padded, int32_t* to) {
  split_digits<2>(weights, padded, to);
}

FASTEMBED_SIMD void split_three_digits(const Weights& weights, int64_t padded, int32_t* to) {
  split_digits<3>(weights, padded, to);
}

// The memory behind a Digits.
class DigitTable {
 public:
  // For `padded` outputs: those past the last have weights of 0.
  Digits fill(const Weights& weights, int64_t padded) {
    int32_t least = 0, most = 0;
    for (int64_t i = 0; i < weights.taps * weights.size; ++i) {
      least = std::min(least, weights.value[i]);
      most = std::max(most, weights.value[i]);
    }
    // A digit is -128..127. Three reach to 1.99 * 2^22; no weight of a cubic is above 1.2.
    const int digits = least >= -128 * 257 && most <= 127 * 257 ? 2 : 3;
    first_.assign(padded, 0);
    std::copy_n(weights.first, weights.size, first_.begin());
    packed_.assign(weights.taps / 4 * digits * padded, 0);
    (digits == 2 ? split_two_digits : split_three_digits)(weights, padded, packed_.data());
    return {first_.data(),    weights.last, packed_.data(), padded,
            weights.taps / 4, digits,       weights.bits};
  }

 private:
  std::vector<int32_t> first_, packed_;
};

class Resizer {
 public:
  static constexpr int32_t kUnit = 4;

  // The table's bytes apart: [3, value_bytes, 256].
  explicit Resizer(const BlendCrops& op) : fade_(op.background), table_(768 * op.value_bytes) {
    const auto* from = static_cast<const uint8_t*>(op.table);
    for (int64_t i = 0; i < 768; ++i) {
      for (int64_t b = 0; b < op.value_bytes; ++b) {
        table_[(i / 256 * op.value_bytes + b) * 256 + i % 256] = *from++;
      }
    }
  }

  void operator()(const Source& source, const Weights& column_weights, const Weights& row_weights,
                  bool, bool down_first, Target target) {
    Scratch scratch{};
    scratch.out_stride = round_up(target.size, 16);
    scratch.out_columns = round_up(3 * scratch.out_stride, 64);
    const Digits columns = column_table_.fill(column_weights, scratch.out_stride);
    const Digits rows = row_table_.fill(row_weights, target.size);
    // Loads and stores are of whole vectors. An odd number of them from row to row keeps 16 rows
    // from the same cache set.
    scratch.row_pitch = (round_up(3 * source.width, 192) + 64) | 64;
    scratch.ring.slots = rows.fours + 4;
    scratch.ring.columns = down_first ? round_up(3 * source.width, 64) : scratch.out_columns;
    const int64_t sizes[] = {
        20 * scratch.row_pitch, 192 * (round_up(source.width, 4) / 4 + columns.fours),
        down_first ? 16 * scratch.out_columns : 0, (down_first ? 16 : 1) * scratch.out_columns + 64,
        4 * scratch.ring.slots * scratch.ring.columns};
    uint8_t** const parts[] = {&scratch.rows, &scratch.pixels, &scratch.quads, &scratch.levels,
                               &scratch.ring.bytes};
    int64_t total = 63;
    for (const int64_t size : sizes) total += size;
    bytes_.resize(std::max<size_t>(bytes_.size(), total));
    uint8_t* at = bytes_.data() + (-reinterpret_cast<uintptr_t>(bytes_.data()) & 63);
    for (int i = 0; i < 5; ++i) {
      *parts[i] = at;
      at += sizes[i];
    }
    target.table = table_.data();
    if (down_first) return down_then_across(source, fade_, columns, rows, scratch, target);
    across_then_down(source, fade_, columns, rows, scratch, target);
  }

 private:
  const uint8_t* fade_;
  std::vector<uint8_t> table_, bytes_;
  DigitTable row_table_, column_table_;
};

}  // namespace vnni
#endif

template <class Resizer>
void blend(const BlendCrops& op) {
  Resizer resize(op);
  WeightTable row_table, column_table;
  for (int64_t s = 0; s < op.crops; ++s) {
    const Crop& crop = op.crop[s];
    const int64_t corner = crop.top * op.width + crop.left;
    const Source source{
        op.image + 3 * corner, op.ids + corner, crop.height, crop.width, op.width, crop.id};
    const Target target{nullptr,
                        static_cast<uint8_t*>(op.out) + s * 3 * op.size * op.size * op.value_bytes,
                        op.size, op.value_bytes};
    resize(source,
           column_table.template fill<Resizer::kUnit>(crop.width, op.size, op.cubic, op.narrow),
           row_table.template fill<Resizer::kUnit>(crop.height, op.size, op.cubic, op.narrow),
           op.narrow, op.tall_first && is_tall(crop.height, crop.width, op.size), target);
  }
}

// One way to run it, for one instruction set.
struct Path {
  const char* name;
  bool (*runs_here)();
  void (*blend)(const BlendCrops& op);
};

// Fastest first.
constexpr Path kPaths[] = {
#ifdef FASTEMBED_WIDE_LOOPS
    {"vnni",
     [] {
       return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
              __builtin_cpu_supports("avx512vnni");
     },
     blend<vnni::Resizer>},
    {"avx512",
     [] { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"); },
     blend<pairs::Resizer<pairs::avx512::resize>>},
    {"avx2", [] { return __builtin_cpu_supports("avx2") != 0; },
     blend<pairs::Resizer<pairs::avx2::resize>>},
#endif
    {"portable", [] { return true; }, blend<pairs::Resizer<pairs::portable::resize>>},
};

const Path& fastest() {
  for (const Path& path : kPaths) {
    if (path.runs_here()) return path;
  }
  __builtin_unreachable();  // portable runs everywhere
}

}  // namespace

void blend_crops(const BlendCrops& op) {
  static const Path& path = fastest();
  path.blend(op);
}

}  // namespace fastembed::cpu
