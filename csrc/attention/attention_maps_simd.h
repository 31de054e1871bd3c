// Rows of attention maps; included by for_each_isa.h. The formulas: docs/design/attention.md.

#include "attention/divergence_simd.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// What a score that stands for a masked key becomes: -0, which no other is.
FASTLOSS_INLINE vf masked_score() { return (vf)(vi{} + (int32_t)0x80000000); }

// Lanes past the n elements are filled with what counts for nothing.
template <typename T>
static void prepare_row(const T* from, const float* mask, const Preparation& how, int64_t n, float* to) {
  const vf none = all(how.logits ? -__builtin_inff() : 0.0f);
  for (int64_t i = 0; i < n; i += W) {
    vf x = load_up_to(from + i, n - i);
    const vf m = mask ? load_up_to(mask + i, n - i) : all(1.0f);
    if (mask && how.added) x += m;
    if (how.logits && how.temperature != 1.0f) x = x / how.temperature;
    if (how.scores) x = x <= kLeastScore ? masked_score() : x + 0.0f;
    if (mask && !how.added) x = m != 0.0f ? x : none;
    if (n - i < W) x = lanes() < (int)(n - i) ? x : none;
    store(to + i, x);
  }
}

template <typename T>
static void write_row(const float* from, const Left& left, int64_t n, T* to, bool streamed) {
  for (int64_t i = 0; i < n; i += W) {
    vf x = load(from + i);
    if (left.mask) x = where(load_up_to(left.mask + i, n - i) != 0.0f, x);
    if (left.scores) x = where(~((vi)load(left.scores + i) == (vi)masked_score()), x);
    put(to + i, x, n - i, streamed && n - i >= W);
  }
}

struct Sums {
  double first, second;
};
// The sums of two vectors that body(i, first, second) adds to, i = 0, W .. n.
template <typename Body>
FASTLOSS_INLINE Sums sum_row(int64_t n, const Body& body) {
  Sums total{};
  for (int64_t begin = 0; begin < n; begin += 512) {  // in float32 no longer than that
    vf first{}, second{};
    const int64_t end = n - begin < 512 ? n : begin + 512;
    for (int64_t i = begin; i < end; i += W) body(i, first, second);
    total.first += sum(first);
    total.second += sum(second);
  }
  return total;
}

// The largest of a row, NaN if there is nothing but NaN and -inf; -inf if there is nothing else than that.
FASTLOSS_INLINE float peak_of(const float* x, int64_t n) {
  vf largest = all(-__builtin_inff());
  vi nan{};
  for (int64_t i = 0; i < n; i += W) {
    const vf v = load(x + i);
    largest = v > largest ? v : largest;
    nan |= v != v;
  }
  float peak = largest[0];
  bool any = false;
  for (int k = 0; k < W; ++k) {
    peak = largest[k] > peak ? largest[k] : peak;
    any = any || nan[k] != 0;
  }
  return any ? __builtin_nanf("") : peak;
}

// Exponentials of a row: to = e^(x - peak). Returns the logarithm of their sum, or of the root of that of squares.
template <bool squares>
FASTLOSS_INLINE float exponentials(const float* x, float peak, int64_t n, float* to) {
  const Sums sums = sum_row(n, [&](int64_t i, vf& first, vf&) __attribute__((always_inline)) {
    const vf e = exp(load(x + i) - peak);
    store(to + i, e);
    first += squares ? e * e : e;
  });
  return (float)((squares ? 0.5 : 1.0) * __builtin_log(sums.first));
}

// A product that the compiler does not fuse with a subtraction that follows: equal ones differ by exactly 0.
FASTLOSS_INLINE vf rounded_product(vf x, float by) { return where(x != 0.0f, x * by); }

struct Element {
  vf value, inner;  // `inner`: p times the slope of p, of logits
};

