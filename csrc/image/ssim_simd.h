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
  FASTLOSS_INLINE float taps_in_all(const SsimAxis& axis) {
    float taps = axis.taps[0];
    for (int i = 1; i <= axis.radius; ++i) taps += 2 * axis.taps[i];
    return taps;
  }
  // A row outside the image, as the filters along x and the depth would leave it.
  FASTLOSS_INLINE void outside(const SsimRing& ring, int64_t k, const SsimOptions& o, const SsimShift& shift) {
    if (shift.rest_a == 0 && shift.rest_d == 0) return clear(ring, k);
    const float taps = taps_in_all(o.x) * taps_in_all(o.z);
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
  float* depth_lines;  // kSsimDepthLines
  SsimSlice slice;     // of a volume
};

// `scale`: of the gradients; x, y: which are asked for.
template <typename T>
static void ssim_start(void* walk, const SsimPlanes<T>& p, const SsimTile& t, const SsimOptions& o,
                       const SsimWeights& weights, float scale, bool x, bool y, float* scratch,
                       const SsimSlice& slice) {
  const int64_t n = t.x1 - t.x0, step = ssim_step(n);
  const int64_t y_reach = x || y ? o.y.radius : 0, x_reach = x || y ? o.x.radius : 0;
  const int64_t count = 2 * o.y.radius + 2 * kRows, all_rows = kRows * step;
  const auto from = [](int64_t i, const SsimAxis& axis) { return i > axis.margin ? i : axis.margin; };
  const auto to = [](int64_t i, int64_t size, const SsimAxis& axis) {
    return i < size - axis.margin ? i : size - axis.margin;
  };
  SsimWalk<T>& k = *static_cast<SsimWalk<T>*>(walk);
  const SsimShift shift = ssim_shift(p, p.depth > 0 ? SsimTile{0, p.height, 0, p.width} : t, o);  // a volume has one
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
       t.y0 - y_reach,
       from(t.y0 - y_reach, o.y),
       to(t.y1 + y_reach, p.height, o.y),
       from(t.x0 - x_reach, o.x),
       to(t.x1 + x_reach, p.width, o.x),
       scratch + kSsimPad,
       nullptr,
       nullptr,
       nullptr,
       nullptr,
       {},
       {},
       nullptr,
       slice};
  const int64_t origin = t.x0 - kSsimPad;
  k.next = k.top - o.y.radius;
  k.d = k.a + all_rows;
  k.w = k.d + all_rows;
  k.x_line = k.w + all_rows;
  k.y_line = k.x_line + all_rows;
  float* const partials = k.y_line + all_rows;
  k.moments = {partials + 4 * all_rows, count, 4 * step};
  k.filtered = {k.moments.data + count * 4 * step, count, 4 * step};
  k.depth_lines = k.filtered.data + count * 4 * step;
  k.map = {shift,
           (k.left - origin) / W * W,
           k.right - origin,
           from(t.x0, o.x) - origin,
           to(t.x1, p.width, o.x) - origin,
           0,
           0,
           nullptr,
           scale,
           x,
           y,
           partials,
           step,
           slice.map == nullptr ? nullptr : k.x_line};
}

// Columns begin .. begin + n of row y of a volume's slice, filtered along the depth: G a, G d, G a^2, G d^2, `step`
// apart. `lines`: of the slices that the window sees.
template <typename T>
static void ssim_along_depth(const SsimPlanes<T>& p, const SsimShift& shift, const SsimAxis& axis, int64_t y,
                             int64_t begin, int64_t n, float* lines, int64_t step, float* to) {
  const int r = axis.radius;
  for (int k = -r; k <= r; ++k) {
    float *const a = lines + 2 * (k + r) * step, *const d = a + step;
    if (p.z + k < 0 || p.z + k >= p.depth) {
      for (int64_t j = 0; j < n; j += W) store(a + j, all(0 - shift.rest_a)), store(d + j, all(0 - shift.rest_d));
    } else {
      SsimPlanes<T> slice = p;
      slice.x += k * p.x_slice;
      slice.y += k * p.y_slice;
      ssim_read(slice, shift, y, begin, n, a, d);
    }
  }
  const SsimTaps taps = ssim_taps(axis);
  for (int64_t j = 0; j < n; j += W) {
    const float* const middle = lines + 2 * r * step + j;
    for (int m = 0; m < 2; ++m) {
      const float* const line = middle + m * step;
      const vf c = load(line);
      vf mean = taps.of[0] * c, square = taps.of[0] * (c * c);
      for (int k = 1; k <= r; ++k) {
        const vf before = load(line - 2 * k * step), after = load(line + 2 * k * step);
        mean += taps.of[k] * (before + after);
        square += taps.of[k] * (before * before + after * after);
      }
      store(to + m * step + j, mean);
      store(to + (2 + m) * step + j, square);
    }
  }
}

