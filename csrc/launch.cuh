// What every CUDA launcher shares.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace fastembed::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxGridY = 65535;  // larger sizes loop inside the kernel

// The largest of a number of each image: every image gets the blocks that the largest needs.
template <class Op, class Number>
int64_t largest(const Batch<Op>& batch, const Number& number) {
  int64_t most = 0;
  for (int64_t i = 0; i < batch.count; ++i) most = std::max(most, number(batch.host[i]));
  return most;
}

// Null, or why the launch just made was refused.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastembed::cuda
