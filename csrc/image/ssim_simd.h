// SSIM over a tile of a plane; included by for_each_isa.h, after ssim.h.
//
// A tile goes from row to row. Each row is filtered along x once, into a ring; the filter along y reads the ring, a few
// rows at a time, so that each row is loaded once for all of them. The partials go the same way through a second ring:
// the window is symmetric, so it is its own transpose.

#include "image/ssim_steps_simd.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// A ring of rows filtered along x.
struct SsimRing {
  float* data;
  int64_t count, size;

  FASTLOSS_INLINE float* row(const SsimRing& ring, int64_t k) {  // k may be as low as minus a ring
    return ring.data + (k + ring.count) % ring.count * ring.size;
  }
  FASTLOSS_INLINE void clear(const SsimRing& ring, int64_t k) {
    float* const to = row(ring, k);
    for (int64_t i = 0; i < ring.size; ++i) to[i] = 0;
  }
  // A row outside the image, as the filter along x would leave it.
  FASTLOSS_INLINE void outside(const SsimRing& ring, int64_t k, const SsimOptions& o, const SsimShift& shift) {
    if (shift.rest_a == 0 && shift.rest_d == 0) return clear(ring, k);
    float taps = o.taps[0];
    for (int i = 1; i <= o.radius; ++i) taps += 2 * o.taps[i];
    const float a = 0 - shift.rest_a, d = 0 - shift.rest_d;
    const float values[4] = {taps * a, taps * d, taps * a * a, taps * d * d};
    float* const to = row(ring, k);
    for (int64_t i = 0; i < ring.size; i += W) store(to + i, all(values[i / W % 4]));
  }
  FASTLOSS_INLINE void windows(const SsimRing& ring, int64_t first, int radius, const float** rows) {
    for (int i = 0; i < kRows + 2 * radius; ++i) rows[i] = row(ring, first - radius + i);
  }
};

// What a tile's walk works in and on.
template <typename T>
struct SsimWalk {
  SsimPlanes<T> p;
  SsimTile tile;
  SsimOptions o;
  SsimWeights weights;
  SsimShift shift;
  SsimSteps steps;
  SsimMap map;
  int64_t n, step;                     // columns; floats of a row of scratch
  int64_t next, emit_row, row;         // the next rows to filter along x, to emit, of the map
  int64_t top, bottom, left, right;    // the part of the map to make: what is in the tile, or what the tile sees
  float *a, *d, *w, *x_line, *y_line;  // kRows rows each
  SsimRing moments, filtered;
};

// `scale`: of the gradients; x, y: which are asked for.
template <typename T>
static void ssim_start(void* walk, const SsimPlanes<T>& p, const SsimTile& t, const SsimOptions& o,
                       const SsimWeights& weights, float scale, bool x, bool y, float* scratch) {
  const int64_t n = t.x1 - t.x0, step = ssim_step(n), reach = x || y ? o.radius : 0, bound = o.margin;
  const int64_t count = 2 * o.radius + 2 * kRows, all_rows = kRows * step;
  const auto from = [&](int64_t i) { return i > bound ? i : bound; };
  const auto to = [&](int64_t i, int64_t size) { return i < size - bound ? i : size - bound; };
  SsimWalk<T>& k = *static_cast<SsimWalk<T>*>(walk);
  const SsimShift shift = ssim_shift(p, t, o);
  k = {p,
       t,
       o,
       weights,
       shift,
       ssim_steps(o, shift, 2 + x + y),
       {},
       n,
       step,
       0,
       t.y0,
       t.y0 - reach,
       from(t.y0 - reach),
       to(t.y1 + reach, p.height),
       from(t.x0 - reach),
       to(t.x1 + reach, p.width),
       scratch + kSsimPad,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       {},
       {}};
  const int64_t origin = t.x0 - kSsimPad;
  k.next = k.top - o.radius;
  k.d = k.a + all_rows;
  k.w = k.d + all_rows;
  k.x_line = k.w + all_rows;
  k.y_line = k.x_line + all_rows;
  float* const partials = k.y_line + all_rows;
  k.moments = {partials + 4 * all_rows, count, 4 * step};
  k.filtered = {k.moments.data + count * 4 * step, count, 4 * step};
  k.map = {shift,
           (k.left - origin) / W * W,
           k.right - origin,
           from(t.x0) - origin,
           to(t.x1, p.width) - origin,
           0,
           0,
           nullptr,
           scale,
           x,
           y,
           partials,
           step};
}

