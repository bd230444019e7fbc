// Contract: fastembed/ops/crops.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "launch.cuh"
#include "quantize.h"

namespace fastembed::cuda {
namespace {

constexpr int kRowsPerBlock = 4 * kWarps;

// Blocks: x over (crop, plane), y over rows. What all images have in common is a parameter:
// read from memory it would take registers. A warp takes a row, so its reads and its writes
// are runs of neighbours, and no pixel index needs a division.
template <class Pixel, class Value>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(GatherCrops op, const GatherCrops* __restrict__ batch) {
  __shared__ Value table[256];
  const int64_t n = blockIdx.x / op.count, p = blockIdx.x % op.count;
  const Origin origin = op.origins[n];
  const GatherCrops& own = batch[origin.image];
  table[threadIdx.x] = static_cast<const Value*>(op.table)[256 * p + threadIdx.x];
  __syncthreads();
  const int64_t channel = op.planes[p];
  const Ramp ramp = own.ramp[channel];
  const int64_t width = own.width;
  const Pixel* corner =
      static_cast<const Pixel*>(own.image) + (channel * own.height + origin.y) * width + origin.x;
  // A crop's side fits into an int, its distance from the image's first pixel may not.
  const int size = static_cast<int>(op.size), lane = threadIdx.x % kWarp;
  const int step = static_cast<int>(gridDim.y) * kWarps;
  for (int y = blockIdx.y * kWarps + threadIdx.x / kWarp; y < size; y += step) {
    const Pixel* row = corner + y * width;
    Value* out = static_cast<Value*>(op.out) + (blockIdx.x * op.size + y) * op.size;
    for (int x = lane; x < size; x += kWarp) out[x] = table[level(row[x], ramp)];
  }
}

template <class Pixel, class Value>
const char* gather(const Batch<GatherCrops>& batch, cudaStream_t stream) {
  static_assert(kThreads == 256, "a thread loads one table entry");
  const GatherCrops& op = *batch.host;
  const int64_t rows = std::min((op.size + kRowsPerBlock - 1) / kRowsPerBlock, kMaxGridY);
  const dim3 grid(static_cast<unsigned>(op.crops * op.count), static_cast<unsigned>(rows));
  gather_kernel<Pixel, Value><<<grid, kThreads, 0, stream>>>(op, batch.device);
  return launch_error();
}

template <class Pixel>
const char* gather_of(const Batch<GatherCrops>& batch, cudaStream_t stream) {
  switch (batch.host->value_bytes) {
    case 1:
      return gather<Pixel, uint8_t>(batch, stream);
    case 2:
      return gather<Pixel, uint16_t>(batch, stream);
    case 4:
      return gather<Pixel, uint32_t>(batch, stream);
  }
  return "table elements must have 1, 2 or 4 bytes";
}

__device__ float widen(float value) { return value; }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float widen(__half value) { return __half2float(value); }

__device__ void narrow(float value, float& out) { out = value; }
__device__ void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ void narrow(float value, __half& out) { out = __float2half_rn(value); }

template <class Feature>
__device__ float pooled(const PoolCrops& op, int64_t s, int64_t d) {
  const Feature* crop = static_cast<const Feature*>(op.features) + s * op.crops * op.dim + d;
  float sum = widen(*crop);
  for (int64_t n = 1; n < op.crops; ++n) {
    const float x = widen(*(crop += op.dim));
    sum = op.take_max ? (x >= sum || x != x ? x : sum) : sum + x;
  }
  return op.take_max ? sum : sum / static_cast<float>(op.crops);
}

// The sum over a block, in every thread.
__device__ double block_sum(double value) {
  __shared__ double partial[kWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp];
  return sum;
}

// Blocks: x over samples, y over dimensions; with a norm one block has the whole sample.
template <class Feature, class Value>
__global__ void __launch_bounds__(kThreads) pool_kernel(PoolCrops op) {
  const int64_t s = blockIdx.x;
  double factor = 1;
  if (op.l2_normalize) {
    double square = 0;
    for (int64_t d = threadIdx.x; d < op.dim; d += kThreads) {
      const double value = pooled<Feature>(op, s, d);
      square += value * value;
    }
    const double norm = sqrt(block_sum(square));
    factor = 1 / (norm < 1e-12 ? 1e-12 : norm);  // NaN stays NaN
  }
  Value* out = static_cast<Value*>(op.out) + s * op.dim;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t d = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; d < op.dim;
       d += step) {
    float value = pooled<Feature>(op, s, d);  // once more: the crops are still in the cache
    if (op.l2_normalize) value = static_cast<float>(value * factor);
    narrow(value, out[d]);
  }
}

template <class Feature, class Value>
const char* pool(const PoolCrops& op, cudaStream_t stream) {
  const int64_t blocks =
      op.l2_normalize ? 1 : std::min((op.dim + kThreads - 1) / kThreads, kMaxGridY);
  const dim3 grid(static_cast<unsigned>(op.samples), static_cast<unsigned>(blocks));
  pool_kernel<Feature, Value><<<grid, kThreads, 0, stream>>>(op);
  return launch_error();
}

template <class Feature>
const char* pool_of(const PoolCrops& op, cudaStream_t stream) {
  switch (op.value) {
    case Real::kFloat32:
      return pool<Feature, float>(op, stream);
    case Real::kBFloat16:
      return pool<Feature, __nv_bfloat16>(op, stream);
    case Real::kFloat16:
      return pool<Feature, __half>(op, stream);
  }
  return "unknown value type";
}

}  // namespace

const char* gather_crops(const Batch<GatherCrops>& batch, void* stream) {
  if (batch.host->crops == 0 || batch.host->count == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (batch.host->pixel) {
    case Pixel::kUInt8:
      return gather_of<uint8_t>(batch, on);
    case Pixel::kUInt16:
      return gather_of<uint16_t>(batch, on);
    case Pixel::kFloat32:
      return gather_of<float>(batch, on);
  }
  return "unknown pixel type";
}

const char* pool_crops(const PoolCrops& op, void* stream) {
  if (op.samples == 0 || op.dim == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (op.feature) {
    case Real::kFloat32:
      return pool_of<float>(op, on);
    case Real::kBFloat16:
      return pool_of<__nv_bfloat16>(op, on);
    case Real::kFloat16:
      return pool_of<__half>(op, on);
  }
  return "unknown feature type";
}

}  // namespace fastembed::cuda
