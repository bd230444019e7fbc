// blend_crops_float; contract: fastembed/ops/masks.py.
#include <cstring>

#include "floats.h"
#include "masks.h"

namespace fastembed::cpu {
namespace {

// A pixel of three floats and the next one's first, which is computed and dropped.
using Four = float __attribute__((vector_size(16)));
// Sums that stay in registers, one or more as the instruction set has it.
using Sixteen = float __attribute__((vector_size(64)));

// The crop's rows that the vertical pass reads, as floats and RGB as in the image.
struct Rows {
  float* values;  // [slots, pitch]
  int64_t slots, pitch;
};

FASTEMBED_INLINE void load_row(const Source& source, const Fade& fade, int64_t y,
                               uint8_t* __restrict inside, float* __restrict row) {
  const uint8_t* __restrict pixels = source.pixels + y * source.pitch * 3;
  const int32_t* __restrict ids = source.ids + y * source.pitch;
  const int64_t width = source.width;
  const int32_t id = source.id;
  for (int64_t x = 0; x < width; ++x) {
    inside[3 * x] = inside[3 * x + 1] = inside[3 * x + 2] = ids[x] == id ? 255 : 0;
  }
  if (fade.linear) {
    const uint16_t factor = fade.factor, offset = fade.offset;
    for (int64_t i = 0; i < 3 * width; ++i) {
      const uint8_t faded = faded_level(pixels[i], factor, offset);
      row[i] = inside[i] ? pixels[i] : faded;
    }
  } else {
    for (int64_t i = 0; i < 3 * width; ++i) row[i] = inside[i] ? pixels[i] : fade.table[pixels[i]];
  }
}

// Output row i of the vertical pass.
FASTEMBED_INLINE void down(const FloatWeights& weights, int64_t i, const Rows& rows,
                           int64_t columns, float* __restrict out) {
  const int64_t first = weights.first[i] % rows.slots;
  const int64_t taps = weights.last[i] - weights.first[i];
  for (int64_t x = 0; x < columns; x += 64) {
    Sixteen sums[4] = {};
    int64_t slot = first;
    for (int64_t k = 0; k < taps; ++k) {
      const float weight = weights.value[k * weights.size + i];
      const float* row = rows.values + slot * rows.pitch + x;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        Sixteen pixels;
        memcpy(&pixels, row + 16 * v, sizeof pixels);
        sums[v] += weight * pixels;
      }
      if (++slot == rows.slots) slot = 0;
    }
    memcpy(out + x, sums, sizeof sums);
  }
}

// The horizontal pass over one row, to three planes of `size`.
FASTEMBED_INLINE void across(const FloatWeights& weights, const float* row, float* __restrict out) {
  const int64_t size = weights.size, taps = weights.taps;
  for (int64_t i = 0; i < size; ++i) {
    const float* from = row + 3 * int64_t{weights.first[i]};
    const float* weight = weights.value + i;
    Four sum{};
    for (int64_t k = 0; k < taps; ++k, from += 3, weight += size) {
      Four pixel;
      memcpy(&pixel, from, sizeof pixel);
      sum += *weight * pixel;
    }
    for (int c = 0; c < 3; ++c) out[c * size + i] = sum[c];
  }
}

template <class Value>
FASTEMBED_INLINE void normalise(const BlendCropsFloat& op, const float* __restrict row, int64_t y,
                                Value* __restrict out) {
  const int64_t size = op.size;
  out += y * size;
  for (int c = 0; c < 3; ++c, row += size, out += size * size) {
    const float mean = op.ramp[c], std = op.ramp[3 + c];
    for (int64_t x = 0; x < size; ++x) narrow((row[x] / 255 - mean) / std, out[x]);
  }
}

template <class Value>
FASTEMBED_INLINE void resize(const BlendCropsFloat& op, const Source& source, const Fade& fade,
                             const FloatWeights& columns, const FloatWeights& rows,
                             const Rows& ring, uint8_t* inside, float* row, Value* out) {
  const int64_t width = 3 * source.width;
  int64_t loaded = 0;  // source rows
  float* planes = row + ring.pitch;
  for (int64_t i = 0; i < op.size; ++i) {
    for (; loaded < rows.last[i]; ++loaded) {
      load_row(source, fade, loaded, inside, ring.values + loaded % ring.slots * ring.pitch);
    }
    down(rows, i, ring, width, row);
    across(columns, row, planes);
    normalise(op, planes, i, out);
  }
}

FASTEMBED_SIMD void resize_any(const BlendCropsFloat& op, const Source& source, const Fade& fade,
                               const FloatWeights& columns, const FloatWeights& rows,
                               const Rows& ring, uint8_t* inside, float* row, int64_t s) {
  const int64_t at = s * 3 * op.size * op.size;
  switch (op.value) {
    case Real::kFloat32:
      return resize(op, source, fade, columns, rows, ring, inside, row,
                    static_cast<float*>(op.out) + at);
    case Real::kBFloat16:
      return resize(op, source, fade, columns, rows, ring, inside, row,
                    static_cast<BFloat16*>(op.out) + at);
    case Real::kFloat16:
      return resize(op, source, fade, columns, rows, ring, inside, row,
                    static_cast<Float16*>(op.out) + at);
  }
}

}  // namespace

void blend_crops_float(const BlendCropsFloat& op) {
  const Fade fade = make_fade(op.background);
  WeightTable row_table, column_table;
  std::vector<uint8_t> inside;
  std::vector<float> floats;
  for (int64_t s = 0; s < op.crops; ++s) {
    const Crop& crop = op.crop[s];
    const int64_t corner = crop.top * op.width + crop.left;
    const Source source{
        op.image + 3 * corner, op.ids + corner, crop.height, crop.width, op.width, crop.id};
    const FloatWeights columns = column_table.fill_floats(crop.width, op.size);
    const FloatWeights rows = row_table.fill_floats(crop.height, op.size);
    // Past a row's end are read a block of the vertical pass and taps with weights of 0.
    const int64_t pitch = round_up(3 * (crop.width + columns.taps) + 1, 64);
    inside.resize(3 * crop.width);
    floats.assign((rows.taps + 1) * pitch + 3 * op.size, 0.0f);
    const Rows ring{floats.data(), rows.taps, pitch};
    resize_any(op, source, fade, columns, rows, ring, inside.data(),
               floats.data() + rows.taps * pitch, s);
  }
}

}  // namespace fastembed::cpu
