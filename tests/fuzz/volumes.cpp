// triplane_accumulate on random planes, in buffers that end where the data ends: every instruction
// set that runs here against one voxel after the other, to the bit. Arguments: seconds, first seed.
// Its own translation unit of the kernels, to call each instruction set by name.
//   cmake -B build/fuzz -DFASTEMBED_FUZZ=ON && cmake --build build/fuzz
//   build/fuzz/fuzz_volumes 60
#include "../../csrc/volumes.cpp"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>

namespace fastembed {
namespace {

// Where `length` voxels lie between tokens; not only as an upsampling has them.
struct Axis {
  std::vector<int32_t> low, high;
  std::vector<float> weight;
  Taps taps() const { return {low.data(), high.data(), weight.data()}; }
};

template <class Token>
struct Grids {
  std::vector<Token> tokens;
  Axis row, column;
};

class Maker {
 public:
  explicit Maker(unsigned seed) : random_(seed) {}

  int64_t below(int64_t n) { return static_cast<int64_t>(random_() % n); }
  float weight() { return below(4) ? static_cast<float>(random_() % 4096) / 4096.0f : 0.0f; }

  Axis axis(int64_t tokens, int64_t length) {
    Axis axis;
    const int64_t most = 1 + below(3) * tokens / std::max<int64_t>(1, length);
    int64_t at = below(tokens);
    if (below(2)) at = 0;
    for (int64_t i = 0; i < length; ++i) {
      at = std::min(tokens - 1, at + below(most + 1));
      axis.low.push_back(static_cast<int32_t>(at));
      axis.high.push_back(static_cast<int32_t>(std::min(tokens - 1, at + 1)));
      axis.weight.push_back(weight());
    }
    return axis;
  }

  template <class Token>
  std::vector<Token> tokens(int64_t count) {
    std::vector<Token> tokens(count);
    std::normal_distribution<float> normal;
    for (Token& token : tokens) cpu::narrow(normal(random_) * (below(9) ? 1 : 3e4f), token);
    return tokens;
  }

 private:
  std::mt19937 random_;
};

float lerp(float low, float high, float weight) { return low + weight * (high - low); }

template <class Token>
float voxel(const TriplaneAccumulate& op, int p, int64_t slice, int64_t c, int64_t row,
            int64_t column) {
  const TokenPlane& plane = op.planes[p];
  if (plane.tokens == nullptr) return 0;
  const auto token = [&](int64_t r, int64_t k) {
    return cpu::widen(static_cast<const Token*>(
               plane.tokens)[slice * plane.slice_pitch + c * plane.channel_pitch +
                             r * plane.columns + k]) *
           op.scale;
  };
  const int32_t up = plane.row.low[row], down = plane.row.high[row];
  const int32_t left = plane.column.low[column], right = plane.column.high[column];
  const float t = plane.row.weight[row], s = plane.column.weight[column];
  if (p < 2) {
    return lerp(lerp(token(up, left), token(up, right), s),
                lerp(token(down, left), token(down, right), s), t);
  }
  return lerp(lerp(token(up, left), token(down, left), t),
              lerp(token(up, right), token(down, right), t), s);
}

template <class Token, class Value>
void check(Real token, Real value, unsigned seed) {
  Maker make(seed);
  const auto side = [&] { return 1 + make.below(make.below(8) == 0 ? 140 : 20); };
  // Some blocks are large enough to be written past the caches, and of rows that allow it.
  const bool large = make.below(400) == 0;
  const int64_t extent[3] = {large ? 64 : side(), large ? 64 : side(),
                             large           ? 512
                             : make.below(4) ? side()
                                             : 32 * (1 + make.below(5))};
  constexpr int kAxes[3][3] = {{0, 1, 2}, {1, 0, 2}, {2, 0, 1}};  // slices, rows, columns
  TriplaneAccumulate op{};
  op.token = token;
  op.value = value;
  op.channels = large ? 2 : 1 + make.below(3);
  op.depth = extent[0];
  op.height = extent[1];
  op.width = extent[2];
  const int64_t present = 1 + make.below(7);
  Grids<Token> grids[3];
  int count = 0;
  for (int p = 0; p < 3; ++p) {
    TokenPlane& plane = op.planes[p];
    const bool is_there = present >> p & 1;
    plane.rows = is_there ? side() : 1;
    plane.columns = is_there ? side() : 1;
    grids[p].row = make.axis(plane.rows, extent[kAxes[p][1]]);
    grids[p].column = make.axis(plane.columns, extent[kAxes[p][2]]);
    plane.row = grids[p].row.taps();
    plane.column = grids[p].column.taps();
    if (!is_there) continue;
    const int64_t slices = extent[kAxes[p][0]], area = plane.rows * plane.columns;
    const bool slices_inside = make.below(3) == 0;
    plane.slice_pitch = slices_inside ? area : op.channels * area;
    plane.channel_pitch = slices_inside ? slices * area : area;
    grids[p].tokens = make.tokens<Token>(slices * op.channels * area);
    plane.tokens = grids[p].tokens.data();
    ++count;
  }
  op.scale = 1.0f / static_cast<float>(count);
  std::vector<Value> expected;
  for (int64_t c = 0; c < op.channels; ++c) {
    for (int64_t z = 0; z < op.depth; ++z) {
      for (int64_t y = 0; y < op.height; ++y) {
        for (int64_t x = 0; x < op.width; ++x) {
          const float sum = (voxel<Token>(op, 0, z, c, y, x) + voxel<Token>(op, 1, y, c, z, x)) +
                            voxel<Token>(op, 2, x, c, z, y);
          Value narrowed;
          cpu::narrow(sum, narrowed);
          expected.push_back(narrowed);
        }
      }
    }
  }
  for (const cpu::Path& path : cpu::kPaths) {
    if (!path.runs_here()) continue;
    // Behind the block lies what must stay: AddressSanitizer does not see every kind of store.
    constexpr int64_t kGuard = 64;
    const auto bytes = static_cast<int64_t>(expected.size() * sizeof(Value));
    std::vector<uint8_t> memory(bytes + 64 + kGuard, 0xa5);
    const int64_t start = -reinterpret_cast<intptr_t>(memory.data()) & 63;
    op.out = memory.data() + start;
    cpu::run(path, op);
    bool same = memcmp(op.out, expected.data(), bytes) == 0;
    for (int64_t i = 0; i < kGuard; ++i) same = same && memory[start + bytes + i] == 0xa5;
    if (!same) {
      fprintf(stderr, "%s, seed %u, token %d, value %d differs\n", path.name, seed,
              static_cast<int>(token), static_cast<int>(value));
      exit(1);
    }
  }
}

}  // namespace
}  // namespace fastembed

int main(int count, char** arguments) {
  using namespace fastembed;
  const double seconds = count > 1 ? atof(arguments[1]) : 10;
  unsigned seed = count > 2 ? static_cast<unsigned>(atol(arguments[2])) : 0;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  unsigned cases = 0;
  for (; elapsed() < seconds; ++cases, ++seed) {
    check<float, float>(Real::kFloat32, Real::kFloat32, seed);
    check<float, cpu::Float16>(Real::kFloat32, Real::kFloat16, seed);
    check<cpu::BFloat16, cpu::Float16>(Real::kBFloat16, Real::kFloat16, seed);
    check<cpu::Float16, float>(Real::kFloat16, Real::kFloat32, seed);
  }
  printf("%u images of each kind of token\n", cases);
}
