// gather_crops, quantize and pool_crops against one pixel after the other, on random images,
// ramps, tables and features, in buffers that end where the data ends. Arguments: seconds, first
// seed. FASTEMBED_SIMD=portable runs what processors without AVX-512 run.
//   cmake -B build/fuzz -DFASTEMBED_FUZZ=ON && cmake --build build/fuzz
//   build/fuzz/fuzz_crops 60
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "floats.h"
#include "quantize.h"

namespace fastembed {
namespace {

using Random = std::mt19937;

int64_t below(Random& random, int64_t n) { return static_cast<int64_t>(random() % n); }

template <class T>
T any_bits(Random& random) {
  const uint32_t bits = random();
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float between(Random& random, double low, double high) {
  return static_cast<float>(std::uniform_real_distribution<double>(low, high)(random));
}

[[noreturn]] void fail(const char* what, unsigned seed, int64_t at) {
  fprintf(stderr, "%s, seed %u: element %ld differs\n", what, seed, static_cast<long>(at));
  exit(1);
}

template <class T>
void compare(const char* what, unsigned seed, const std::vector<T>& got,
             const std::vector<T>& expected) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (memcmp(&got[i], &expected[i], sizeof(T)) != 0) fail(what, seed, static_cast<int64_t>(i));
  }
}

// Of either rule, without width, and with pixels that lie halfway between two levels.
Ramp ramp_of(Random& random) {
  const float lo = between(random, -10, 300), width = between(random, 0, 5000);
  switch (below(random, 4)) {
    case 0:
      return {0, 1, lo, lo + width, (lo + width) - lo};
    case 1:
      return {0, 1, std::floor(lo), std::floor(lo) + 510, 510};
    case 2:
      return {between(random, -9, 900), between(random, 0.01, 900), -3, 3, 6};
    default:
      return {0, 1, lo, lo - width, below(random, 2) ? 0 : -width};
  }
}

template <class T>
std::vector<T> image_of(Random& random, int64_t count) {
  std::vector<T> image(count);
  const bool typical = below(random, 4) != 0;
  for (T& x : image) x = typical ? static_cast<T>(below(random, 6000)) : any_bits<T>(random);
  return image;
}

template <class T, class Value>
void check_gather(Pixel pixel, unsigned seed) {
  Random random(seed);
  // Some are wider than one run of levels.
  const int64_t size = 1 + below(random, below(random, 8) == 0 ? 300 : 70);
  const int64_t channels = 1 + below(random, 3);
  const int64_t height = size + below(random, 4), width = size + below(random, 70);
  const int64_t crops = below(random, 4), count = 1 + below(random, 3);
  const auto image = image_of<T>(random, channels * height * width);
  std::vector<Ramp> ramps(channels);
  for (Ramp& ramp : ramps) ramp = ramp_of(random);
  std::vector<Origin> origins;
  std::vector<int32_t> planes;
  for (int64_t n = 0; n < crops; ++n) {
    const auto y = static_cast<int32_t>(below(random, height - size + 1));
    origins.push_back({0, y, static_cast<int32_t>(below(random, width - size + 1))});
  }
  for (int64_t p = 0; p < count; ++p) {
    planes.push_back(static_cast<int32_t>(below(random, channels)));
  }
  std::vector<Value> table(256 * count);
  for (Value& value : table) value = static_cast<Value>(random());

  // Half of the outputs end where AddressSanitizer watches, half in front of what must stay: it
  // does not see what AVX-512 stores by a mask.
  const int64_t guard = below(random, 2) ? 64 : 0;
  const auto sentinel = static_cast<Value>(0xa5a5a5a5u);
  std::vector<uint8_t> levels, quantized(image.size() + guard, 0xa5);
  for (int64_t i = 0; i < channels * height * width; ++i) {
    levels.push_back(level(static_cast<float>(image[i]), ramps[i / (height * width)]));
  }
  levels.resize(quantized.size(), 0xa5);
  std::vector<Value> expected, out(crops * count * size * size + guard, sentinel);
  for (int64_t n = 0; n < crops; ++n) {
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t y = 0; y < size; ++y) {
        const int64_t row = planes[p] * height + origins[n].y + y;
        for (int64_t x = 0; x < size; ++x) {
          expected.push_back(table[256 * p + levels[row * width + origins[n].x + x]]);
        }
      }
    }
  }
  expected.resize(out.size(), sentinel);
  cpu::quantize({pixel, image.data(), ramps.data(), quantized.data(), channels, height * width});
  compare("quantize", seed, quantized, levels);
  cpu::gather_crops({pixel, image.data(), origins.data(), planes.data(), ramps.data(), table.data(),
                     out.data(), sizeof(Value), channels, height, width, crops, count, size});
  compare("gather_crops", seed, out, expected);
}

