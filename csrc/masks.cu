// Contract: fastembed/ops/masks.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "filter.h"
#include "kernels.h"
#include "launch.cuh"

namespace fastembed::cuda {
namespace {

// A block makes a tile of one crop's output, a pixel per thread.
constexpr int kTileX = kWarp, kTileY = kWarps;
constexpr int kStrip = 32;  // rows (or columns) between the passes that are held at a time
constexpr size_t kMaxShared = 160 * 1024;  // what an A100 grants; later ones grant more

__device__ uint8_t level_of(int32_t sum, int bits) {
  return static_cast<uint8_t>(min(max(sum >> bits, 0), 255));
}

// The two kinds of resize: in integers with levels between the passes, and in floats.
struct Levels {
  using Op = BlendCrops;
  using Weight = int32_t;
  using Pixel = uint8_t;
  static constexpr bool kTurns = true;  // the vertical pass may be the first one
  static __host__ __device__ bool cubic(const Op& op) { return op.cubic; }
  static __device__ bool narrow(const Op& op) { return op.narrow; }
  static __device__ bool down_first(const Op& op, const Crop& crop) {
    return op.tall_first && is_tall(crop.height, crop.width, op.size);
  }
  static __device__ Weight weight(double real, int bits) { return fixed_weight(real, bits); }
  static __device__ Weight start(int bits) { return 1 << bits >> 1; }
  static __device__ Pixel pixel(Weight sum, int bits) { return level_of(sum, bits); }
  template <class Value>
  static __device__ void put(const Op& op, int c, Pixel level, Value* out) {
    *out = static_cast<const Value*>(op.table)[256 * c + level];
  }
};

struct Floats {
  using Op = BlendCropsFloat;
  using Weight = float;
  using Pixel = float;
  static constexpr bool kTurns = false;
  static __host__ __device__ bool cubic(const Op&) { return false; }
  static __device__ bool narrow(const Op&) { return false; }
  static __device__ bool down_first(const Op&, const Crop&) { return kTurns; }
  static __device__ Weight weight(double real, int) { return static_cast<float>(real); }
  static __device__ Weight start(int) { return 0; }
  static __device__ Pixel pixel(Weight sum, int) { return sum; }
  template <class Value>
  static __device__ void put(const Op& op, int c, Pixel sum, Value* out) {
    *out = static_cast<Value>((sum / 255 - op.ramp[c]) / op.ramp[3 + c]);
  }
};

// The tile's outputs along one axis: their weights, as [taps, count] in shared memory.
template <class Kind>
struct Taps {
  typename Kind::Weight* weights;
  int32_t* first;
  int32_t* last;
  int count, bits;
};

// The normalised weights' largest over all outputs of an axis, in every thread.
__device__ double largest_weight(const Axis& axis, bool cubic, int64_t size) {
  __shared__ double partial[kWarps];
  double largest = 0;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const double center = center_of(axis, i);
    const int32_t first = first_of(axis, center), last = last_of(axis, center);
    double total = 0, most = 0;
    for (int32_t j = first; j < last; ++j) {
      const double weight = raw_weight(axis, cubic, center, j);
      total += weight;
      most = fmax(most, weight);
    }
    largest = fmax(largest, most / total);  // division is monotonic: it keeps the largest
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) largest = fmax(largest, partial[warp]);
  return largest;
}

// Weights of outputs start to start + count, a thread per output: the sum of an output's
// weights must be taken in order.
template <class Kind>
__device__ void fill(Taps<Kind>& taps, const Axis& axis, bool cubic, bool narrow, int64_t size,
                     int64_t start) {
  taps.bits = narrow ? narrow_bits(largest_weight(axis, cubic, size)) : kWeightBits;
  const int i = threadIdx.x;
  if (i < taps.count && start + i < size) {
    const double center = center_of(axis, start + i);
    const int32_t first = first_of(axis, center), last = last_of(axis, center);
    double total = 0;
    for (int32_t j = first; j < last; ++j) total += raw_weight(axis, cubic, center, j);
    for (int32_t j = first; j < last; ++j) {
      const double weight = raw_weight(axis, cubic, center, j) / total;
      taps.weights[(j - first) * taps.count + i] = Kind::weight(weight, taps.bits);
    }
    taps.first[i] = first;
    taps.last[i] = last;
  } else if (i < taps.count) {
    taps.first[i] = taps.last[i] = 0;
  }
}

template <class Kind>
struct Shared {
  typename Kind::Pixel between[3][kStrip][kTileX];  // what is between the passes; kTileX >= kTileY
  uint8_t background[256];
  int32_t first[2][kTileX], last[2][kTileX];
};

// The tile at (x0, y0). kDown: the vertical pass is the first one. Along `a` runs the first
// pass, along `b` the second; a strip of b is resized along a, then added to every thread's sums.
template <class Kind, class Value, bool kDown>
__device__ void resize_tile(const typename Kind::Op& op, const Crop& crop, int64_t s, int64_t x0,
                            int64_t y0, Shared<Kind>& shared, typename Kind::Weight* weights) {
  using Weight = typename Kind::Weight;
  const bool cubic = Kind::cubic(op), narrow = Kind::narrow(op);
  constexpr int kA = kDown ? kTileY : kTileX, kB = kDown ? kTileX : kTileY;
  const Axis a_axis = make_axis(kDown ? crop.height : crop.width, op.size, cubic);
  const Axis b_axis = make_axis(kDown ? crop.width : crop.height, op.size, cubic);
  Taps<Kind> a{weights, shared.first[0], shared.last[0], kA, 0};
  Taps<Kind> b{weights + kA * most_taps(a_axis), shared.first[1], shared.last[1], kB, 0};
  fill(a, a_axis, cubic, narrow, op.size, kDown ? y0 : x0);
  fill(b, b_axis, cubic, narrow, op.size, kDown ? x0 : y0);
  __syncthreads();

  const int tx = threadIdx.x % kTileX, ty = threadIdx.x / kTileX;
  const int at_a = kDown ? ty : tx, at_b = kDown ? tx : ty;
  const int64_t corner = static_cast<int64_t>(crop.top) * op.width + crop.left;
  const int64_t a_step = kDown ? op.width : 1, b_step = kDown ? 1 : op.width;
  const int32_t begin = b.first[0];
  int32_t end = begin;
  for (int i = 0; i < kB; ++i) end = max(end, b.last[i]);

  Weight red = Kind::start(b.bits), green = red, blue = red;
  for (int32_t strip = begin; strip < end; strip += kStrip) {
    for (int i = threadIdx.x; i < kA * kStrip; i += kThreads) {
      // Neighbouring threads read neighbouring columns, whichever way the pass runs.
      const int to_a = kDown ? i / kStrip : i % kA, to_b = kDown ? i % kStrip : i / kA;
      if (strip + to_b >= end) continue;
      const int32_t first = a.first[to_a], count = a.last[to_a] - first;
      int64_t pixel = corner + (strip + to_b) * b_step + first * a_step;
      Weight r = Kind::start(a.bits), g = r, u = r;
      for (int32_t k = 0; k < count; ++k, pixel += a_step) {
        const Weight weight = a.weights[k * kA + to_a];
        const uint8_t* rgb = op.image + 3 * pixel;
        if (op.ids[pixel] == crop.id) {
          r += weight * rgb[0], g += weight * rgb[1], u += weight * rgb[2];
        } else {
          r += weight * shared.background[rgb[0]];
          g += weight * shared.background[rgb[1]];
          u += weight * shared.background[rgb[2]];
        }
      }
      shared.between[0][to_b][to_a] = Kind::pixel(r, a.bits);
      shared.between[1][to_b][to_a] = Kind::pixel(g, a.bits);
      shared.between[2][to_b][to_a] = Kind::pixel(u, a.bits);
    }
    __syncthreads();
    const int32_t last = min(b.last[at_b], strip + kStrip);
    for (int32_t j = max(b.first[at_b], strip); j < last; ++j) {
      const Weight weight = b.weights[(j - b.first[at_b]) * kB + at_b];
      red += weight * shared.between[0][j - strip][at_a];
      green += weight * shared.between[1][j - strip][at_a];
      blue += weight * shared.between[2][j - strip][at_a];
    }
    __syncthreads();
  }
  if (x0 + tx < op.size && y0 + ty < op.size) {
    const int64_t plane = op.size * op.size;
    Value* out = static_cast<Value*>(op.out) + 3 * s * plane + (y0 + ty) * op.size + x0 + tx;
    Kind::put(op, 0, Kind::pixel(red, b.bits), out);
    Kind::put(op, 1, Kind::pixel(green, b.bits), out + plane);
    Kind::put(op, 2, Kind::pixel(blue, b.bits), out + 2 * plane);
  }
}

// Blocks: x over crops, y over tiles. Four on a multiprocessor, which grants 64 registers: left
// to itself ptxas takes 40 for floats on sm_100, and spills. What all images have in common is a
// parameter: read from memory it would take 35 registers more per thread (sm_90, nvcc 13.0).
template <class Kind, class Value>
__global__ void __launch_bounds__(kThreads, 4)
    blend_kernel(typename Kind::Op op, const typename Kind::Op* __restrict__ batch) {
  static_assert(kTileX * kTileY == kThreads && kThreads == 256, "a thread per pixel and entry");
  extern __shared__ int32_t dynamic[];
  auto* weights = reinterpret_cast<typename Kind::Weight*>(dynamic);
  __shared__ Shared<Kind> shared;
  const Crop crop = op.crop[blockIdx.x];
  op.image = batch[crop.image].image;
  op.ids = batch[crop.image].ids;
  op.width = batch[crop.image].width;
  shared.background[threadIdx.x] = op.background[threadIdx.x];
  const bool down = Kind::down_first(op, crop);
  const int64_t across = (op.size + kTileX - 1) / kTileX;
  const int64_t tiles = across * ((op.size + kTileY - 1) / kTileY);
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    __syncthreads();
    const int64_t x0 = tile % across * kTileX, y0 = tile / across * kTileY;
    if (down) {
      // The same function as below where the kind has one order only: it is not compiled twice.
      resize_tile<Kind, Value, Kind::kTurns>(op, crop, blockIdx.x, x0, y0, shared, weights);
    } else {
      resize_tile<Kind, Value, false>(op, crop, blockIdx.x, x0, y0, shared, weights);
    }
  }
}

