// The CPU kernels of csrc/panoptic.cpp on noise and near-noise, in buffers that end where the
// data ends. Built by test_panoptic.py with AddressSanitizer and UndefinedBehaviorSanitizer;
// what the kernels compute is tested there, here only that they stay inside.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels.h"

using namespace fastembed;

int main() {
  std::mt19937 random(1);
  auto below = [&](int n) { return static_cast<int>(random() % n); };
  int64_t found = 0;
  for (int round = 0; round < 4000; ++round) {
    const int64_t height = 1 + below(6);
    const int64_t width = 1 + (round % 8 == 0 ? below(700) : below(70));
    const int64_t slots = int64_t{2} << below(12);
    const int density = 1 + below(100);  // percent of bytes that are not 0
    auto noise = [&]() {
      return below(100) < density ? static_cast<uint8_t>(random()) : uint8_t{0};
    };
    // Exact sizes on the heap: one byte further and AddressSanitizer stops the program.
    std::vector<uint8_t> lines(height * (1 + 3 * width)), rgb(height * width * 3);
    std::vector<int32_t> ids(height * width), decoded(height * width);
    for (uint8_t& byte : lines) byte = noise();
    for (uint8_t& byte : rgb) byte = noise();
    for (int32_t& id : ids) id = static_cast<int32_t>(noise() * 0x01010101u);
    for (int64_t y = 0; y < height; ++y) {
      if (below(10) != 0) lines[y * (1 + 3 * width)] = static_cast<uint8_t>(below(5));
    }
    std::vector<Segment> table(1 + slots, Segment{-1, -1, -1, -1, -1, -1});
    cpu::decode_panoptic({rgb.data(), decoded.data(), height * width});
    for (const bool colours : {false, true}) {
      cpu::panoptic_segments({colours ? rgb.data() : nullptr, colours ? nullptr : ids.data(),
                              table.data(), height, width, slots, 0});
      found += table[0].id;
    }
    for (int32_t* out : {static_cast<int32_t*>(nullptr), ids.data()}) {
      cpu::scanline_segments(
          {lines.data(), out, table.data(), height, width, slots, int64_t{1} << 31});
      found += table[0].id;
    }
  }
  std::printf("%lld segments\n", static_cast<long long>(found));
  return 0;
}
