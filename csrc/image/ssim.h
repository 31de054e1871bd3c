// The SSIM kernels (ssim_simd.h) and what they are given: an image pair, a tile of one plane, the window, weights,
// scratch.
#pragma once

#include "core/constants.h"
#include "core/op.h"
#include "core/parallel.h"
#include "core/tensors.h"

#include <cmath>
#include <cstddef>
#include <memory>

namespace fastloss {

constexpr int kSsimRadius = 5;  // windows up to 11 pixels

// One plane of both images, by strides: any memory format is read as it lies. Of volumes with windows along their depth
// too: slice z of `depth`, whose neighbours lie x_slice and y_slice elements away.
template <typename T>
struct SsimPlanes {
  const T *x, *y;
  int64_t x_row, x_column, y_row, y_column;
  int64_t height, width;
  int64_t z = 0, depth = 0, x_slice = 0, y_slice = 0;  // a depth of 0: no volume
};

// Rows y0 .. y1 and columns x0 .. x1 of a plane.
struct SsimTile {
  int64_t y0, y1, x0, x1;
};

// Which SSIM: as the ops that compute it take it.
struct SsimParameters {
  int64_t window;
  double sigma;
  bool same;
  double c1, c2, low;
  FASTLOSS_FIELDS(window, sigma, same, c1, c2, low)
};

// A window along one axis.
struct SsimAxis {
  int radius;
  float taps[kSsimRadius + 1];  // weight of the pixels k away
  int64_t margin;               // the SSIM map covers margin .. size - margin: 0 for "same", radius for "valid"
  bool one_pixel;               // nothing but the middle counts
};

// The same for the kernels.
struct SsimOptions {
  SsimAxis z, y, x;  // z: of volumes
  float c1, c2, low;
  bool structure_only;  // the contrast-structure term alone, without luminance
  bool one_pixel;       // nothing but the window's middle counts: variances are 0, and there is luminance alone
};

// What is subtracted from x + y and x - y before they are squared, and what is then missing in their means. Outside the
// image they are minus that.
struct SsimShift {
  float a, d, rest_a, rest_d;
};

inline SsimAxis ssim_axis(int64_t window, double sigma, bool same) {
  STD_TORCH_CHECK(window >= 1 && window <= 2 * kSsimRadius + 1 && window % 2 == 1, "ssim: odd windows to 11 only");
  const int radius = static_cast<int>(window / 2);
  SsimAxis axis{};
  axis.radius = radius;
  axis.margin = same ? 0 : radius;
  axis.one_pixel = radius == 0 || 2 * std::exp(-0.5 / sigma / sigma) < 0x1p-25;  // as ssim_reference.py has it
  double taps[kSsimRadius + 1], total = 0;
  for (int k = 0; k <= radius; ++k) {
    taps[k] = std::exp(-0.5 * (k / sigma) * (k / sigma));
    total += k == 0 ? taps[k] : 2 * taps[k];
  }
  for (int k = 0; k <= radius; ++k) axis.taps[k] = static_cast<float>(taps[k] / total);
  return axis;
}

inline SsimOptions ssim_options(const SsimAxis (&axes)[3], double c1, double c2, double low, bool structure_only) {
  const auto& [z, y, x] = axes;
  const bool one_pixel = z.one_pixel && y.one_pixel && x.one_pixel;
  return {z, y, x, static_cast<float>(c1), static_cast<float>(c2), static_cast<float>(low), structure_only, one_pixel};
}

inline SsimOptions ssim_options(const SsimParameters& p, bool structure_only) {
  const SsimAxis side = ssim_axis(p.window, p.sigma, p.same);
  return ssim_options({ssim_axis(1, 1, p.same), side, side}, p.c1, p.c2, p.low, structure_only);
}

// Weights of the SSIM map, or nothing: n of them from image row y, column x on, in place or in `buffer`.
struct SsimWeights {
  const float* (*read)(const void* from, int64_t y, int64_t x, int64_t n, float* buffer);
  const void* from;
};

// Where the gradients go, by strides; null where one is not needed.
struct SsimGradients {
  float *x, *y;
  int64_t x_row, x_column, y_row, y_column;
  bool streamed;  // rows are dense, aligned, and of whole vectors: written past the caches
};

// Where a walk over a slice of a volume puts what it makes, each null where it is not asked for: the map, and the
// partials filtered along y and x, rows of whole vectors.
struct SsimSlice {
  float *map, *partials;
  int64_t map_row, row, partial;  // from a row of the map to the next, of the partials; from one partial to the next
};

// Rows of the partials of one row of a volume, those that its windows see; null where they end.
struct SsimDepthRows {
  const float* of[4][2 * kSsimRadius + 1];
};

// A tile is walked down, its state in `walk`, `size` bytes: start once, then advance from row to row.
template <typename T>
struct SsimKernels {
  size_t size;
  void (*start)(void* walk, const SsimPlanes<T>&, const SsimTile&, const SsimOptions&, const SsimWeights&, float scale,
                bool x, bool y, float* scratch, const SsimSlice& slice);
  double (*advance)(void* walk, int64_t end, const SsimGradients&);
  void (*scale)(const float* from, const float* factors, float factor, int64_t n, T* to, bool streamed);
  void (*depth)(const SsimPlanes<T>&, const SsimOptions&, const SsimDepthRows&, int64_t y, bool weighted, float* x_grad,
                float* y_grad, float* scratch);
};
// Of the CPU at hand; ssim.cpp has them for each type that for_dtype() knows.
template <typename T>
SsimKernels<T> ssim_kernels();

// The largest tile: what a walk keeps of it, 36 rows of four maps, stays in the L2 cache.
constexpr int64_t kSsimRows = 256, kSsimColumns = 512;
constexpr int64_t kSsimPad = 16;    // elements on either side of the tile's columns in a row of scratch
constexpr int kSsimRowsAtOnce = 4;  // at most, filtered along y

// Floats in a row of scratch for `columns` columns.
constexpr int64_t ssim_step(int64_t columns) { return (columns + 15) / 16 * 16 + 4 * kSsimPad; }

// Floats of scratch, aligned to 64 bytes, for tiles of so many columns: rows of both images, weights, both gradients,
// four partials, and two rings of four filtered rows; rows of the slices that a window of a volume sees.
constexpr int64_t kSsimDepthLines = 2 * (2 * kSsimRadius + 1);
constexpr int64_t ssim_scratch(int64_t columns) {
  return (9 * kSsimRowsAtOnce + (2 * kSsimRadius + 2 * kSsimRowsAtOnce) * 8 + kSsimDepthLines) * ssim_step(columns) +
         2 * kSsimPad;
}

namespace {

// A plane's weights, for the kernels.
struct SsimPlaneWeights {
  const Operand* weights;
  int64_t start, width, y_margin, x_margin;

