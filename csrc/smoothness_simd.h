// The smoothness loss over rows of a plane; included by each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

// b - a as it counts in the gradient: its sign, or twice itself.
template <Step step>
FASTLOSS_INLINE vf slope(vf a, vf b) {
  if constexpr (step == Step::l1) return (vf)(((vi)all(1.0f) & (b > a)) | ((vi)all(-1.0f) & (b < a)));
  return 2.0f * (b - a);
}

// Adds the distances of n pixels at r + x to the vectors. `edge`: the last of them is the last of its row.
template <Step step, bool has_down, bool edge, typename T>
FASTLOSS_INLINE void add(const T* r, int64_t width, int64_t n, vf& down, vf& right) {
  const vf c = edge ? load_up_to(r, n) : load(r);
  vf dx = (edge ? load_some(r + 1, n - 1) : load(r + 1)) - c;
  if constexpr (edge) dx = where(lanes() < (int)(n - 1), dx);
  vf dy{};
  if constexpr (has_down) dy = (edge ? load_up_to(r + width, n) : load(r + width)) - c;
  if constexpr (step == Step::l1) {
    down += abs(dy);
    right += abs(dx);
  } else if constexpr (step == Step::l2) {
    down += dy * dy;
    right += dx * dx;
  } else {
    down += sqrt(dy * dy + dx * dx);
  }
}

// The accumulators run over 16 vectors each before they move to double: the error does not grow with the image.
template <Step step, bool has_down, typename T>
FASTLOSS_INLINE void add_row(const T* r, int64_t width, vd& down, vd& right) {
  int64_t x = 0;
  while (x + 2 * W < width) {
    vf d0{}, d1{}, r0{}, r1{};
    for (int i = 0; i < 16 && x + 2 * W < width; ++i, x += 2 * W) {
      add<step, has_down, false>(r + x, width, W, d0, r0);
      add<step, has_down, false>(r + x + W, width, W, d1, r1);
    }
    down += __builtin_convertvector(d0 + d1, vd);
    right += __builtin_convertvector(r0 + r1, vd);
  }
  vf d{}, s{};
  if (x + W < width) {
    add<step, has_down, false>(r + x, width, W, d, s);
    x += W;
  }
  add<step, has_down, true>(r + x, width, width - x, d, s);
  down += __builtin_convertvector(d, vd);
  right += __builtin_convertvector(s, vd);
}

template <Step step, typename T>
static Sums smoothness_sum(const Rows<T>& rows) {
  vd down{}, right{};
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    const T* r = rows.plane + y * rows.width;
    if (y + 1 < rows.height)
      add_row<step, true>(r, rows.width, down, right);
    else
      add_row<step, false>(r, rows.width, down, right);
  }
  return {sum(down), sum(right)};
}

// The gradient of n pixels from r[x] on. `edge`: the row begins or ends with them.
template <Step step, bool has_up, bool has_down, bool edge, typename T>
FASTLOSS_INLINE void pull(const T* r, int64_t x, int64_t width, int64_t n, T* to, vf gd, vf gr, bool streamed) {
  const T* at = r + x;
  const vf c = edge ? load_up_to(at, n) : load(at);
  vf vertical{};
  if constexpr (has_up) vertical += slope<step>(edge ? load_up_to(at - width, n) : load(at - width), c);
  if constexpr (has_down) vertical -= slope<step>(c, edge ? load_up_to(at + width, n) : load(at + width));
  vf left, right;
  if constexpr (edge) {
    const int64_t after = x + n < width ? n : n - 1;  // how many of them have a right neighbour
    right = where(lanes() < (int)after, slope<step>(c, load_up_to(at + 1, after)));
    if (x > 0) {
      left = slope<step>(load_up_to(at - 1, n), c);
    } else {
      T moved[W] = {};
      __builtin_memcpy((void*)(moved + 1), (const void*)r, (n - 1) * sizeof(T));
      left = where(lanes() > 0, slope<step>(load((const T*)moved), c));
    }
  } else {
    left = slope<step>(load(at - 1), c);
    right = slope<step>(c, load(at + 1));
  }
  const vf g = gd * vertical + gr * (left - right);
  put(to + x, g, edge ? n : W, streamed);
}

