// Distances of deep features over a stretch of elements; included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

// c(d) and its derivative. The parameter p is eps for Charbonnier, beta for smooth L1.
template <Criterion criterion>
FASTLOSS_INLINE vf feature_term(vf d, float p) {
  const vf a = abs(d);
  if constexpr (criterion == Criterion::l1) return a;
  if constexpr (criterion == Criterion::l2) return d * d;
  if constexpr (criterion == Criterion::charbonnier) return sqrt(d * d + p * p);
  return a < p ? 0.5f * d * (d / p) : a - 0.5f * p;  // smooth L1
}
template <Criterion criterion>
FASTLOSS_INLINE vf feature_slope(vf d, float p) {
  if constexpr (criterion == Criterion::l1) return sign(d);
  if constexpr (criterion == Criterion::l2) return d + d;
  if constexpr (criterion == Criterion::charbonnier) {
    vf t = d * (1 / (p < 0x1p-126f ? 0x1p-126f : p));  // in units of eps: its square is never too small or too large
    t = t > 0x1p24f ? all(0x1p24f) : t < -0x1p24f ? all(-0x1p24f) : t;  // the slope is 1 from there on
    return t * inverse_sqrt(t * t + 1.0f) + (d - d);                    // NaN for infinities, as eager has
  }
  return abs(d) >= p ? sign(d) : d / p;  // smooth L1; NaN divided by p stays NaN
}

// The lanes that are set, as bits from the lowest.
FASTLOSS_INLINE uint32_t bits_of(vi lanes) {
#if defined(__x86_64__) && FASTLOSS_BYTES == 64
  return (uint32_t)_mm512_movepi32_mask((__m512i)lanes);
#elif defined(__x86_64__) && FASTLOSS_BYTES == 32
  return (uint32_t)_mm256_movemask_ps((__m256)lanes);
#elif defined(__x86_64__)
  return (uint32_t)_mm_movemask_ps((__m128)lanes);
#else
  uint32_t bits = 0;
  for (int k = 0; k < W; ++k) bits |= (uint32_t)(lanes[k] & 1) << k;
  return bits;
#endif
}
// Which of the lanes are positive, and which negative; NaN counts as both.
FASTLOSS_INLINE uint32_t positive_bits(vf d) { return bits_of(~(d <= 0.0f)); }
FASTLOSS_INLINE uint32_t negative_bits(vf d) { return bits_of(~(d >= 0.0f)); }
FASTLOSS_INLINE vf sign_of(uint32_t positive, uint32_t negative) {
  vi lane{};
  for (int k = 0; k < W; ++k) lane[k] = 1 << k;
  const vi up = ((vi{} + (int32_t)positive) & lane) != 0, down = ((vi{} + (int32_t)negative) & lane) != 0;
  return (vf)(((vi)all(1.0f) & up) | ((vi)all(-1.0f) & down) | ((vi)all(__builtin_nanf("")) & up & down));
}

// The sum of the terms and, if `signs` is given, two words of signs for every kGroup elements. The accumulators move to
// double after 16 groups: the error does not grow with n.
template <Criterion criterion, typename T>
static double feature_sum(const Pair<T>& s, double parameter, uint32_t* signs) {
  constexpr int kVectors = kGroup / W, kSums = kVectors < 4 ? kVectors : 4;
  const float p = (float)parameter;
  vd total{};
  int64_t i = 0;
  while (i + kGroup <= s.n) {
    vf sums[kSums] = {};
    for (int step = 0; step < 16 && i + kGroup <= s.n; ++step, i += kGroup) {
      uint32_t positive = 0, negative = 0;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const vf d = load(s.feature + i + v * W) - load(s.target + i + v * W);
        sums[v % kSums] += feature_term<criterion>(d, p);
        if constexpr (criterion == Criterion::l1) {
          positive |= positive_bits(d) << (v * W);
          negative |= negative_bits(d) << (v * W);
        }
      }
      if constexpr (criterion == Criterion::l1) {
        *signs++ = positive;
        *signs++ = negative;
      }
    }
    for (int k = 0; k < kSums; ++k) total += __builtin_convertvector(sums[k], vd);
  }
  double rest = 0;
  uint32_t positive = 0, negative = 0;
  const int64_t group = i;
  for (; i < s.n; i += W) {
    const int64_t count = s.n - i < W ? s.n - i : W;
    const vf d = load_some(s.feature + i, count) - load_some(s.target + i, count);
    const vf value = feature_term<criterion>(d, p);
    for (int64_t k = 0; k < count; ++k) rest += value[k];
    if constexpr (criterion == Criterion::l1) {
      positive |= positive_bits(d) << (i - group);
      negative |= negative_bits(d) << (i - group);
    }
  }
  if constexpr (criterion == Criterion::l1) {
    if (group < s.n) {
      signs[0] = positive;
      signs[1] = negative;
    }
  }
  return sum(total) + rest;
}

template <typename T>
FASTLOSS_INLINE void put(const Sides<T>& to, int64_t i, vf g, bool streamed) {
  const vf sum = to.incoming ? load(to.incoming + i) + g : g;
  if (streamed) {
    if (to.feature) stream(to.feature + i, sum);
    if (to.target) stream(to.target + i, -g);
  } else {
    if (to.feature) store(to.feature + i, sum);
    if (to.target) store(to.target + i, -g);
  }
}
template <typename T>
FASTLOSS_INLINE void put_some(const Sides<T>& to, int64_t i, vf g, int64_t count) {
  if (to.feature) store_some(to.feature + i, to.incoming ? load_some(to.incoming + i, count) + g : g, count);
  if (to.target) store_some(to.target + i, -g, count);
}

template <Criterion criterion, typename T>
static void feature_grad(const Pair<T>& s, double parameter, float upstream, const Sides<T>& to) {
  const float p = (float)parameter;
  int64_t i = 0;
  for (; i + W <= s.n; i += W)
    put(to, i, upstream * feature_slope<criterion>(load(s.feature + i) - load(s.target + i), p), to.streamed);
  if (to.streamed) fence();
  if (i == s.n) return;
  const vf d = load_some(s.feature + i, s.n - i) - load_some(s.target + i, s.n - i);
  put_some(to, i, upstream * feature_slope<criterion>(d, p), s.n - i);
}

template <typename T>
static void sign_grad(const uint32_t* signs, int64_t n, float upstream, const Sides<T>& to) {
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup, signs += 2) {
#pragma GCC unroll 8
    for (int v = 0; v < kGroup / W; ++v)
      put(to, i + v * W, upstream * sign_of(signs[0] >> (v * W), signs[1] >> (v * W)), to.streamed);
  }
  if (to.streamed) fence();
  for (int64_t group = i; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    put_some(to, i, upstream * sign_of(signs[0] >> (i - group), signs[1] >> (i - group)), count);
  }
}

template <typename T>
static FeatureKernels<T> feature_kernels(Criterion criterion) {
#define FASTLOSS_CRITERION(c) \
  case Criterion::c: return {feature_sum<Criterion::c, T>, feature_grad<Criterion::c, T>, sign_grad<T>};
  switch (criterion) {
    FASTLOSS_CRITERION(l1)
    FASTLOSS_CRITERION(l2)
    FASTLOSS_CRITERION(charbonnier)
    FASTLOSS_CRITERION(smooth_l1)
  }
#undef FASTLOSS_CRITERION
  return {};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
