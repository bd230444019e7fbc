// The table of objects, which is a hash table: CPU and CUDA look alike.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTEMBED_HOST_DEVICE __host__ __device__
#else
#define FASTEMBED_HOST_DEVICE
#endif

namespace fastembed {

// Columns of the table; each channel's three follow.
enum Column { kId, kY0, kX0, kY1, kX1, kArea, kChannels };
enum ChannelColumn { kSum, kLow, kHigh, kPerChannel };

FASTEMBED_HOST_DEVICE constexpr int64_t columns_of(int64_t channels) {
  return kChannels + kPerChannel * channels;
}

// Integers that compare as the floats do of which these are the bits.
FASTEMBED_HOST_DEVICE inline int64_t order_key(int32_t bits) {
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// The slots to try for a label, one after the other.
struct LabelProbe {
  uint32_t mixed;
  int64_t slot, slots;

  // 2^64 / golden ratio spreads labels that are alike.
  FASTEMBED_HOST_DEVICE LabelProbe(int64_t label, int64_t slots)
      : mixed(static_cast<uint32_t>(static_cast<uint64_t>(label) * 0x9E3779B97F4A7C15u >> 32)),
        slot(static_cast<int64_t>(static_cast<uint64_t>(mixed) * slots >> 32)),
        slots(slots) {}

  // Labels that meet in one slot part again; an odd step comes by every slot.
  FASTEMBED_HOST_DEVICE void next() { slot = (slot + (mixed | 1u)) & (slots - 1); }
};

}  // namespace fastembed
