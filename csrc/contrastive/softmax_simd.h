// One row of a tile of logits at a time, at most kColumns long and padded to whole vectors with -inf: its maximum, its
// sums of exponentials, its gradient. Included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

FASTLOSS_INLINE vf larger(vf a, vf b) { return (a > b) | (a != a) ? a : b; }  // NaN stays

// raw products become logits; those that are no negatives, and the padding, become -inf.
static void contrastive_logits(const float* raw, int64_t n, const RowOf& row, const ColumnsOf& columns, float* to) {
  const vf none = all(-__builtin_inff());
  for (int64_t i = 0; i < n; i += W) {
    const vf x = n - i < W ? load_some(raw + i, n - i) : load(raw + i);
    const vf similar = x * load(columns.scale + i) * row.scale;
    const vf ceiling = columns.ceiling ? load(columns.ceiling + i) : all(row.ceiling);
    vf s = similar > ceiling ? none : similar + load(columns.bias + i);
    if (columns.ids) {
      const vl same = (vl)(load_bits<vl>(columns.ids + i) == (vl{} + (uint64_t)row.id));
      s = __builtin_convertvector(same, vu) ? none : s;
    }
    store(to + i, s);
  }
  for (int64_t i = n; i < (n + W - 1) / W * W; ++i) to[i] = -__builtin_inff();
}

// The row's largest logit; of_columns (or null) takes the columns' largest.
static float contrastive_most(const float* s, int64_t n, float* of_columns) {
  vf top[2] = {all(kLowest), all(kLowest)};
  for (int64_t i = 0; i < n; i += W) {
    const vf x = load(s + i);
    top[i / W % 2] = larger(x, top[i / W % 2]);
    if (of_columns) store(of_columns + i, larger(x, load(of_columns + i)));
  }
  const vf both = larger(top[0], top[1]);
  float most = both[0];
  for (int k = 1; k < W; ++k) most = both[k] > most || both[k] != both[k] ? both[k] : most;
  return most;
}

// sum_j e^(factor (s_j - most))
static double contrastive_row(const float* s, int64_t n, float factor, float most) {
  vd total{};
  for (int64_t i = 0; i < n;) {
    vf part{};  // of 32 vectors, before it moves to double: the error does not grow with n
    for (int step = 0; step < 32 && i < n; ++step, i += W) part += exp((load(s + i) - most) * factor);
    total += __builtin_convertvector(part, vd);
  }
  return sum(total);
}

// total_j += e^(factor (s_j - most_j))
static void contrastive_columns(const float* s, int64_t n, float factor, const float* most, float* total) {
  for (int64_t i = 0; i < n; i += W) store(total + i, load(total + i) + exp((load(s + i) - load(most + i)) * factor));
}

// Sum and number of the row's negatives; also added to the columns' (or null).
static SumAndCount contrastive_moments(const float* s, int64_t n, float* column_sum, float* column_count) {
  vd total{}, count{};
  for (int64_t i = 0; i < n; i += W) {
    const vf x = load(s + i);
    const vi there = x != -__builtin_inff();
    const vf value = there ? x : all(0.0f), one = there ? all(1.0f) : all(0.0f);
    total += __builtin_convertvector(value, vd);
    count += __builtin_convertvector(one, vd);
    if (!column_sum) continue;
    store(column_sum + i, load(column_sum + i) + value);
    store(column_count + i, load(column_count + i) + one);
  }
  return {sum(total), sum(count)};
}

// Adds a group of rows to the running sums of exponentials of columns whose maximum moves from `before` to `now`.
static void contrastive_merge(int64_t n, float factor, const float* before, const float* now, const float* most,
                              const float* part, double* total) {
  for (int64_t i = 0; i < n; i += W) {
    const vf m = load(now + i);
    const vd kept = __builtin_convertvector(exp((load(before + i) - m) * factor), vd);
    const vd more = __builtin_convertvector(exp((load(most + i) - m) * factor), vd);
    store_bits(total + i, load_bits<vd>(total + i) * kept + __builtin_convertvector(load(part + i), vd) * more);
  }
}
static void contrastive_raise(int64_t n, const float* most, float* now) {
  for (int64_t i = 0; i < n; i += W) store(now + i, larger(load(most + i), load(now + i)));
}

