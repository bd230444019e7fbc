// What every op needs to run: plain pointers and sizes, no torch. bindings.cpp checks the
// tensors and fills these structs; the .cpp and .cu files hold the loops. The contracts are
// the docstrings in fastembed/ops/.
#pragma once

#include <cstdint>

namespace fastembed {

enum class Pixel { kUInt8, kUInt16, kFloat32 };
enum class Real { kFloat32, kBFloat16, kFloat16 };

// The quantiser of one channel; a row of the ramp tensor.
struct Ramp {
  float shift, scale, lo, hi, span;
};

// Where a percentile lies in the sorted order: past `rank` by a fraction of the way to the next.
struct Rank {
  int64_t rank;
  double fraction;
};

struct PercentileBounds {
  Pixel pixel;
  const void* image;  // [channels, pixels] of pixel
  float* out;         // [channels, 2]; NaN for a channel with a pixel that is not finite
  void* scratch;      // CUDA: cuda::percentile_scratch() bytes
  int64_t channels, pixels;
  Rank low, high;
};

struct Quantize {
  Pixel pixel;
  const void* image;  // [channels, pixels] of pixel
  const Ramp* ramp;   // [channels]
  uint8_t* out;       // [channels, pixels]
  int64_t channels, pixels;
};

struct GatherCrops {
  Pixel pixel;
  const void* image;       // [channels, height, width] of pixel
  const int32_t* origins;  // [crops, 2], (y, x)
  const int32_t* planes;   // [count], source channel of each output plane
  const Ramp* ramp;        // [channels]
  const void* table;       // [count, 256], elements of value_bytes
  void* out;               // [crops, count, size, size], elements of value_bytes
  int64_t value_bytes;     // 1, 2 or 4: a lookup copies bits, whatever they mean
  int64_t channels, height, width, crops, count, size;
};

struct PoolCrops {
  Real feature;
  Real value;
  const void* features;  // [samples, crops, dim] of feature
  void* out;             // [samples, dim] of value
  int64_t samples, crops, dim;
  bool take_max, l2_normalize;
};

// Single-threaded: the pipeline's pool is the parallelism.
namespace cpu {
void percentile_bounds(const PercentileBounds& op);
void quantize(const Quantize& op);
void gather_crops(const GatherCrops& op);
void pool_crops(const PoolCrops& op);
}  // namespace cpu

// On the current device and the given cudaStream_t, without waiting. Null, or what failed.
namespace cuda {
int64_t percentile_scratch(const PercentileBounds& op);
const char* percentile_bounds(const PercentileBounds& op, void* stream);
const char* quantize(const Quantize& op, void* stream);
const char* gather_crops(const GatherCrops& op, void* stream);
const char* pool_crops(const PoolCrops& op, void* stream);
}  // namespace cuda

}  // namespace fastembed