  static const float* read(const void* from, int64_t y, int64_t x, int64_t n, float* buffer) {
    const auto& w = *static_cast<const SsimPlaneWeights*>(from);
    return w.weights->read(w.start + (y - w.y_margin) * w.width + (x - w.x_margin), n, buffer);
  }
};

// Whether the channels of each pixel lie side by side, and nothing between the pixels.
inline bool channels_last(const Tensor& t) { return t.size(1) > 1 && is_dense(t, true); }

// What one walk needs; nothing of it is read before it is written, but for lanes that nobody uses.
struct SsimWorkspace {
  std::unique_ptr<float[]> floats;
  std::vector<std::max_align_t> walk;
  float* scratch;

  SsimWorkspace(int64_t columns, size_t size)
      : floats(new float[ssim_scratch(columns) + 16]),
        walk(size / sizeof(std::max_align_t) + 1),
        scratch(floats.get() + (64 - reinterpret_cast<uintptr_t>(floats.get()) % 64) / sizeof(float)) {}
};

// The checked arguments of a call.
struct SsimCall {
  const Tensor &image, &image_pred;
  SsimOptions options;
  int64_t channels, planes, height, width;
  std::optional<Operand> weights;

  SsimCall(const Tensor& a, const Tensor& b, const std::optional<Tensor>& weight, const SsimParameters& parameters,
           bool structure_only)
      : image(a), image_pred(b) {
    options = ssim_options(parameters, structure_only);
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
      fits = fits && weight->dim() == 4 && weight->size(d) == a.size(d) - (d < 2 ? 0 : 2 * options.x.margin);
      if (fits && weight->size(d) != 1) order.push_back(d);
    }
    STD_TORCH_CHECK(fits, "ssim: weight has another shape than the SSIM map");
    weights.emplace(*weight, order);
  }

  template <typename T>
  SsimPlanes<T> plane(int64_t index) const {
    return {plane_data<const T>(image, index),
            plane_data<const T>(image_pred, index),
            image.stride(2),
            image.stride(3),
            image_pred.stride(2),
            image_pred.stride(3),
            height,
            width};
  }

  // Where the gradients of a plane go, from the first: in the order of its image's memory if
  // that is channels_last, else one plane after the other.
  SsimGradients gradients(float* x, float* y, int64_t index) const {
    SsimGradients to{};
    const int64_t within = index % channels, size = height * width;
    const auto lies = [&](const Tensor& like, float* data, float*& begin, int64_t& row, int64_t& column) {
      column = channels_last(like) ? channels : 1;
      row = width * column;
      if (data != nullptr) begin = data + (column == 1 ? index * size : (index - within) * size + within);
    };
    lies(image, x, to.x, to.x_row, to.x_column);
    lies(image_pred, y, to.y, to.y_row, to.y_column);
    const bool aligned = (reinterpret_cast<uintptr_t>(to.x) | reinterpret_cast<uintptr_t>(to.y)) % 64 == 0;
    const bool large = planes * size * 4 >= kStreamedGradientBytes && width % 16 == 0;
    to.streamed = large && aligned && to.x_column == 1 && to.y_column == 1;
    return to;
  }

  SsimPlaneWeights weights_of(int64_t plane) const {
    const int64_t margin = options.x.margin, w = width - 2 * margin;
    return {weights ? &*weights : nullptr, plane * (height - 2 * margin) * w, w, margin, margin};
  }

 private:
  template <typename T>
  T* plane_data(const Tensor& t, int64_t plane) const {
    auto* data = static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
    return data + plane / channels * t.stride(0) + plane % channels * t.stride(1);
  }
};

}  // namespace
}  // namespace fastloss
