// The ops as torch sees them: torch.ops.fastembed.*. Tensors become the structs of kernels.h
// here and nowhere else. fastembed/ops/ has checked its arguments in words for people; what
// is checked again here is only what keeps a kernel inside the memory of its tensors.
//
// LibTorch stable ABI, targeted at the oldest torch allowed (CMakeLists.txt): one library
// serves every torch from there on, and it needs neither libpython nor torch's CUDA headers.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
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

BlendCrops blend_crops_op(const Tensor& image, const Tensor& ids, const Tensor& crops,
                          const Tensor& background, const Tensor& table, bool cubic, bool narrow,
                          bool tall_first, const Tensor& out) {
  check_layout("blend_crops", out, {image, ids, crops, background, table});
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
  STD_TORCH_CHECK(table.scalar_type() == out.scalar_type() && table.dim() == 2 &&
                      table.size(0) == 3 && table.size(1) == 256,
                  "table must be [3, 256] of out's dtype");
  BlendCrops op{};
  op.image = static_cast<const uint8_t*>(image.const_data_ptr());
  op.ids = static_cast<const int32_t*>(ids.const_data_ptr());
  op.crop = static_cast<const Crop*>(crops.const_data_ptr());
  op.background = static_cast<const uint8_t*>(background.const_data_ptr());
  op.table = table.const_data_ptr();
  op.out = out.mutable_data_ptr();
  op.value_bytes = static_cast<int64_t>(out.element_size());
  op.height = image.size(0);
  op.width = image.size(1);
  op.crops = out.size(0);
  op.size = out.size(2);
  op.cubic = cubic;
  op.narrow = narrow;
  op.tall_first = tall_first;
  STD_TORCH_CHECK(op.value_bytes == 1 || op.value_bytes == 2 || op.value_bytes == 4,
                  "elements of table must have 1, 2 or 4 bytes");
  return op;
}

void check_indices(const BlendCrops& op) {
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

void blend_crops_cpu(const Tensor& image, const Tensor& ids, const Tensor& crops,
                     const Tensor& background, const Tensor& table, bool cubic, bool narrow,
                     bool tall_first, const Tensor& out) {
  const BlendCrops op =
      blend_crops_op(image, ids, crops, background, table, cubic, narrow, tall_first, out);
  check_indices(op);
  cpu::blend_crops(op);
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

void blend_crops_cuda(const Tensor& image, const Tensor& ids, const Tensor& crops,
                      const Tensor& background, const Tensor& table, bool cubic, bool narrow,
                      bool tall_first, const Tensor& out) {
  launch(cuda::blend_crops,
         blend_crops_op(image, ids, crops, background, table, cubic, narrow, tall_first, out), out);
}

#endif  // FASTEMBED_CUDA

}  // namespace
}  // namespace fastembed

STABLE_TORCH_LIBRARY(fastembed, library) {
  library.def("quantize(Tensor image, Tensor ramp, Tensor(a!) out) -> ()");
  library.def(
      "gather_crops(Tensor image, Tensor origins, Tensor planes, Tensor ramp, Tensor table, "
      "Tensor(a!) out) -> ()");
  library.def(
      "pool_crops(Tensor features, bool take_max, bool l2_normalize, Tensor(a!) out) -> ()");
  library.def(
      "blend_crops(Tensor image, Tensor ids, Tensor crops, Tensor background, Tensor table, "
      "bool cubic, bool narrow, bool tall_first, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastembed, CPU, library) {
  library.impl("quantize", TORCH_BOX(&fastembed::quantize_cpu));
  library.impl("gather_crops", TORCH_BOX(&fastembed::gather_crops_cpu));
  library.impl("pool_crops", TORCH_BOX(&fastembed::pool_crops_cpu));
  library.impl("blend_crops", TORCH_BOX(&fastembed::blend_crops_cpu));
}

#ifdef FASTEMBED_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastembed, CUDA, library) {
  library.impl("quantize", TORCH_BOX(&fastembed::quantize_cuda));
  library.impl("gather_crops", TORCH_BOX(&fastembed::gather_crops_cuda));
  library.impl("pool_crops", TORCH_BOX(&fastembed::pool_crops_cuda));
  library.impl("blend_crops", TORCH_BOX(&fastembed::blend_crops_cuda));
}
#endif
