// The smoothness kernels and what they are handed, shared by the smoothness loss and the image loss.
#pragma once

#include "core/parallel.h"
#include "core/tensors.h"

namespace fastloss {

enum class Step { l1, l2, isotropic };
constexpr int kAxes = 3;  // z, y, x; z is unused in an image

// A dense image as the kernels walk it: rows of `row` elements, neighbours along a row `step` apart. Contiguous: a
// plane per channel, step 1. channels_last: one plane per image that holds all channels, step C.
struct Layout {
  int64_t planes, step, depth, height, row;
  int64_t size() const { return depth * height * row; }  // of a plane
};

// Rows begin .. end of slice z of a plane, and what is needed besides.
template <typename T>
struct Band {
  const T* plane;
  int64_t first, last;  // what may be read of the tensor, in elements from `plane` on
  Layout layout;
  int64_t z, begin, end;
  bool second;            // second differences
  const Operand* weight;  // or null
  int64_t position;       // of the plane in `weight`
  const float* edges;     // or null; see edge_row()
};

// Rows of factors of a band and its neighbours: kAxes rows each for slices z - 1 .. z + 1 (an image: z only) and rows
// begin - 1 .. end.
struct Edges {
  static int64_t pitch(const Layout& layout) { return layout.row + 16; }
  static int64_t size(const Layout& layout, int64_t rows) {
    return (layout.depth > 1 ? 3 : 1) * (rows + 2) * kAxes * pitch(layout);
  }
  static int64_t offset(const Layout& layout, int64_t rows, int64_t slice, int64_t row) {
    return (((layout.depth > 1 ? slice + 1 : 0) * (rows + 2)) + row + 1) * kAxes * pitch(layout);
  }
};

// Sums and upstream gradients by position in a row modulo `period`, a multiple of the step and of all vectors.
inline int64_t period_of(int64_t step) {
  int64_t period = step;
  while (period % 16 != 0) period *= 2;
  return period < 64 ? period * (64 / period) : period;
}

// What a thread works in. `grad_differences` holds 5 sets of rows and one of zeros, see band_grad_differences(); their
// padding stays 0.
struct Memory {
  int64_t period, pad, pitch;
  float *weight, *line, *sums, *up, *grad_differences;
  double* totals;
};

struct Scratch {
  Memory memory;
  std::vector<float> floats;
  std::vector<double> doubles;

  Scratch(const Layout& layout, bool backward) {
    const int64_t period = period_of(layout.step), pad = (layout.step + 15) / 16 * 16 + 16;
    const int64_t pitch = (layout.row + 15) / 16 * 16 + 2 * pad;
    floats.resize(layout.row + pitch + 2 * kAxes * period + (backward ? (5 * kAxes + 1) * pitch : 0));
    doubles.resize(kAxes * period);
    float *const line = floats.data() + layout.row, *const sums = line + pitch, *const up = sums + kAxes * period;
    memory = {period, pad, pitch, floats.data(), line, sums, up, up + kAxes * period, doubles.data()};
  }
};

using EachRow = void (*)(const void* context, int64_t y, const float* line);
template <typename T>
struct SmoothnessKernels {
  void (*sum)(const Band<T>&, const Memory&);
  void (*grad)(const Band<T>&, const Memory&, T* plane, bool streamed);
  // The gradient row by row, in float: row(context, y, line).
  void (*rows)(const Band<T>&, const Memory&, EachRow row, const void* context);
};
// A row of a guide: `groups` planes with `each` channels side by side, of `width` pixels.
struct GuideRow {
  const void* pixels;
  int64_t first, last;  // what may be read of the guide, from `pixels` on
  int64_t groups, plane, group_channels, width;
  int64_t away[kAxes];
  bool has[kAxes];
  bool second;
};
using EdgeKernel = void (*)(const GuideRow&, int64_t step, int64_t pitch, float* sums, float* to);

// Of the CPU at hand; smoothness.cpp has them for each type that for_dtype() knows.
template <typename T>
SmoothnessKernels<T> smoothness_kernels(Step step, bool plain);
template <typename T>
EdgeKernel edge_kernel();

inline Step step_of(const std::string& name) {
  if (name == "l1") return Step::l1;
  if (name == "l2") return Step::l2;
  STD_TORCH_CHECK(name == "isotropic", "smoothness: unknown kind ", name);
  return Step::isotropic;
}

}  // namespace fastloss
