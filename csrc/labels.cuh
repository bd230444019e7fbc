// The kernels of csrc/labels.cu, where tests/fuzz/labels.cpp can compile them for a CPU.
#pragma once

#include <cstring>

#include "kernels.h"
#include "labels.h"
#include "launch.cuh"

namespace fastembed::cuda {

constexpr int64_t kFar = INT64_MAX;
constexpr unsigned kAll = 0xffffffffu;

// Blocks: x over slots, y over images. A free row has the background's id, 0.
static __global__ void __launch_bounds__(kThreads)
    clear_labels_kernel(const LabelStatistics* __restrict__ batch) {
  const LabelStatistics op = batch[blockIdx.y];
  const int64_t columns = columns_of(op.channels);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i > op.slots) return;
  int64_t* row = op.out + i * columns;  // row 0 is the header: the count in it begins at 0 too
  row[kId] = 0;
  row[kY0] = row[kX0] = kFar;
  row[kY1] = row[kX1] = -1;
  row[kArea] = 0;
  for (int64_t* channel = row + kChannels; channel < row + columns; channel += kPerChannel) {
    channel[kSum] = 0;
    channel[kLow] = kFar;
    channel[kHigh] = -kFar;
  }
}

__device__ inline void add(int64_t& value, int64_t amount) {
  atomicAdd(reinterpret_cast<unsigned long long*>(&value), static_cast<unsigned long long>(amount));
}

__device__ inline void add(int64_t& value, int32_t amount) { add(value, int64_t{amount}); }

__device__ inline void add(int64_t& bits, double amount) {
  atomicAdd(reinterpret_cast<double*>(&bits), amount);
}

// What a thread reads here may be old; the values only ever move one way, so an old one costs
// an atomic that changes nothing, and a spared one would have changed nothing.
__device__ inline int64_t glance(const int64_t& value) {
  return *const_cast<const volatile int64_t*>(&value);
}

__device__ inline void lower(int64_t& value, int64_t to) {
  if (to < glance(value))
    atomicMin(reinterpret_cast<long long*>(&value), static_cast<long long>(to));
}

__device__ inline void raise(int64_t& value, int64_t to) {
  if (to > glance(value))
    atomicMax(reinterpret_cast<long long*>(&value), static_cast<long long>(to));
}

// The row of a run's object, which a new one takes; null where there is no room for it.
__device__ inline int64_t* add_label_run(const LabelStatistics& op, int64_t label, int64_t y,
                                         int64_t x0, int64_t x1) {
  const int64_t columns = columns_of(op.channels);
  for (LabelProbe probe(label, op.slots);; probe.next()) {
    int64_t* row = op.out + (1 + probe.slot) * columns;
    int64_t owner = glance(row[kId]);
    // No room: nothing matters any more, and in a full table the search would have no end.
    if (owner != label && glance(op.out[kId]) > op.slots / 2) return nullptr;
    if (owner == 0) {
      owner = static_cast<int64_t>(atomicCAS(reinterpret_cast<unsigned long long*>(&row[kId]), 0ull,
                                             static_cast<unsigned long long>(label)));
      if (owner == 0) {
        add(op.out[kId], int64_t{1});
        owner = label;
      }
    }
    if (owner == label) {
      lower(row[kY0], y);
      lower(row[kX0], x0);
      raise(row[kY1], y);
      raise(row[kX1], x1);
      add(row[kArea], x1 - x0 + 1);
      return row;
    }
  }
}

__device__ inline int64_t label_at(const LabelStatistics& op, int64_t i) {
  switch (op.label) {
    case Label::kUInt8:
      return static_cast<const uint8_t*>(op.labels)[i];
    case Label::kUInt16:
      return static_cast<const uint16_t*>(op.labels)[i];
    case Label::kInt32:
      return static_cast<const int32_t*>(op.labels)[i];
    case Label::kUInt32:
      return static_cast<const uint32_t*>(op.labels)[i];
    default:
      return static_cast<const int64_t*>(op.labels)[i];
  }
}

__device__ inline int32_t key_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return static_cast<int32_t>(order_key(bits));
}
__device__ inline int32_t key_of(uint16_t value) { return value; }
__device__ inline int32_t key_of(uint8_t value) { return value; }

// What 32 pixels are added up in.
template <class T>
struct SumOf {
  using Type = int32_t;
};
template <>
struct SumOf<float> {
  using Type = double;
};

__host__ __device__ inline int64_t stretches_of(const LabelStatistics& op) {
  return (op.width + kWarp - 1) / kWarp;
}

// Blocks: x over stretches, y over images. A warp takes 32 pixels of one row; runs that leave
// them are added in parts. Every thread stays to the end: they hand each other what they have.
// Without "four blocks per multiprocessor" the compiler spills a register to have room for six.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    label_statistics_kernel(const LabelStatistics* __restrict__ batch) {
  using Sum = typename SumOf<T>::Type;
  const LabelStatistics& op = batch[blockIdx.y];
  const int64_t stretches = stretches_of(op);
  const int64_t stretch = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t y = stretch / stretches;
  const int64_t x = stretch % stretches * kWarp + lane;
  const int64_t pixel = y * op.width + x;
  const bool inside = y < op.height && x < op.width;
  const int64_t label = inside ? label_at(op, pixel) : 0;

  const int64_t left = __shfl_up_sync(kAll, label, 1);
  const unsigned opening = __ballot_sync(kAll, lane == 0 || left != label);
  const int start = 31 - __clz(static_cast<int>(opening & (~0u >> (31 - lane))));
  const bool closes = lane == 31 || (opening >> (lane + 1) & 1) != 0;
  int64_t* row = nullptr;
  if (closes && label != 0) row = add_label_run(op, label, y, x - lane + start, x);

  for (int64_t c = 0; c < op.channels; ++c) {
    T value{};
    if (label != 0) value = static_cast<const T*>(op.image)[c * op.height * op.width + pixel];
    Sum sum = value;
    int32_t low = key_of(value), high = low;
    // After each step a lane has twice as many pixels of its run, up to its own.
    for (int step = 1; step < kWarp; step *= 2) {
      const Sum earlier = __shfl_up_sync(kAll, sum, step);
      const int32_t lowest = __shfl_up_sync(kAll, low, step);
      const int32_t highest = __shfl_up_sync(kAll, high, step);
      if (lane - step >= start) {
        sum += earlier;
        low = lowest < low ? lowest : low;
        high = highest > high ? highest : high;
      }
    }
    if (row != nullptr) {
      int64_t* channel = row + kChannels + kPerChannel * c;
      add(channel[kSum], sum);
      lower(channel[kLow], low);
      raise(channel[kHigh], high);
    }
  }
}

}  // namespace fastembed::cuda
