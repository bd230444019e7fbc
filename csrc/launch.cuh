// What every CUDA launcher shares.
#pragma once

#include <cstdint>

namespace fastembed::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxGridY = 65535;  // larger sizes loop inside the kernel

// Null, or why the launch just made was refused.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastembed::cuda