template <Step step, bool has_up, bool has_down, typename T>
static void pull_row(const T* r, int64_t width, T* to, const PlaneGradient<T>& up) {
  const vf gd = all(up.down), gr = all(up.right);
  pull<step, has_up, has_down, true>(r, 0, width, width < W ? width : W, to, gd, gr, up.streamed);
  int64_t x = W;
  if (up.streamed)
    for (; x + W < width; x += W) pull<step, has_up, has_down, false>(r, x, width, W, to, gd, gr, true);
  else
    for (; x + W < width; x += W) pull<step, has_up, has_down, false>(r, x, width, W, to, gd, gr, false);
  if (x < width) pull<step, has_up, has_down, true>(r, x, width, width - x, to, gd, gr, up.streamed);
}

// d / |d| of a row's pixels, along y and x: 0 where the pixel is flat. Written W at a time, over the end of the row.
template <bool has_down, typename T>
static void unit_row(const T* r, int64_t width, float* down, float* right) {
  const auto unit = [&](int64_t x, vf dy, vf dx) __attribute__((always_inline)) {
    const vf length = sqrt(dy * dy + dx * dx);
    const vf inverse = where(length != 0.0f, 1.0f / length);
    store(down + x, dy * inverse);
    store(right + x, dx * inverse);
  };
  int64_t x = 0;
  for (; x + W < width; x += W) {
    const vf c = load(r + x);
    unit(x, has_down ? load(r + x + width) - c : vf{}, load(r + x + 1) - c);
  }
  const int64_t n = width - x;
  const vf c = load_up_to(r + x, n);
  const vf dx = where(lanes() < (int)(n - 1), load_some(r + x + 1, n - 1) - c);
  unit(x, has_down ? load_up_to(r + x + width, n) - c : vf{}, dx);
}

template <typename T>
static void isotropic_grad(const Rows<T>& rows, const PlaneGradient<T>& up) {
  const int64_t width = rows.width, step = scratch_row(width);
  float *above = up.scratch + kPad, *down = above + step, *right = down + step;  // zeroed by the caller
  const T* r = rows.plane + rows.begin * width;
  if (rows.begin > 0) unit_row<true>(r - width, width, above, right);
  const vf g = all(up.down);
  for (int64_t y = rows.begin; y < rows.end; ++y, r += width) {
    if (y + 1 < rows.height)
      unit_row<true>(r, width, down, right);
    else
      unit_row<false>(r, width, down, right);
    right[-1] = 0;
    T* to = up.plane + y * width;
    for (int64_t x = 0; x < width; x += W) {
      const vf unit = (load(above + x) - load(down + x)) + (load(right + x - 1) - load(right + x));
      put(to + x, g * unit, width - x < W ? width - x : W, up.streamed);
    }
    float* const spare = above;
    above = down;
    down = spare;
  }
  if (up.streamed) fence();
}

template <Step step, typename T>
static void smoothness_grad(const Rows<T>& rows, const PlaneGradient<T>& up) {
  if constexpr (step == Step::isotropic) {
    isotropic_grad(rows, up);
  } else {
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const T* r = rows.plane + y * rows.width;
      T* to = up.plane + y * rows.width;
      const bool above = y > 0, below = y + 1 < rows.height;
      if (above && below)
        pull_row<step, true, true>(r, rows.width, to, up);
      else if (above)
        pull_row<step, true, false>(r, rows.width, to, up);
      else if (below)
        pull_row<step, false, true>(r, rows.width, to, up);
      else
        pull_row<step, false, false>(r, rows.width, to, up);
    }
    if (up.streamed) fence();
  }
}

template <typename T>
static SmoothnessKernels<T> smoothness_kernels(Step step) {
  switch (step) {
    case Step::l1: return {smoothness_sum<Step::l1, T>, smoothness_grad<Step::l1, T>};
    case Step::l2: return {smoothness_sum<Step::l2, T>, smoothness_grad<Step::l2, T>};
    case Step::isotropic: return {smoothness_sum<Step::isotropic, T>, smoothness_grad<Step::isotropic, T>};
  }
  return {};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
