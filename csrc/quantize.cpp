// Contract: fastembed/ops/quantize.py.
#include <memory>

#include "lookup.h"
#include "quantize_row.h"
#include "select.h"

namespace fastembed::cpu {
namespace {

template <class Pixel>
FASTEMBED_INLINE void run(const Quantize& op) {
  const Pixel* image = static_cast<const Pixel*>(op.image);
  for (int64_t c = 0; c < op.channels; ++c) {
    quantize_row(image + c * op.pixels, op.pixels, op.ramp[c], op.out + c * op.pixels);
  }
}

FASTEMBED_INLINE void run_bytes(const Quantize& op) {
  const uint8_t* image = static_cast<const uint8_t*>(op.image);
  for (int64_t c = 0; c < op.channels; ++c) {
    uint8_t levels[256];
    byte_levels(op.ramp[c], levels);
    const Lookup<uint8_t> look_up(levels);
    look_up(image + c * op.pixels, op.pixels, op.out + c * op.pixels);
  }
}

template <class T>
void bounds(const PercentileBounds& op) {
  const T* image = static_cast<const T*>(op.image);
  // Uninitialised: of these two channels only the pages that take the tails become real.
  const std::unique_ptr<T[]> room(new T[2 * (op.pixels + kSlack)]);
  for (int64_t c = 0; c < op.channels; ++c) {
    float* out = op.out + 2 * c;
    Neighbours<T> low, high;
    if (select_pair(image + c * op.pixels, op.pixels, op.low.rank, op.high.rank, room.get(), low,
                    high)) {
      out[0] = interpolate(low.below, low.above, op.low.fraction);
      out[1] = interpolate(high.below, high.above, op.high.fraction);
    } else {
      out[0] = out[1] = Limits<float>::quiet_NaN();
    }
  }
}

}  // namespace

void percentile_bounds(const PercentileBounds& op) {
  switch (op.pixel) {
    case Pixel::kUInt8:
      return bounds<uint8_t>(op);
    case Pixel::kUInt16:
      return bounds<uint16_t>(op);
    case Pixel::kFloat32:
      return bounds<float>(op);
  }
}

FASTEMBED_SIMD void quantize(const Quantize& op) {
  switch (op.pixel) {
    case Pixel::kUInt8:
      return run_bytes(op);
    case Pixel::kUInt16:
      return run<uint16_t>(op);
    case Pixel::kFloat32:
      return run<float>(op);
  }
}

}  // namespace fastembed::cpu
