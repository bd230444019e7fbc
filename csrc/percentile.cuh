// The kernel of percentile_bounds: radix select, exact for every image. Only atomics and
// barriers of a block, so that tests/fuzz can run this text on a CPU.
#pragma once

#include <cstring>

#include "launch.cuh"
#include "quantize.h"

namespace fastembed::cuda {

// Pixels as unsigned integers of the same order.
template <class Pixel>
struct Key {
  static constexpr int kBits = 8 * sizeof(Pixel);
  __device__ static uint32_t of(Pixel pixel) { return pixel; }
  __device__ static float value(uint32_t key) { return static_cast<float>(key); }
};

template <>
struct Key<float> {
  static constexpr int kBits = 32;
  static constexpr uint32_t kSign = 0x80000000u;

  __device__ static uint32_t of(float pixel) {
    uint32_t bits;
    memcpy(&bits, &pixel, sizeof bits);
    return bits & kSign ? ~bits : bits | kSign;
  }

  __device__ static float value(uint32_t key) {
    const uint32_t bits = key & kSign ? key ^ kSign : ~key;
    float pixel;
    memcpy(&pixel, &bits, sizeof pixel);
    return pixel;
  }
};

// A level settles the next 11 bits of the keys: three levels for float32, two for uint16, one
// for uint8. 2048 counts of each target are 32 KB, so that six blocks share an SM's memory.
constexpr int kDigit = 11;
constexpr int kBins = 1 << kDigit;

template <class Pixel>
constexpr int kLevels = (Key<Pixel>::kBits + kDigit - 1) / kDigit;

// The order statistics in search: low rank, the rank above it, high rank, the one above it.
constexpr int kTargets = 4;

// What the launches hand on, per channel of an image; zero before the first.
struct Progress {
  unsigned long long count[kTargets][kBins];
  unsigned long long rank[kTargets];  // among the pixels that have the prefix
  uint32_t prefix[kTargets];          // the settled bits
  uint32_t blocks_done;
  uint32_t not_finite;
};

constexpr int kBatch = 8;  // loads in flight per thread
constexpr int kTile = kBatch * kThreads;
constexpr int64_t kTilesPerBlock = 8;  // pay for clearing and flushing the counts

FASTEMBED_HOST_DEVICE inline int64_t tiles_of(int64_t pixels) {
  return (pixels + kTile - 1) / kTile;
}

__device__ inline int64_t rank_of(const PercentileBounds& op, int target) {
  const int64_t rank = (target < 2 ? op.low : op.high).rank + target % 2;
  return rank < op.pixels ? rank : op.pixels - 1;
}

// Finds the bin of `count` [kCount] in which `rank` falls, by the whole block, and settles it.
template <int kCount>
__device__ void settle(const unsigned long long* count, unsigned long long rank,
                       unsigned long long& rank_in_bin, uint32_t& prefix) {
  constexpr int kPerThread = (kCount + kThreads - 1) / kThreads;
  __shared__ unsigned long long sums[kThreads];
  const int first = static_cast<int>(threadIdx.x) * kPerThread;
  unsigned long long own = 0;
  for (int bin = first; bin < first + kPerThread && bin < kCount; ++bin) own += __ldcg(count + bin);
  sums[threadIdx.x] = own;
  __syncthreads();
  for (unsigned step = 1; step < kThreads; step *= 2) {
    const unsigned long long before = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
    __syncthreads();
  }
  unsigned long long below = sums[threadIdx.x] - own;
  if (below <= rank && rank < below + own) {
    int bin = first;
    for (; rank >= below + __ldcg(count + bin); ++bin) below += __ldcg(count + bin);
    rank_in_bin = rank - below;
    prefix = prefix * kCount + bin;
  }
  __syncthreads();
}

// Blocks: x over the channels of all images, y over pixels. Counts the digits of the pixels that
// agree with a target in the bits settled so far; the channel's last block settles the next ones.
template <class Pixel, int kLevel>
__global__ void __launch_bounds__(kThreads)
    percentile_kernel(const PercentileBounds* __restrict__ batch) {
  constexpr int kSettled = kLevel * kDigit;
  constexpr int kLeft = Key<Pixel>::kBits - kSettled;
  constexpr int kShift = kLeft > kDigit ? kLeft - kDigit : 0;
  constexpr int kCount = 1 << (kLeft - kShift);
  // One more than a power of two: equal bins of two tables lie in different banks.
  __shared__ unsigned int count[kTargets][kCount + 1];
  __shared__ bool last;

  const auto channels = static_cast<unsigned>(batch->channels);
  const unsigned channel = blockIdx.x % channels;
  const PercentileBounds& op = batch[blockIdx.x / channels];
  // In a batch an image can have fewer tiles than there are blocks: those have nothing to do.
  const int64_t tiles = tiles_of(op.pixels);
  const unsigned blocks = tiles < gridDim.y ? static_cast<unsigned>(tiles) : gridDim.y;
  if (blockIdx.y >= blocks) return;
  Progress& progress = static_cast<Progress*>(op.scratch)[channel];
  const Pixel* image = static_cast<const Pixel*>(op.image) + channel * op.pixels;
  uint32_t prefix[kTargets];
  int table[kTargets];  // targets of the same prefix share the first one's counts
  for (int t = 0; t < kTargets; ++t) {
    prefix[t] = progress.prefix[t];
    table[t] = t;
    for (int u = t - 1; u >= 0; --u) table[t] = prefix[u] == prefix[t] ? u : table[t];
    for (int bin = threadIdx.x; bin < kCount; bin += kThreads) count[t][bin] = 0;
  }
  __syncthreads();

  for (int64_t tile = blockIdx.y; tile * kTile < op.pixels; tile += blocks) {
    const int64_t start = tile * kTile + threadIdx.x;
    Pixel pixel[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t i = start + k * kThreads;
      pixel[k] = i < op.pixels ? image[i] : Pixel{};
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (start + k * kThreads >= op.pixels) break;
      const uint32_t key = Key<Pixel>::of(pixel[k]);
      const uint32_t digit = key >> kShift & (kCount - 1);
      if constexpr (kLevel == 0) {
        // All targets want the same counts: four copies, for backgrounds that hit few bins.
        atomicAdd(&count[threadIdx.x % kTargets][digit], 1u);
      } else {
        const uint32_t settled = key >> kLeft;
        for (int t = 0; t < kTargets; ++t) {
          if (table[t] == t && settled == prefix[t]) atomicAdd(&count[t][digit], 1u);
        }
      }
    }
  }
  __syncthreads();

  for (int bin = threadIdx.x; bin < kCount; bin += kThreads) {
    if constexpr (kLevel == 0) {
      for (int t = 1; t < kTargets; ++t) count[0][bin] += count[t][bin];
      if (count[0][bin] != 0) atomicAdd(&progress.count[0][bin], 1ull * count[0][bin]);
    } else {
      for (int t = 0; t < kTargets; ++t) {
        if (count[t][bin] != 0) atomicAdd(&progress.count[t][bin], 1ull * count[t][bin]);
      }
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&progress.blocks_done, 1u) == blocks - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();

  if constexpr (kLevel == 0 && Key<Pixel>::kBits == 32) {
    // Sign, exponent and two bits more: infinities and NaN are the four bins at either end.
    if (threadIdx.x < 8) {
      const unsigned bin = threadIdx.x < 4 ? threadIdx.x : kCount - 8 + threadIdx.x;
      if (__ldcg(&progress.count[0][bin]) != 0) atomicOr(&progress.not_finite, 1u);
    }
  }
  for (int t = 0; t < kTargets; ++t) {
    const unsigned long long rank = kLevel == 0 ? rank_of(op, t) : progress.rank[t];
    settle<kCount>(progress.count[table[t]], rank, progress.rank[t], progress.prefix[t]);
  }
  if constexpr (kShift > 0) {
    for (int t = 0; t < kTargets; ++t) {
      for (int bin = threadIdx.x; bin < kCount; bin += kThreads) progress.count[t][bin] = 0;
    }
    if (threadIdx.x == 0) progress.blocks_done = 0;
  } else if (threadIdx.x < 2) {
    const int t = 2 * threadIdx.x;
    const float below = Key<Pixel>::value(progress.prefix[t]);
    const float above = Key<Pixel>::value(progress.prefix[t + 1]);
    const double fraction = (threadIdx.x == 0 ? op.low : op.high).fraction;
    const float nan = Key<float>::value(0xffffffffu);
    op.out[2 * channel + threadIdx.x] =
        progress.not_finite ? nan : interpolate(below, above, fraction);
  }
}

}  // namespace fastembed::cuda