// Rows y .. y + kRows of the map: their sum, and their partials filtered along x.
template <typename T>
static double ssim_make(SsimWalk<T>& k, int64_t y, int maps) {
  const int64_t origin = k.tile.x0 - kSsimPad, width = k.n + 2 * kSsimPad;
  const float* rows[2 * kSsimRadius + kRows];
  for (; k.next < y + kRows + k.o.radius; ++k.next) {
    if (k.next < 0 || k.next >= k.p.height) {
      SsimRing::outside(k.moments, k.next, k.o, k.shift);
    } else {
      ssim_read(k.p, k.shift, k.next, origin, width, k.a, k.d);
      const int64_t later = k.next + kSsimAhead < k.p.height ? kSsimAhead : 0;
      const T* const x = k.p.x + (k.next + later) * k.p.x_row + (k.tile.x0 - kSsimPad) * k.p.x_column;
      const T* const z = k.p.y + (k.next + later) * k.p.y_row + (k.tile.x0 - kSsimPad) * k.p.y_column;
      const SsimAhead ahead{(const char*)x, (const char*)z, k.p.x_column * (int64_t)sizeof(T),
                            k.p.y_column * (int64_t)sizeof(T)};
      k.steps.moments(k.o, k.a, k.d, k.map.begin, k.map.end, ahead, SsimRing::row(k.moments, k.next));
    }
  }
  const int64_t last = k.bottom - y < kRows ? k.bottom - y : kRows;
  if (k.weights.read != nullptr) {
    for (int64_t b = 0; b < last; ++b) {
      float* const to = k.w + b * k.step + (k.left - origin);
      const float* found = k.weights.read(k.weights.from, y + b, k.left, k.right - k.left, to);
      if (found != to) __builtin_memcpy(to, found, (k.right - k.left) * sizeof(float));
    }
    k.map.weights = k.w;
  }
  const auto row = [&](int64_t i) { return (int)(i < y ? 0 : i - y < last ? i - y : last); };
  k.map.top = row(k.tile.y0);
  k.map.bottom = row(k.tile.y1);
  SsimRing::windows(k.moments, y, k.o.radius, rows);
  const double total = k.steps.map(k.o, k.map, rows);
  for (int64_t b = 0; b < kRows && maps > 2; ++b) {
    if (b >= last) {
      SsimRing::clear(k.filtered, y + b);
      continue;
    }
    float* const from = k.map.partials + b * maps * k.step;
    for (int m = 0; m < maps; ++m) {  // nothing comes from beyond the map
      float* const line = from + m * k.step;
      for (int64_t i = 0; i < k.left - origin; ++i) line[i] = 0;
      for (int64_t i = k.right - origin; i < width; ++i) line[i] = 0;
    }
    k.steps.filter(k.o, from, k.step, k.n, SsimRing::row(k.filtered, y + b));
  }
  return total;
}

// n floats to where they go, `column` elements apart.
FASTLOSS_INLINE void ssim_write(const float* from, int64_t n, float* to, int64_t column, bool streamed) {
  if (column == 1) {
    for (int64_t i = 0; i < n; i += W) put(to + i, load(from + i), n - i, streamed);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * column] = from[i];
  }
}

// to = factor * from, or factors[i] * from[i].
template <typename T>
static void ssim_scale(const float* from, const float* factors, float factor, int64_t n, T* to, bool streamed) {
  for (int64_t i = 0; i < n; i += W) {
    const vf by = factors == nullptr ? all(factor) : load_up_to(factors + i, n - i);
    put(to + i, by * load_up_to(from + i, n - i), n - i, streamed);
  }
  if (streamed) fence();
}