template <MapMetric metric>
FASTLOSS_INLINE Element element_of_probabilities(vf p, vf q) {
  if constexpr (metric == MapMetric::js) {
    const JensenShannon js = jensen_shannon(p, q);
    return {js.value, where(p != 0.0f, 0.5f * p * js.log_p)};
  }
  if constexpr (metric == MapMetric::kl) return {where(p != 0.0f, p * log_ratio(p, q)), vf{}};
  if constexpr (metric == MapMetric::sym_kl) return {0.5f * (p - q) * log_ratio(p, q), vf{}};
  const vf d = p - q;
  if constexpr (metric == MapMetric::mse) return {d * d, 2.0f * p * d};
  if constexpr (metric == MapMetric::l1) return {abs(d), p * sign(d)};
  return {0.5f * d * d, vf{}};  // cosine, of unit vectors
}

// Of kl and sym_kl from logits: d = log p - log q.
template <MapMetric metric>
FASTLOSS_INLINE Element element_of_logarithms(vf p, vf q, vf d) {
  if constexpr (metric == MapMetric::sym_kl) {
    d = where(~((p == 0.0f) & (q == 0.0f)), d);
    return {0.5f * (p - q) * d, where(p != 0.0f, p * d)};
  }
  d = where(p != 0.0f, d);
  const vi near = (abs(d) < 0.5f) & (p != 0.0f);
  return {near ? p * exponential_rest(d) : p * d + (q - p), p * d};
}

constexpr bool of_logarithms(MapMetric metric) { return metric == MapMetric::kl || metric == MapMetric::sym_kl; }

template <MapMetric metric>
static RowValue logits_forward(const Row& row, MapStatistics& s) {
  constexpr bool squares = metric == MapMetric::cosine;
  s.peak_a = peak_of(row.a, row.n), s.peak_b = peak_of(row.b, row.n);
  if (s.scale == 0.0f || s.peak_a == -__builtin_inff() || s.peak_b == -__builtin_inff()) {
    s = MapStatistics{};
    return {0, false};
  }
  constexpr bool mean = metric == MapMetric::mse || metric == MapMetric::l1;
  if constexpr (!mean) s.scale = 1;
  s.log_a = exponentials<squares>(row.a, s.peak_a, row.n, row.more_a);
  s.log_b = exponentials<squares>(row.b, s.peak_b, row.n, row.more_b);
  const float inverse_a = __builtin_expf(-s.log_a), inverse_b = __builtin_expf(-s.log_b);
  Sums sums = sum_row(row.n, [&](int64_t i, vf& value, vf& inner) __attribute__((always_inline)) {
    const vf p = rounded_product(load(row.more_a + i), inverse_a);
    const vf q = rounded_product(load(row.more_b + i), inverse_b);
    Element e;
    if constexpr (of_logarithms(metric)) {
      const vf d = ((load(row.a + i) - s.peak_a) - s.log_a) - ((load(row.b + i) - s.peak_b) - s.log_b);
      e = element_of_logarithms<metric>(p, q, d);
    } else {
      e = element_of_probabilities<metric>(p, q);
    }
    value += e.value;
    inner += e.inner;
  });
  const double scale = mean ? row.mean : 1, value = sums.first * scale, inner = sums.second * scale;
  const bool twice = metric == MapMetric::sym_kl || metric == MapMetric::mse;
  s.inner_a = (float)(squares ? value : inner);
  s.inner_b = (float)(squares ? value : (twice ? 2 * value : value) - inner);
  return {value, true};
}

// The root of a sum of squares; NaN for an infinite one, whose row has no direction.
FASTLOSS_INLINE float length_of(double square) {
  return square > 1.7e308 ? __builtin_nanf("") : (float)__builtin_sqrt(square);
}
// What a row is divided by: 0s, without a direction, stay so. A division, after which a row of one number is exactly 1.
FASTLOSS_INLINE float divisor_of(float length) { return length == 0.0f ? __builtin_inff() : length; }

