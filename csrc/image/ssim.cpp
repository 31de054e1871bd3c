// SSIM loss: sums of one minus the SSIM of each plane over tiles that stay in the caches, and in the same pass their
// gradients, which the backward multiplies by the upstream ones.

#include "image/ssim.h"
#include "core/isa.h"
#include "core/op.h"
#include "image/per_image.h"

#define FASTLOSS_KERNELS "image/ssim_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {

template <typename T>
SsimKernels<T> ssim_kernels() {
  return FASTLOSS_PICK(ssim_kernels<T>());
}
template SsimKernels<float> ssim_kernels();
template SsimKernels<BFloat16> ssim_kernels();
template SsimKernels<Half> ssim_kernels();

namespace {

struct Inputs {
  Tensor image, image_pred;
  std::optional<Tensor> weight;
  SsimParameters parameters;
  bool structure_only;
  int64_t keep;
  FASTLOSS_FIELDS(image, image_pred, weight, parameters, structure_only, keep)
};
struct Saved {
  Tensor gradients;  // what `keep` asks for; Python's Saved.kept
  FASTLOSS_FIELDS(gradients)
};
using Grads = PerImage<Tensor>;
using Needs = PerImage<bool>;

// Every plane cut into tiles, the same whatever the number of threads.
struct Tiles {
  int64_t height, width, rows, tiles_per_column, tiles_per_row, columns, count;

  explicit Tiles(const SsimCall& call)
      : height(call.height),
        width(call.width),
        rows(kSsimRows),
        tiles_per_column((height + rows - 1) / rows),
        tiles_per_row((width + kSsimColumns - 1) / kSsimColumns),
        columns(std::min(width, kSsimColumns)),
        count(call.planes * tiles_per_column * tiles_per_row) {}

  // body(tile number, plane, tile, workspace) over torch's threads.
  template <typename Body>
  void for_each_tile(size_t size, const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, std::min(height, rows) * columns));
    over_threads(0, count, grain, [&](int64_t first, int64_t last) {
      SsimWorkspace workspace(columns, size);
      for (int64_t i = first; i < last && going_on(); ++i) {
        const int64_t per_plane = tiles_per_column * tiles_per_row, plane = i / per_plane, within = i % per_plane;
        const int64_t y = within / tiles_per_row * rows, x = within % tiles_per_row * kSsimColumns;
        body(i, plane, SsimTile{y, std::min(height, y + rows), x, std::min(width, x + kSsimColumns)}, workspace);
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
  const SsimKernels<T> kernels = ssim_kernels<T>();
  float* const second = to + (kept.image ? call.image.numel() : 0);
  tiles.for_each_tile(kernels.size, [&](int64_t i, int64_t plane, const SsimTile& tile, SsimWorkspace& workspace) {
    const SsimPlaneWeights weights = call.weights_of(plane);
    const SsimWeights reader{weights.weights == nullptr ? nullptr : SsimPlaneWeights::read, &weights};
    const auto gradients = call.gradients(kept.image ? to : nullptr, kept.image_pred ? second : nullptr, plane);
    void* const walk = workspace.walk.data();
    kernels.start(walk, call.plane<T>(plane), tile, call.options, reader, 1.0f, kept.image, kept.image_pred,
                  workspace.scratch, {});
    const double sum = kernels.advance(walk, tile.y1, gradients);
    if (partial != nullptr) partial[i] = sum;
  });
}

std::tuple<Tensor, Saved> ssim_fwd(const Inputs& x) {
  const SsimCall call(x.image, x.image_pred, x.weight, x.parameters, x.structure_only);
  const Tiles tiles(call);
  const Kept kept(x.keep);
  Tensor out = torch::stable::new_empty(x.image, {x.image.size(0), x.image.size(1)}, ScalarType::Float);
  Tensor gradients = kept.empty(x.image);
  std::vector<double> partial(tiles.count);
  for_dtype(x.image.scalar_type(), "ssim", [&](auto element) {
    make<decltype(element)>(call, tiles, kept, output<float>(gradients), partial.data());
  });
  float* to = output<float>(out);
  const int64_t per_plane = tiles.tiles_per_column * tiles.tiles_per_row;
  for (int64_t plane = 0; plane < call.planes; ++plane) {
    double total = 0;
    for (int64_t i = plane * per_plane; i < (plane + 1) * per_plane; ++i) total += partial[i];
    to[plane] = static_cast<float>(total);
  }
  return {out, {gradients}};
}

// A kept gradient times the upstream gradients of the planes, in the type and layout of `like`.
template <typename T>
Tensor scaled(const float* from, const float* up, const Tensor& like) {
  const auto scale = ssim_kernels<T>().scale;
  const int64_t channels = like.size(1), size = like.size(2) * like.size(3), total = like.numel();
  const bool last = channels_last(like);
  const Tensor out = empty_like(like, like.scalar_type());
  Tensor written = out;
  if (!last && !is_dense(out, false))
    written = torch::stable::new_empty(like, {like.size(0), channels, like.size(2), like.size(3)});
  T* const to = output<T>(written);
  const bool large = total * static_cast<int64_t>(sizeof(T)) >= kStreamedGradientBytes && size % 16 == 0;
  const bool streamed = large && reinterpret_cast<uintptr_t>(to) % 64 == 0;
  // pieces of a plane, of one factor; or whole pixels of an image, with the factors of their channels in turn
  const int64_t run = last ? size * channels : size;
  const int64_t piece = last ? channels * std::max<int64_t>(16, kBlockElements / channels / 16 * 16) : kBlockElements;
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

Grads ssim_bwd(const Tensor& grad, const Saved& saved, const Inputs& x, const Needs& needs) {
  const SsimCall call(x.image, x.image_pred, x.weight, x.parameters, x.structure_only);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == call.planes,
                  "ssim: expected a float32 gradient of the sums");
  const Tensor upstream = torch::stable::contiguous(grad);
  const float* up = input<float>(upstream);
  const ScalarType dtype = x.image.scalar_type();
  const auto none = [&] { return torch::stable::new_empty(x.image, {0}); };
  if (x.image.numel() == 0)
    return {needs.image ? empty_like(x.image, dtype) : none(),
            needs.image_pred ? empty_like(x.image_pred, dtype) : none()};
  Grads grads{none(), none()};
  for_dtype(dtype, "ssim", [&](auto element) {
    using T = decltype(element);
    Kept kept(x.keep);
    Tensor found = saved.gradients;
    if (x.keep == 0) {  // nobody asked for a gradient when the forward ran
      kept = Kept(needs.image + 2 * needs.image_pred + 8);
      found = kept.empty(x.image);
      make<T>(call, Tiles(call), kept, output<float>(found), nullptr);
    }
    STD_TORCH_CHECK(found.numel() == kept.count * x.image.numel() && kept.image >= needs.image &&
                        kept.image_pred >= needs.image_pred,
                    "ssim: the gradient asked for was not kept");
    const float* const first = input<float>(found);
    if (needs.image) grads.image = scaled<T>(first, up, x.image);
    if (needs.image_pred) grads.image_pred = scaled<T>(first + (kept.image ? x.image.numel() : 0), up, x.image_pred);
  });
  return grads;
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("ssim_fwd", FASTLOSS_BOX(&fastloss::ssim_fwd));
  m.impl("ssim_bwd", FASTLOSS_BOX(&fastloss::ssim_bwd));
}
