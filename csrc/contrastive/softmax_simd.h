// One row of a tile of logits at a time, at most kTileColumns long and padded to whole vectors with -inf: its maximum,
// its sums of exponentials, its gradient. Included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

FASTLOSS_INLINE vf larger(vf a, vf b) { return (a > b) | (a != a) ? a : b; }  // NaN stays

// Logits of raw products; those that are no negatives, and the padding, become -inf.
static void softmax_logits(const float* raw, int64_t n, const RowOperands& row, const ColumnOperands& columns,
                           float* to) {
  const vf none = all(-__builtin_inff());
  for (int64_t i = 0; i < n; i += W) {
    const vf x = n - i < W ? load_some(raw + i, n - i) : load(raw + i);
    const vf similar = x * load(columns.scale + i) * row.scale;
    const vf logit_limit = columns.logit_limit ? load(columns.logit_limit + i) : all(row.logit_limit);
    vf s = similar > logit_limit ? none : similar + load(columns.bias + i);
    if (columns.ids) {
      const vl same = (vl)(load_bits<vl>(columns.ids + i) == (vl{} + (uint64_t)row.id));
      s = __builtin_convertvector(same, vu) ? none : s;
    }
    store(to + i, s);
  }
  for (int64_t i = n; i < (n + W - 1) / W * W; ++i) to[i] = -__builtin_inff();
}

// The row's largest logit; column_max (or null) becomes the larger of itself and the row.
static float softmax_max(const float* s, int64_t n, float* column_max) {
  vf max[2] = {all(kLowest), all(kLowest)};
  for (int64_t i = 0; i < n; i += W) {
    const vf x = load(s + i);
    max[i / W % 2] = larger(x, max[i / W % 2]);
    if (column_max) store(column_max + i, larger(x, load(column_max + i)));
  }
  const vf both = larger(max[0], max[1]);
  float row_max = both[0];
  for (int k = 1; k < W; ++k) row_max = both[k] > row_max || both[k] != both[k] ? both[k] : row_max;
  return row_max;
}

// sum_j e^(power (s_j - max))
static double softmax_sum_exp(const float* s, int64_t n, float power, float max) {
  vd sum_exp{};
  for (int64_t i = 0; i < n;) {
    vf part{};  // of 32 vectors, before it moves to double: the error does not grow with n
    for (int step = 0; step < 32 && i < n; ++step, i += W) part += exp((load(s + i) - max) * power);
    sum_exp += __builtin_convertvector(part, vd);
  }
  return sum(sum_exp);
}

// sum_exp_j += e^(power (s_j - max_j))
static void softmax_add_column_exps(const float* s, int64_t n, float power, const float* max, float* sum_exp) {
  for (int64_t i = 0; i < n; i += W) store(sum_exp + i, load(sum_exp + i) + exp((load(s + i) - load(max + i)) * power));
}

// Sum and number of the row's negatives; also added to the columns' (or null).
static SumAndCount softmax_moments(const float* s, int64_t n, float* column_sum, float* column_count) {
  vd row_sum{}, row_count{};
  for (int64_t i = 0; i < n; i += W) {
    const vf x = load(s + i);
    const vi allowed = x != -__builtin_inff();
    const vf value = allowed ? x : all(0.0f), one = allowed ? all(1.0f) : all(0.0f);
    row_sum += __builtin_convertvector(value, vd);
    row_count += __builtin_convertvector(one, vd);
    if (!column_sum) continue;
    store(column_sum + i, load(column_sum + i) + value);
    store(column_count + i, load(column_count + i) + one);
  }
  return {sum(row_sum), sum(row_count)};
}

// Adds a part, which is relative to part_max, to the columns' sums of exponentials, which were relative to max_before
// and become relative to max_now.
static void softmax_merge_sum_exps(int64_t n, float power, const float* max_before, const float* max_now,
                                   const float* part_max, const float* part, double* sum_exp) {
  for (int64_t i = 0; i < n; i += W) {
    const vf m = load(max_now + i);
    const vd old_weight = __builtin_convertvector(exp((load(max_before + i) - m) * power), vd);
    const vd part_weight = __builtin_convertvector(exp((load(part_max + i) - m) * power), vd);
    store_bits(sum_exp + i,
               load_bits<vd>(sum_exp + i) * old_weight + __builtin_convertvector(load(part + i), vd) * part_weight);
  }
}
static void softmax_raise_max(int64_t n, const float* part_max, float* max) {
  for (int64_t i = 0; i < n; i += W) store(max + i, larger(load(part_max + i), load(max + i)));
}

