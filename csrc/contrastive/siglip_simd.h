// One row of a tile of logits of negative pairs: log(1 + e^x), and its slope; included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

// Sums over the row of softplus(s_j + bias) and of its slope sigmoid(s_j + bias); g_j = row_weight slope_j, unless g is
// null. Both come of e = exp(-|x|) and one division: log(1 + e) is 2 atanh(t) with t = e / (2 + e) <= 1/3, atanh(t) / t
// fitted by a polynomial in t^2 to 2e-8.
static SigmoidSums siglip_row(const float* s, int64_t n, float bias, float row_weight, float* g) {
  vd loss{}, slope_sum{};
  for (int64_t i = 0; i < n;) {
    vf loss_part{}, slope_part{};  // of 32 vectors, before they move to double: the error does not grow with n
    for (int step = 0; step < 32 && i < n; ++step, i += W) {
      const vf x = load(s + i) + bias;
      const vf e = exp(-abs(x));
      const vf one = e + 1.0f, two = e + 2.0f, inverse = 1.0f / (one * two);
      const vf t = e * one * inverse, q = t * t;
      vf series = q * 0.1342575f + 0.1411831f;
      series = series * q + 0.2000378f;
      series = series * q + 0.3333332f;
      loss_part += (x > 0.0f ? x : vf{}) + 2.0f * (t + t * (q * series));
      const vf up = inverse * two, sigmoid = x < 0.0f ? e * up : up;
      slope_part += sigmoid;
      if (g) store(g + i, sigmoid * row_weight);
    }
    loss += __builtin_convertvector(loss_part, vd);
    slope_sum += __builtin_convertvector(slope_part, vd);
  }
  return {sum(loss), sum(slope_sum)};
}

static SiglipKernels siglip_kernels() { return {siglip_row}; }

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
