// Contract: fastembed/ops/quantize.py.
#include "quantize_row.h"

namespace fastembed::cpu {
namespace {

template <class Pixel>
FASTEMBED_INLINE void run(const Quantize& op) {
  const Pixel* image = static_cast<const Pixel*>(op.image);
  for (int64_t c = 0; c < op.channels; ++c) {
    quantize_row(image + c * op.pixels, op.pixels, op.ramp[c], op.out + c * op.pixels);
  }
}

}  // namespace

FASTEMBED_SIMD void quantize(const Quantize& op) {
  switch (op.pixel) {
    case Pixel::kUInt8:
      return run<uint8_t>(op);
    case Pixel::kUInt16:
      return run<uint16_t>(op);
    case Pixel::kFloat32:
      return run<float>(op);
  }
}

}  // namespace fastembed::cpu
