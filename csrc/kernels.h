// What every op needs to run: plain pointers and sizes, no torch. The bind_*.cpp files check
// the tensors and fill these structs; the other .cpp and the .cu files hold the loops. The
// contracts are the docstrings in fastembed/ops/.
//
// A struct is about one image. A batch is an array of them, alike in types and counts, each
// image of its own size.
#pragma once

#include <cstdint>

namespace fastembed {

enum class Pixel { kUInt8, kUInt16, kFloat32 };
enum class Label { kUInt8, kUInt16, kInt32, kUInt32, kInt64 };
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
  void* scratch;      // CUDA: cuda::percentile_scratch() bytes, one after the other's
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

// Where a crop is cut out, of which image of the batch; a row of the origins tensor.
struct Origin {
  int32_t image, y, x;
};

// In a batch on CUDA every op has all the crops of all the images.
struct GatherCrops {
  Pixel pixel;
  const void* image;      // [channels, height, width] of pixel
  const Origin* origins;  // [crops]
  const int32_t* planes;  // [count], source channel of each output plane
  const Ramp* ramp;       // [channels]
  const void* table;      // [count, 256], elements of value_bytes
  void* out;              // [crops, count, size, size], elements of value_bytes
  int64_t value_bytes;    // 1, 2 or 4: a lookup copies bits, whatever they mean
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

struct DecodePanoptic {
  const uint8_t* rgb;  // [pixels, 3]
  int32_t* out;        // [pixels]
  int64_t pixels;
};

// A row of the segment table; area 0 is a free one.
struct Segment {
  int64_t id, y0, x0, y1, x1, area;
};

// The table: out[0].id becomes the number of ids found, which had no room if it is above
// slots / 2; the other rows hold one segment each, in any order.
struct PanopticSegments {
  const uint8_t* rgb;  // [height, width, 3], or null and
  const int32_t* ids;  // [height, width]
  Segment* out;        // [1 + slots], slots a power of two
  int64_t height, width, slots;
  int64_t void_id;  // its pixels are in no segment
};

struct ScanlineSegments {
  const uint8_t* lines;  // [height, 1 + 3 width]: PNG filter type, filtered RGB
  int32_t* ids;          // [height, width], or null: not wanted
  Segment* out;          // as in PanopticSegments
  int64_t height, width, slots;
  int64_t void_id;
};

// The table as of PanopticSegments, with wider rows: id, y0, x0, y1, x1, area, and by channel
// sum (of float32 the bits of a double), minimum and maximum (of float32 order_key()).
struct LabelStatistics {
  Label label;
  Pixel pixel;
  const void* labels;  // [height, width] of label; 0 is in no object
  const void* image;   // [channels, height, width] of pixel
  int64_t* out;        // [1 + slots, 6 + 3 channels], slots a power of two
  int64_t channels, height, width, slots;
};

// A padded box and the segment in it, of which image of the batch; a row of the crops tensor.
struct Crop {
  int32_t image, id, top, left, height, width;
};

// In a batch on CUDA every op has all the crops of all the images.
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

struct BlendCropsFloat {
  const uint8_t* image;       // as in BlendCrops
  const int32_t* ids;         // likewise
  const Crop* crop;           // likewise
  const uint8_t* background;  // likewise
  const float* ramp;          // [2, 3]: mean, std
  Real value;
  void* out;  // [crops, 3, size, size] of value
  int64_t height, width, crops, size;
};

// Which two tokens each voxel along an axis lies between, neither descending, and how far from
// the lower one.
struct Taps {
  const int32_t* low;
  const int32_t* high;
  const float* weight;
};

// The part of a plane that a block hangs on: a grid of tokens per slice and channel.
struct TokenPlane {
  const void* tokens;                  // null: the plane is missing
  int64_t slice_pitch, channel_pitch;  // in tokens; a grid's rows lie side by side
  int64_t rows, columns;               // of a grid
  Taps row, column;                    // per voxel
};

struct TriplaneAccumulate {
  Real token;
  Real value;            // float16 or float32
  TokenPlane planes[3];  // xy: slices are z, rows y, columns x; xz: y, z, x; yz: x, z, y
  float scale;           // 1 / planes that are there
  void* out;             // [channels, depth, height, width] of value
  int64_t channels, depth, height, width;
};

// Rows of bytes from one array of up to four axes to another; pitches are in bytes.
struct PlaceBlock {
  const char* block;
  char* out;
  int64_t sizes[3];  // rows along each outer axis
  int64_t block_pitch[3], out_pitch[3];
  int64_t row_bytes;
};

// Single-threaded, an image per call: the pipeline's pool is the parallelism.
namespace cpu {
void percentile_bounds(const PercentileBounds& op);
void quantize(const Quantize& op);
void gather_crops(const GatherCrops& op);
void pool_crops(const PoolCrops& op);
void decode_panoptic(const DecodePanoptic& op);
void panoptic_segments(const PanopticSegments& op);
void scanline_segments(const ScanlineSegments& op);
void label_statistics(const LabelStatistics& op);
void blend_crops(const BlendCrops& op);
void blend_crops_float(const BlendCropsFloat& op);
void triplane_accumulate(const TriplaneAccumulate& op);
void place_block(const PlaceBlock& op);
}  // namespace cpu

// On the current device and the given cudaStream_t, without waiting, the whole batch in one
// launch. Null, or what failed.
namespace cuda {

constexpr int64_t kMaxImages = 65535;  // of a batch: one of the grid's axes

// The launcher reads the ops at `host`, what it launches those at `device`.
template <class Op>
struct Batch {
  const Op* host;
  const Op* device;
  int64_t count;  // >= 1
};

int64_t percentile_scratch(const PercentileBounds& op);
const char* percentile_bounds(const Batch<PercentileBounds>& batch, void* stream);
const char* quantize(const Batch<Quantize>& batch, void* stream);
const char* gather_crops(const Batch<GatherCrops>& batch, void* stream);
const char* pool_crops(const PoolCrops& op, void* stream);
const char* decode_panoptic(const Batch<DecodePanoptic>& batch, void* stream);
const char* panoptic_segments(const Batch<PanopticSegments>& batch, void* stream);
const char* label_statistics(const Batch<LabelStatistics>& batch, void* stream);
const char* blend_crops(const Batch<BlendCrops>& batch, void* stream);
const char* blend_crops_float(const Batch<BlendCropsFloat>& batch, void* stream);
const char* triplane_accumulate(const TriplaneAccumulate& op, void* stream);
}  // namespace cuda

}  // namespace fastembed
