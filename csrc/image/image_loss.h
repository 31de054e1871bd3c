// What the kernels of the image loss are handed.
#pragma once

#include "image/pixel.h"
#include "image/smoothness.h"
#include "image/ssim.h"

namespace fastloss {
namespace {

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

template <typename T, typename G>
struct ImageKernels {
  double (*pixel)(const Stretch<T>&, double p);
  void (*row)(const Stretch<T>&, double p, float scale, const float* line, const Gradients<const float>& more,
              const Gradients<G>&);
  void (*smoothness)(const Band<T>&, const Memory&);
  SmoothnessRows<T> rows;
  void (*fence)();  // after the last streamed row of a band
  SsimKernels<T> ssim;
  Sweep<T, G> sweep;  // of nothing: the terms one after the other
};

}  // namespace
}  // namespace fastloss
