// The ops as torch sees them: torch.ops.fastembed.*. Tensors become the structs of kernels.h
// here and nowhere else. fastembed/ops/ has checked its arguments in words for people; what
// is checked again here is only what keeps a kernel inside the memory of its tensors.
//
// LibTorch stable ABI, targeted at the oldest torch allowed (CMakeLists.txt): one library
// serves every torch from there on, and it needs neither libpython nor torch's CUDA headers.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "kernels.h"

#ifdef FASTEMBED_CUDA
// In libtorch_cuda. Weak, so that a library built with nvcc also links against and loads into
// a torch without CUDA, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fastembed {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_layout(const char* op, const Tensor& out, std::initializer_list<Tensor> inputs) {
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous");
  for (const Tensor& input : inputs) {
    STD_TORCH_CHECK(input.is_contiguous(), op, ": every tensor must be contiguous");
    STD_TORCH_CHECK(input.device() == out.device(), op, ": every tensor must be on out's device");
  }
}

Pixel pixel_of(const Tensor& image) {
  switch (image.scalar_type()) {
    case ScalarType::Byte:
      return Pixel::kUInt8;
    case ScalarType::UInt16:
      return Pixel::kUInt16;
    case ScalarType::Float:
      return Pixel::kFloat32;
    default:
      STD_TORCH_CHECK(false, "image must be uint8, uint16 or float32");
  }
}

Real real_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Real::kFloat32;
    case ScalarType::BFloat16:
      return Real::kBFloat16;
    case ScalarType::Half:
      return Real::kFloat16;
    default:
      STD_TORCH_CHECK(false, "features and out must be float32, bfloat16 or float16");
  }
}

const Ramp* ramps_of(const Tensor& ramp, int64_t channels) {
  STD_TORCH_CHECK(ramp.scalar_type() == ScalarType::Float && ramp.dim() == 2 &&
                      ramp.size(0) == channels && ramp.size(1) == 5,
                  "ramp must be float32 [", channels, ", 5]");
  return static_cast<const Ramp*>(ramp.const_data_ptr());
}

PercentileBounds percentile_bounds_op(const Tensor& image, Rank low, Rank high, const Tensor& out) {
  check_layout("percentile_bounds", out, {image});
  STD_TORCH_CHECK(image.dim() >= 1 && image.size(0) > 0 && image.numel() > 0,
                  "image must have pixels");
  PercentileBounds op{};
  op.pixel = pixel_of(image);
  op.image = image.const_data_ptr();
  op.channels = image.size(0);
  op.pixels = image.numel() / op.channels;
  op.low = low;
  op.high = high;
  for (const Rank& at : {low, high}) {
    STD_TORCH_CHECK(0 <= at.rank && at.rank < op.pixels, "rank ", at.rank, " is not one of ",
                    op.pixels, " pixels");
  }
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.dim() == 2 &&
                      out.size(0) == op.channels && out.size(1) == 2,
                  "out must be float32 [", op.channels, ", 2]");
  op.out = static_cast<float*>(out.mutable_data_ptr());
  return op;
}

Quantize quantize_op(const Tensor& image, const Tensor& ramp, const Tensor& out) {
  check_layout("quantize", out, {image, ramp});
  STD_TORCH_CHECK(image.dim() >= 1, "image must have a channel axis");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Byte && out.numel() == image.numel(),
                  "out must be uint8 with ", image.numel(), " elements");
  Quantize op{};
  op.pixel = pixel_of(image);
  op.image = image.const_data_ptr();
  op.channels = image.size(0);
  op.pixels = op.channels == 0 ? 0 : image.numel() / op.channels;
  op.ramp = ramps_of(ramp, op.channels);
  op.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  return op;
}

