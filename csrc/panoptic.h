// Where an id lies in the segment table, which is a hash table: CPU and CUDA look alike.
#pragma once

#include "kernels.h"

#ifdef __CUDACC__
#define FASTEMBED_HOST_DEVICE __host__ __device__
#else
#define FASTEMBED_HOST_DEVICE
#endif

namespace fastembed {

// The slots to try for an id, one after the other.
struct Probe {
  uint32_t mixed;
  int64_t slot, slots;

  // 2^32 / golden ratio spreads ids that are alike.
  FASTEMBED_HOST_DEVICE Probe(int32_t id, int64_t slots)
      : mixed(static_cast<uint32_t>(id) * 0x9E3779B1u),
        slot(static_cast<int64_t>(static_cast<uint64_t>(mixed) * slots >> 32)),
        slots(slots) {}

  // Ids that meet in one slot part again, so that no choice of ids makes the search long; an
  // odd step comes by every slot.
  FASTEMBED_HOST_DEVICE void next() { slot = (slot + (mixed | 1u)) & (slots - 1); }
};

}  // namespace fastembed
