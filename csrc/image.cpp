// Image loss: pixel, smoothness and SSIM losses of an image pair, term after term on bands of rows that stay in the L2
// cache, so that memory is passed over once in each direction.

#include "pixel.h"
#include "smoothness.h"
#include "ssim.h"

namespace fastloss {
namespace {

template <typename T>
struct ImageKernels {
  double (*pixel)(const Stretch<T>&, double p);
  void (*row)(const Stretch<T>&, double p, float scale, const float* line, bool add, const Gradients<T>&);
  void (*smoothness)(const Band<T>&, const Memory&);
  SmoothnessRows<T> rows;
  SsimKernels<T> ssim;
};

}  // namespace
}  // namespace fastloss

#define FASTLOSS_KERNELS "image_simd.h"
#include "each_isa.h"
#include "smoothness_bands.h"

namespace fastloss {
namespace {

Tensor laid_out_as(const Tensor& t, const Tensor& model) {
  if (same_strides(t, model)) return t;
  Tensor copy = empty_like(model, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// What the losses are: `kinds` names those of pixel and smoothness, "pixel,smoothness", empty where one is off.
struct Terms {
  bool pixel, smoothness, ssim, same;
  Kind kind;
  Step step;
  double p, sigma, c1, c2;
  int64_t order, window;

  Terms(const std::string& kinds, const std::vector<double>& numbers) {
    STD_TORCH_CHECK(numbers.size() == 7 && kinds.find(',') != std::string::npos, "image: unknown terms ", kinds);
    const std::string first = kinds.substr(0, kinds.find(',')), second = kinds.substr(kinds.find(',') + 1);
    p = numbers[0];
    order = static_cast<int64_t>(numbers[1]);
    window = static_cast<int64_t>(numbers[2]);
    sigma = numbers[3];
    same = numbers[4] != 0;
    c1 = numbers[5];
    c2 = numbers[6];
    pixel = !first.empty();
    smoothness = !second.empty();
    ssim = window > 0;
    kind = pixel ? kind_of(first, p) : Kind::l2;
    step = smoothness ? step_of(second) : Step::l1;
  }
};

struct Pair {
  Terms terms;
  Bands bands;
  Tensor image;  // laid out as the prediction in bands
  std::optional<Operand> weight;
  std::optional<SsimCall> ssim;
  int64_t axes;

  Pair(const Tensor& target, const Tensor& image_pred, const std::optional<Tensor>& pixel_weight,
       const std::optional<Tensor>& guide, const std::optional<Tensor>& smoothness_weight,
       const std::optional<Tensor>& ssim_weight, const std::string& kinds, const std::vector<double>& numbers)
      : terms(kinds, numbers),
        bands(image_pred, guide, smoothness_weight, terms.order,
              terms.ssim ? kSsimRows * image_pred.size(image_pred.dim() - 1) : kBlock),
        image(laid_out_as(target, bands.image)),
        axes(terms.step == Step::isotropic ? 1 : bands.spatial) {
    STD_TORCH_CHECK(target.scalar_type() == image_pred.scalar_type(), "image: the images differ in dtype");
    if (pixel_weight) weight.emplace(*pixel_weight, *memory_order(bands.image));
    if (terms.ssim)
      ssim.emplace(image, bands.image, ssim_weight, terms.window, terms.sigma, terms.same, terms.c1, terms.c2, false);
  }

  // What a call returns: the sums of the pixel loss, of the smoothness along each axis, of SSIM.
  int64_t sums() const { return axes + 2; }

  template <typename T>
  auto kernels() const {
    return FASTLOSS_PICK(image_kernels<T>(terms.pixel, terms.kind, terms.step, bands.plain()));
  }

  // body(plane, tile) for each channel and stretch of columns of a band, with the SSIM map's margin cut off.
  template <typename Body>
  void tiles(int64_t n, int64_t plane, int64_t begin, int64_t end, int64_t margin, const Body& body) const {
    const int64_t step = bands.layout.step, width = bands.layout.row / step;
    const int64_t top = std::max(begin, margin), bottom = std::min(end, bands.layout.height - margin);
    if (top >= bottom) return;
    for (int64_t c = 0; c < step; ++c)
      for (int64_t x = margin; x < width - margin; x += kSsimColumns)
        body(n * bands.channels + plane * step + c,
             SsimTile{top, bottom, x, std::min(width - margin, x + kSsimColumns)});
  }
  int64_t columns() const { return std::min(bands.layout.row / bands.layout.step, kSsimColumns); }
};

struct SsimRoom {
  std::vector<float> room;
  float* at = nullptr;

  explicit SsimRoom(int64_t columns) : room(ssim_scratch(columns) + 16) {
    at = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) / sizeof(float);
  }
};

// Nothing is kept for the backward, whatever `keep` says: the images are read again.
std::tuple<Tensor, Tensor> image_fwd(const Tensor& image, const Tensor& image_pred,
                                     std::optional<Tensor> pixel_weight,
                                     std::optional<Tensor> guide, std::optional<Tensor> smoothness_weight,
                                     std::optional<Tensor> ssim_weight, std::string kinds,
                                     std::vector<double> numbers, int64_t) {
  const Pair pair(image, image_pred, pixel_weight, guide, smoothness_weight, ssim_weight, kinds, numbers);
  const Bands& bands = pair.bands;
  const int64_t sums = pair.sums(), step = bands.layout.step;
  Tensor out = torch::stable::new_empty(image_pred, {sums}, ScalarType::Float);
  std::vector<double> partial(bands.slots() * sums);  // in the slot of a band's first channel
  for_dtype(image_pred.scalar_type(), "image", [&](auto element) {
    using T = decltype(element);
    const auto kernels = pair.kernels<T>();
    bands.each<T>(false, [&](int64_t n, int64_t plane, const Band<T>& band, const Memory& memory) {
      double* to = partial.data() + bands.slot(n, plane, band.z, band.begin) * sums;
      const int64_t from = band.position + (band.z * bands.layout.height + band.begin) * bands.layout.row;
      if (pair.terms.pixel) {
        float buffer[kChunk];
        const int64_t end = from + (band.end - band.begin) * bands.layout.row;
        for (int64_t i = from; i < end; i += kChunk) {
          const int64_t count = std::min(kChunk, end - i);
          to[0] += kernels.pixel({input<T>(pair.image) + i, input<T>(bands.image) + i,
                                  pair.weight ? pair.weight->read(i, count, buffer) : nullptr, count},
                                 pair.terms.p);
        }
      }
      if (pair.terms.smoothness) {
        kernels.smoothness(band, memory);
        std::vector<double> totals(step * pair.axes);
        add_totals(memory, pair.axes, step, totals.data());
        for (int64_t i = 0; i < step * pair.axes; ++i) to[1 + i % pair.axes] += totals[i];
      }
      if (pair.terms.ssim) {
        const SsimRoom room(pair.columns());
        pair.tiles(n, plane, band.begin, band.end, pair.ssim->options.margin, [&](int64_t index, const SsimTile& tile) {
          const SsimPlaneWeights weights = pair.ssim->weights_of(index);
          to[sums - 1] += kernels.ssim.sum(pair.ssim->template plane<T>(index), tile, pair.ssim->options,
                                           {weights.weights ? SsimPlaneWeights::read : nullptr, &weights}, room.at);
        });
      }
    });
  });
  for (int64_t k = 0; k < sums; ++k) {
    double total = 0;
    for (int64_t i = 0; i < bands.slots(); ++i) total += partial[i * sums + k];
    output<float>(out)[k] = static_cast<float>(total);
  }
  return {out, torch::stable::new_empty(out, {0})};
}

// The rows of one band, as the kernels of the smoothness loss hand them over.
template <typename T>
struct Rows {
  const Pair& pair;
  const ImageKernels<T>& kernels;
  int64_t from;  // of the slice's first element
  float scale;
  float* buffer;
  T *image, *image_pred;
  bool streamed;

  static void row(const void* context, int64_t y, const float* line) {
    const auto& r = *static_cast<const Rows*>(context);
    const Pair& pair = r.pair;
    const int64_t n = pair.bands.layout.row, i = r.from + y * n;
    r.kernels.row({input<T>(pair.image) + i, input<T>(pair.bands.image) + i,
                   pair.weight ? pair.weight->read(i, n, r.buffer) : nullptr, n},
                  pair.terms.p, r.scale, line, pair.terms.ssim,
                  {r.image ? r.image + i : nullptr, r.image_pred ? r.image_pred + i : nullptr, r.streamed});
  }
};

std::tuple<Tensor, Tensor> image_bwd(const Tensor& grad, const Tensor&, const Tensor& image, const Tensor& image_pred,
                                     std::optional<Tensor> pixel_weight, std::optional<Tensor> guide,
                                     std::optional<Tensor> smoothness_weight, std::optional<Tensor> ssim_weight,
                                     std::string kinds, std::vector<double> numbers, int64_t, bool needs_image,
                                     bool needs_image_pred) {
  const Pair pair(image, image_pred, pixel_weight, guide, smoothness_weight, ssim_weight, kinds, numbers);
  const Bands& bands = pair.bands;
  const int64_t step = bands.layout.step;
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == pair.sums(),
                  "image: expected a float32 gradient of the sums");
  const Tensor upstream = torch::stable::contiguous(grad);
  const float* up = input<float>(upstream);
  std::vector<float> along;
  for (int64_t c = 0; c < step; ++c) along.insert(along.end(), up + 1, up + 1 + pair.axes);
  std::optional<Result> to_image, to_pred;
  if (needs_image) to_image.emplace(image, image.scalar_type(), bands.image);
  if (needs_image_pred) to_pred.emplace(image_pred, image.scalar_type(), bands.image);
  std::optional<Tensor> x, y;
  if (to_image) x = to_image->written;
  if (to_pred) y = to_pred->written;
  for_dtype(image_pred.scalar_type(), "image", [&](auto element) {
    using T = decltype(element);
    const auto kernels = pair.kernels<T>();
    T *first = x ? output<T>(*x) : nullptr, *second = y ? output<T>(*y) : nullptr;
    const bool aligned = (reinterpret_cast<uintptr_t>(first) | reinterpret_cast<uintptr_t>(second)) % 64 == 0;
    const bool streamed = aligned && !pair.terms.ssim && bands.layout.row % 16 == 0 &&
                          image_pred.numel() * static_cast<int64_t>(sizeof(T)) >= kStreamed;
    bands.each<T>(true, [&](int64_t n, int64_t plane, const Band<T>& band, const Memory& memory) {
      if (pair.terms.ssim) {  // it writes, the others add while the band is in the caches
        const SsimRoom room(pair.columns());
        pair.tiles(n, plane, band.begin, band.end, 0, [&](int64_t index, const SsimTile& tile) {
          const SsimPlaneWeights weights = pair.ssim->weights_of(index);
          auto to = pair.ssim->template gradients<T>(x, y, index);
          to.streamed = false;
          kernels.ssim.grad(pair.ssim->template plane<T>(index), tile, pair.ssim->options,
                            {weights.weights ? SsimPlaneWeights::read : nullptr, &weights}, up[pair.sums() - 1], to,
                            room.at);
        });
      }
      std::vector<float> buffer(pair.weight ? bands.layout.row : 0);
      const Rows<T> rows{pair, kernels, band.position + band.z * bands.layout.height * bands.layout.row, up[0],
                         buffer.data(), first, second, streamed};
      if (pair.terms.smoothness && second) {
        set_upstream(along.data(), pair.axes, step, memory);
        kernels.rows(band, memory, Rows<T>::row, &rows);
      } else {
        for (int64_t row = band.begin; row < band.end; ++row) Rows<T>::row(&rows, row, nullptr);
      }
    });
  });
  const auto none = [&] { return torch::stable::new_empty(image, {0}); };
  return {to_image ? to_image->take() : none(), to_pred ? to_pred->take() : none()};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("image_fwd", TORCH_BOX(&fastloss::image_fwd));
  m.impl("image_bwd", TORCH_BOX(&fastloss::image_bwd));
}