GatherCrops gather_crops_op(const Tensor& image, const Tensor& origins, const Tensor& planes,
                            const Tensor& ramp, const Tensor& table, const Tensor& out) {
  check_layout("gather_crops", out, {image, origins, planes, ramp, table});
  STD_TORCH_CHECK(image.dim() == 3 && out.dim() == 4 && out.size(2) == out.size(3),
                  "image must be [C, H, W] and out [N, P, size, size]");
  STD_TORCH_CHECK(origins.scalar_type() == ScalarType::Int && origins.dim() == 2 &&
                      origins.size(0) == out.size(0) && origins.size(1) == 2,
                  "origins must be int32 [", out.size(0), ", 2]");
  STD_TORCH_CHECK(
      planes.scalar_type() == ScalarType::Int && planes.dim() == 1 && planes.size(0) == out.size(1),
      "planes must be int32 [", out.size(1), "]");
  STD_TORCH_CHECK(table.scalar_type() == out.scalar_type() && table.dim() == 2 &&
                      table.size(0) == out.size(1) && table.size(1) == 256,
                  "table must be [", out.size(1), ", 256] of out's dtype");
  GatherCrops op{};
  op.pixel = pixel_of(image);
  op.image = image.const_data_ptr();
  op.origins = static_cast<const int32_t*>(origins.const_data_ptr());
  op.planes = static_cast<const int32_t*>(planes.const_data_ptr());
  op.ramp = ramps_of(ramp, image.size(0));
  op.table = table.const_data_ptr();
  op.out = out.mutable_data_ptr();
  op.value_bytes = static_cast<int64_t>(out.element_size());
  op.channels = image.size(0);
  op.height = image.size(1);
  op.width = image.size(2);
  op.crops = out.size(0);
  op.count = out.size(1);
  op.size = out.size(2);
  STD_TORCH_CHECK(op.value_bytes == 1 || op.value_bytes == 2 || op.value_bytes == 4,
                  "elements of table must have 1, 2 or 4 bytes");
  return op;
}

// On a CUDA device the indices stay there: reading them back would wait for the stream.
void check_indices(const GatherCrops& op) {
  for (int64_t p = 0; p < op.count; ++p) {
    STD_TORCH_CHECK(0 <= op.planes[p] && op.planes[p] < op.channels, "plane ", op.planes[p],
                    " is not one of ", op.channels, " channels");
  }
  for (int64_t n = 0; n < op.crops; ++n) {
    const int64_t y = op.origins[2 * n], x = op.origins[2 * n + 1];
    STD_TORCH_CHECK(0 <= y && y + op.size <= op.height && 0 <= x && x + op.size <= op.width,
                    "crop ", n, " at (", y, ", ", x, ") leaves the image");
  }
}

PoolCrops pool_crops_op(const Tensor& features, bool take_max, bool l2_normalize,
                        const Tensor& out) {
  check_layout("pool_crops", out, {features});
  STD_TORCH_CHECK(features.dim() == 3 && features.size(1) >= 1 && out.dim() == 2 &&
                      out.size(0) == features.size(0) && out.size(1) == features.size(2),
                  "features must be [S, N, D] with N >= 1 and out [S, D]");
  PoolCrops op{};
  op.feature = real_of(features);
  op.value = real_of(out);
  op.features = features.const_data_ptr();
  op.out = out.mutable_data_ptr();
  op.samples = features.size(0);
  op.crops = features.size(1);
  op.dim = features.size(2);
  op.take_max = take_max;
  op.l2_normalize = l2_normalize;
  return op;
}

DecodePanoptic decode_panoptic_op(const Tensor& rgb, const Tensor& out) {
  check_layout("decode_panoptic", out, {rgb});
  STD_TORCH_CHECK(rgb.scalar_type() == ScalarType::Byte && out.scalar_type() == ScalarType::Int &&
                      rgb.numel() == 3 * out.numel(),
                  "rgb must be uint8 with 3 elements for each of the int32 elements of out");
  DecodePanoptic op{};
  op.rgb = static_cast<const uint8_t*>(rgb.const_data_ptr());
  op.out = static_cast<int32_t*>(out.mutable_data_ptr());
  op.pixels = out.numel();
  return op;
}

// The slots of a segment table: its rows but the first.
int64_t slots_of(const Tensor& out) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Long && out.dim() == 2 && out.size(1) == 6,
                  "out must be int64 [1 + slots, 6]");
  const int64_t slots = out.size(0) - 1;
  STD_TORCH_CHECK(slots >= 2 && slots <= int64_t{1} << 30 && (slots & (slots - 1)) == 0,
                  "slots must be a power of two in 2..2^30, not ", slots);
  return slots;
}

PanopticSegments panoptic_segments_op(const Tensor& pixels, int64_t void_id, const Tensor& out) {
  check_layout("panoptic_segments", out, {pixels});
  PanopticSegments op{};
  if (pixels.scalar_type() == ScalarType::Byte) {
    STD_TORCH_CHECK(pixels.dim() == 3 && pixels.size(2) == 3, "colours must be [H, W, 3]");
    op.rgb = static_cast<const uint8_t*>(pixels.const_data_ptr());
  } else {
    STD_TORCH_CHECK(pixels.scalar_type() == ScalarType::Int && pixels.dim() == 2,
                    "pixels must be uint8 [H, W, 3] or int32 [H, W]");
    op.ids = static_cast<const int32_t*>(pixels.const_data_ptr());
  }
  op.height = pixels.size(0);
  op.width = pixels.size(1);
  op.slots = slots_of(out);
  op.out = static_cast<Segment*>(out.mutable_data_ptr());
  op.void_id = void_id;
  return op;
}

