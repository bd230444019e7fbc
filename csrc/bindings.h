// What the bind_*.cpp files share. In them the ops are as torch sees them, torch.ops.fastembed.*,
// and tensors become the structs of kernels.h there and nowhere else. fastembed/ops/ has checked
// its arguments in words for people; what is checked again there is only what keeps a kernel
// inside the memory of its tensors.
//
// LibTorch stable ABI, targeted at the oldest torch allowed (CMakeLists.txt): one library
// serves every torch from there on, and it needs neither libpython nor torch's CUDA headers.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <vector>

#include "kernels.h"

#ifdef FASTEMBED_CUDA
// In libtorch_cuda. Weak, so that a library built with nvcc also links against and loads into
// a torch without CUDA, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fastembed {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline void check_layout(const char* op, const Tensor& out, const Tensors& inputs) {
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous");
  for (const Tensor& input : inputs) {
    STD_TORCH_CHECK(input.is_contiguous(), op, ": every tensor must be contiguous");
    STD_TORCH_CHECK(input.device() == out.device(), op, ": every tensor must be on out's device");
  }
}

inline Pixel pixel_of(const Tensor& image) {
  switch (image.scalar_type()) {
    case ScalarType::Byte:
      return Pixel::kUInt8;
    case ScalarType::UInt16:
      return Pixel::kUInt16;
    case ScalarType::Float:
      return Pixel::kFloat32;
    default:
      STD_TORCH_CHECK(false, "images must be uint8, uint16 or float32");
  }
}

inline Real real_of(const Tensor& tensor) {
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

// The channels that the images of a batch have, all of one dtype.
inline int64_t channels_of(const Tensors& images) {
  STD_TORCH_CHECK(!images.empty(), "a batch must have an image");
  for (const Tensor& image : images) {
    STD_TORCH_CHECK(image.dim() >= 1 && image.size(0) == images[0].size(0) &&
                        image.scalar_type() == images[0].scalar_type(),
                    "images must have the same channels and dtype");
  }
  return images[0].size(0);
}

// The ramps of each image of a batch, [channels] after [channels].
inline const Ramp* ramps_of(const Tensor& ramp, const Tensors& images) {
  const int64_t count = static_cast<int64_t>(images.size()), channels = channels_of(images);
  STD_TORCH_CHECK(ramp.scalar_type() == ScalarType::Float && ramp.dim() == 3 &&
                      ramp.size(0) == count && ramp.size(1) == channels && ramp.size(2) == 5,
                  "ramp must be float32 [", count, ", ", channels, ", 5]");
  return static_cast<const Ramp*>(ramp.const_data_ptr());
}

// The elements of a table that is only looked up in: their bits are copied, whatever they mean.
inline int64_t value_bytes_of(const Tensor& out) {
  const auto bytes = static_cast<int64_t>(out.element_size());
  STD_TORCH_CHECK(bytes == 1 || bytes == 2 || bytes == 4,
                  "elements of table must have 1, 2 or 4 bytes");
  return bytes;
}

// One past the last of the rows (crops) from `begin` on that are of the same image.
template <class Row>
int64_t end_of_run(const Row* rows, int64_t begin, int64_t count) {
  int64_t end = begin + 1;
  while (end < count && rows[end].image == rows[begin].image) ++end;
  return end;
}

#ifdef FASTEMBED_CUDA

// Calls run(stream) with torch's current stream of the device that holds `out`.
template <class Run>
void on_stream_of(const Tensor& out, const Run& run) {
  const int32_t device = out.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = run(stream);
  STD_TORCH_CHECK(error == nullptr, "CUDA launch failed: ", error);
}

template <class Op>
void launch(const char* (*kernel)(const Op&, void*), const Op& op, const Tensor& out) {
  on_stream_of(out, [&](void* stream) { return kernel(op, stream); });
}

template <class Op>
void launch(const char* (*kernel)(const cuda::Batch<Op>&, void*), const std::vector<Op>& ops,
            const Tensor& out) {
  using torch::stable::Device, torch::headeronly::DeviceType;
  const auto count = static_cast<int64_t>(ops.size());
  STD_TORCH_CHECK(count <= cuda::kMaxImages, "a batch has at most ", cuda::kMaxImages,
                  " images on CUDA, not ", count);
  on_stream_of(out, [&](void* stream) {
    // Pinned, so that the copy does not wait; and all from torch's allocators, which know the
    // stream: they give the memory to others only behind the copy and the kernel.
    const int64_t bytes = count * static_cast<int64_t>(sizeof(Op));
    const Tensor host = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt,
                                             Device(DeviceType::CPU), true);
    memcpy(host.mutable_data_ptr(), ops.data(), bytes);
    Tensor device = torch::stable::new_empty(out, {bytes}, ScalarType::Byte);
    torch::stable::copy_(device, host, true);
    return kernel({ops.data(), static_cast<const Op*>(device.const_data_ptr()), count}, stream);
  });
}

#endif  // FASTEMBED_CUDA

}  // namespace fastembed
