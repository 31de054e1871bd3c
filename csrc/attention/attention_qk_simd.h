// Rows of two attention maps: products, softmaxes, divergences and their gradients. Rows of logits are multiples of
// kLanes long. Included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

// R rows of a with C vectors of columns of b.
template <int R, int C>
FASTLOSS_INLINE void qk_tile(const float* a, int64_t a_row, int64_t a_term, const float* b, int64_t b_term,
                             int64_t terms, float* to, int64_t to_row, bool adds) {
  vf sums[R][C] = {};
  for (int64_t t = 0; t < terms; ++t) {
    vf of_b[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) of_b[c] = load(b + t * b_term + c * W);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vf of_a = all(a[r * a_row + t * a_term]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] += of_a * of_b[c];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* at = to + r * to_row + c * W;
      store(at, adds ? sums[r][c] + load(at) : sums[r][c]);
    }
}

template <int C>
static void qk_columns(const float* a, int64_t a_row, int64_t a_term, int64_t rows, const float* b, int64_t b_term,
                       int64_t terms, float* to, int64_t to_row, bool adds) {
  for (int64_t r = 0; r < rows; r += 6) {
    const float* from = a + r * a_row;
    float* at = to + r * to_row;
    switch (rows - r) {
      case 1: qk_tile<1, C>(from, a_row, a_term, b, b_term, terms, at, to_row, adds); break;
      case 2: qk_tile<2, C>(from, a_row, a_term, b, b_term, terms, at, to_row, adds); break;
      case 3: qk_tile<3, C>(from, a_row, a_term, b, b_term, terms, at, to_row, adds); break;
      case 4: qk_tile<4, C>(from, a_row, a_term, b, b_term, terms, at, to_row, adds); break;
      case 5: qk_tile<5, C>(from, a_row, a_term, b, b_term, terms, at, to_row, adds); break;
      default: qk_tile<6, C>(from, a_row, a_term, b, b_term, terms, at, to_row, adds);
    }
  }
}

static void qk_product(const float* a, int64_t a_row, int64_t a_term, int64_t rows, const float* b, int64_t b_term,
                       int64_t columns, int64_t terms, float* to, int64_t to_row, bool adds) {
  constexpr int C = FASTLOSS_BYTES == 64 ? 4 : 2;  // 6 C sums, in 32 registers or 16
  int64_t c = 0;
  for (; c + C * W <= columns; c += C * W)
    qk_columns<C>(a, a_row, a_term, rows, b + c, b_term, terms, to + c, to_row, adds);
  for (; c < columns; c += W) qk_columns<1>(a, a_row, a_term, rows, b + c, b_term, terms, to + c, to_row, adds);
}

FASTLOSS_INLINE vf qk_larger(vf a, vf b) { return (a > b) | (a != a) ? a : b; }  // NaN stays
FASTLOSS_INLINE float qk_largest(vf x) {
  float largest = x[0];
  for (int k = 1; k < W; ++k) largest = x[k] > largest || x[k] != x[k] ? x[k] : largest;
  return largest;
}

// x - 1 + e^-x over x^2, |x| < 1/2
FASTLOSS_INLINE vf qk_bregman(vf x) {
  vf p = x * (1.0f / 40320) - 1.0f / 5040;
  p = p * x + 1.0f / 720;
  p = p * x - 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x - 1.0f / 6;
  return p * x + 0.5f;
}

// log(2 p / (p + q)), exact where they are near: 2 p / (p + q) = (1 + z) / (1 - z), z = (p - q) / (3 p + q).
FASTLOSS_INLINE vf qk_log_share(vf p, vf q) {
  const vf share = 2.0f * p / (p + q);
  const vi bits = (vi)share - 0x3f3504f3;  // mantissa in [sqrt(1/2), sqrt(2))
  const vi near = (share > 0.5f) & (share < 1.5f);
  const vf exponent = near ? all(0.0f) : __builtin_convertvector(bits >> 23, vf);
  const vf mantissa = (vf)((bits & 0x7fffff) + 0x3f3504f3);
  const vf z = (near ? p - q : mantissa - 1.0f) / (near ? 3.0f * p + q : mantissa + 1.0f);
  const vf u = z * z;
  vf s = u * (1.0f / 13) + 1.0f / 11;
  s = s * u + 1.0f / 9;
  s = s * u + 1.0f / 7;
  s = s * u + 1.0f / 5;
  s = s * u + 1.0f / 3;
  const vf logarithm = exponent * 0.69314718056f + 2.0f * z * (s * u + 1.0f);
  return share == share ? logarithm : share;  // NaN stays
}

