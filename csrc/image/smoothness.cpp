// Smoothness loss: sums of the differences of neighbouring pixels, and their gradient, in one pass over memory each.

#include "image/smoothness_bands.h"
#include "core/constants.h"
#include "core/isa.h"
#include "core/op.h"

#define FASTLOSS_KERNELS "image/smoothness_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {

template <typename T>
SmoothnessKernels<T> smoothness_kernels(Step step, bool plain) {
  return FASTLOSS_PICK(smoothness_kernels<T>(step, plain));
}
template SmoothnessKernels<float> smoothness_kernels(Step, bool);
template SmoothnessKernels<BFloat16> smoothness_kernels(Step, bool);
template SmoothnessKernels<Half> smoothness_kernels(Step, bool);

template <typename T>
EdgeKernel edge_kernel() {
  return FASTLOSS_PICK(edge_kernel<T>());
}
template EdgeKernel edge_kernel<float>();
template EdgeKernel edge_kernel<BFloat16>();
template EdgeKernel edge_kernel<Half>();

namespace {

struct Inputs {
  Tensor image_pred;
  std::optional<Tensor> guide, weight;
  std::string kind;
  int64_t order;
  FASTLOSS_FIELDS(image_pred, guide, weight, kind, order)
};
struct Grads {
  Tensor image_pred;
  FASTLOSS_FIELDS(image_pred)
};

Tensor smoothness_fwd(const Inputs& x) {
  const Bands bands(x.image_pred, x.guide, x.weight, x.order);
  const Step step = step_of(x.kind);
  const int64_t axes = step == Step::isotropic ? 1 : bands.spatial, channels = bands.channels;
  Tensor out = torch::stable::new_empty(x.image_pred, {bands.images, channels, axes}, ScalarType::Float);
  std::vector<double> partial(bands.slots() * axes);
  for_dtype(x.image_pred.scalar_type(), "smoothness", [&](auto element) {
    using T = decltype(element);
    const auto kernels = smoothness_kernels<T>(step, bands.plain());
    bands.for_each_band<T>(false, [&](int64_t n, int64_t plane, const Band<T>& band, const Memory& memory) {
      kernels.sum(band, memory);
      add_totals(memory, axes, bands.layout.step, partial.data() + bands.slot(n, plane, band.z, band.begin) * axes);
    });
  });
  float* to = output<float>(out);
  const int64_t sums = channels * axes;
  for (int64_t i = 0; i < bands.images * sums; ++i) {
    const double* from = partial.data() + i / sums * bands.parts() * sums + i % sums;
    double total = 0;
    for (int64_t part = 0; part < bands.parts(); ++part) total += from[part * sums];
    to[i] = static_cast<float>(total);
  }
  return out;
}

Grads smoothness_bwd(const Tensor& grad, const Inputs& x) {
  const Bands bands(x.image_pred, x.guide, x.weight, x.order);
  const Step step = step_of(x.kind);
  const int64_t axes = step == Step::isotropic ? 1 : bands.spatial, channels = bands.channels;
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == bands.images * channels * axes,
                  "smoothness: expected a float32 gradient of the sums");
  const Tensor upstream = torch::stable::contiguous(grad);
  const Tensor out = empty_like(x.image_pred, x.image_pred.scalar_type());
  Tensor written = same_strides(out, bands.image) ? out : empty_like(bands.image, x.image_pred.scalar_type());
  for_dtype(x.image_pred.scalar_type(), "smoothness", [&](auto element) {
    using T = decltype(element);
    const auto kernels = smoothness_kernels<T>(step, bands.plain());
    T* to = output<T>(written);
    const bool aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0 && bands.layout.row % 16 == 0;
    const bool streamed = aligned && x.image_pred.numel() * static_cast<int64_t>(sizeof(T)) >= kStreamedGradientBytes;
    bands.for_each_band<T>(true, [&](int64_t n, int64_t plane, const Band<T>& band, const Memory& memory) {
      const int64_t channel = n * channels + plane * bands.layout.step;
      set_upstream(input<float>(upstream) + channel * axes, axes, bands.layout.step, memory);
      kernels.grad(band, memory, to + band.position, streamed);
    });
  });
  if (written.data_ptr() == out.data_ptr()) return {written};
  Tensor result = out;
  torch::stable::copy_(result, written);
  return {result};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("smoothness_fwd", FASTLOSS_BOX(&fastloss::smoothness_fwd));
  m.impl("smoothness_bwd", FASTLOSS_BOX(&fastloss::smoothness_bwd));
}
