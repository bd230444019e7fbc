// Contract: fastembed/ops/quantize.py.
#include <algorithm>

#include "launch.cuh"
#include "percentile.cuh"
#include "quantize.h"

namespace fastembed::cuda {
namespace {

// Blocks: x over pixels, y over channels, z over images.
template <class Pixel>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const Quantize* __restrict__ batch) {
  const Quantize op = batch[blockIdx.z];
  const Pixel* image = static_cast<const Pixel*>(op.image);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t c = blockIdx.y; c < op.channels; c += gridDim.y) {
    const Ramp ramp = op.ramp[c];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    for (int64_t i = first; i < op.pixels; i += step) {
      op.out[c * op.pixels + i] = level(image[c * op.pixels + i], ramp);
    }
  }
}

template <class Pixel>
const char* run(const Batch<Quantize>& batch, cudaStream_t stream) {
  // Eight pixels per thread pay for its load of the ramp.
  constexpr int64_t kPixels = 8 * kThreads;
  const int64_t pixels = largest(batch, [](const Quantize& op) { return op.pixels; });
  const int64_t channels = batch.host->channels;
  if (channels == 0 || pixels == 0) return nullptr;
  const int64_t blocks = std::min<int64_t>((pixels + kPixels - 1) / kPixels, 1 << 20);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(std::min(channels, kMaxGridY)),
                  static_cast<unsigned>(batch.count));
  quantize_kernel<Pixel><<<grid, kThreads, 0, stream>>>(batch.device);
  return launch_error();
}

template <class Pixel, int kLevel = 0>
const char* bounds(const Batch<PercentileBounds>& batch, cudaStream_t stream) {
  if constexpr (kLevel < kLevels<Pixel>) {
    const int64_t tiles =
        tiles_of(largest(batch, [](const PercentileBounds& op) { return op.pixels; }));
    const int64_t blocks = (tiles + kTilesPerBlock - 1) / kTilesPerBlock;
    const dim3 grid(static_cast<unsigned>(batch.count * batch.host->channels),
                    static_cast<unsigned>(std::min<int64_t>(blocks, 1024)));
    percentile_kernel<Pixel, kLevel><<<grid, kThreads, 0, stream>>>(batch.device);
    const char* error = launch_error();
    return error != nullptr ? error : bounds<Pixel, kLevel + 1>(batch, stream);
  }
  return nullptr;
}

}  // namespace

int64_t percentile_scratch(const PercentileBounds& op) {
  return op.channels * static_cast<int64_t>(sizeof(Progress));
}

const char* percentile_bounds(const Batch<PercentileBounds>& batch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const PercentileBounds& first = *batch.host;
  const size_t bytes = batch.count * percentile_scratch(first);
  const cudaError_t error = cudaMemsetAsync(first.scratch, 0, bytes, on);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  switch (first.pixel) {
    case Pixel::kUInt8:
      return bounds<uint8_t>(batch, on);
    case Pixel::kUInt16:
      return bounds<uint16_t>(batch, on);
    case Pixel::kFloat32:
      return bounds<float>(batch, on);
  }
  return "unknown pixel type";
}

const char* quantize(const Batch<Quantize>& batch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (batch.host->pixel) {
    case Pixel::kUInt8:
      return run<uint8_t>(batch, on);
    case Pixel::kUInt16:
      return run<uint16_t>(batch, on);
    case Pixel::kFloat32:
      return run<float>(batch, on);
  }
  return "unknown pixel type";
}

}  // namespace fastembed::cuda