// (1 + r) log(1 + r) + (1 - r) log(1 - r) over r^2, for u = r^2 <= 1/4
FASTLOSS_INLINE vf qk_entropy(vf u) {
  vf s = u * (1.0f / 190) + 1.0f / 153;
  s = s * u + 1.0f / 120;
  s = s * u + 1.0f / 91;
  s = s * u + 1.0f / 66;
  s = s * u + 1.0f / 45;
  s = s * u + 1.0f / 28;
  s = s * u + 1.0f / 15;
  s = s * u + 1.0f / 6;
  return s * u + 1.0f;
}

// The maxima of both rows, e^(s - max) and their sums. False where a row has no key: it does not count.
static bool qk_softmax(const float* s1, const float* s2, int64_t n, float* e1, float* e2, RowStatistics& of) {
  vf max1 = all(-__builtin_inff()), max2 = max1;
  for (int64_t i = 0; i < n; i += W) {
    max1 = qk_larger(load(s1 + i), max1);
    max2 = qk_larger(load(s2 + i), max2);
  }
  of = {qk_largest(max1), 1, qk_largest(max2), 1, 0, 0};
  if (of.max1 == -__builtin_inff() || of.max2 == -__builtin_inff()) {
    of.max1 = of.max2 = __builtin_inff();
    return false;
  }
  vd sum1{}, sum2{};
  for (int64_t i = 0; i < n;) {
    vf part1{}, part2{};  // of 32 vectors, before they move to double: the error does not grow with n
    for (int step = 0; step < 32 && i < n; ++step, i += W) {
      const vf x = exp(load(s1 + i) - of.max1), y = exp(load(s2 + i) - of.max2);
      part1 += x;
      part2 += y;
      store(e1 + i, x);
      store(e2 + i, y);
    }
    sum1 += __builtin_convertvector(part1, vd);
    sum2 += __builtin_convertvector(part2, vd);
  }
  of.sum1 = (float)sum(sum1);
  of.sum2 = (float)sum(sum2);
  return true;
}

// By element: the divergence, and what the means are of, times its probability.
struct QkTerms {
  vf value, mean1, mean2;
};

template <Divergence kind>
FASTLOSS_INLINE QkTerms qk_terms(vf s1, vf s2, vf p, vf q, float shift) {
  if constexpr (kind == Divergence::js) {
    const vi first = p != 0.0f, second = q != 0.0f;
    const vf of_p = where(first, p * qk_log_share(p, q)), of_q = where(second, q * qk_log_share(q, p));
    const vf total = p + q, r = (p - q) / total;
    const vi near = abs(r) < 0.5f;
    const vf close = 0.25f * total * (r * r) * qk_entropy(r * r);
    return {near ? close : 0.5f * (of_p + of_q), of_p, of_q};
  } else {
    const vf x = s1 - s2 - shift;  // log p - log q
    const vi near = abs(x) < 0.5f, first = p != 0.0f, second = q != 0.0f;
    const vf square = x * x * qk_bregman(x);  // x - 1 + e^-x
    vf value;
    if constexpr (kind == Divergence::kl)
      value = near ? p * square : where(first, p * x) - (p - q);  // the sum of p - q is 0
    else
      value = near ? 0.5f * p * x * (x - square) : 0.5f * (where(first, p * x) - where(second, q * x));
    return {where(first | second, value), where(first, p * x), where(second, q * x)};
  }
}

// The difference of the log-sum-exps. The means are of differences less it: not of large numbers, whose rounding would
// be that of the gradients.
FASTLOSS_INLINE float qk_shift(const RowStatistics& of) {
  return (float)((double)of.max1 - of.max2 + __builtin_log((double)of.sum1 / of.sum2));
}

