// Logarithms of ratios of two probabilities, without the rounding of a difference of logarithms; included after simd.h.

namespace fastloss {
namespace FASTLOSS_ISA {

// log(1 + f) + n log 2, two ulp, for 1 + f in [sqrt(1/2), sqrt(2))
FASTLOSS_INLINE vf log_of_scaled(vf f, vf n) {
  const vf square = f * f;
  vf p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * square - n * 2.12194440e-4f - 0.5f * square;  // ln 2 in two parts
  return n * 0.693359375f + (f + p);
}

// log x, two ulp; -inf for 0, NaN for negative numbers.
FASTLOSS_INLINE vf log(vf x) {
  const vi tiny = x < 0x1p-126f;
  const vf scaled = tiny ? x * 0x1p64f : x;
  const vi exponent = ((vi)scaled - 0x3f3504f3) >> 23;  // the mantissa is in [sqrt(1/2), sqrt(2))
  const vf n = __builtin_convertvector(exponent, vf) - where(tiny, all(64.0f));
  const vf value = log_of_scaled((vf)((vi)scaled - (exponent << 23)) - 1.0f, n);
  const vf finite = x > 0.0f ? value : x == 0.0f ? all(-__builtin_inff()) : all(__builtin_nanf(""));
  return x == __builtin_inff() ? x : finite;
}

template <int n>
FASTLOSS_INLINE vf polynomial(vf x, const float (&coefficients)[n]) {  // from the constant on
  vf y = all(coefficients[n - 1]);
#pragma GCC unroll 16
  for (int k = n - 2; k >= 0; --k) y = y * x + coefficients[k];
  return y;
}

// NaN where p or q is negative, and so no probability.
FASTLOSS_INLINE vf probable(vf p, vf q, vf x) { return (p < 0.0f) | (q < 0.0f) ? all(__builtin_nanf("")) : x; }

// 1 / (p + q), and 0 where that is no normal number.
FASTLOSS_INLINE vf inverse_total(vf p, vf q) {
  const vf total = p + q;
  return probable(p, q, abs(total) < 0x1p-126f ? all(0.0f) : inverse(total));
}

// Where log_of_normal_ratio can be used: p / q and q are normal numbers, neither is negative. `ratio` may be rounded.
FASTLOSS_INLINE vi is_normal_ratio(vf p, vf q, vf ratio) {
  return (ratio > 0x1p-125f) & (ratio < 0x1p125f) & (q >= 0x1p-126f) & (p > 0.0f);
}
// log(p / q) with `over`, 1 / q: log(1 + f) + n log 2, where p / 2^n is within a factor of root 2 of q and f is their
// exact difference times `over`. So numbers that are near keep their digits, and equal ones give exactly 0.
FASTLOSS_INLINE vf log_of_normal_ratio(vf p, vf q, vf over) {
  const vi exponent = ((vi)(p * over) - 0x3f3504f3) >> 23;
  const vf power = (vf)(0x3f800000 - (exponent << 23));
  return log_of_scaled((p * power - q) * over, __builtin_convertvector(exponent, vf));
}

// log(p / q); where both are 0, 0.
FASTLOSS_INLINE vf log_ratio(vf p, vf q) {
  vf over = inverse(q);
  const vi usual = is_normal_ratio(p, q, p * over);
  if (every(usual)) return log_of_normal_ratio(p, q, over);
  const vi none = (p == 0.0f) & (q == 0.0f);
  if (every(usual | none)) {  // maps with masked keys
    over = none ? all(1.0f) : over;
    return log_of_normal_ratio(none ? all(1.0f) : p, none ? all(1.0f) : q, over);
  }
  const vf t = (p - q) * inverse_total(p, q);  // log(p / q) = 2 atanh t
  const vf series = 2.0f * t * polynomial(t * t, {1.0f, 0.333331573f, 0.200124549f, 0.139803041f, 0.140891551f});
  return abs(t) < 0x1.555556p-2f ? series : log(p) - log(q);
}

// With m = (p + q) / 2: log(p / m), log(q / m), and p log(p / m) / 2 + q log(q / m) / 2. Where p, q or both are 0 their
// logarithms are to be left out.
struct JensenShannon {
  vf log_p, log_q, value;
};
FASTLOSS_INLINE JensenShannon jensen_shannon(vf p, vf q) {
  const vf inverse = inverse_total(p, q), r = (p - q) * inverse, t = abs(r);  // p = m (1 + r), q = m (1 - r)
  const vf larger = t * polynomial(t, {0.99999997f, -0.499994931f, 0.333190952f, -0.248429695f, 0.191059571f,
                                       -0.136631401f, 0.0782247057f, -0.0295044736f, 0.00523250335f});
  vf smaller = t * polynomial(t, {-1.00000002f, -0.499992854f, -0.333700549f, -0.242806137f, -0.269604422f, 0.20350335f,
                                  -1.25758553f, 1.69570816f, -1.44105597f});
  const vf square = t * t;  // the sum of the two terms is a series in it
  vf value = 0.25f * (p + q) * square *
             polynomial(square, {1.0f, 0.166667414f, 0.0666329079f, 0.0362662147f, 0.0182374227f, 0.0276251413f});
  const vi near = t < 0.5f, first = r > 0.0f;
  if (!every(near)) {
    const vf less = p < q ? p : q, more = p < q ? q : p;
    smaller = near ? smaller : log(2.0f * less * inverse);
    const vf far = where(less != 0.0f, less * smaller) + more * larger;
    value = near ? value : 0.5f * far;
  }
  return {first ? larger : smaller, first ? smaller : larger, value};
}

// d + e^-d - 1 = d^2 / 2 - d^3 / 6 ..., for |d| < 1 / 2
FASTLOSS_INLINE vf exponential_rest(vf d) {
  return d * d *
         polynomial(d, {0.500000012f, -0.166666655f, 0.0416657959f, -0.00833345225f, 0.00139819973f, -0.000198756037f});
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