template <class Kind, class Value>
const char* blend(const Batch<typename Kind::Op>& batch, void* stream) {
  using Op = typename Kind::Op;
  const Op& op = *batch.host;
  if (op.crops == 0) return nullptr;
  // The crops' sizes are on the device: room for the largest that the images can hold.
  const int64_t width = largest(batch, [](const Op& one) { return one.width; });
  const int64_t height = largest(batch, [](const Op& one) { return one.height; });
  const size_t taps_x = most_taps(make_axis(width, op.size, Kind::cubic(op)));
  const size_t taps_y = most_taps(make_axis(height, op.size, Kind::cubic(op)));
  const size_t bytes = (kTileX * taps_x + kTileY * taps_y) * sizeof(typename Kind::Weight);
  if (bytes + sizeof(Shared<Kind>) > kMaxShared) return "an image is too large for this size";
  const cudaError_t error =
      cudaFuncSetAttribute(blend_kernel<Kind, Value>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(bytes));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t tiles = ((op.size + kTileX - 1) / kTileX) * ((op.size + kTileY - 1) / kTileY);
  const dim3 grid(static_cast<unsigned>(op.crops),
                  static_cast<unsigned>(std::min(tiles, kMaxGridY)));
  const auto on = static_cast<cudaStream_t>(stream);
  blend_kernel<Kind, Value><<<grid, kThreads, bytes, on>>>(op, batch.device);
  return launch_error();
}

}  // namespace

const char* blend_crops(const Batch<BlendCrops>& batch, void* stream) {
  switch (batch.host->value_bytes) {
    case 1:
      return blend<Levels, uint8_t>(batch, stream);
    case 2:
      return blend<Levels, uint16_t>(batch, stream);
    case 4:
      return blend<Levels, uint32_t>(batch, stream);
  }
  return "table elements must have 1, 2 or 4 bytes";
}

const char* blend_crops_float(const Batch<BlendCropsFloat>& batch, void* stream) {
  switch (batch.host->value) {
    case Real::kFloat32:
      return blend<Floats, float>(batch, stream);
    case Real::kBFloat16:
      return blend<Floats, __nv_bfloat16>(batch, stream);
    case Real::kFloat16:
      return blend<Floats, __half>(batch, stream);
  }
  return "out must be float32, bfloat16 or float16";
}

}  // namespace fastembed::cuda
