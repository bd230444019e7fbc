// Contract: fastembed/ops/labels.py.
#include "labels.cuh"

namespace fastembed::cuda {

const char* label_statistics(const Batch<LabelStatistics>& batch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const auto images = static_cast<unsigned>(batch.count);
  // A row more than slots: the header.
  const dim3 clear(static_cast<unsigned>(batch.host->slots / kThreads + 1), images);
  clear_labels_kernel<<<clear, kThreads, 0, on>>>(batch.device);
  const char* error = launch_error();
  const int64_t stretches =
      largest(batch, [](const LabelStatistics& op) { return op.height * stretches_of(op); });
  if (error != nullptr || stretches == 0) return error;
  const dim3 grid(static_cast<unsigned>((stretches + kWarps - 1) / kWarps), images);
  switch (batch.host->pixel) {
    case Pixel::kUInt8:
      label_statistics_kernel<uint8_t><<<grid, kThreads, 0, on>>>(batch.device);
      break;
    case Pixel::kUInt16:
      label_statistics_kernel<uint16_t><<<grid, kThreads, 0, on>>>(batch.device);
      break;
    default:
      label_statistics_kernel<float><<<grid, kThreads, 0, on>>>(batch.device);
  }
  return launch_error();
}

}  // namespace fastembed::cuda