ScanlineSegments scanline_segments_op(const Tensor& lines, int64_t void_id, const Tensor& ids,
                                      const Tensor& out) {
  check_layout("scanline_segments", out, {lines, ids});
  STD_TORCH_CHECK(
      lines.scalar_type() == ScalarType::Byte && lines.dim() == 2 && lines.size(1) % 3 == 1,
      "lines must be uint8 [H, 1 + 3 W]");
  ScanlineSegments op{};
  op.lines = static_cast<const uint8_t*>(lines.const_data_ptr());
  op.height = lines.size(0);
  op.width = lines.size(1) / 3;
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Int && ids.dim() == 2 &&
                      ids.size(1) == op.width && (ids.size(0) == 0 || ids.size(0) == op.height),
                  "ids must be int32 [", op.height, ", ", op.width, "], or [0, ", op.width,
                  "] for none");
  op.ids = ids.size(0) == 0 ? nullptr : static_cast<int32_t*>(ids.mutable_data_ptr());
  op.slots = slots_of(out);
  op.out = static_cast<Segment*>(out.mutable_data_ptr());
  op.void_id = void_id;
  return op;
}

void percentile_bounds_cpu(const Tensor& image, int64_t low_rank, double low_fraction,
                           int64_t high_rank, double high_fraction, const Tensor& out) {
  cpu::percentile_bounds(
      percentile_bounds_op(image, {low_rank, low_fraction}, {high_rank, high_fraction}, out));
}

// What both kinds of blend_crops read.
template <class Op>
Op crops_op(const Tensor& image, const Tensor& ids, const Tensor& crops, const Tensor& background,
            const Tensor& out) {
  STD_TORCH_CHECK(image.scalar_type() == ScalarType::Byte && image.dim() == 3 && image.size(2) == 3,
                  "image must be uint8 [H, W, 3]");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Int && ids.dim() == 2 &&
                      ids.size(0) == image.size(0) && ids.size(1) == image.size(1),
                  "ids must be int32 [", image.size(0), ", ", image.size(1), "]");
  STD_TORCH_CHECK(out.dim() == 4 && out.size(1) == 3 && out.size(2) == out.size(3) &&
                      (out.size(2) >= 1 || out.size(0) == 0),
                  "out must be [S, 3, size, size] with size >= 1");
  STD_TORCH_CHECK(crops.scalar_type() == ScalarType::Int && crops.dim() == 2 &&
                      crops.size(0) == out.size(0) && crops.size(1) == 5,
                  "crops must be int32 [", out.size(0), ", 5]");
  STD_TORCH_CHECK(background.scalar_type() == ScalarType::Byte && background.numel() == 256,
                  "background must be uint8 [256]");
  Op op{};
  op.image = static_cast<const uint8_t*>(image.const_data_ptr());
  op.ids = static_cast<const int32_t*>(ids.const_data_ptr());
  op.crop = static_cast<const Crop*>(crops.const_data_ptr());
  op.background = static_cast<const uint8_t*>(background.const_data_ptr());
  op.out = out.mutable_data_ptr();
  op.height = image.size(0);
  op.width = image.size(1);
  op.crops = out.size(0);
  op.size = out.size(2);
  return op;
}

BlendCrops blend_crops_op(const Tensor& image, const Tensor& ids, const Tensor& crops,
                          const Tensor& background, const Tensor& table, bool cubic, bool narrow,
                          bool tall_first, const Tensor& out) {
  check_layout("blend_crops", out, {image, ids, crops, background, table});
  STD_TORCH_CHECK(table.scalar_type() == out.scalar_type() && table.dim() == 2 &&
                      table.size(0) == 3 && table.size(1) == 256,
                  "table must be [3, 256] of out's dtype");
  BlendCrops op = crops_op<BlendCrops>(image, ids, crops, background, out);
  op.table = table.const_data_ptr();
  op.value_bytes = static_cast<int64_t>(out.element_size());
  op.cubic = cubic;
  op.narrow = narrow;
  op.tall_first = tall_first;
  STD_TORCH_CHECK(op.value_bytes == 1 || op.value_bytes == 2 || op.value_bytes == 4,
                  "elements of table must have 1, 2 or 4 bytes");
  return op;
}

