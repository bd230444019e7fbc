// Contract: fastembed/ops/volumes.py.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

// Clang has no target pragma of GCC's kind: there the portable loops are all there is.
#if defined(__x86_64__) && !defined(__clang__)
#define FASTEMBED_WIDE_LOOPS
#endif

#include "floats.h"
#include "kernels.h"
#include "simd.h"

namespace fastembed::cpu {
namespace {

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// The tokens that the voxels along an axis hang on.
struct Reach {
  int32_t first;
  int64_t count;
};

Reach reach_of(const Taps& taps, int64_t length) {
  return {taps.low[0], int64_t{taps.high[length - 1]} - taps.low[0] + 1};
}

// A row of voxels over a row of tokens, a vector of voxels at a time.
struct Columns {
  const int32_t* base;  // [vectors], the first token of a vector
  const int32_t* low;   // [vectors, lanes], from there on
  const int32_t* high;  // likewise
  const float* weight;  // [vectors, lanes]
  int64_t vectors;
  bool near;  // every vector hangs on `lanes` tokens at most
  Reach reach;
};

// The memory behind a Columns.
class ColumnTable {
 public:
  Columns fill(const Taps& taps, int64_t length, int64_t lanes) {
    const Reach reach = reach_of(taps, length);
    const int64_t vectors = (length + lanes - 1) / lanes;
    numbers_.assign(vectors * (1 + 2 * lanes), 0);
    weight_.assign(vectors * lanes, 0.0f);
    std::copy_n(taps.weight, length, weight_.begin());
    int32_t* base = numbers_.data();
    int32_t* low = base + vectors;
    int32_t* high = low + vectors * lanes;
    bool near = true;
    for (int64_t i = 0; i < length; ++i) {
      if (i % lanes == 0) base[i / lanes] = taps.low[i] - reach.first;
      const int32_t from = reach.first + base[i / lanes];
      low[i] = taps.low[i] - from;
      high[i] = taps.high[i] - from;
      near = near && high[i] < lanes;
    }
    return {base, low, high, weight_.data(), vectors, near, reach};
  }

 private:
  std::vector<int32_t> numbers_;
  std::vector<float> weight_;
};

// What a channel goes through; all rows are of `pitch` floats.
struct Scratch {
  float* tokens;       // [8, token_pitch], or a grid's rows, times the scale
  float* from_xy;      // [rows of xy, pitch], at one z: a row per row of tokens
  float* from_yz;      // [columns of yz, pitch], likewise
  float* along_x;      // [rows of xz, tile, pitch], of the rows y of a tile
  float* turned;       // [rows of yz, turned_columns, pitch]
  const float* zeros;  // [pitch]
  int64_t pitch, token_pitch, tile, turned_columns;
  bool stream;  // the block is written past the caches
};

// Not FASTEMBED_SIMD: the compiler finds neither the permutation of a vector by another one nor
// float16's instructions by itself.
#ifdef FASTEMBED_WIDE_LOOPS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
namespace avx512 {
#define FASTEMBED_LANES 16
#include "volumes_simd.h"
#undef FASTEMBED_LANES
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
namespace avx2 {
#define FASTEMBED_LANES 8
#include "volumes_simd.h"
#undef FASTEMBED_LANES
}  // namespace avx2
#pragma GCC pop_options
#endif
namespace portable {
#define FASTEMBED_LANES 4
#include "volumes_simd.h"
#undef FASTEMBED_LANES
}  // namespace portable

// One way to run it, for one instruction set.
struct Path {
  const char* name;
  bool (*runs_here)();
  void (*channel)(const TriplaneAccumulate& op, const Columns& columns_xy,
                  const Columns& columns_xz, const Scratch& scratch, int64_t c);
  int64_t lanes;
};

// Fastest first.
constexpr Path kPaths[] = {
#ifdef FASTEMBED_WIDE_LOOPS
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq");
     },
     avx512::accumulate, 16},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); },
     avx2::accumulate, 8},
