// SSIM loss: sums of one minus the SSIM of each plane over tiles that stay in the caches, and in the same pass their
// gradients, which the backward multiplies by the upstream ones.

#include "image/ssim.h"
#include "core/isa.h"
#include "core/op.h"

#define FASTLOSS_KERNELS "image/ssim_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {
namespace {

// Every plane cut into tiles, the same whatever the number of threads.
struct Tiles {
  int64_t height, width, rows, down, across, columns, count;

  explicit Tiles(const SsimCall& call)
      : height(call.height),
        width(call.width),
        rows(kSsimRows),
        down((height + rows - 1) / rows),
        across((width + kSsimColumns - 1) / kSsimColumns),
        columns(std::min(width, kSsimColumns)),
        count(call.planes * down * across) {}

  // body(tile number, plane, tile, room) over torch's threads.
  template <typename Body>
  void each(size_t size, const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, std::min(height, rows) * columns));
    over_threads(0, count, grain, [&](int64_t first, int64_t last) {
      SsimRoom room(columns, size);
      for (int64_t i = first; i < last && going_on(); ++i) {
        const int64_t plane = i / (down * across), within = i % (down * across);
        const int64_t y = within / across * rows, x = within % across * kSsimColumns;
        body(i, plane, SsimTile{y, std::min(height, y + rows), x, std::min(width, x + kSsimColumns)}, room);
      }
    });
  }
};

// What `keep` asks for: gradients of the sums, unscaled, one after the other.
struct Kept {
  bool image, image_pred;
  int64_t count;

  explicit Kept(int64_t keep) : image(keep & 1), image_pred(keep & 2), count(image + image_pred) {
    STD_TORCH_CHECK(keep == 0 || (keep & 8 && count > 0), "ssim: the CPU kernels keep gradients, or nothing");
  }
  Tensor empty(const Tensor& like) const {
    if (count == 0) return torch::stable::new_empty(like, {0}, ScalarType::Float);
    return torch::stable::new_empty(like, {count, like.numel()}, ScalarType::Float);
  }
};

// The sums of every tile, into `partial`, and what is to be kept.
template <typename T>
void make(const SsimCall& call, const Tiles& tiles, const Kept& kept, float* to, double* partial) {
  const SsimKernels<T> kernels = FASTLOSS_PICK(ssim_kernels<T>());
  float* const second = to + (kept.image ? call.image.numel() : 0);
  tiles.each(kernels.size, [&](int64_t i, int64_t plane, const SsimTile& tile, SsimRoom& room) {
    const SsimPlaneWeights weights = call.weights_of(plane);
    const SsimWeights reader{weights.weights == nullptr ? nullptr : SsimPlaneWeights::read, &weights};
    const auto gradients = call.gradients(kept.image ? to : nullptr, kept.image_pred ? second : nullptr, plane);
    void* const walk = room.walk.data();
    kernels.start(walk, call.plane<T>(plane), tile, call.options, reader, 1.0f, kept.image, kept.image_pred,
                  room.scratch);
    const double sum = kernels.advance(walk, tile.y1, gradients);
    if (partial != nullptr) partial[i] = sum;
  });
}

std::tuple<Tensor, Tensor> ssim_fwd(const Tensor& image, const Tensor& image_pred, std::optional<Tensor> weight,
                                    int64_t window, double sigma, bool same, double c1, double c2, double low,
                                    bool structure, int64_t keep) {
  const SsimCall call(image, image_pred, weight, window, sigma, same, c1, c2, low, structure);
  const Tiles tiles(call);
  const Kept kept(keep);
  Tensor out = torch::stable::new_empty(image, {image.size(0), image.size(1)}, ScalarType::Float);
  Tensor gradients = kept.empty(image);
  std::vector<double> partial(tiles.count);
  for_dtype(image.scalar_type(), "ssim", [&](auto element) {
    make<decltype(element)>(call, tiles, kept, output<float>(gradients), partial.data());
  });
  float* to = output<float>(out);
  const int64_t each = tiles.down * tiles.across;
  for (int64_t plane = 0; plane < call.planes; ++plane) {
    double total = 0;
    for (int64_t i = plane * each; i < (plane + 1) * each; ++i) total += partial[i];
    to[plane] = static_cast<float>(total);
  }
  return {out, gradients};
}

