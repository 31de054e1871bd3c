// Means and mean squares of two planes, and their gradient; included by each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int64_t kPiece = 2048;  // elements: both planes' stay in the L1 cache between the two passes

struct Piece {
  double sum_f, sum_t, sum_d;  // about what is subtracted
  double square_f, square_t, square_d;
};

// Sums over n <= kPiece elements of f, t and d = f - t about the numbers given, and with `squares` of their squares.
template <bool squares, typename T>
FASTLOSS_INLINE Piece add_up(const T* f, const T* t, int64_t n, float about_f, float about_t, float about_d) {
  vf sf[2] = {}, st[2] = {}, sd[2] = {}, ff[2] = {}, tt[2] = {}, dd[2] = {};
  const auto add = [&](int k, vf x, vf y, vf d) __attribute__((always_inline)) {
    sf[k] += x;
    st[k] += y;
    sd[k] += d;
    if constexpr (squares) {
      ff[k] += x * x;
      tt[k] += y * y;
      dd[k] += d * d;
    }
  };
  const auto full = [&](int k, int64_t i) __attribute__((always_inline)) {
    const vf x = load(f + i), y = load(t + i);
    add(k, x - about_f, y - about_t, (x - y) - about_d);
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    full(0, i);
    full(1, i + W);
  }
  for (; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    const vf x = load_some(f + i, count), y = load_some(t + i, count);
    vi lane{};
    for (int k = 0; k < W; ++k) lane[k] = k;
    const vi inside = lane < (int32_t)count;
    const auto keep = [&](vf v) __attribute__((always_inline)) { return (vf)((vi)v & inside); };
    add(0, keep(x - about_f), keep(y - about_t), keep((x - y) - about_d));
  }
  const auto total = [](const vf* v) __attribute__((always_inline)) {
    return sum(__builtin_convertvector(v[0], vd) + __builtin_convertvector(v[1], vd));
  };
  return {total(sf), total(st), total(sd), total(ff), total(tt), total(dd)};
}

// Mean and sum of squares about it, so far; `at` elements of them.
struct Running {
  double mean, square;
};
// Merges the `count` elements whose sums about a number are given (Chan, Golub and LeVeque).
FASTLOSS_INLINE void merge(Running& r, int64_t at, int64_t count, float about, double sum_about, double square_about) {
  const double off = sum_about / (double)count;  // what rounding left of the mean
  const double step = about + off - r.mean, share = (double)count / (double)(at + count);
  r.square += square_about - (double)count * off * off + step * step * (double)at * share;
  r.mean += step * share;
}

// A piece is summed for its means, then about them.
template <typename T>
static Moments plane_moments(const T* f, const T* t, int64_t n) {
  Running of_f{}, of_t{}, of_d{};
  for (int64_t at = 0; at < n; at += kPiece) {
    const int64_t count = n - at < kPiece ? n - at : kPiece;
    const Piece sums = add_up<false>(f + at, t + at, count, 0.0f, 0.0f, 0.0f);
    const float about_f = (float)(sums.sum_f / count), about_t = (float)(sums.sum_t / count);
    const float about_d = (float)(sums.sum_d / count);
    const Piece p = add_up<true>(f + at, t + at, count, about_f, about_t, about_d);
    merge(of_f, at, count, about_f, p.sum_f, p.square_f);
    merge(of_t, at, count, about_t, p.sum_t, p.square_t);
    merge(of_d, at, count, about_d, p.sum_d, p.square_d);
  }
  return {of_f.mean, of_t.mean, of_d.mean, of_f.square, of_t.square, of_d.square};
}

template <typename T>
static void plane_grad(const T* f, const T* t, int64_t n, const Slopes& s, const PlaneSides<T>& to) {
  const auto slopes = [&](vf x, vf y, vf& of_f, vf& of_t) __attribute__((always_inline)) {
    const vf d = s.constant_d + s.slope_d * ((x - y) - s.mean_d - s.rest_d);
    of_f = s.constant_f + s.slope_f * (x - s.mean_f - s.rest_f) + d;
    of_t = s.slope_t * (y - s.mean_t - s.rest_t) - d;
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vf a, b;
    slopes(load(f + i), load(t + i), a, b);
    if (to.streamed) {
      if (to.feature) stream(to.feature + i, a);
      if (to.target) stream(to.target + i, b);
    } else {
      if (to.feature) store(to.feature + i, a);
      if (to.target) store(to.target + i, b);
    }
  }
  if (to.streamed) fence();
  if (i == n) return;
  vf a, b;
  slopes(load_some(f + i, n - i), load_some(t + i, n - i), a, b);
  if (to.feature) store_some(to.feature + i, a, n - i);
  if (to.target) store_some(to.target + i, b, n - i);
}

template <typename T>
static DistsKernels<T> dists_kernels() {
  return {plane_moments<T>, plane_grad<T>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
