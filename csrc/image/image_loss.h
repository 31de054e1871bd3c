// What the op of the image loss takes and gives, and what its kernels are handed.
#pragma once

#include "image/per_image.h"
#include "image/pixel.h"
#include "image/smoothness.h"
#include "image/ssim.h"
#include "core/op.h"

namespace fastloss {
namespace {

struct Inputs {
  Tensor image, image_pred;
  std::optional<Tensor> pixel_weight, guide, smoothness_weight, ssim_weight;
  std::string pixel_kind;  // empty: off
  double pixel_parameter;
  std::string smoothness_kind;  // empty: off
  int64_t order;
  SsimParameters ssim;  // with a window of 0: off
  int64_t keep;
  std::optional<Tensor> sum_weights;
  FASTLOSS_FIELDS(image, image_pred, pixel_weight, guide, smoothness_weight, ssim_weight, pixel_kind, pixel_parameter,
                  smoothness_kind, order, ssim, keep, sum_weights)
};
struct Saved {
  Tensor gradients;  // what `keep` asks for; Python's Saved.kept
  FASTLOSS_FIELDS(gradients)
};
using Grads = PerImage<Tensor>;
using Needs = PerImage<bool>;

// A row of the usual terms, and where its sums and its gradients go, each or null.
template <typename T, typename G>
struct SweepRow {
  const T *image, *image_pred;
  int64_t first, last;  // what may be read of either, from there on
  int64_t size, step;
  int64_t below;                  // from the row to the next one, 0 if it is the last
  const float* weight;            // of the pixel loss, or null
  float scale, along_y, along_x;  // upstream
  Gradients<const float> more;    // to add
  Gradients<G> to;
  float* above;  // the slopes along y of the row above; then those of this one
  double* sums;  // of the pixel loss, along y, along x: a vector of each
};
template <typename T, typename G>
struct Sweep {
  void (*row)(const SweepRow<T, G>&, double p);
  void (*above)(const T* row, int64_t below, int64_t size, float* above);
};

// The kernels of the image loss alone.
template <typename T, typename G>
struct ImageRowKernels {
  void (*row)(const Stretch<T>&, double p, float scale, const float* line, const Gradients<const float>& more,
              const Gradients<G>&);
  void (*fence)();    // after the last streamed row of a band
  Sweep<T, G> sweep;  // of nothing: the terms one after the other
};
template <typename T, typename G>
struct ImageKernels : ImageRowKernels<T, G> {
  PixelKernels<T> pixel;
  SmoothnessKernels<T> smoothness;
  SsimKernels<T> ssim;
};

}  // namespace
}  // namespace fastloss
