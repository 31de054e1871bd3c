// The distances of the pixel loss; included by pixel_simd.h and image_loss_simd.h.

namespace fastloss {
namespace FASTLOSS_ISA {

// loss(d) and its derivative. The parameter p is eps for Charbonnier, delta for Huber.
template <Kind kind>
FASTLOSS_INLINE vf distance(vf d, double p) {
  const vf a = abs(d);
  if constexpr (kind == Kind::l1) return a;
  if constexpr (kind == Kind::l2) return d * d;
  if constexpr (kind == Kind::l1_5) return a * sqrt(a);
  if constexpr (kind == Kind::l3) return a * a * a;
  if constexpr (kind == Kind::l4) return (d * d) * (d * d);
  if constexpr (kind == Kind::lp) return pow(a, p);
  if constexpr (kind == Kind::charbonnier) return sqrt(d * d + (float)(p * p));
  const vf delta = all((float)p);  // huber
  return a <= delta ? 0.5f * d * d : delta * (a - 0.5f * delta);
}
template <Kind kind>
FASTLOSS_INLINE vf slope(vf d, double p) {
  const vf a = abs(d);
  if constexpr (kind == Kind::l1) return sign(d);
  if constexpr (kind == Kind::l2) return d + d;
  if constexpr (kind == Kind::l1_5) return 1.5f * sqrt(a) * sign(d);
  if constexpr (kind == Kind::l3) return 3.0f * d * a;
  if constexpr (kind == Kind::l4) return 4.0f * d * d * d;
  if constexpr (kind == Kind::lp) return (float)p * pow(a, p - 1) * sign(d);
  if constexpr (kind == Kind::charbonnier) {  // of t = d / eps, whose square is never too small or too large
    vf t = d * (float)(1 / (p < 0x1p-126 ? 0x1p-126 : p));
    t = t > 0x1p24f ? all(0x1p24f) : t < -0x1p24f ? all(-0x1p24f) : t;  // the slope is 1 from there on
    return t * inverse_sqrt(t * t + 1.0f) + (d - d);                    // NaN for infinities, as sqrt(d^2 + eps^2) has
  }
  const vf delta = all((float)p);  // huber
  return a > delta ? delta * sign(d) : d;
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