BlendCropsFloat blend_crops_float_op(const Tensor& image, const Tensor& ids, const Tensor& crops,
                                     const Tensor& background, const Tensor& ramp,
                                     const Tensor& out) {
  check_layout("blend_crops_float", out, {image, ids, crops, background, ramp});
  STD_TORCH_CHECK(ramp.scalar_type() == ScalarType::Float && ramp.dim() == 2 && ramp.size(0) == 2 &&
                      ramp.size(1) == 3,
                  "ramp must be float32 [2, 3]");
  BlendCropsFloat op = crops_op<BlendCropsFloat>(image, ids, crops, background, out);
  op.ramp = static_cast<const float*>(ramp.const_data_ptr());
  op.value = real_of(out);
  return op;
}

template <class Op>
void check_crops(const Op& op) {
  for (int64_t s = 0; s < op.crops; ++s) {
    const int64_t top = op.crop[s].top, left = op.crop[s].left;
    const int64_t height = op.crop[s].height, width = op.crop[s].width;
    STD_TORCH_CHECK(0 <= top && 0 <= left && 1 <= height && 1 <= width &&
                        top + height <= op.height && left + width <= op.width,
                    "crop ", s, " of ", height, "x", width, " at (", top, ", ", left,
                    ") is empty or leaves the image");
  }
}

void quantize_cpu(const Tensor& image, const Tensor& ramp, const Tensor& out) {
  cpu::quantize(quantize_op(image, ramp, out));
}

void gather_crops_cpu(const Tensor& image, const Tensor& origins, const Tensor& planes,
                      const Tensor& ramp, const Tensor& table, const Tensor& out) {
  const GatherCrops op = gather_crops_op(image, origins, planes, ramp, table, out);
  check_indices(op);
  cpu::gather_crops(op);
}

void pool_crops_cpu(const Tensor& features, bool take_max, bool l2_normalize, const Tensor& out) {
  cpu::pool_crops(pool_crops_op(features, take_max, l2_normalize, out));
}

void decode_panoptic_cpu(const Tensor& rgb, const Tensor& out) {
  cpu::decode_panoptic(decode_panoptic_op(rgb, out));
}

void panoptic_segments_cpu(const Tensor& pixels, int64_t void_id, const Tensor& out) {
  cpu::panoptic_segments(panoptic_segments_op(pixels, void_id, out));
}

void scanline_segments_cpu(const Tensor& lines, int64_t void_id, const Tensor& ids,
                           const Tensor& out) {
  cpu::scanline_segments(scanline_segments_op(lines, void_id, ids, out));
}

void blend_crops_cpu(const Tensor& image, const Tensor& ids, const Tensor& crops,
                     const Tensor& background, const Tensor& table, bool cubic, bool narrow,
                     bool tall_first, const Tensor& out) {
  const BlendCrops op =
      blend_crops_op(image, ids, crops, background, table, cubic, narrow, tall_first, out);
  check_crops(op);
  cpu::blend_crops(op);
}

void blend_crops_float_cpu(const Tensor& image, const Tensor& ids, const Tensor& crops,
                           const Tensor& background, const Tensor& ramp, const Tensor& out) {
  const BlendCropsFloat op = blend_crops_float_op(image, ids, crops, background, ramp, out);
  check_crops(op);
  cpu::blend_crops_float(op);
}

#ifdef FASTEMBED_CUDA

// Launches on torch's current stream of the device that holds `out`.
template <class Op>
void launch(const char* (*kernel)(const Op&, void*), const Op& op, const Tensor& out) {
  const int32_t device = out.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = kernel(op, stream);
  STD_TORCH_CHECK(error == nullptr, "CUDA launch failed: ", error);
}

void percentile_bounds_cuda(const Tensor& image, int64_t low_rank, double low_fraction,
                            int64_t high_rank, double high_fraction, const Tensor& out) {
  PercentileBounds op =
      percentile_bounds_op(image, {low_rank, low_fraction}, {high_rank, high_fraction}, out);
  // From torch's allocator, which knows the stream: it gives the memory to others only behind
  // these kernels, so that nothing here waits for them.
  const Tensor scratch =
      torch::stable::new_empty(out, {cuda::percentile_scratch(op)}, ScalarType::Byte);
  op.scratch = scratch.mutable_data_ptr();
  launch(cuda::percentile_bounds, op, out);
}

void quantize_cuda(const Tensor& image, const Tensor& ramp, const Tensor& out) {
  launch(cuda::quantize, quantize_op(image, ramp, out), out);
}

void gather_crops_cuda(const Tensor& image, const Tensor& origins, const Tensor& planes,
                       const Tensor& ramp, const Tensor& table, const Tensor& out) {
  launch(cuda::gather_crops, gather_crops_op(image, origins, planes, ramp, table, out), out);
}

