// Contract: fastembed/ops/panoptic.py.
#include <algorithm>

#include "launch.cuh"
#include "panoptic.h"

namespace fastembed::cuda {
namespace {

constexpr int64_t kFree = INT64_MIN;  // the id of a row without segment
constexpr int64_t kStretch = 4 * kWarp;

__device__ int32_t id_of(const uint8_t* pixel) { return pixel[0] | pixel[1] << 8 | pixel[2] << 16; }

// Blocks: x over pixels, y over images. Four pixels per thread: three words in, four out.
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const DecodePanoptic* __restrict__ batch) {
  const DecodePanoptic op = batch[blockIdx.y];
  const bool aligned = reinterpret_cast<uintptr_t>(op.rgb) % sizeof(uint32_t) == 0 &&
                       reinterpret_cast<uintptr_t>(op.out) % sizeof(uint4) == 0;
  const int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (aligned && i + 4 <= op.pixels) {
    const uint32_t* word = reinterpret_cast<const uint32_t*>(op.rgb + 3 * i);
    const uint32_t a = word[0], b = word[1], c = word[2];
    *reinterpret_cast<uint4*>(op.out + i) = make_uint4(
        a & 0xffffffu, (a >> 24 | b << 8) & 0xffffffu, (b >> 16 | c << 16) & 0xffffffu, c >> 8);
  } else {
    for (int64_t k = i; k < i + 4 && k < op.pixels; ++k) op.out[k] = id_of(op.rgb + 3 * k);
  }
}

// Blocks: x over slots, y over images.
__global__ void __launch_bounds__(kThreads)
    clear_kernel(const PanopticSegments* __restrict__ batch) {
  Segment* out = batch[blockIdx.y].out;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i == 0) out[0] = {0, 0, 0, 0, 0, 0};
  if (i < batch->slots) out[1 + i] = {kFree, INT64_MAX, INT64_MAX, -1, -1, 0};
}

__device__ long long* atomic(int64_t& value) { return reinterpret_cast<long long*>(&value); }

// What a thread reads here may be old; the values only ever move one way, so an old one costs
// an atomic that changes nothing, and a spared one would have changed nothing.
__device__ int64_t peek(const int64_t& value) {
  return *const_cast<const volatile int64_t*>(&value);
}

__device__ void add_run(const PanopticSegments& op, int32_t id, int64_t y, int64_t x0, int64_t x1) {
  for (Probe probe(id, op.slots);; probe.next()) {
    Segment& row = op.out[1 + probe.slot];
    int64_t owner = peek(row.id);
    // No room: nothing matters any more, and in a full table the search would have no end.
    if (owner != id && peek(op.out->id) > op.slots / 2) return;
    if (owner == kFree) {
      owner = atomicCAS(reinterpret_cast<unsigned long long*>(&row.id),
                        static_cast<unsigned long long>(kFree),
                        static_cast<unsigned long long>(static_cast<int64_t>(id)));
      if (owner == kFree) {
        atomicAdd(reinterpret_cast<unsigned long long*>(&op.out->id), 1ull);
        owner = id;
      }
    }
    if (owner == id) {
      if (y < peek(row.y0)) atomicMin(atomic(row.y0), y);
      if (x0 < peek(row.x0)) atomicMin(atomic(row.x0), x0);
      if (y > peek(row.y1)) atomicMax(atomic(row.y1), y);
      if (x1 > peek(row.x1)) atomicMax(atomic(row.x1), x1);
      atomicAdd(reinterpret_cast<unsigned long long*>(&row.area), x1 - x0 + 1);
      return;
    }
  }
}

template <bool kColours>
__device__ int32_t pixel_id(const PanopticSegments& op, int64_t pixel) {
  return kColours ? id_of(op.rgb + 3 * pixel) : op.ids[pixel];
}

__host__ __device__ int64_t stretches_of(const PanopticSegments& op) {
  return (op.width + kStretch - 1) / kStretch;
}

// Blocks: x over stretches, y over images. A warp takes a stretch of one row; runs that leave
// it are added in parts.
template <bool kColours>
__global__ void __launch_bounds__(kThreads)
    segments_kernel(PanopticSegments op, const PanopticSegments* __restrict__ batch) {
  const PanopticSegments& own = batch[blockIdx.y];
  const int64_t stretches = stretches_of(own);
  const int64_t stretch = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (stretch >= own.height * stretches) return;
  const int64_t y = stretch / stretches;
  op.out = own.out;
  // From here on those of the row.
  if constexpr (kColours) {
    op.rgb = own.rgb + 3 * y * own.width;
  } else {
    op.ids = own.ids + y * own.width;
  }
  const int64_t begin = stretch % stretches * kStretch;
  const int64_t end = min(begin + kStretch, own.width);
  const int lane = threadIdx.x % kWarp;
  int64_t start = begin;  // of the run that is open
  for (int64_t x = begin; x < end; x += kWarp) {
    const int64_t mine = x + lane;
    const int32_t id = mine < end ? pixel_id<kColours>(op, mine) : 0;
    const bool closes = mine < end && (mine + 1 == end || pixel_id<kColours>(op, mine + 1) != id);
    const unsigned closing = __ballot_sync(0xffffffffu, closes);
    const unsigned before = closing & ((1u << lane) - 1);
    if (closes && id != op.void_id) {
      add_run(op, id, y, before == 0 ? start : x + kWarp - __clz(before), mine);
    }
    if (closing != 0) start = x + kWarp - __clz(closing);
  }
}

}  // namespace

const char* decode_panoptic(const Batch<DecodePanoptic>& batch, void* stream) {
  constexpr int64_t kPixels = 4 * kThreads;
  const int64_t pixels = largest(batch, [](const DecodePanoptic& op) { return op.pixels; });
  if (pixels == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>((pixels + kPixels - 1) / kPixels),
                  static_cast<unsigned>(batch.count));
  decode_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch.device);
  return launch_error();
}

const char* panoptic_segments(const Batch<PanopticSegments>& batch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const auto images = static_cast<unsigned>(batch.count);
  const dim3 clear(static_cast<unsigned>((batch.host->slots + kThreads - 1) / kThreads), images);
  clear_kernel<<<clear, kThreads, 0, on>>>(batch.device);
  const char* error = launch_error();
  const int64_t stretches =
      largest(batch, [](const PanopticSegments& op) { return op.height * stretches_of(op); });
  if (error != nullptr || stretches == 0) return error;
  const dim3 grid(static_cast<unsigned>((stretches + kWarps - 1) / kWarps), images);
  if (batch.host->rgb != nullptr) {
    segments_kernel<true><<<grid, kThreads, 0, on>>>(*batch.host, batch.device);
  } else {
    segments_kernel<false><<<grid, kThreads, 0, on>>>(*batch.host, batch.device);
  }
  return launch_error();
}

}  // namespace fastembed::cuda