#endif
    {"portable", [] { return true; }, portable::accumulate, 4},
};

const Path& fastest() {
  const char* most = std::getenv("FASTEMBED_SIMD");
  bool allowed = most == nullptr;
  for (const Path& path : kPaths) {
    allowed = allowed || std::strcmp(most, path.name) == 0;
    if (allowed && path.runs_here()) return path;
  }
  return kPaths[std::size(kPaths) - 1];
}

void run(const Path& path, const TriplaneAccumulate& op) {
  const TokenPlane &xy = op.planes[0], &xz = op.planes[1], &yz = op.planes[2];
  Scratch scratch{};
  scratch.pitch = round_up(op.width, 32);
  ColumnTable tables[2];
  Columns columns_xy{}, columns_xz{};
  int64_t rows_xy = 1, rows_xz = 1, rows_yz = 1, columns_yz = 1, grid = 0;
  if (xy.tokens != nullptr) {
    columns_xy = tables[0].fill(xy.column, op.width, path.lanes);
    rows_xy = reach_of(xy.row, op.height).count;
    grid = std::max(grid, rows_xy * xy.columns);
  }
  if (xz.tokens != nullptr) {
    columns_xz = tables[1].fill(xz.column, op.width, path.lanes);
    rows_xz = reach_of(xz.row, op.depth).count;
    grid = std::max(grid, rows_xz * xz.columns);
  }
  if (yz.tokens != nullptr) {
    rows_yz = reach_of(yz.row, op.depth).count;
    columns_yz = reach_of(yz.column, op.height).count;
    scratch.token_pitch = round_up(yz.columns, 16);
  }
  // Of xz as many rows y at a time as leave room in a second-level cache of 1 MB.
  constexpr int64_t kTileFloats = 1 << 17;
  scratch.tile = std::clamp<int64_t>(kTileFloats / (rows_xz * scratch.pitch), 1, op.height);
  scratch.turned_columns = round_up(columns_yz, 4);
  // Whole vectors are read past the last token.
  const int64_t tokens = round_up(std::max(grid, 8 * scratch.token_pitch) + 16, 16);
  const int64_t sizes[] = {tokens,
                           rows_xy * scratch.pitch,
                           columns_yz * scratch.pitch,
                           rows_xz * scratch.tile * scratch.pitch,
                           rows_yz * scratch.turned_columns * scratch.pitch,
                           scratch.pitch};
  int64_t total = 15;
  for (const int64_t size : sizes) total += size;
  std::vector<float> floats(total);
  float* at = floats.data() + (-reinterpret_cast<uintptr_t>(floats.data()) & 63) / sizeof(float);
  float** const parts[] = {&scratch.tokens, &scratch.from_xy, &scratch.from_yz, &scratch.along_x,
                           &scratch.turned};
  for (int i = 0; i < 5; ++i) {
    *parts[i] = at;
    at += sizes[i];
  }
  scratch.zeros = at;
  // A block that no core's caches hold would be read from memory only to be overwritten.
  constexpr int64_t kLine = 64, kLarge = 1 << 23;
  const int64_t row_bytes = op.width * (op.value == Real::kFloat16 ? 2 : 4);
  scratch.stream = path.lanes > 4 && reinterpret_cast<uintptr_t>(op.out) % kLine == 0 &&
                   row_bytes % kLine == 0 &&
                   row_bytes * op.height * op.depth * op.channels >= kLarge;
  for (int64_t c = 0; c < op.channels; ++c) path.channel(op, columns_xy, columns_xz, scratch, c);
#ifdef FASTEMBED_WIDE_LOOPS
  _mm_sfence();  // what was streamed is seen by whoever learns that this returned
#endif
}

}  // namespace

void triplane_accumulate(const TriplaneAccumulate& op) {
  static const Path& path = fastest();
  run(path, op);
}

}  // namespace fastembed::cpu