// Rows y .. y + kRows of the map: their sum, and their partials filtered along x.
template <typename T>
static double ssim_make(SsimWalk<T>& k, int64_t y, int maps) {
  const int64_t origin = k.tile.x0 - kSsimPad, width = k.n + 2 * kSsimPad;
  const float* rows[2 * kSsimRadius + kRows];
  for (; k.next < y + kRows + k.o.y.radius; ++k.next) {
    if (k.next < 0 || k.next >= k.p.height) {
      SsimRing::outside(k.moments, k.next, k.o, k.shift);
    } else if (k.p.depth > 0) {
      ssim_along_depth(k.p, k.shift, k.o.z, k.next, origin, width, k.depth_lines, k.step, k.a);
      k.steps.moments_of_depth(k.o, k.a, k.step, k.map.begin, k.map.end, SsimRing::row(k.moments, k.next));
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
  SsimRing::windows(k.moments, y, k.o.y.radius, rows);
  const double total = k.steps.map(k.o, k.map, rows);
  for (int64_t b = k.map.top; k.slice.map != nullptr && b < k.map.bottom; ++b)
    __builtin_memcpy(k.slice.map + (y + b - k.o.y.margin) * k.slice.map_row + (k.map.left + origin - k.o.x.margin),
                     k.x_line + b * k.step + k.map.left, (k.map.right - k.map.left) * sizeof(float));
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
    k.steps.filter(k.o, from, k.step, kSsimPad, kSsimPad + k.n, SsimRing::row(k.filtered, y + b));
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

// Writes the gradients of rows emit_row .. emit_row + count from the filtered partials around them; of a volume those
// filtered partials, which are yet to be filtered along the depth.
template <typename T>
static void ssim_emit(SsimWalk<T>& k, int64_t count, const SsimGradients& to) {
  const float* rows[2 * kSsimRadius + kRows];
  const int64_t x0 = k.tile.x0;
  SsimRing::windows(k.filtered, k.emit_row, k.o.y.radius, rows);
  if (k.slice.partials != nullptr) {
    k.steps.spread(k.o, rows, k.n, (int)count, k.slice.partials + k.emit_row * k.slice.row + x0, k.slice.row,
                   k.slice.partial);
    return;
  }
  for (int64_t b = 0; b < count; ++b) {
    float *const a = k.a + b * k.step + kSsimPad, *const d = k.d + b * k.step + kSsimPad;
    ssim_read(k.p, k.shift, k.emit_row + b, x0, k.n, a, d);
    if (k.weights.read != nullptr) ssim_finite(a, d, k.n);
  }
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
  const int64_t reach = maps == 2 ? 0 : k.o.y.radius;
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

// The gradients of row y of a volume's slice, from the partials of the slices that its windows see.
template <typename T>
static void ssim_depth(const SsimPlanes<T>& p, const SsimOptions& o, const SsimDepthRows& rows, int64_t y,
                       bool weighted, float* x_grad, float* y_grad, float* scratch) {
  const SsimShift shift = ssim_shift(p, SsimTile{0, p.height, 0, p.width}, o);
  const SsimTaps taps = ssim_taps(o.z);
  const int r = o.z.radius, maps = 2 + (x_grad != nullptr) + (y_grad != nullptr);
  float *const a = scratch, *const d = scratch + ssim_step(kSsimColumns);
  for (int64_t x0 = 0; x0 < p.width; x0 += kSsimColumns) {
    const int64_t n = p.width - x0 < kSsimColumns ? p.width - x0 : kSsimColumns;
    ssim_read(p, shift, y, x0, n, a, d);
    if (weighted) ssim_finite(a, d, n);
    for (int64_t j = 0; j < n; j += W) {
      vf filtered[4];
      for (int m = 0; m < maps; ++m) {
        filtered[m] = vf{};
        for (int k = -r; k <= r; ++k) {
          const float* const from = rows.of[m][k + r];
          if (from != nullptr) filtered[m] += taps.of[k < 0 ? -k : k] * load(from + x0 + j);
        }
      }
      const vf of_a = load(a + j) * filtered[0], of_d = load(d + j) * filtered[1];
      if (x_grad != nullptr) put(x_grad + x0 + j, filtered[2] - of_a + of_d, n - j, false);
      if (y_grad != nullptr) put(y_grad + x0 + j, filtered[maps - 1] - of_a - of_d, n - j, false);
    }
  }
}

template <typename T>
static SsimKernels<T> ssim_kernels() {
  return {sizeof(SsimWalk<T>), ssim_start<T>, ssim_advance<T>, ssim_scale<T>, ssim_depth<T>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
