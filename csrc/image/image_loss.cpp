// Image loss: pixel, smoothness and SSIM losses of an image pair. They share bands of rows that stay in the caches, so
// that forward and backward read memory once each. In a band SSIM comes first; then the usual pixel and smoothness
// losses in one sweep over each row, which makes sums and gradients at once, or others one after the other.
//
// With SSIM the forward makes the gradient of the total too, in float32, as the backward would have to make SSIM again;
// the backward only multiplies it by its upstream number. `sum_weights` has the weight of each sum in the total. If the
// upstream gradient of the sums is no multiple of `sum_weights`, the backward makes the pass again with it.

#include "image/image_loss.h"
#include "image/smoothness_bands.h"
#include "core/constants.h"
#include "core/isa.h"
#include "core/op.h"

#include <numeric>

#define FASTLOSS_KERNELS "image/image_loss_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {
namespace {

Tensor laid_out_as(const Tensor& t, const Tensor& model) {
  if (same_strides(t, model)) return t;
  Tensor copy = empty_like(model, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// Which losses are on, and which of each they are.
struct Terms {
  bool pixel, smoothness, ssim;
  Kind kind;
  Step step;
  double parameter;

  explicit Terms(const Inputs& x)
      : pixel(!x.pixel_kind.empty()),
        smoothness(!x.smoothness_kind.empty()),
        ssim(x.ssim.window > 0),
        kind(pixel ? kind_of(x.pixel_kind, x.pixel_parameter) : Kind::l2),
        step(smoothness ? step_of(x.smoothness_kind) : Step::l1),
        parameter(x.pixel_parameter) {}
};

struct Pair {
  Terms terms;
  Bands bands;
  Tensor image;  // laid out as the prediction in bands
  std::optional<Operand> weight;
  std::optional<SsimCall> ssim;
  int64_t axes;

  explicit Pair(const Inputs& x)
      : terms(x),
        bands(x.image_pred, x.guide, x.smoothness_weight, x.order,
              terms.ssim ? kSsimRows * x.image_pred.size(x.image_pred.dim() - 1) : kBlockElements),
        image(laid_out_as(x.image, bands.image)),
        axes(terms.step == Step::isotropic ? 1 : bands.spatial) {
    STD_TORCH_CHECK(x.image.scalar_type() == x.image_pred.scalar_type(), "image: the images differ in dtype");
    if (x.pixel_weight) weight.emplace(*x.pixel_weight, *memory_order(bands.image));
    if (terms.ssim) ssim.emplace(image, bands.image, x.ssim_weight, x.ssim, false);
  }

  // What a call returns: the sums of the pixel loss, of the smoothness along each axis, of SSIM.
  int64_t sums() const { return axes + 2; }

  template <typename T, typename G>
  ImageKernels<T, G> kernels() const {
    const bool plain = bands.plain();
    ImageKernels<T, G> found{FASTLOSS_PICK(image_row_kernels<T, G>(terms.pixel, terms.kind, terms.step, plain)),
                             pixel_kernels<T>(terms.kind), smoothness_kernels<T>(terms.step, plain), ssim_kernels<T>()};
    if (!terms.smoothness || bands.layout.depth > 1) found.sweep = {};
    return found;
  }
};

// Where gradients go, in the order of the prediction in bands; null where one is not needed.
template <typename G>
struct Targets {
  G *image = nullptr, *image_pred = nullptr;
  bool needed() const { return image != nullptr || image_pred != nullptr; }
};

constexpr int64_t kRowsTogether = 16;  // of a band, from term to term

// A band of rows: what all the terms need of it.
template <typename T, typename G>
struct Strip {
  const Pair& pair;
  const ImageKernels<T, G>& kernels;
  const float* up;  // of each sum
  Targets<G> to;
  bool streamed;
  int64_t n, plane;
  Band<T> band;
  const Memory& memory;

  int64_t row_size() const { return band.layout.row; }
  int64_t at(int64_t y) const { return band.position + (band.z * band.layout.height + y) * row_size(); }
  bool second() const { return pair.terms.smoothness && to.image_pred != nullptr; }

  double pixel() const {
    float buffer[kChunkElements];
    double total = 0;
    for (int64_t i = at(band.begin), end = at(band.end); i < end; i += kChunkElements) {
      const int64_t count = std::min(kChunkElements, end - i);
      const float* weight = pair.weight ? pair.weight->read(i, count, buffer) : nullptr;
      total += kernels.pixel.sum({input<T>(pair.image) + i, input<T>(pair.bands.image) + i, weight, count},
                                 pair.terms.parameter);
    }
    return total;
  }

  void smoothness(double* to_axes) const {
    kernels.smoothness.sum(band, memory);
    std::vector<double> totals(band.layout.step * pair.axes);
    add_totals(memory, pair.axes, band.layout.step, totals.data());
    for (size_t i = 0; i < totals.size(); ++i) to_axes[i % pair.axes] += totals[i];
  }

  // All but SSIM, whose gradients are in `more`: of the rows from the band's beginning on, then of those that follow.
  void sweep(bool begins, double* to_sums, const Targets<const float>& more) const {
    const int64_t size = row_size(), right = pair.axes, down = right - 1;  // of the sums: a volume's begin with z
    float* const above = memory.grad_differences;
    if (begins && to.needed()) {
      if (band.begin > 0)
        kernels.sweep.above(band.plane + (band.begin - 1) * size, size, size, above);
      else
        std::fill_n(above, size, 0.0f);
    }
    std::vector<float> weights(pair.weight ? size : 0);
    alignas(64) double sums[3][16] = {};  // or each load of them waits for the stores before it
    for (int64_t y = band.begin; y < band.end; ++y) {
      const int64_t i = at(y), within = (y - band.begin) * size;
      const float* weight = pair.weight ? pair.weight->read(i, size, weights.data()) : nullptr;
      kernels.sweep.row(
          {input<T>(pair.image) + i, input<T>(pair.bands.image) + i, -i, pair.bands.image.numel() - i, size,
           band.layout.step, y + 1 < band.layout.height ? size : 0, weight, up ? up[0] : 0, up ? up[down] : 0,
           up ? up[right] : 0, more_of(more, within), gradients_of(i), above, to_sums ? sums[0] : nullptr},
          pair.terms.parameter);
    }
    const int64_t offsets[3] = {0, down, right};
    for (int k = 0; to_sums != nullptr && k < 3; ++k)
      to_sums[offsets[k]] += std::accumulate(sums[k], sums[k] + 16, 0.0);
    if (streamed) kernels.fence();
  }

  // `more`: SSIM's gradients of the rows, or null.
  void gradients(const Targets<const float>& more) const {
    std::vector<float> buffer(pair.weight ? row_size() : 0);
    const Rows rows{*this, buffer.data(), more};
    if (second()) {
      kernels.smoothness.rows(band, memory, Rows::row, &rows);
    } else {
      for (int64_t y = band.begin; y < band.end; ++y) Rows::row(&rows, y, nullptr);
    }
    if (streamed) kernels.fence();
  }

 private:
  Gradients<G> gradients_of(int64_t i) const {
    return {to.image ? to.image + i : nullptr, to.image_pred ? to.image_pred + i : nullptr, streamed};
  }
  static Gradients<const float> more_of(const Targets<const float>& more, int64_t i) {
    return {more.image ? more.image + i : nullptr, more.image_pred ? more.image_pred + i : nullptr, false};
  }

  // As the kernels of the smoothness loss hand rows over.
  struct Rows {
    const Strip& strip;
    float* buffer;
    Targets<const float> more;

    static void row(const void* context, int64_t y, const float* line) {
      const auto& [s, buffer, more] = *static_cast<const Rows*>(context);
      const int64_t n = s.row_size(), i = s.at(y), within = (y - s.band.begin) * n;
      const float* weight = s.pair.weight ? s.pair.weight->read(i, n, buffer) : nullptr;
      s.kernels.row({input<T>(s.pair.image) + i, input<T>(s.pair.bands.image) + i, weight, n}, s.pair.terms.parameter,
                    s.up[0], line, more_of(more, within), s.gradients_of(i));
    }
  };
};

// SSIM over a band: a walk for each channel and stretch of columns, and the gradients of the rows just passed.
template <typename T>
struct SsimStrip {
  const SsimKernels<T>& kernels;
  const Layout& layout;
  int64_t size;
  std::vector<SsimPlaneWeights> weights;
  std::vector<SsimWorkspace> workspaces;
  std::vector<float> image, image_pred;

  template <typename G>
  explicit SsimStrip(const Strip<T, G>& s) : kernels(s.kernels.ssim), layout(s.band.layout) {
    const SsimCall& call = *s.pair.ssim;
    const int64_t step = layout.step, width = layout.row / step,
                  tiles_per_row = (width + kSsimColumns - 1) / kSsimColumns;
    size = kRowsTogether * layout.row;
    image.resize(s.to.image ? size : 0);
    image_pred.resize(s.to.image_pred ? size : 0);
    weights.reserve(step * tiles_per_row);
    for (int64_t i = 0; i < step * tiles_per_row; ++i) {
      const int64_t plane = s.n * s.pair.bands.channels + s.plane * step + i / tiles_per_row,
                    x = i % tiles_per_row * kSsimColumns;
      const SsimTile tile{s.band.begin, s.band.end, x, std::min(width, x + kSsimColumns)};
      const SsimPlaneWeights& w = weights.emplace_back(call.weights_of(plane));
      SsimWorkspace& workspace = workspaces.emplace_back(tile.x1 - tile.x0, kernels.size);
      kernels.start(workspace.walk.data(), call.plane<T>(plane), tile, call.options,
                    {w.weights ? SsimPlaneWeights::read : nullptr, &w}, s.up ? s.up[s.pair.sums() - 1] : 0.0f,
                    s.to.image != nullptr, s.to.image_pred != nullptr, workspace.scratch, {});
    }
  }

  double advance(int64_t begin, int64_t end) {
    double total = 0;
    const int64_t row = layout.row, step = layout.step, tiles_per_row = static_cast<int64_t>(workspaces.size()) / step;
    for (size_t i = 0; i < workspaces.size(); ++i) {
      const int64_t offset = static_cast<int64_t>(i) / tiles_per_row - begin * row;
      float* const image_grad = image.empty() ? nullptr : image.data() + offset;
      float* const pred_grad = image_pred.empty() ? nullptr : image_pred.data() + offset;
      total += kernels.advance(workspaces[i].walk.data(), end, {image_grad, pred_grad, row, step, row, step, false});
    }
    return total;
  }
  Targets<const float> gradients() const {
    return {image.empty() ? nullptr : image.data(), image_pred.empty() ? nullptr : image_pred.data()};
  }
};

// All the terms: the sums into `partial` (or null), in the slot of a band's first channel, and the gradients.
template <typename T, typename G>
void pass(const Pair& pair, const float* up, const Targets<G>& to, double* partial) {
  const Bands& bands = pair.bands;
  const int64_t sums = pair.sums(), step = bands.layout.step, row = bands.layout.row;
  const auto kernels = pair.kernels<T, G>();
  const bool aligned = (reinterpret_cast<uintptr_t>(to.image) | reinterpret_cast<uintptr_t>(to.image_pred)) % 64 == 0;
  const bool streamed =
      aligned && row % 16 == 0 && bands.image.numel() * static_cast<int64_t>(sizeof(G)) >= kStreamedGradientBytes;
  std::vector<float> along;
  for (int64_t c = 0; up != nullptr && c < step; ++c) along.insert(along.end(), up + 1, up + 1 + pair.axes);
  bands.for_each_band<T>(to.needed(), [&](int64_t n, int64_t plane, const Band<T>& band, const Memory& memory) {
    Strip<T, G> strip{pair, kernels, up, to, streamed, n, plane, band, memory};
    double* const sum = partial == nullptr ? nullptr : partial + bands.slot(n, plane, band.z, band.begin) * sums;
    std::optional<SsimStrip<T>> ssim;
    if (pair.terms.ssim) ssim.emplace(strip);
    if (strip.second()) set_upstream(along.data(), pair.axes, step, memory);
    const int64_t together = pair.terms.ssim ? kRowsTogether : band.end - band.begin;
    for (int64_t y = band.begin; y < band.end; y += together) {
      strip.band.begin = y;
      strip.band.end = std::min(band.end, y + together);
      if (band.edges) strip.band.edges = band.edges + (y - band.begin) * kAxes * Edges::pitch(band.layout);
      const double structure = ssim ? ssim->advance(y, strip.band.end) : 0;
      const Targets<const float> more = ssim ? ssim->gradients() : Targets<const float>{};
      if (kernels.sweep.row != nullptr) {
        strip.sweep(y == band.begin, sum, more);
        if (sum != nullptr) sum[sums - 1] += structure;
        continue;
      }
      if (sum != nullptr) {
        if (pair.terms.pixel) sum[0] += strip.pixel();
        if (pair.terms.smoothness) strip.smoothness(sum + 1);
        sum[sums - 1] += structure;
      }
      if (to.needed()) strip.gradients(more);
    }
  });
}

// What `keep` asks for: the gradients of the total, one after the other, in the order of the prediction in bands.
struct Kept {
  Tensor gradients;
  Targets<float> at;

  Kept(const Tensor& like, bool image, bool image_pred)
      : gradients(torch::stable::new_empty(like, {0}, ScalarType::Float)) {
    if (!image && !image_pred) return;
    gradients = torch::stable::new_empty(like, {image + image_pred, like.numel()}, ScalarType::Float);
    float* const data = output<float>(gradients);
    at = {image ? data : nullptr, image_pred ? data + (image ? like.numel() : 0) : nullptr};
  }
};

constexpr int64_t kKeepGradients = 8;  // of `keep`, beside 1 for the image's and 2 for the prediction's

std::tuple<Tensor, Saved> image_loss_fwd(const Inputs& x) {
  const Pair pair(x);
  const int64_t sums = pair.sums(), slots = pair.bands.slots();
  const auto& weights = x.sum_weights;
  STD_TORCH_CHECK(x.keep == 0 || (x.keep & kKeepGradients && weights && weights->numel() == sums &&
                                  weights->is_contiguous() && weights->scalar_type() == ScalarType::Float),
                  "image: the CPU kernels keep the gradient of a total with float32 weights of each sum, or nothing");
  const Kept kept(x.image_pred, x.keep & 1, x.keep & 2);
  Tensor out = torch::stable::new_empty(x.image_pred, {sums}, ScalarType::Float);
  std::vector<double> partial(slots * sums);
  for_dtype(x.image_pred.scalar_type(), "image", [&](auto element) {
    pass<decltype(element), float>(pair, x.keep ? input<float>(*weights) : nullptr, kept.at, partial.data());
  });
  for (int64_t k = 0; k < sums; ++k) {
    double total = 0;
    for (int64_t i = 0; i < slots; ++i) total += partial[i * sums + k];
    output<float>(out)[k] = static_cast<float>(total);
  }
  return {out, {kept.gradients}};
}

// The number that makes `weights` the upstream gradient, but for rounding; nothing if there is none.
std::optional<float> multiple(const float* up, const float* weights, int64_t n) {
  int64_t largest = 0;
  for (int64_t k = 1; k < n; ++k)
    if (std::abs(weights[k]) > std::abs(weights[largest])) largest = k;
  const float by = weights[largest] == 0 ? 0 : up[largest] / weights[largest];
  for (int64_t k = 0; k < n; ++k)
    if (!(std::abs(up[k] - by * weights[k]) <= 0x1p-20f * std::abs(up[k]))) return std::nullopt;
  return by;
}

Grads image_loss_bwd(const Tensor& grad, const Saved& saved, const Inputs& x, const Needs& needs) {
  const Pair pair(x);
  const Tensor& laid_out = pair.bands.image;
  const int64_t sums = pair.sums(), total = laid_out.numel();
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == sums,
                  "image: expected a float32 gradient of the sums");
  const Tensor upstream = torch::stable::contiguous(grad);
  const float* up = input<float>(upstream);
  std::optional<Result> image_grad, pred_grad;
  if (needs.image) image_grad.emplace(x.image, x.image.scalar_type(), laid_out);
  if (needs.image_pred) pred_grad.emplace(x.image_pred, x.image.scalar_type(), laid_out);
  for_dtype(x.image_pred.scalar_type(), "image", [&](auto element) {
    using T = decltype(element);
    const Targets<T> to{image_grad ? output<T>(image_grad->written) : nullptr,
                        pred_grad ? output<T>(pred_grad->written) : nullptr};
    if (!pair.terms.ssim) return pass<T, T>(pair, up, to, nullptr);
    const bool there = (!needs.image || x.keep & 1) && (!needs.image_pred || x.keep & 2) && x.sum_weights;
    std::optional<float> by;
    if (there) by = multiple(up, input<float>(*x.sum_weights), sums);
    std::optional<Kept> made;
    if (!by) {
      made.emplace(laid_out, needs.image, needs.image_pred);
      pass<T, float>(pair, up, made->at, nullptr);
    }
    const float* from = input<float>(made ? made->gradients : saved.gradients);
    const auto scale = ssim_kernels<T>().scale;
    const auto write = [&](const float* values, T* result) {
      const bool streamed = reinterpret_cast<uintptr_t>(result) % 64 == 0 && total % 16 == 0 &&
                            total * static_cast<int64_t>(sizeof(T)) >= kStreamedGradientBytes;
      for_blocks(total, [&](int64_t begin, int64_t end) {
        scale(values + begin, nullptr, by.value_or(1.0f), end - begin, result + begin, streamed);
      });
    };
    const bool image_first = made ? needs.image : x.keep & 1;
    if (needs.image) write(from, to.image);
    if (needs.image_pred) write(from + (image_first ? total : 0), to.image_pred);
  });
  const auto none = [&] { return torch::stable::new_empty(x.image, {0}); };
  return {image_grad ? image_grad->take() : none(), pred_grad ? pred_grad->take() : none()};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("image_loss_fwd", FASTLOSS_BOX(&fastloss::image_loss_fwd));
  m.impl("image_loss_bwd", FASTLOSS_BOX(&fastloss::image_loss_bwd));
}
