// What the SSIM kernels (ssim_simd.h) are given: an image pair, a tile of one plane, the window, weights, scratch.
#pragma once

#include "common.h"

#include <cmath>

namespace fastloss {

constexpr int kSsimRadius = 5;  // windows up to 11 pixels

// One plane of both images, by strides: any memory format is read as it lies.
template <typename T>
struct SsimPlanes {
  const T *x, *y;
  int64_t x_row, x_column, y_row, y_column;
  int64_t height, width;
};

// Rows y0 .. y1 and columns x0 .. x1 of a plane.
struct SsimTile {
  int64_t y0, y1, x0, x1;
};

struct SsimOptions {
  int radius;
  float taps[kSsimRadius + 1];  // weight of the pixels k away
  int64_t margin;               // the SSIM map covers margin .. size - margin: 0 for "same", radius for "valid"
  float c1, c2;
  bool structure;  // the contrast-structure term alone, without luminance
};

inline SsimOptions ssim_options(int64_t window, double sigma, bool same, double c1, double c2, bool structure) {
  const int radius = static_cast<int>(window / 2);
  SsimOptions o{radius, {}, same ? 0 : radius, static_cast<float>(c1), static_cast<float>(c2), structure};
  double taps[kSsimRadius + 1], total = 0;
  for (int k = 0; k <= radius; ++k) {
    taps[k] = std::exp(k * k / (-2 * sigma * sigma));
    total += k == 0 ? taps[k] : 2 * taps[k];
  }
  for (int k = 0; k <= radius; ++k) o.taps[k] = static_cast<float>(taps[k] / total);
  return o;
}

// Weights of the SSIM map, or nothing: n of them from image row y, column x on, in place or in `buffer`.
struct SsimWeights {
  const float* (*read)(const void* from, int64_t y, int64_t x, int64_t n, float* buffer);
  const void* from;
};

// Where the gradients go, by strides; null where one is not needed.
template <typename T>
struct SsimGradients {
  T *x, *y;
  int64_t x_row, x_column, y_row, y_column;
  bool streamed;  // rows are dense, aligned, and of whole vectors: written past the caches
};

template <typename T>
struct SsimKernels {
  double (*sum)(const SsimPlanes<T>&, const SsimTile&, const SsimOptions&, const SsimWeights&, float* scratch);
  void (*grad)(const SsimPlanes<T>&, const SsimTile&, const SsimOptions&, const SsimWeights&, float upstream,
               const SsimGradients<T>&, float* scratch);
};

// The largest tile: what a backward keeps of it, some 100 rows, stays in the L2 cache.
constexpr int64_t kSsimRows = 128, kSsimColumns = 512;

// Floats in a row of scratch for `columns` columns: the windows reach two radii to either side, vectors over the end.
constexpr int64_t ssim_step(int64_t columns) { return (columns + 4 * kSsimRadius + 15) / 16 * 16 + 32; }

// Floats of scratch, aligned to 64 bytes, for tiles of so many columns: rows of both images, rings of window rows for
// four moments and four partial derivatives, the partial derivatives, weights, both gradients.
constexpr int64_t ssim_scratch(int64_t columns) {
  return (2 + (2 * kSsimRadius + 1) * 8 + 4 + 1 + 2) * ssim_step(columns);
}

}  // namespace fastloss
