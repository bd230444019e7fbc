// As much of CUDA as the kernels under test use, on one CPU thread. Each CUDA thread is a
// fiber that runs up to the next barrier. Between two barriers the order of the threads is
// random, so a barrier that is missing shows; one that only some threads reach aborts. What
// this cannot show is a race inside of a warp or between blocks: blocks run one by one.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static

struct Index3 {
  unsigned x, y;
};
inline Index3 threadIdx, blockIdx, gridDim;

template <class T>
T atomicAdd(T* target, T value) {
  const T before = *target;
  *target += value;
  return before;
}

template <class T>
void atomicOr(T* target, T value) {
  *target |= value;
}

template <class T>
T atomicMin(T* target, T value) {
  const T before = *target;
  *target = std::min(before, value);
  return before;
}

template <class T>
T atomicMax(T* target, T value) {
  const T before = *target;
  *target = std::max(before, value);
  return before;
}

template <class T>
T atomicCAS(T* target, T expected, T value) {
  const T before = *target;
  if (before == expected) *target = value;
  return before;
}

template <class T>
T __ldcg(const T* source) {
  return *source;
}

inline void __threadfence() {}

enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

class BlockOnCpu {
 public:
  BlockOnCpu(int threads, unsigned seed) : fibers_(threads), random_(seed) {
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStack]);
  }

  // Runs a kernel on a grid, in any order of its blocks.
  void launch(Index3 grid, const std::function<void()>& kernel) {
    gridDim = grid;
    std::vector<unsigned> blocks(grid.x * grid.y);
    std::iota(blocks.begin(), blocks.end(), 0u);
    std::shuffle(blocks.begin(), blocks.end(), random_);
    for (unsigned block : blocks) {
      blockIdx = {block % grid.x, block / grid.x};
      run(kernel);
    }
  }

  void barrier() { swapcontext(&fibers_[running_].context, &scheduler_); }

 private:
  static constexpr size_t kStack = 1 << 16;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
  };

  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    active_ = this;
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      fiber.done = false;
      makecontext(&fiber.context, &BlockOnCpu::enter, 0);
    }
    std::vector<size_t> order(fibers_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    for (size_t done = 0; done < fibers_.size();) {
      std::shuffle(order.begin(), order.end(), random_);
      for (size_t thread : order) {
        running_ = thread;
        threadIdx = {static_cast<unsigned>(thread), 0};
        swapcontext(&scheduler_, &fibers_[thread].context);
        done += fibers_[thread].done;
      }
      if (done != 0 && done != fibers_.size()) {
        fprintf(stderr, "%zu threads left while others wait at a barrier\n", done);
        abort();
      }
    }
  }

  static void enter() {
    (*active_->kernel_)();
    active_->fibers_[active_->running_].done = true;
  }

  inline static BlockOnCpu* active_;
  friend void __syncthreads();

  std::vector<Fiber> fibers_;
  std::mt19937 random_;
  ucontext_t scheduler_;
  const std::function<void()>* kernel_;
  size_t running_;
};

inline void __syncthreads() { BlockOnCpu::active_->barrier(); }

// What the threads of a warp hand each other. Every thread of the block has to come by.
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  static T handed[1024];
  const unsigned thread = threadIdx.x;
  handed[thread] = value;
  __syncthreads();
  const T result = handed[thread % 32 >= step ? thread - step : thread];
  __syncthreads();
  return result;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  static bool votes[1024];
  const unsigned thread = threadIdx.x;
  votes[thread] = vote;
  __syncthreads();
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    ballot |= static_cast<unsigned>(votes[thread - thread % 32 + lane]) << lane;
  }
  __syncthreads();
  return ballot;
}

inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(value); }