// g_j = (row_grad + column_grad_j) e^(s_j - exponent): both directions by one exponential, where their log-sum-exps are
// not far apart.
static void softmax_grad_both(const float* s, int64_t n, float exponent, float row_grad, const float* column_grad,
                              float* g) {
  for (int64_t i = 0; i < n; i += W) store(g + i, (load(column_grad + i) + row_grad) * exp(load(s + i) - exponent));
}
// g_j += grad_lse e^(s_j - lse)
static void softmax_grad_row(const float* s, int64_t n, float lse, float grad_lse, float* g) {
  for (int64_t i = 0; i < n; i += W) store(g + i, load(g + i) + grad_lse * exp(load(s + i) - lse));
}
// g_j += grad_lse_j e^(s_j - lse_j)
static void softmax_grad_columns(const float* s, int64_t n, const float* lse, const float* grad_lse, float* g) {
  for (int64_t i = 0; i < n; i += W) store(g + i, load(g + i) + load(grad_lse + i) * exp(load(s + i) - load(lse + i)));
}
// With d_j = s_j - max and h_j = grad_1p_beta e^((1 + beta) d_j - lse_1p_beta):
// g_j += h_j + beta (h_j + grad_beta e^(beta d_j - lse_beta)). The two terms of the bracket may cancel, so they are
// added before they are multiplied by beta.
static void softmax_grad_hardness_row(const float* s, int64_t n, float hardness, const HardnessStats<float>& stats,
                                      const HardnessGrads<float>& grads, float* g) {
  const float one_plus_hardness = 1 + hardness;
  for (int64_t i = 0; i < n; i += W) {
    const vf d = load(s + i) - stats.max;
    const vf h = grads.lse_1p_beta * exp(d * one_plus_hardness - stats.lse_1p_beta);
    const vf h_beta = grads.lse_beta * exp(d * hardness - stats.lse_beta);
    store(g + i, load(g + i) + (h + hardness * (h + h_beta)));
  }
}
static void softmax_grad_hardness_columns(const float* s, int64_t n, float hardness,
                                          const HardnessStats<const float*>& stats,
                                          const HardnessGrads<const float*>& grads, float* g) {
  const float one_plus_hardness = 1 + hardness;
  for (int64_t i = 0; i < n; i += W) {
    const vf d = load(s + i) - load(stats.max + i);
    const vf h = load(grads.lse_1p_beta + i) * exp(d * one_plus_hardness - load(stats.lse_1p_beta + i));
    const vf h_beta = load(grads.lse_beta + i) * exp(d * hardness - load(stats.lse_beta + i));
    store(g + i, load(g + i) + (h + hardness * (h + h_beta)));
  }
}
// g_j += row_grad + column_grad_j (or null) where j is a negative
static void softmax_grad_sum(const float* s, int64_t n, float row_grad, const float* column_grad, float* g) {
  for (int64_t i = 0; i < n; i += W) {
    const vf more = column_grad ? load(column_grad + i) + row_grad : all(row_grad);
    store(g + i, load(g + i) + (load(s + i) != -__builtin_inff() ? more : all(0.0f)));
  }
}

// The gradient of the raw products, to_j = g_j row_scale column_scale_j. Adds to the gradients of column scales and
// biases (or null) and returns the row scale's.
static double softmax_grad_raw(const float* raw, const float* g, int64_t n, float row_scale, const float* column_scale,
                               float* scale_grad, float* bias_grad, float* to) {
  vd row_scale_grad{};
  for (int64_t i = 0; i < n;) {
    vf part{};
    for (int step = 0; step < 32 && i < n; ++step, i += W) {
      const bool whole = n - i >= W;
      const vf grad = load(g + i), x = whole ? load(raw + i) : load_some(raw + i, n - i);
      const vf scaled = grad * load(column_scale + i), h = scaled * row_scale;
      part += scaled * x;
      if (scale_grad) store(scale_grad + i, load(scale_grad + i) + grad * row_scale * x);
      if (bias_grad) store(bias_grad + i, load(bias_grad + i) + grad);
      if (whole)
        store(to + i, h);
      else
        store_some(to + i, h, n - i);
    }
    row_scale_grad += __builtin_convertvector(part, vd);
  }
  return sum(row_scale_grad);
}

// to_j = e^(power (s_j - max)) column_scale_j, where `to` has n elements; the sum of the exponentials.
static double softmax_weights(const float* s, int64_t n, float power, float max, const float* column_scale, float* to) {
  vd sum_exp{};
  for (int64_t i = 0; i < n;) {
    vf part{};
    for (int step = 0; step < 32 && i < n; ++step, i += W) {
      const vf e = exp((load(s + i) - max) * power);
      part += e;
      store_up_to(to + i, e * load(column_scale + i), n - i);
    }
    sum_exp += __builtin_convertvector(part, vd);
  }
  return sum(sum_exp);
}
// to_j = column_scale_j where j is a negative, else 0
static void softmax_weights_of_sum(const float* s, int64_t n, const float* column_scale, float* to) {
  for (int64_t i = 0; i < n; i += W)
    store_up_to(to + i, load(s + i) != -__builtin_inff() ? load(column_scale + i) : all(0.0f), n - i);
}
// <a, a> and <a, b>, each in four chains of vectors.
static SquareAndDot softmax_square_and_dot(const float* a, const float* b, int64_t n) {
  vf square[4] = {}, dot[4] = {};
  for (int64_t i = 0; i < n;)
    for (int k = 0; k < 4 && i < n; ++k, i += W) {
      const vf x = load_up_to(a + i, n - i), y = load_up_to(b + i, n - i);
      square[k] += x * x;
      dot[k] += x * y;
    }
  const auto sum_of = [](const vf* v) {
    return sum(__builtin_convertvector(v[0] + v[1], vd) + __builtin_convertvector(v[2] + v[3], vd));
  };
  return {sum_of(square), sum_of(dot)};
}

// to = v_weight v + x_weight x (no x: 0)
template <typename T>
static void softmax_combine(const float* v, float v_weight, const float* x, float x_weight, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += W) {
    const vf more = x ? x_weight * load_up_to(x + i, n - i) : all(0.0f);
    store_up_to(to + i, v_weight * load_up_to(v + i, n - i) + more, n - i);
  }
}

static ContrastiveKernels contrastive_kernels() {
  return {softmax_logits,
          softmax_max,
          softmax_sum_exp,
          softmax_add_column_exps,
          softmax_moments,
          softmax_merge_sum_exps,
          softmax_raise_max,
          softmax_grad_both,
          softmax_grad_row,
          softmax_grad_columns,
          softmax_grad_hardness_row,
          softmax_grad_hardness_columns,
          softmax_grad_sum,
          softmax_grad_raw,
          softmax_weights,
          softmax_weights_of_sum,
          softmax_square_and_dot,
          softmax_combine<float>,
          softmax_combine<BFloat16>,
          softmax_combine<Half>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