template <Divergence kind>
static float qk_divergence(const float* s1, const float* s2, const float* e1, const float* e2, int64_t n,
                           RowStatistics& of) {
  // js: of e1 and e2 in units of the first probabilities. A product with 1, which equal views have here, is exact, also
  // where the compiler fuses it with a difference.
  const bool scaled = kind == Divergence::js;
  const float weight1 = scaled ? 1 : 1 / of.sum1, weight2 = scaled ? of.sum1 / of.sum2 : 1 / of.sum2;
  const float shift = qk_shift(of);
  vd value{}, mean1{}, mean2{};
  for (int64_t i = 0; i < n;) {
    QkTerms part{};
    for (int step = 0; step < 32 && i < n; ++step, i += W) {
      const vf p = load(e1 + i) * weight1, q = load(e2 + i) * weight2;
      const QkTerms terms = qk_terms<kind>(load(s1 + i), load(s2 + i), p, q, shift);
      part.value += terms.value;
      part.mean1 += terms.mean1;
      part.mean2 += terms.mean2;
    }
    value += __builtin_convertvector(part.value, vd);
    mean1 += __builtin_convertvector(part.mean1, vd);
    mean2 += __builtin_convertvector(part.mean2, vd);
  }
  const double unit = scaled ? 1 / (double)of.sum1 : 1;
  of.mean1 = (float)(sum(mean1) * unit);
  of.mean2 = (float)(sum(mean2) * unit);
  return (float)(sum(value) * unit);
}

static float qk_forward(Divergence kind, const float* s1, const float* s2, int64_t n, float* e1, float* e2,
                        RowStatistics& of) {
  if (!qk_softmax(s1, s2, n, e1, e2, of)) return 0;
  if (kind == Divergence::kl) return qk_divergence<Divergence::kl>(s1, s2, e1, e2, n, of);
  if (kind == Divergence::sym_kl) return qk_divergence<Divergence::sym_kl>(s1, s2, e1, e2, n, of);
  return qk_divergence<Divergence::js>(s1, s2, e1, e2, n, of);
}

template <Divergence kind>
static void qk_gradient(float* s1, float* s2, int64_t n, const RowStatistics& of, float weight) {
  // q is in units of p's: a product with 1, which equal views have here, is exact, also fused with a difference
  const float unit = weight / of.sum1, half = 0.5f * unit, ratio = of.sum1 / of.sum2, shift = qk_shift(of);
  for (int64_t i = 0; i < n; i += W) {
    const vf a = load(s1 + i), b = load(s2 + i);
    const vf p = exp(a - of.max1), q = exp(b - of.max2) * ratio;
    const vi first = p != 0.0f, second = q != 0.0f;
    if constexpr (kind == Divergence::js) {
      store(s1 + i, where(first, half * p * (qk_log_share(p, q) - of.mean1)));
      store(s2 + i, where(second, half * q * (qk_log_share(q, p) - of.mean2)));
    } else {
      const vf d = a - b - shift, of_p = where(first, p * (d - of.mean1));
      if constexpr (kind == Divergence::kl) {
        store(s1 + i, unit * of_p);
        store(s2 + i, unit * (q - p));
      } else {
        const vf of_q = where(second, q * (d - of.mean2));
        store(s1 + i, half * (of_p + (p - q)));
        store(s2 + i, half * ((q - p) - of_q));
      }
    }
  }
}

static void qk_backward(Divergence kind, float* s1, float* s2, int64_t n, const RowStatistics& of, float weight) {
  if (kind == Divergence::kl) return qk_gradient<Divergence::kl>(s1, s2, n, of, weight);
  if (kind == Divergence::sym_kl) return qk_gradient<Divergence::sym_kl>(s1, s2, n, of, weight);
  qk_gradient<Divergence::js>(s1, s2, n, of, weight);
}

static AttentionQkKernels attention_qk_kernels() { return {qk_product, qk_forward, qk_backward}; }

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
