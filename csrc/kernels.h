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

// A padded box and the segment in it; a row of the crops tensor.
struct Crop {
  int32_t id, top, left, height, width;
};

struct BlendCrops {
  const uint8_t* image;       // [height, width, 3]
  const int32_t* ids;         // [height, width]
  const Crop* crop;           // [crops]
  const uint8_t* background;  // [256], what a level becomes outside of the mask
  const void* table;          // [3, 256], elements of value_bytes
  void* out;                  // [crops, 3, size, size], elements of value_bytes
  int64_t value_bytes;        // 1, 2 or 4: a lookup copies bits, whatever they mean
  int64_t height, width, crops, size;
  bool cubic, narrow, tall_first;
};

// Single-threaded: the pipeline's pool is the parallelism.
namespace cpu {
void quantize(const Quantize& op);
void gather_crops(const GatherCrops& op);
void pool_crops(const PoolCrops& op);
void blend_crops(const BlendCrops& op);
}  // namespace cpu

// On the current device and the given cudaStream_t, without waiting. Null, or what failed.
namespace cuda {
const char* quantize(const Quantize& op, void* stream);
const char* gather_crops(const GatherCrops& op, void* stream);
const char* pool_crops(const PoolCrops& op, void* stream);
const char* blend_crops(const BlendCrops& op, void* stream);
}  // namespace cuda

}  // namespace fastembed