// A kept gradient times the upstream gradients of the planes, in the type and layout of `like`.
template <typename T>
Tensor scaled(const float* from, const float* up, const Tensor& like) {
  const auto scale = FASTLOSS_PICK(ssim_kernels<T>()).scale;
  const int64_t channels = like.size(1), size = like.size(2) * like.size(3), total = like.numel();
  const bool last = channels_last(like);
  const Tensor out = empty_like(like, like.scalar_type());
  Tensor written = out;
  if (!last && !is_dense(out, false))
    written = torch::stable::new_empty(like, {like.size(0), channels, like.size(2), like.size(3)});
  T* const to = output<T>(written);
  const bool large = total * static_cast<int64_t>(sizeof(T)) >= kSsimStreamed && size % 16 == 0;
  const bool streamed = large && reinterpret_cast<uintptr_t>(to) % 64 == 0;
  // pieces of a plane, of one factor; or whole pixels of an image, with the factors of their channels in turn
  const int64_t run = last ? size * channels : size;
  const int64_t piece = last ? channels * std::max<int64_t>(16, kBlock / channels / 16 * 16) : kBlock;
  const int64_t pieces = (run + piece - 1) / piece;
  over_threads(0, total / run * pieces, 2, [&](int64_t first, int64_t end) {
    std::vector<float> factors(last ? piece : 0);
    for (int64_t i = first; i < end && going_on(); ++i) {
      const int64_t index = i / pieces, at = index * run + i % pieces * piece;
      for (size_t k = 0; k < factors.size(); ++k) factors[k] = up[index * channels + k % channels];
      scale(from + at, last ? factors.data() : nullptr, last ? 0.0f : up[index],
            std::min(piece, (index + 1) * run - at), to + at, streamed);
    }
  });
  if (written.data_ptr() == out.data_ptr()) return written;
  Tensor result = out;
  torch::stable::copy_(result, written);
  return result;
}

std::tuple<Tensor, Tensor> ssim_bwd(const Tensor& grad, const Tensor& gradients, const Tensor& image,
                                    const Tensor& image_pred, std::optional<Tensor> weight, int64_t window,
                                    double sigma, bool same, double c1, double c2, double low, bool structure,
                                    int64_t keep, bool needs_image, bool needs_image_pred) {
  const SsimCall call(image, image_pred, weight, window, sigma, same, c1, c2, low, structure);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == call.planes,
                  "ssim: expected a float32 gradient of the sums");
  const Tensor upstream = torch::stable::contiguous(grad);
  const float* up = input<float>(upstream);
  const auto none = [&] { return torch::stable::new_empty(image, {0}); };
  Tensor x = none(), y = none();
  if (image.numel() == 0)
    return {needs_image ? empty_like(image, image.scalar_type()) : x,
            needs_image_pred ? empty_like(image_pred, image.scalar_type()) : y};
  for_dtype(image.scalar_type(), "ssim", [&](auto element) {
    using T = decltype(element);
    Kept kept(keep);
    Tensor found = gradients;
    if (keep == 0) {  // nobody asked for a gradient when the forward ran
      kept = Kept(needs_image + 2 * needs_image_pred + 8);
      found = kept.empty(image);
      make<T>(call, Tiles(call), kept, output<float>(found), nullptr);
    }
    STD_TORCH_CHECK(
        found.numel() == kept.count * image.numel() && kept.image >= needs_image && kept.image_pred >= needs_image_pred,
        "ssim: the gradient asked for was not kept");
    if (needs_image) x = scaled<T>(input<float>(found), up, image);
    if (needs_image_pred) y = scaled<T>(input<float>(found) + (kept.image ? image.numel() : 0), up, image_pred);
  });
  return {x, y};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("ssim_fwd", FASTLOSS_BOX(&fastloss::ssim_fwd));
  m.impl("ssim_bwd", FASTLOSS_BOX(&fastloss::ssim_bwd));
}
