// Contract: fastembed/ops/panoptic.py.
#include "bindings.h"

namespace fastembed {
namespace {

std::vector<DecodePanoptic> decode_panoptic_ops(const Tensors& images, const Tensors& out) {
  STD_TORCH_CHECK(!images.empty() && out.size() == images.size(),
                  "a batch must have an image, and out a tensor for each");
  std::vector<DecodePanoptic> ops;
  for (size_t i = 0; i < images.size(); ++i) {
    check_layout("decode_panoptic", out[i], {images[i], out[0]});
    STD_TORCH_CHECK(images[i].scalar_type() == ScalarType::Byte &&
                        out[i].scalar_type() == ScalarType::Int &&
                        images[i].numel() == 3 * out[i].numel(),
                    "images must be uint8 with 3 elements for each of the int32 elements of out");
    DecodePanoptic op{};
    op.rgb = static_cast<const uint8_t*>(images[i].const_data_ptr());
    op.out = static_cast<int32_t*>(out[i].mutable_data_ptr());
    op.pixels = out[i].numel();
    ops.push_back(op);
  }
  return ops;
}

// The slots of a segment table: its rows but the first.
int64_t slots_of(const Tensor& out) {
  const int64_t axis = out.dim() - 2;
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Long && axis >= 0 && out.size(axis + 1) == 6,
                  "out must be int64 [..., 1 + slots, 6]");
  const int64_t slots = out.size(axis) - 1;
  STD_TORCH_CHECK(slots >= 2 && slots <= int64_t{1} << 30 && (slots & (slots - 1)) == 0,
                  "slots must be a power of two in 2..2^30, not ", slots);
  return slots;
}

std::vector<PanopticSegments> panoptic_segments_ops(const Tensors& maps, int64_t void_id,
                                                    const Tensor& out) {
  check_layout("panoptic_segments", out, maps);
  const int64_t slots = slots_of(out);
  STD_TORCH_CHECK(
      !maps.empty() && out.dim() == 3 && out.size(0) == static_cast<int64_t>(maps.size()),
      "out must have a table for each of ", maps.size(), " maps, and one at least");
  auto* table = static_cast<Segment*>(out.mutable_data_ptr());
  std::vector<PanopticSegments> ops;
  for (const Tensor& map : maps) {
    STD_TORCH_CHECK(map.scalar_type() == maps[0].scalar_type(), "maps must be of one dtype");
    PanopticSegments op{};
    if (map.scalar_type() == ScalarType::Byte) {
      STD_TORCH_CHECK(map.dim() == 3 && map.size(2) == 3, "colours must be [H, W, 3]");
      op.rgb = static_cast<const uint8_t*>(map.const_data_ptr());
    } else {
      STD_TORCH_CHECK(map.scalar_type() == ScalarType::Int && map.dim() == 2,
                      "maps must be uint8 [H, W, 3] or int32 [H, W]");
      op.ids = static_cast<const int32_t*>(map.const_data_ptr());
    }
    op.height = map.size(0);
    op.width = map.size(1);
    op.slots = slots;
    op.out = table;
    op.void_id = void_id;
    ops.push_back(op);
    table += 1 + slots;
  }
  return ops;
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
  STD_TORCH_CHECK(out.dim() == 2, "out must be one table");
  op.slots = slots_of(out);
  op.out = static_cast<Segment*>(out.mutable_data_ptr());
  op.void_id = void_id;
  return op;
}

void decode_panoptic_cpu(const Tensors& images, const Tensors& out) {
  for (const DecodePanoptic& op : decode_panoptic_ops(images, out)) cpu::decode_panoptic(op);
}

void panoptic_segments_cpu(const Tensors& maps, int64_t void_id, const Tensor& out) {
  for (const PanopticSegments& op : panoptic_segments_ops(maps, void_id, out)) {
    cpu::panoptic_segments(op);
  }
}

void scanline_segments_cpu(const Tensor& lines, int64_t void_id, const Tensor& ids,
                           const Tensor& out) {
  cpu::scanline_segments(scanline_segments_op(lines, void_id, ids, out));
}

#ifdef FASTEMBED_CUDA

void decode_panoptic_cuda(const Tensors& images, const Tensors& out) {
  launch(cuda::decode_panoptic, decode_panoptic_ops(images, out), out[0]);
}

void panoptic_segments_cuda(const Tensors& maps, int64_t void_id, const Tensor& out) {
  launch(cuda::panoptic_segments, panoptic_segments_ops(maps, void_id, out), out);
}

#endif  // FASTEMBED_CUDA

}  // namespace
}  // namespace fastembed

STABLE_TORCH_LIBRARY_FRAGMENT(fastembed, library) {
  library.def("decode_panoptic(Tensor[] images, Tensor(a!)[] out) -> ()");
  library.def("panoptic_segments(Tensor[] maps, int void_id, Tensor(a!) out) -> ()");
  library.def("scanline_segments(Tensor lines, int void_id, Tensor(a!) ids, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastembed, CPU, library) {
  library.impl("decode_panoptic", TORCH_BOX(&fastembed::decode_panoptic_cpu));
  library.impl("panoptic_segments", TORCH_BOX(&fastembed::panoptic_segments_cpu));
  library.impl("scanline_segments", TORCH_BOX(&fastembed::scanline_segments_cpu));
}

#ifdef FASTEMBED_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastembed, CUDA, library) {
  library.impl("decode_panoptic", TORCH_BOX(&fastembed::decode_panoptic_cuda));
  library.impl("panoptic_segments", TORCH_BOX(&fastembed::panoptic_segments_cuda));
}
#endif
