// label_statistics against a map of objects filled pixel by pixel, on random label images: the
// CPU kernel and the text of the CUDA kernels. Every array ends where its data ends, so that
// the sanitizers see a kernel that leaves it. Arguments: seconds, first seed.
//   cmake -B build/fuzz -DFASTEMBED_FUZZ=ON && cmake --build build/fuzz
//   build/fuzz/fuzz_labels 60
#include "cuda_on_cpu.h"
// Before what it stands for.
#include <chrono>
#include <cmath>
#include <cstring>
#include <map>

#include "labels.cuh"

namespace fastembed {
namespace {

template <class T>
constexpr Pixel kPixel = std::is_same_v<T, float>      ? Pixel::kFloat32
                         : std::is_same_v<T, uint16_t> ? Pixel::kUInt16
                                                       : Pixel::kUInt8;
template <class T>
constexpr Label kLabel = std::is_same_v<T, uint8_t>    ? Label::kUInt8
                         : std::is_same_v<T, uint16_t> ? Label::kUInt16
                         : std::is_same_v<T, int32_t>  ? Label::kInt32
                         : std::is_same_v<T, uint32_t> ? Label::kUInt32
                                                       : Label::kInt64;

using Row = std::vector<int64_t>;

// Float pixels are whole numbers here: their sums are the same in any order.
template <class T>
int64_t key(T pixel) {
  if constexpr (std::is_same_v<T, float>) {
    int32_t bits;
    memcpy(&bits, &pixel, sizeof bits);
    return order_key(bits);
  } else {
    return pixel;
  }
}

template <class T>
int64_t plus(int64_t sum, T pixel) {
  if constexpr (std::is_same_v<T, float>) {
    double value;
    memcpy(&value, &sum, sizeof value);
    value += pixel;
    memcpy(&sum, &value, sizeof value);
    return sum;
  } else {
    return sum + pixel;
  }
}

template <class L, class T>
std::map<int64_t, Row> pixel_by_pixel(const LabelStatistics& op) {
  std::map<int64_t, Row> rows;
  const L* labels = static_cast<const L*>(op.labels);
  const T* image = static_cast<const T*>(op.image);
  for (int64_t i = 0; i < op.height * op.width; ++i) {
    const auto label = static_cast<int64_t>(labels[i]);
    if (label == 0) continue;
    const int64_t y = i / op.width, x = i % op.width;
    Row& row = rows[label];
    const bool first = row.empty();
    if (first) row = {label, y, x, y, x, 0};
    row[kX0] = std::min(row[kX0], x);
    row[kX1] = std::max(row[kX1], x);
    row[kY1] = y;
    ++row[kArea];
    for (int64_t c = 0; c < op.channels; ++c) {
      const T pixel = image[c * op.height * op.width + i];
      if (first) row.insert(row.end(), {0, key(pixel), key(pixel)});
      int64_t* channel = row.data() + kChannels + kPerChannel * c;
      channel[kSum] = plus(channel[kSum], pixel);
      channel[kLow] = std::min(channel[kLow], key(pixel));
      channel[kHigh] = std::max(channel[kHigh], key(pixel));
    }
  }
  return rows;
}

template <class L, class T>
void compare(const char* what, unsigned seed, const LabelStatistics& op) {
  const std::map<int64_t, Row> expected = pixel_by_pixel<L, T>(op);
  const int64_t columns = columns_of(op.channels);
  const auto found = static_cast<int64_t>(expected.size());
  const auto fail = [&](const char* why) {
    fprintf(stderr,
            "%s, seed %u: %s; %zu-byte labels, %zu-byte pixels [%ld, %ld, %ld], %ld slots\n", what,
            seed, why, sizeof(L), sizeof(T), static_cast<long>(op.channels),
            static_cast<long>(op.height), static_cast<long>(op.width), static_cast<long>(op.slots));
    exit(1);
  };
  if (found > op.slots / 2) {
    if (op.out[kId] <= op.slots / 2) fail("objects without room were not reported");
    return;
  }
  if (op.out[kId] != found) fail("another number of objects");
  int64_t rows = 0;
  for (const int64_t* row = op.out + columns; row < op.out + (1 + op.slots) * columns;
       row += columns) {
    if (row[kArea] == 0) continue;
    ++rows;
    const auto at = expected.find(row[kId]);
    if (at == expected.end()) fail("a label that is not in the image");
    if (!std::equal(at->second.begin(), at->second.end(), row)) fail("another row");
  }
  if (rows != found) fail("another number of rows");
}

template <class L, class T>
void check(unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  LabelStatistics op{};
  op.label = kLabel<L>;
  op.pixel = kPixel<T>;
  op.channels = 1 + below(3);
  op.height = 1 + below(6);
  op.width = 1 + (below(8) == 0 ? below(700) : below(70));
  op.slots = int64_t{2} << below(9);
  const int64_t size = op.height * op.width, longest = 1 + below(40);
  std::vector<L> labels(size);
  std::vector<T> image(op.channels * size);
  const int64_t objects = 1 + below(below(2) ? 9 : 200);
  const uint64_t stride = below(4) == 0 ? (uint64_t{1} << below(8 * sizeof(L))) + 1 : 1;
  for (int64_t i = 0; i < size;) {
    const auto label = static_cast<L>(below(3) == 0 ? 0 : below(objects) * stride);
    for (int64_t run = 1 + below(longest); run > 0 && i < size; --run) labels[i++] = label;
  }
  for (T& pixel : image) {
    pixel = static_cast<T>(std::is_same_v<T, float> ? below(1 << 20) - (1 << 19) : below(1 << 16));
  }
  std::vector<int64_t> table((1 + op.slots) * columns_of(op.channels), -1);
  op.labels = labels.data();
  op.image = image.data();
  op.out = table.data();
  cpu::label_statistics(op);
  compare<L, T>("cpu", seed, op);

  if (seed % 8 != 0) return;  // a thousand times slower
  static BlockOnCpu block(cuda::kThreads, seed);
  // A batch: the first rows of the labels once more, as a smaller image with pixels of its own.
  std::vector<int64_t> second(table);
  LabelStatistics batch[] = {op, op};
  batch[1].height = 1 + below(op.height);
  batch[1].out = second.data();
  std::vector<T> smaller(op.channels * batch[1].height * op.width, T(7));
  batch[1].image = smaller.data();
  const auto blocks = [](int64_t items, int64_t each) {
    return static_cast<unsigned>((items + each - 1) / each);
  };
  block.launch({blocks(1 + op.slots, cuda::kThreads), 2},
               [&] { cuda::clear_labels_kernel(batch); });
  block.launch({blocks(op.height * cuda::stretches_of(op), cuda::kWarps), 2},
               [&] { cuda::label_statistics_kernel<T>(batch); });
  for (const LabelStatistics& one : batch) compare<L, T>("cuda", seed, one);
}

template <class L>
void check_pixels(unsigned seed) {
  check<L, float>(seed);
  check<L, uint16_t>(seed);
  check<L, uint8_t>(seed);
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
    fastembed::check_pixels<uint8_t>(seed);
    fastembed::check_pixels<uint16_t>(seed);
    fastembed::check_pixels<int32_t>(seed);
    fastembed::check_pixels<uint32_t>(seed);
    fastembed::check_pixels<int64_t>(seed);
  }
  printf("%u images of each label and pixel type\n", cases);
}