// 0 for what is not finite: its gradient is NaN by the partials of the windows that see it, if their weights are not 0.
static void ssim_finite(float* a, float* d, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const vf u = load(a + i), v = load(d + i);
    store(a + i, where(u - u == 0.0f, u));
    store(d + i, where(v - v == 0.0f, v));
  }
}

// Writes the gradients of rows emit_row .. emit_row + count from the filtered partials around them.
template <typename T>
static void ssim_emit(SsimWalk<T>& k, int64_t count, const SsimGradients& to) {
  const float* rows[2 * kSsimRadius + kRows];
  const int64_t x0 = k.tile.x0;
  for (int64_t b = 0; b < count; ++b) {
    float *const a = k.a + b * k.step + kSsimPad, *const d = k.d + b * k.step + kSsimPad;
    ssim_read(k.p, k.shift, k.emit_row + b, x0, k.n, a, d);
    if (k.weights.read != nullptr) ssim_finite(a, d, k.n);
  }
  SsimRing::windows(k.filtered, k.emit_row, k.o.radius, rows);
  const int64_t row_stride = to.x ? to.x_row : to.y_row;
  const bool vectors = k.n % W == 0 && count == kRows && !to.streamed && (!to.x || !to.y || to.x_row == to.y_row);
  if (vectors && (!to.x || to.x_column == 1) && (!to.y || to.y_column == 1)) {  // straight to where they go
    const int64_t offset = k.emit_row * row_stride + x0 - kSsimPad;
    k.steps.gradient(k.o, rows, k.n, k.a, k.d, k.step, to.x ? to.x + offset : nullptr, to.y ? to.y + offset : nullptr,
                     row_stride);
    return;
  }
  k.steps.gradient(k.o, rows, k.n, k.a, k.d, k.step, to.x ? k.x_line : nullptr, to.y ? k.y_line : nullptr, k.step);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t from = b * k.step + kSsimPad, y = k.emit_row + b;
    if (to.x) ssim_write(k.x_line + from, k.n, to.x + y * to.x_row + x0 * to.x_column, to.x_column, to.streamed);
    if (to.y) ssim_write(k.y_line + from, k.n, to.y + y * to.y_row + x0 * to.y_column, to.y_column, to.streamed);
  }
  if (to.streamed) fence();
}

// Goes on from row `emit_row` of the tile to row `end`, a multiple of 4 rows on or the tile's last: the (weighted) sum
// of the rows of the map made on the way and, if asked for at the start, the gradients of the rows passed.
template <typename T>
static double ssim_advance(void* walk, int64_t end, const SsimGradients& to) {
  SsimWalk<T>& k = *static_cast<SsimWalk<T>*>(walk);
  const int maps = 2 + k.map.needs_x + k.map.needs_y;
  const int64_t reach = maps == 2 ? 0 : k.o.radius;
  double total = 0;
  while (k.emit_row < end) {
    for (; k.row < k.top; ++k.row)  // blocks of rows begin where the map does
      if (maps > 2) SsimRing::clear(k.filtered, k.row);
    if (k.row < k.bottom && k.left < k.right) {
      total += ssim_make(k, k.row, maps);
    } else if (maps > 2) {
      for (int64_t b = 0; b < kRows; ++b) SsimRing::clear(k.filtered, k.row + b);
    }
    for (; k.emit_row < end && k.emit_row + reach <= k.row; k.emit_row += kRows)
      if (maps > 2) ssim_emit(k, k.tile.y1 - k.emit_row < kRows ? k.tile.y1 - k.emit_row : kRows, to);
    k.row += kRows;
  }
  return total;
}

template <typename T>
static SsimKernels<T> ssim_kernels() {
  return {sizeof(SsimWalk<T>), ssim_start<T>, ssim_advance<T>, ssim_scale<T>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