template <MapMetric metric>
static RowValue probabilities_forward(const Row& row, MapStatistics& s) {
  const bool counts = s.scale != 0.0f;
  if constexpr (metric == MapMetric::cosine) {  // kept: |a|, |b|, the value
    const Sums squares = sum_row(row.n, [&](int64_t i, vf& of_a, vf& of_b) __attribute__((always_inline)) {
      const vf a = load(row.a + i), b = load(row.b + i);
      of_a += a * a;
      of_b += b * b;
    });
    s.peak_a = length_of(squares.first);
    s.log_a = length_of(squares.second);
    const float by_a = divisor_of(s.peak_a), by_b = divisor_of(s.log_a);
    const Sums sums = sum_row(row.n, [&](int64_t i, vf& value, vf&) __attribute__((always_inline)) {
      value += element_of_probabilities<metric>(load(row.a + i) / by_a, load(row.b + i) / by_b).value;
    });
    const bool one_is_zero = (s.peak_a == 0.0f) != (s.log_a == 0.0f);
    s.peak_b = (float)(one_is_zero ? 2 * sums.first : sums.first);
    return {s.peak_b, counts};
  }
  const Sums sums = sum_row(row.n, [&](int64_t i, vf& value, vf&) __attribute__((always_inline)) {
    value += element_of_probabilities<metric>(load(row.a + i), load(row.b + i)).value;
  });
  const bool mean = metric == MapMetric::mse || metric == MapMetric::l1;
  return {mean ? sums.first * row.mean : sums.first, counts};
}

struct Slopes {
  vf a, b;
};

// Those that are wanted, the others are anything.
template <MapMetric metric>
FASTLOSS_INLINE Slopes slopes_of_probabilities(vf p, vf q, bool of_a, bool of_b) {
  const vf d = p - q;
  if constexpr (metric == MapMetric::js) {
    const JensenShannon js = jensen_shannon(p, q);
    return {where(p != 0.0f, 0.5f * js.log_p), where(q != 0.0f, 0.5f * js.log_q)};
  }
  if constexpr (metric == MapMetric::kl) {
    const vi there = p != 0.0f;
    Slopes slopes{};
    if (of_a) slopes.a = where(there, log_ratio(p, q) + 1.0f);
    if (of_b) slopes.b = where(there, probable(p, q, -p / q));
    return slopes;
  }
  if constexpr (metric == MapMetric::sym_kl) {
    const vi there = (p != 0.0f) | (q != 0.0f);
    const vf ratio = log_ratio(p, q);
    Slopes slopes{};
    if (of_a) slopes.a = where(there, 0.5f * (d / p + ratio));
    if (of_b) slopes.b = where(there, -0.5f * (d / q + ratio));
    return slopes;
  }
  if constexpr (metric == MapMetric::mse) return {2.0f * d, -2.0f * d};
  return {sign(d), -sign(d)};
}

FASTLOSS_INLINE void store_slopes(const RowGradient& to, int64_t i, vf a, vf b) {
  if (to.a) put(to.a + i, a * to.upstream, W, to.streamed);
  if (to.b) put(to.b + i, b * to.upstream, W, to.streamed);
}

template <MapMetric metric>
static void probabilities_backward(const Row& row, const MapStatistics& s, const RowGradient& to) {
  const float mean = metric == MapMetric::mse || metric == MapMetric::l1 ? s.scale : 1.0f;
  for (int64_t i = 0; i < row.n; i += W) {
    const vf p = load(row.a + i), q = load(row.b + i);
    if constexpr (metric == MapMetric::cosine) {
      const float by_a = divisor_of(s.peak_a), by_b = divisor_of(s.log_a);
      const vf u = p / by_a, v = q / by_b;
      const vi both = vi{} - (int)(s.peak_a != 0.0f && s.log_a != 0.0f);  // a row of zeros has no direction
      store_slopes(to, i, where(both, ((u - v) - u * s.peak_b) / by_a), where(both, ((v - u) - v * s.peak_b) / by_b));
    } else {
      const Slopes slopes = slopes_of_probabilities<metric>(p, q, to.a != nullptr, to.b != nullptr);
      store_slopes(to, i, slopes.a * mean, slopes.b * mean);
    }
  }
}

