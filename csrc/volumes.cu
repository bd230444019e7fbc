// Contract: fastembed/ops/volumes.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "launch.cuh"

namespace fastembed::cuda {
namespace {

// A block takes kTile x kTile voxels of one z and channel at a time.
constexpr int kTile = kWarp;
constexpr int64_t kMostBlocks = int64_t{1} << 20;  // larger volumes loop inside the kernel

__device__ float widen(float value) { return value; }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float widen(__half value) { return __half2float(value); }

__device__ void narrow(float value, float& out) { out = value; }
__device__ void narrow(float value, __half& out) { out = __float2half_rn(value); }

__device__ float lerp(float low, float high, float weight) { return low + weight * (high - low); }

// The plane's value at voxel (row, column) of a slice, along the columns first or the rows first.
template <class Token>
__device__ float upsampled(const TokenPlane& plane, int64_t slice, int64_t c, int row, int column,
                           float scale, bool columns_first) {
  const Token* grid =
      static_cast<const Token*>(plane.tokens) + slice * plane.slice_pitch + c * plane.channel_pitch;
  const Token* upper = grid + plane.row.low[row] * plane.columns;
  const Token* lower = grid + plane.row.high[row] * plane.columns;
  const int left = plane.column.low[column], right = plane.column.high[column];
  const float down = plane.row.weight[row], across = plane.column.weight[column];
  const float a = widen(upper[left]) * scale, b = widen(upper[right]) * scale;
  const float c0 = widen(lower[left]) * scale, d = widen(lower[right]) * scale;
  return columns_first ? lerp(lerp(a, b, across), lerp(c0, d, across), down)
                       : lerp(lerp(a, c0, down), lerp(b, d, down), across);
}

// Threads side by side are voxels along x: writes, and reads of xy and xz, are runs of neighbours.
// The slices of yz are x, so its tile is read with y side by side and turned in shared memory.
template <class Token, class Value>
__global__ void __launch_bounds__(kThreads) triplane_kernel(TriplaneAccumulate op) {
  __shared__ float turned[kTile][kTile + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tiles_x = (op.width + kTile - 1) / kTile, tiles_y = (op.height + kTile - 1) / kTile;
  const int64_t tiles = tiles_x * tiles_y * op.depth * op.channels;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int x0 = static_cast<int>(tile % tiles_x) * kTile;
    const int y0 = static_cast<int>(tile / tiles_x % tiles_y) * kTile;
    const int64_t plane = tile / (tiles_x * tiles_y);
    const int64_t c = plane / op.depth;
    const int z = static_cast<int>(plane % op.depth);
    if (op.planes[2].tokens != nullptr) {
      __syncthreads();  // the tile before is read
      for (int i = warp; i < kTile; i += kWarps) {
        if (x0 + i < op.width && y0 + lane < op.height) {
          turned[i][lane] =
              upsampled<Token>(op.planes[2], x0 + i, c, z, y0 + lane, op.scale, false);
        }
      }
      __syncthreads();
    }
    const int x = x0 + lane;
    for (int i = warp; i < kTile && y0 + i < op.height && x < op.width; i += kWarps) {
      const int y = y0 + i;
      float xy = 0, xz = 0, yz = 0;
      if (op.planes[0].tokens != nullptr) {
        xy = upsampled<Token>(op.planes[0], z, c, y, x, op.scale, true);
      }
      if (op.planes[1].tokens != nullptr) {
        xz = upsampled<Token>(op.planes[1], y, c, z, x, op.scale, true);
      }
      if (op.planes[2].tokens != nullptr) yz = turned[lane][i];
      narrow((xy + xz) + yz, static_cast<Value*>(op.out)[(plane * op.height + y) * op.width + x]);
    }
  }
}

template <class Token, class Value>
const char* accumulate(const TriplaneAccumulate& op, cudaStream_t stream) {
  const int64_t tiles =
      ((op.width + kTile - 1) / kTile) * ((op.height + kTile - 1) / kTile) * op.depth * op.channels;
  const auto blocks = static_cast<unsigned>(std::min(tiles, kMostBlocks));
  triplane_kernel<Token, Value><<<blocks, kThreads, 0, stream>>>(op);
  return launch_error();
}

template <class Token>
const char* accumulate_of(const TriplaneAccumulate& op, cudaStream_t stream) {
  switch (op.value) {
    case Real::kFloat32:
      return accumulate<Token, float>(op, stream);
    case Real::kFloat16:
      return accumulate<Token, __half>(op, stream);
    default:
      return "out must be float32 or float16";
  }
}

}  // namespace

const char* triplane_accumulate(const TriplaneAccumulate& op, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (op.token) {
    case Real::kFloat32:
      return accumulate_of<float>(op, on);
    case Real::kBFloat16:
      return accumulate_of<__nv_bfloat16>(op, on);
    case Real::kFloat16:
      return accumulate_of<__half>(op, on);
  }
  return "unknown token type";
}

}  // namespace fastembed::cuda