void pool_crops_cuda(const Tensor& features, bool take_max, bool l2_normalize, const Tensor& out) {
  launch(cuda::pool_crops, pool_crops_op(features, take_max, l2_normalize, out), out);
}

void decode_panoptic_cuda(const Tensor& rgb, const Tensor& out) {
  launch(cuda::decode_panoptic, decode_panoptic_op(rgb, out), out);
}

void panoptic_segments_cuda(const Tensor& pixels, int64_t void_id, const Tensor& out) {
  launch(cuda::panoptic_segments, panoptic_segments_op(pixels, void_id, out), out);
}

void blend_crops_cuda(const Tensor& image, const Tensor& ids, const Tensor& crops,
                      const Tensor& background, const Tensor& table, bool cubic, bool narrow,
                      bool tall_first, const Tensor& out) {
  launch(cuda::blend_crops,
         blend_crops_op(image, ids, crops, background, table, cubic, narrow, tall_first, out), out);
}

void blend_crops_float_cuda(const Tensor& image, const Tensor& ids, const Tensor& crops,
                            const Tensor& background, const Tensor& ramp, const Tensor& out) {
  launch(cuda::blend_crops_float, blend_crops_float_op(image, ids, crops, background, ramp, out),
         out);
}

#endif  // FASTEMBED_CUDA

}  // namespace
}  // namespace fastembed

STABLE_TORCH_LIBRARY(fastembed, library) {
  library.def(
      "percentile_bounds(Tensor image, int low_rank, float low_fraction, int high_rank, "
      "float high_fraction, Tensor(a!) out) -> ()");
  library.def("quantize(Tensor image, Tensor ramp, Tensor(a!) out) -> ()");
  library.def(
      "gather_crops(Tensor image, Tensor origins, Tensor planes, Tensor ramp, Tensor table, "
      "Tensor(a!) out) -> ()");
  library.def(
      "pool_crops(Tensor features, bool take_max, bool l2_normalize, Tensor(a!) out) -> ()");
  library.def("decode_panoptic(Tensor rgb, Tensor(a!) out) -> ()");
  library.def("panoptic_segments(Tensor pixels, int void_id, Tensor(a!) out) -> ()");
  library.def("scanline_segments(Tensor lines, int void_id, Tensor(a!) ids, Tensor(b!) out) -> ()");
  library.def(
      "blend_crops(Tensor image, Tensor ids, Tensor crops, Tensor background, Tensor table, "
      "bool cubic, bool narrow, bool tall_first, Tensor(a!) out) -> ()");
  library.def(
      "blend_crops_float(Tensor image, Tensor ids, Tensor crops, Tensor background, Tensor ramp, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastembed, CPU, library) {
  library.impl("percentile_bounds", TORCH_BOX(&fastembed::percentile_bounds_cpu));
  library.impl("quantize", TORCH_BOX(&fastembed::quantize_cpu));
  library.impl("gather_crops", TORCH_BOX(&fastembed::gather_crops_cpu));
  library.impl("pool_crops", TORCH_BOX(&fastembed::pool_crops_cpu));
  library.impl("decode_panoptic", TORCH_BOX(&fastembed::decode_panoptic_cpu));
  library.impl("panoptic_segments", TORCH_BOX(&fastembed::panoptic_segments_cpu));
  library.impl("scanline_segments", TORCH_BOX(&fastembed::scanline_segments_cpu));
  library.impl("blend_crops", TORCH_BOX(&fastembed::blend_crops_cpu));
  library.impl("blend_crops_float", TORCH_BOX(&fastembed::blend_crops_float_cpu));
}

#ifdef FASTEMBED_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastembed, CUDA, library) {
  library.impl("percentile_bounds", TORCH_BOX(&fastembed::percentile_bounds_cuda));
  library.impl("quantize", TORCH_BOX(&fastembed::quantize_cuda));
  library.impl("gather_crops", TORCH_BOX(&fastembed::gather_crops_cuda));
  library.impl("pool_crops", TORCH_BOX(&fastembed::pool_crops_cuda));
  library.impl("decode_panoptic", TORCH_BOX(&fastembed::decode_panoptic_cuda));
  library.impl("panoptic_segments", TORCH_BOX(&fastembed::panoptic_segments_cuda));
  library.impl("blend_crops", TORCH_BOX(&fastembed::blend_crops_cuda));
  library.impl("blend_crops_float", TORCH_BOX(&fastembed::blend_crops_float_cuda));
}
#endif
