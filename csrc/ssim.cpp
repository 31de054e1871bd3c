// SSIM loss: sums of one minus the SSIM of each plane, and their gradient, over tiles that stay in the caches.

#include "ssim.h"

#define FASTLOSS_KERNELS "ssim_simd.h"
#include "each_isa.h"

namespace fastloss {
namespace {

// Every plane cut into tiles, the same whatever the number of threads.
struct Tiles {
  int64_t margin, height, width, down, across, columns, count;

  Tiles(const SsimCall& call, int64_t cut)
      : margin(cut), height(call.height - cut), width(call.width - cut),
        down((height - cut + kSsimRows - 1) / kSsimRows), across((width - cut + kSsimColumns - 1) / kSsimColumns),
        columns(std::min(width - cut, kSsimColumns)), count(call.planes * down * across) {}

  // body(tile number, plane, tile, scratch) over torch's threads. It must not throw.
  template <typename Body>
  void each(const Body& body) const {
    const int64_t size = std::min(height - margin, kSsimRows) * columns;
    const int64_t grain = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, size));
    torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
      std::vector<float> room(ssim_scratch(columns) + 16);
      float* const scratch = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) / sizeof(float);
      for (int64_t i = first; i < last; ++i) {
        const int64_t plane = i / (down * across), within = i % (down * across);
        const int64_t y = margin + within / across * kSsimRows, x = margin + within % across * kSsimColumns;
        body(i, plane, SsimTile{y, std::min(height, y + kSsimRows), x, std::min(width, x + kSsimColumns)}, scratch);
      }
    });
  }
};

std::tuple<Tensor, Tensor> ssim_fwd(const Tensor& image, const Tensor& image_pred, std::optional<Tensor> weight,
                                    int64_t window, double sigma, bool same, double c1, double c2, bool structure,
                                    int64_t keep) {
  STD_TORCH_CHECK(keep == 0, "ssim: the CPU kernels keep nothing");
  const SsimCall call(image, image_pred, weight, window, sigma, same, c1, c2, structure);
  const Tiles tiles(call, call.options.margin);
  Tensor out = torch::stable::new_empty(image, {image.size(0), image.size(1)}, ScalarType::Float);
  std::vector<double> partial(tiles.count);
  for_dtype(image.scalar_type(), "ssim", [&](auto element) {
    using T = decltype(element);
    const SsimKernels<T> kernels = FASTLOSS_PICK(ssim_kernels<T>());
    tiles.each([&](int64_t i, int64_t plane, const SsimTile& tile, float* scratch) {
      const SsimPlaneWeights weights = call.weights_of(plane);
      const SsimWeights reader{weights.weights == nullptr ? nullptr : SsimPlaneWeights::read, &weights};
      partial[i] = kernels.sum(call.plane<T>(plane), tile, call.options, reader, scratch);
    });
  });
  float* to = output<float>(out);
  const int64_t each = tiles.down * tiles.across;
  for (int64_t plane = 0; plane < call.planes; ++plane) {
    double total = 0;
    for (int64_t i = plane * each; i < (plane + 1) * each; ++i) total += partial[i];
    to[plane] = static_cast<float>(total);
  }
  return {out, torch::stable::new_empty(image, {0}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor> ssim_bwd(const Tensor& grad, const Tensor& /* partials */, const Tensor& image,
                                    const Tensor& image_pred, std::optional<Tensor> weight, int64_t window,
                                    double sigma, bool same, double c1, double c2, bool structure, int64_t /* keep */,
                                    bool needs_image, bool needs_image_pred) {
  const SsimCall call(image, image_pred, weight, window, sigma, same, c1, c2, structure);
  const Tiles tiles(call, 0);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == call.planes,
                  "ssim: expected a float32 gradient of the sums");
  const Tensor upstream = torch::stable::contiguous(grad);
  const float* up = input<float>(upstream);
  std::optional<Tensor> x, y;
  if (needs_image) x = empty_like(image, image.scalar_type());
  if (needs_image_pred) y = empty_like(image_pred, image.scalar_type());
  for_dtype(image.scalar_type(), "ssim", [&](auto element) {
    using T = decltype(element);
    const SsimKernels<T> kernels = FASTLOSS_PICK(ssim_kernels<T>());
    tiles.each([&](int64_t, int64_t plane, const SsimTile& tile, float* scratch) {
      const SsimPlaneWeights weights = call.weights_of(plane);
      const SsimWeights reader{weights.weights == nullptr ? nullptr : SsimPlaneWeights::read, &weights};
      kernels.grad(call.plane<T>(plane), tile, call.options, reader, up[plane], call.gradients<T>(x, y, plane),
                   scratch);
    });
  });
  const auto none = [&] { return torch::stable::new_empty(image, {0}); };
  return {x ? *x : none(), y ? *y : none()};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("ssim_fwd", TORCH_BOX(&fastloss::ssim_fwd));
  m.impl("ssim_bwd", TORCH_BOX(&fastloss::ssim_bwd));
}