// g_j = (row + column_j) e^(s_j - at): both directions by one exponential, where their log-sum-exps are not far apart.
static void contrastive_grad_both(const float* s, int64_t n, float at, float row, const float* column, float* g) {
  for (int64_t i = 0; i < n; i += W) store(g + i, (load(column + i) + row) * exp(load(s + i) - at));
}
// g_j += grad e^(s_j - lse)
static void contrastive_grad_row(const float* s, int64_t n, float lse, float grad, float* g) {
  for (int64_t i = 0; i < n; i += W) store(g + i, load(g + i) + grad * exp(load(s + i) - lse));
}
// g_j += grad_j e^(s_j - lse_j)
static void contrastive_grad_columns(const float* s, int64_t n, const float* lse, const float* grad, float* g) {
  for (int64_t i = 0; i < n; i += W) store(g + i, load(g + i) + load(grad + i) * exp(load(s + i) - load(lse + i)));
}
// With d_j = s_j - most and h_j = harder e^((1 + hardness) d_j - lse'), of which hardness times is to cancel exactly:
// g_j += h_j + hardness (h_j + hard e^(hardness d_j - lse))
static void contrastive_grad_hard_row(const float* s, int64_t n, float hardness, const HardSums<float>& sums,
                                      const HardGrads<float>& grads, float* g) {
  const float harder = 1 + hardness;
  for (int64_t i = 0; i < n; i += W) {
    const vf d = load(s + i) - sums.most, h = grads.harder * exp(d * harder - sums.harder);
    store(g + i, load(g + i) + (h + hardness * (h + grads.hard * exp(d * hardness - sums.hard))));
  }
}
static void contrastive_grad_hard_columns(const float* s, int64_t n, float hardness, const HardSums<const float*>& sums,
                                          const HardGrads<const float*>& grads, float* g) {
  const float harder = 1 + hardness;
  for (int64_t i = 0; i < n; i += W) {
    const vf d = load(s + i) - load(sums.most + i);
    const vf h = load(grads.harder + i) * exp(d * harder - load(sums.harder + i));
    const vf less = load(grads.hard + i) * exp(d * hardness - load(sums.hard + i));
    store(g + i, load(g + i) + (h + hardness * (h + less)));
  }
}
// g_j += row + column_j (or null) where j is a negative
static void contrastive_grad_sum(const float* s, int64_t n, float row, const float* column, float* g) {
  for (int64_t i = 0; i < n; i += W) {
    const vf more = column ? load(column + i) + row : all(row);
    store(g + i, load(g + i) + (load(s + i) != -__builtin_inff() ? more : all(0.0f)));
  }
}

// The gradient of the raw products, to[j] = g_j row.scale scale_j; added to the columns' sums (or null); the row's sum.
static double contrastive_finish(const float* raw, const float* g, int64_t n, float scale, const float* column_scale,
                                 float* of_scale, float* of_bias, float* to) {
  vd total{};
  for (int64_t i = 0; i < n;) {
    vf part{};
    for (int step = 0; step < 32 && i < n; ++step, i += W) {
      const bool whole = n - i >= W;
      const vf grad = load(g + i), x = whole ? load(raw + i) : load_some(raw + i, n - i);
      const vf scaled = grad * load(column_scale + i), h = scaled * scale;
      part += scaled * x;
      if (of_scale) store(of_scale + i, load(of_scale + i) + grad * scale * x);
      if (of_bias) store(of_bias + i, load(of_bias + i) + grad);
      if (whole)
        store(to + i, h);
      else
        store_some(to + i, h, n - i);
    }
    total += __builtin_convertvector(part, vd);
  }
  return sum(total);
}

// to_j = e^(factor (s_j - most)) scale_j, where `to` has n elements; the sum of the exponentials.
static double contrastive_pull(const float* s, int64_t n, float factor, float most, const float* column_scale,
                               float* to) {
  vd total{};
  for (int64_t i = 0; i < n;) {
    vf part{};
    for (int step = 0; step < 32 && i < n; ++step, i += W) {
      const vf e = exp((load(s + i) - most) * factor);
      part += e;
      store_up_to(to + i, e * load(column_scale + i), n - i);
    }
    total += __builtin_convertvector(part, vd);
  }
  return sum(total);
}
// to_j = scale_j where j is a negative, else 0
static void contrastive_pull_sum(const float* s, int64_t n, const float* column_scale, float* to) {
  for (int64_t i = 0; i < n; i += W)
    store_up_to(to + i, load(s + i) != -__builtin_inff() ? load(column_scale + i) : all(0.0f), n - i);
}
// <a, a> and <a, b>, each in four chains of vectors.
static OwnAndBoth contrastive_products(const float* a, const float* b, int64_t n) {
  vf own[4] = {}, both[4] = {};
  for (int64_t i = 0; i < n;)
    for (int k = 0; k < 4 && i < n; ++k, i += W) {
      const vf x = load_up_to(a + i, n - i), y = load_up_to(b + i, n - i);
      own[k] += x * x;
      both[k] += x * y;
    }
  const auto total = [](const vf* v) {
    return sum(__builtin_convertvector(v[0] + v[1], vd) + __builtin_convertvector(v[2] + v[3], vd));
  };
  return {total(own), total(both)};
}

// to = factor v + along x (no x: 0)
template <typename T>
static void contrastive_combine(const float* v, float factor, const float* x, float along, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += W)
    store_up_to(to + i, factor * load_up_to(v + i, n - i) + (x ? along * load_up_to(x + i, n - i) : all(0.0f)), n - i);
}

static ContrastiveKernels contrastive_kernels() {
  return {contrastive_logits,
          contrastive_most,
          contrastive_row,
          contrastive_columns,
          contrastive_moments,
          contrastive_merge,
          contrastive_raise,
          contrastive_grad_both,
          contrastive_grad_row,
          contrastive_grad_columns,
          contrastive_grad_hard_row,
          contrastive_grad_hard_columns,
          contrastive_grad_sum,
          contrastive_finish,
          contrastive_pull,
          contrastive_pull_sum,
          contrastive_products,
          contrastive_combine<float>,
          contrastive_combine<BFloat16>,
          contrastive_combine<Half>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
