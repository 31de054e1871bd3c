// SSIM loss: sums of one minus the SSIM of each plane, and their gradient, over tiles that stay in the caches.

#include "ssim.h"

#define FASTLOSS_KERNELS "ssim_simd.h"
#include "each_isa.h"

namespace fastloss {
namespace {

constexpr int64_t kStreamedGradient = int64_t{8} << 20;  // as in pixel.cpp: what will not stay in the caches

// A plane's weights, for the kernels.
struct PlaneWeights {
  const Operand* weights;
  int64_t start, width, margin;

  static const float* read(const void* from, int64_t y, int64_t x, int64_t n, float* buffer) {
    const auto& w = *static_cast<const PlaneWeights*>(from);
    return w.weights->read(w.start + (y - w.margin) * w.width + (x - w.margin), n, buffer);
  }
};

// The checked arguments of a call.
struct Call {
  const Tensor &image, &image_pred;
  SsimOptions options;
  int64_t channels, planes, height, width;
  std::optional<Operand> weights;

  Call(const Tensor& a, const Tensor& b, const std::optional<Tensor>& weight, int64_t window, double sigma, bool same,
       double c1, double c2, bool structure)
      : image(a), image_pred(b) {
    STD_TORCH_CHECK(window >= 1 && window <= 2 * kSsimRadius + 1 && window % 2 == 1, "ssim: odd windows to 11 only");
    options = ssim_options(window, sigma, same, c1, c2, structure);
    STD_TORCH_CHECK(a.dim() == 4 && b.dim() == 4 && a.scalar_type() == b.scalar_type(),
                    "ssim: expected two 4-D images of one dtype");
    bool fits = true;
    for (int64_t d = 0; d < 4; ++d) fits = fits && a.size(d) == b.size(d);
    STD_TORCH_CHECK(fits, "ssim: image_pred has another shape than image");
    channels = a.size(1);
    planes = a.size(0) * channels;
    height = a.size(2);
    width = a.size(3);
    if (!weight.has_value()) return;
    std::vector<int64_t> order;
    for (int64_t d = 0; d < 4; ++d) {
      fits = fits && weight->dim() == 4 && weight->size(d) == a.size(d) - (d < 2 ? 0 : 2 * options.margin);
      if (fits && weight->size(d) != 1) order.push_back(d);
    }
    STD_TORCH_CHECK(fits, "ssim: weight has another shape than the SSIM map");
    weights.emplace(*weight, order);
  }

  template <typename T>
  SsimPlanes<T> plane(int64_t index) const {
    return {at<const T>(image, index), at<const T>(image_pred, index), image.stride(2),      image.stride(3),
            image_pred.stride(2),      image_pred.stride(3),           height, width};
  }

  template <typename T>
  SsimGradients<T> gradients(const std::optional<Tensor>& x, const std::optional<Tensor>& y, int64_t index) const {
    SsimGradients<T> to{};
    to.streamed = planes * height * width * static_cast<int64_t>(sizeof(T)) >= kStreamedGradient && width % 16 == 0;
    const auto lies = [&](const std::optional<Tensor>& t, T*& data, int64_t& row, int64_t& column) {
      if (!t) return;
      data = at<T>(*t, index);
      row = t->stride(2);
      column = t->stride(3);
      const int64_t bytes = row * static_cast<int64_t>(sizeof(T));
      to.streamed = to.streamed && column == 1 && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 64 == 0;
    };
    lies(x, to.x, to.x_row, to.x_column);
    lies(y, to.y, to.y_row, to.y_column);
    return to;
  }

  PlaneWeights weights_of(int64_t plane) const {
    const int64_t w = width - 2 * options.margin;
    return {weights ? &*weights : nullptr, plane * (height - 2 * options.margin) * w, w, options.margin};
  }

 private:
  template <typename T>
  T* at(const Tensor& t, int64_t plane) const {
    auto* data = static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
    return data + plane / channels * t.stride(0) + plane % channels * t.stride(1);
  }
};

// Every plane cut into tiles, the same whatever the number of threads.
struct Tiles {
  int64_t margin, height, width, down, across, columns, count;

  Tiles(const Call& call, int64_t cut)
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
  const Call call(image, image_pred, weight, window, sigma, same, c1, c2, structure);
  const Tiles tiles(call, call.options.margin);
  Tensor out = torch::stable::new_empty(image, {image.size(0), image.size(1)}, ScalarType::Float);
  std::vector<double> partial(tiles.count);
  for_dtype(image.scalar_type(), "ssim", [&](auto element) {
    using T = decltype(element);
    const SsimKernels<T> kernels = FASTLOSS_PICK(ssim_kernels<T>());
    tiles.each([&](int64_t i, int64_t plane, const SsimTile& tile, float* scratch) {
      const PlaneWeights weights = call.weights_of(plane);
      const SsimWeights reader{weights.weights == nullptr ? nullptr : PlaneWeights::read, &weights};
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
  const Call call(image, image_pred, weight, window, sigma, same, c1, c2, structure);
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
      const PlaneWeights weights = call.weights_of(plane);
      const SsimWeights reader{weights.weights == nullptr ? nullptr : PlaneWeights::read, &weights};
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