template <class Feature, class Value>
void check_pool(Real feature, Real value, unsigned seed) {
  Random random(seed);
  const int64_t samples = below(random, 4), crops = 1 + below(random, 6);
  const int64_t dim = 1 + below(random, below(random, 8) == 0 ? 3000 : 70);
  const bool take_max = below(random, 2), l2_normalize = below(random, 2);
  const bool typical = l2_normalize || below(random, 2);
  std::vector<Feature> features(samples * crops * dim);
  for (Feature& x : features) {
    if (typical) {
      cpu::narrow(between(random, -3, 3), x);
    } else {
      x = any_bits<Feature>(random);
    }
  }
  std::vector<Value> out(samples * dim), expected;
  for (int64_t s = 0; s < samples; ++s) {
    std::vector<float> pooled;
    double square = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const Feature* first = features.data() + s * crops * dim + d;
      float sum = cpu::widen(*first);
      for (int64_t n = 1; n < crops; ++n) {
        const float x = cpu::widen(first[n * dim]);
        sum = !take_max ? sum + x : x >= sum || std::isnan(x) ? x : sum;
      }
      pooled.push_back(take_max ? sum : sum / static_cast<float>(crops));
      square += static_cast<double>(pooled.back()) * pooled.back();
    }
    for (float x : pooled) {
      Value narrowed;
      cpu::narrow(l2_normalize ? static_cast<float>(x / std::sqrt(square)) : x, narrowed);
      expected.push_back(narrowed);
    }
  }
  cpu::pool_crops(
      {feature, value, features.data(), out.data(), samples, crops, dim, take_max, l2_normalize});
  for (size_t i = 0; i < out.size(); ++i) {
    // One rounding of the format apart where a norm is summed in another order; NaN is NaN.
    const float ours = cpu::widen(out[i]), theirs = cpu::widen(expected[i]);
    const double unit = sizeof(Value) == 4 ? 1e-6 : 0x1p-7;
    const bool same = memcmp(&out[i], &expected[i], sizeof(Value)) == 0 ||
                      (std::isnan(ours) && std::isnan(theirs)) ||
                      (l2_normalize && std::abs(ours - theirs) <= unit * std::abs(theirs));
    if (!same) fail("pool_crops", seed, static_cast<int64_t>(i));
  }
}

template <class T>
void check_gathers(Pixel pixel, unsigned seed) {
  check_gather<T, uint8_t>(pixel, seed);
  check_gather<T, uint16_t>(pixel, seed);
  check_gather<T, uint32_t>(pixel, seed);
}

template <class Feature>
void check_pools(Real feature, unsigned seed) {
  check_pool<Feature, float>(feature, Real::kFloat32, seed);
  check_pool<Feature, cpu::BFloat16>(feature, Real::kBFloat16, seed);
  check_pool<Feature, cpu::Float16>(feature, Real::kFloat16, seed);
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
    check_gathers<uint8_t>(Pixel::kUInt8, seed);
    check_gathers<uint16_t>(Pixel::kUInt16, seed);
    check_gathers<float>(Pixel::kFloat32, seed);
    check_pools<float>(Real::kFloat32, seed);
    check_pools<cpu::BFloat16>(Real::kBFloat16, seed);
    check_pools<cpu::Float16>(Real::kFloat16, seed);
  }
  printf("%u images of each pixel type\n", cases);
}
