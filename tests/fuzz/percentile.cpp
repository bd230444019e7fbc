// percentile_bounds against a full sort, on random images of awkward kinds: the CPU kernel, both
// twins of its pass, and the text of the CUDA kernel. Arguments: seconds, first seed.
//   cmake -B build/fuzz -DFASTEMBED_FUZZ=ON && cmake --build build/fuzz
//   build/fuzz/fuzz_percentile 60
#include "cuda_on_cpu.h"
// Before what it stands for.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "percentile.cuh"
#include "select.h"

namespace fastembed {
namespace {

template <class T>
constexpr Pixel kPixel = std::is_same_v<T, float>      ? Pixel::kFloat32
                         : std::is_same_v<T, uint16_t> ? Pixel::kUInt16
                                                       : Pixel::kUInt8;

template <class T>
std::vector<T> image_of(int64_t count, std::mt19937& random) {
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  const double top = std::is_same_v<T, float> ? 1e6 : std::numeric_limits<T>::max();
  std::lognormal_distribution<double> spots(6.0, 0.7);
  std::vector<T> image(count);
  const auto kind = below(10);
  const auto levels = 1 + below(300);
  for (T& x : image) {
    switch (kind) {
      case 0:  // few levels, or one
        x = static_cast<T>(below(levels) % 250);
        break;
      case 1:  // a background of one value
        x = static_cast<T>(below(100) < 97 ? 0 : below(250));
        break;
      case 2:  // saturated
        x = static_cast<T>(std::min(spots(random), top / 2));
        break;
      case 3:  // every bit pattern; of floats only those that are finite
        if constexpr (std::is_same_v<T, float>) {
          do {
            const uint32_t bits = random();
            memcpy(&x, &bits, sizeof x);
          } while (!std::isfinite(x));
        } else {
          x = static_cast<T>(random());
        }
        break;
      case 4:  // denormals and zeros of both signs
        if constexpr (std::is_same_v<T, float>) {
          x = std::copysign(static_cast<float>(below(5)) * 1e-45f, below(2) ? 1.0f : -1.0f);
        } else {
          x = static_cast<T>(below(2));
        }
        break;
      case 8:  // the lowest there are
        x = static_cast<T>(std::is_same_v<T, float> ? -1e34 * spots(random) : below(3));
        break;
      default:
        x = static_cast<T>(std::min(spots(random), top));
    }
  }
  if (kind == 5) std::sort(image.begin(), image.end());
  if (kind == 6) std::sort(image.rbegin(), image.rend());
  if (kind == 7) {  // what a strided sample sees says nothing of the rest
    const int64_t stride = std::max<int64_t>(1, count / 2048) | 1;
    for (int64_t i = 0; i < count; i += stride) image[i] = static_cast<T>(below(2) ? top : 0);
  }
  return image;
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

template <class T>
void fail(const char* what, unsigned seed, const PercentileBounds& op, const float* out,
          const float* expected) {
  fprintf(stderr,
          "%s, seed %u: %zu-byte pixels [%ld, %ld], ranks %ld + %g and %ld + %g: got %g %g, "
          "expected %g %g\n",
          what, seed, sizeof(T), static_cast<long>(op.channels), static_cast<long>(op.pixels),
          static_cast<long>(op.low.rank), op.low.fraction, static_cast<long>(op.high.rank),
          op.high.fraction, out[0], out[1], expected[0], expected[1]);
  exit(1);
}

#ifdef FASTEMBED_AVX512
template <class T>
void check_twins(const std::vector<T>& image, T lo, T hi, unsigned seed) {
  if (!cpu::has_avx512()) return;
  const auto count = static_cast<int64_t>(image.size());
  std::vector<T> one(count + cpu::kSlack), two(image);
  two.resize(count + cpu::kSlack);
  const int64_t n = cpu::keep_outside_portable(image.data(), count, lo, hi, one.data());
  const int64_t m = cpu::keep_outside_avx512(two.data(), count, lo, hi, two.data());
  if (n != m || memcmp(one.data(), two.data(), n * sizeof(T)) != 0) {
    fprintf(stderr, "twins differ, seed %u: %zu-byte pixels\n", seed, sizeof(T));
    exit(1);
  }
}
#endif

template <class T, int kLevel = 0>
void launch(const PercentileBounds* batch, Index3 grid, BlockOnCpu& block) {
  if constexpr (kLevel < cuda::kLevels<T>) {
    block.launch(grid, [&] { cuda::percentile_kernel<T, kLevel>(batch); });
    launch<T, kLevel + 1>(batch, grid, block);
  }
}

template <class T>
std::vector<float> sorted_bounds(const PercentileBounds& op) {
  std::vector<float> bounds;
  for (int64_t c = 0; c < op.channels; ++c) {
    const T* channel = static_cast<const T*>(op.image) + c * op.pixels;
    std::vector<float> sorted(channel, channel + op.pixels);
    const bool all =
        std::all_of(sorted.begin(), sorted.end(), [](float x) { return std::isfinite(x); });
    if (all) std::sort(sorted.begin(), sorted.end());
    for (const Rank& at : {op.low, op.high}) {
      const float above = sorted[std::min(at.rank + 1, op.pixels - 1)];
      bounds.push_back(all ? interpolate(sorted[at.rank], above, at.fraction) : NAN);
    }
  }
  return bounds;
}

template <class T>
void compare(const char* what, unsigned seed, const PercentileBounds& op) {
  const std::vector<float> expected = sorted_bounds<T>(op);
  for (int64_t c = 0; c < op.channels; ++c) {
    const float *ours = op.out + 2 * c, *theirs = expected.data() + 2 * c;
    if (!same(ours[0], theirs[0]) || !same(ours[1], theirs[1])) {
      fail<T>(what, seed, op, ours, theirs);
    }
  }
}

template <class T>
void check(unsigned seed) {
  std::mt19937 random(seed);
  const int64_t channels = 1 + random() % 3;
  const int64_t most = random() % 8 == 0 ? 100'000 : random() % 2 ? 5'000 : 40;
  const int64_t pixels = 1 + random() % most;
  std::vector<T> image = image_of<T>(channels * pixels, random);
  const bool spoil = std::is_same_v<T, float> && random() % 4 == 0;
  if constexpr (std::is_same_v<T, float>) {
    const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    if (spoil) image[random() % image.size()] = bad[random() % 4];
  }

  PercentileBounds op{};
  op.pixel = kPixel<T>;
  op.image = image.data();
  op.channels = channels;
  op.pixels = pixels;
  const int64_t ends[] = {pixels / 100, pixels - 1 - pixels / 100, 0, pixels - 1};
  const auto rank = [&](int side) {
    return random() % 2 ? ends[side + 2 * (random() % 2)] : static_cast<int64_t>(random() % pixels);
  };
  op.low.rank = rank(0);
  op.high.rank = rank(1);
  if (op.high.rank < op.low.rank) std::swap(op.low.rank, op.high.rank);
  const auto fraction = [&](int64_t rank) {
    return rank == pixels - 1 ? 0 : static_cast<double>(random() % 1000) / 1000;
  };
  op.low.fraction = fraction(op.low.rank);
  op.high.fraction = fraction(op.high.rank);

#ifdef FASTEMBED_AVX512
  check_twins(image, image[random() % image.size()], image[random() % image.size()], seed);
#endif

  std::vector<float> out(4 * channels, -1.0f);
  op.out = out.data();
  cpu::percentile_bounds(op);
  compare<T>("cpu", seed, op);

  if (seed % 8 != 0) return;  // a thousand times slower
  static BlockOnCpu block(cuda::kThreads, seed);
  std::vector<cuda::Progress> progress(2 * channels);
  std::fill(out.begin(), out.end(), -1.0f);
  op.scratch = progress.data();
  // A batch: the same memory once more, as a smaller image.
  PercentileBounds batch[] = {op, op};
  PercentileBounds& smaller = batch[1];
  smaller.pixels = 1 + random() % pixels;
  for (Rank* at : {&smaller.low, &smaller.high}) at->rank = std::min(at->rank, smaller.pixels - 1);
  smaller.out += 2 * channels;
  smaller.scratch = progress.data() + channels;
  const auto blocks = static_cast<unsigned>(1 + random() % 4);
  launch<T>(batch, {static_cast<unsigned>(2 * channels), blocks}, block);
  for (const PercentileBounds& one : batch) compare<T>("cuda", seed, one);
}

}  // namespace
}  // namespace fastembed

int main(int count, char** arguments) {
  const double seconds = count > 1 ? atof(arguments[1]) : 10;
  unsigned seed = count > 2 ? static_cast<unsigned>(atol(arguments[2])) : 0;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  unsigned cases = 0;
  for (; elapsed() < seconds; ++cases, ++seed) {
    fastembed::check<float>(seed);
    fastembed::check<uint16_t>(seed);
    fastembed::check<uint8_t>(seed);
  }
  printf("%u images of each pixel type\n", cases);
}