template <MapMetric metric>
static void logits_backward(const Row& row, const MapStatistics& s, const RowGradient& to) {
  if (s.scale == 0.0f) {
    for (int64_t i = 0; i < row.n; i += W) store_slopes({1, to.a, to.b, to.streamed}, i, vf{}, vf{});
    return;
  }
  for (int64_t i = 0; i < row.n; i += W) {
    const vf log_p = (load(row.a + i) - s.peak_a) - s.log_a, log_q = (load(row.b + i) - s.peak_b) - s.log_b;
    const vf p = exp(log_p), q = exp(log_q), d = p - q;
    if constexpr (metric == MapMetric::kl) {
      store_slopes(to, i, where(p != 0.0f, p * ((log_p - log_q) - s.inner_a)), -d);
    } else if constexpr (metric == MapMetric::sym_kl) {
      const vf ratio = log_p - log_q;
      store_slopes(to, i, 0.5f * (where(p != 0.0f, p * (ratio - s.inner_a)) + d),
                   -0.5f * (where(q != 0.0f, q * (ratio + s.inner_b)) + d));
    } else if constexpr (metric == MapMetric::cosine) {
      store_slopes(to, i, p * (d - p * s.inner_a), q * (-d - q * s.inner_b));
    } else {
      const Slopes slopes = slopes_of_probabilities<metric>(p, q, true, true);
      store_slopes(to, i, where(p != 0.0f, p * (slopes.a * s.scale - s.inner_a)),
                   where(q != 0.0f, q * (slopes.b * s.scale - s.inner_b)));
    }
  }
}

static void finish_streams() { fence(); }

static bool soften(const float* logits, int64_t n, float* p, float* sum) {
  const float peak = peak_of(logits, n);
  const bool there = peak != -__builtin_inff();
  const float inverse = there ? __builtin_expf(-exponentials<false>(logits, peak, n, p)) : 0.0f;
  for (int64_t i = 0; i < n; i += W) {
    const vf x = there ? load(p + i) * inverse : vf{};
    store(p + i, x);
    store(sum + i, load(sum + i) + x);
  }
  return there;
}

static void scale_row(float* x, int64_t n, float by) {
  for (int64_t i = 0; i < n; i += W) store(x + i, where(all(by) != 0.0f, load(x + i) * by));
}

static void through_softmax(const float* p, const float* slopes, int64_t n, float by, float* to) {
  const Sums sums = sum_row(n, [&](int64_t i, vf& inner, vf&) __attribute__((always_inline)) {
    const vf x = load(p + i);
    inner += where(x != 0.0f, x * load(slopes + i));
  });
  const float inner = (float)sums.first;
  for (int64_t i = 0; i < n; i += W) {
    const vf x = load(p + i);
    store(to + i, where(x != 0.0f, x * (load(slopes + i) - inner) * by));
  }
}

template <MapMetric metric>
static MapKernels kernels_of(bool logits) {
  return {prepare_row<float>,
          prepare_row<BFloat16>,
          prepare_row<Half>,
          logits ? logits_forward<metric> : probabilities_forward<metric>,
          logits ? logits_backward<metric> : probabilities_backward<metric>,
          write_row<float>,
          write_row<BFloat16>,
          write_row<Half>,
          finish_streams,
          soften,
          scale_row,
          through_softmax};
}

static MapKernels map_kernels(MapMetric metric, bool logits) {
  switch (metric) {
    case MapMetric::js: return kernels_of<MapMetric::js>(logits);
    case MapMetric::kl: return kernels_of<MapMetric::kl>(logits);
    case MapMetric::sym_kl: return kernels_of<MapMetric::sym_kl>(logits);
    case MapMetric::mse: return kernels_of<MapMetric::mse>(logits);
    case MapMetric::l1: return kernels_of<MapMetric::l1>(logits);
    default: return kernels_of<MapMetric::cosine>(logits);
  }
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
