// Logits, log-sum-exps and gradients of a row's own negatives; included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

// The sum of the lanes, in halves.
FASTLOSS_INLINE float sum_of_lanes(vf x) {
  typedef float four __attribute__((vector_size(16)));
  four part[W / 4];
  __builtin_memcpy(part, &x, sizeof x);
  for (int h = W / 8; h > 0; h /= 2)
    for (int k = 0; k < h; ++k) part[k] += part[k + h];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

// <q, n> and <n, n> of R negatives, in one read of them; what is `ahead` of them is fetched into the L2 cache.
template <int R, typename T>
FASTLOSS_INLINE void per_query_dots(const T* rows, int64_t stride, int64_t ahead, const QueryRow& q, float* dot,
                                    float* square) {
  vf dots[R] = {}, squares[R] = {};
  const int64_t whole = q.dim / W * W;
  for (int64_t i = 0; i < whole; i += W) {
    const vf query = load(q.query + i);
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(rows + r * stride + i + ahead, 0, 2);
      const vf x = load(rows + r * stride + i);
      dots[r] += query * x;
      squares[r] += x * x;
    }
  }
  for (int r = 0; r < R; ++r) {
    if (whole < q.dim) {
      const vf x = load_some(rows + r * stride + whole, q.dim - whole);
      dots[r] += load(q.query + whole) * x;
      squares[r] += x * x;
    }
    dot[r] = sum_of_lanes(dots[r]);
    square[r] = sum_of_lanes(squares[r]);
  }
}

// sum = sum_weight sum + sum_r weight_r n_r
template <int R, typename T>
FASTLOSS_INLINE void add_weighted(const T* rows, int64_t stride, int64_t dim, const float* weight, float sum_weight,
                                  float* sum) {
  int64_t i = 0;
  for (; i + W <= dim; i += W) {
    vf x = load(sum + i) * sum_weight;
    for (int r = 0; r < R; ++r) x += weight[r] * load(rows + r * stride + i);
    store(sum + i, x);
  }
  if (i == dim) return;
  vf x = load(sum + i) * sum_weight;
  for (int r = 0; r < R; ++r) x += weight[r] * load_some(rows + r * stride + i, dim - i);
  store(sum + i, x);
}

// One piece of a row's negatives: running maximum, sums of exponentials relative to it, and what `to` asks for.
template <typename T>
static void per_query_read(const T* rows, int64_t stride, const bool* mask, int64_t count, const QueryRow& q,
                           PieceStats& part, const PieceOutput& to) {
  vd sum_exp[kMaxPowers] = {};
  float max = kLowest;
  const int64_t group = kGroup * stride, least = kPrefetchBytes / (int64_t)sizeof(T);
  const int64_t ahead = group > least ? group : least;
  for (int64_t k = 0; k < count; k += kGroup, rows += kGroup * stride) {
    const int n = (int)(count - k < kGroup ? count - k : kGroup);
    float dot[kGroup], square[kGroup], c[kLanes] = {}, s[kLanes];
    const bool all_count = !mask || __builtin_memchr(mask + k, 0, n) == nullptr;
    int r = 0;
    for (; all_count && r + 4 <= n; r += 4) per_query_dots<4>(rows + r * stride, stride, ahead, q, dot + r, square + r);
    for (; r < n; ++r)
      if (!mask || mask[k + r]) per_query_dots<1>(rows + r * stride, stride, ahead, q, dot + r, square + r);
    const float before = max;
    for (r = 0; r < n; ++r) {
      if (mask && !mask[k + r]) {
        s[r] = -__builtin_inff();
        if (to.logits) to.logits[k + r] = s[r];
        if (to.logits) to.inverse_norms[k + r] = 0;
        continue;
      }
      c[r] = !q.normalize ? 1.0f : square[r] <= kTinySquare ? 0.0f : 1.0f / __builtin_sqrtf(square[r]);
      if (q.normalize && square[r] > 3.4028235e38f) c[r] = __builtin_nanf("");  // the norm is not known, and not 0
      s[r] = q.scale * (c[r] * dot[r]);
      if (to.logits) to.logits[k + r] = s[r] > q.logit_limit ? -__builtin_inff() : s[r];
      if (to.logits) to.inverse_norms[k + r] = c[r];
      if (s[r] > q.logit_limit) {
        s[r] = -__builtin_inff();
      } else {
        max = s[r] > max ? s[r] : max;
        part.sum += s[r];
        part.count += 1;
      }
    }
    for (; r < kLanes; ++r) s[r] = -__builtin_inff();
    for (int a = 0; a < q.powers + q.moments; ++a) {
      const bool unweighted = a == q.powers;
      const float power = unweighted ? 0.0f : q.power[a];
      float weight[kLanes];
      for (r = 0; r < kGroup; r += W) {
        const vf x = load(s + r);
        const vf p = unweighted ? (x == -__builtin_inff() ? all(0.0f) : all(1.0f)) : exp(power * (x - max));
        if (!unweighted) {
          const float rescale = r ? 1.0f : exp(all(power * (before - max)))[0];
          sum_exp[a] = sum_exp[a] * (double)rescale + __builtin_convertvector(p, vd);
        }
        store(weight + r, p * load(c + r));
      }
      if (!to.weighted_keys) continue;
      float* sum = to.weighted_keys + a * whole_vectors(q.dim);
      const float rescale = unweighted ? 1.0f : exp(all(power * (before - max)))[0];
      if (all_count && n == kGroup) {
        add_weighted<kGroup>(rows, stride, q.dim, weight, rescale, sum);
        continue;
      }
      float sum_weight = rescale;
      for (r = 0; r < n; ++r) {
        if (mask && !mask[k + r]) continue;
        add_weighted<1>(rows + r * stride, stride, q.dim, weight + r, sum_weight, sum);
        sum_weight = 1.0f;
      }
    }
  }
  part.max = max;
  for (int a = 0; a < q.powers; ++a) part.sum_exp[a] = sum(sum_exp[a]);
}

// Of n <= kGradLogits logits what makes their negatives' gradients: dn = query_weight q - negative_weight n.
static void per_query_grad_weights(const float* logits, const float* inverse_norms, int64_t n, const QueryRow& q,
                                   const UpstreamRow& up, float* query_weight, float* negative_weight) {
  for (int64_t k = 0; k < n; k += W) {
    const vf saved = k + W <= n ? load(logits + k) : load_some(logits + k, n - k);
    const vf c = k + W <= n ? load(inverse_norms + k) : load_some(inverse_norms + k, n - k);
    const vi left_out = saved == -__builtin_inff();
    const vf s = left_out ? all(0.0f) : saved;
    vf grad_logit = up.grad_sum + up.grad_lse[0] * exp(s - up.lse[0]);
    if (q.powers == kMaxPowers) {
      const vf d = s - up.max, h = up.grad_lse[1] * exp(q.power[1] * d - up.lse[1]);
      grad_logit += h + q.power[2] * (h + up.grad_lse[2] * exp(q.power[2] * d - up.lse[2]));
    }
    grad_logit = left_out ? all(0.0f) : grad_logit;
    store(query_weight + k, grad_logit * q.scale * c);
    store(negative_weight + k, grad_logit * s * c * c);
  }
}

template <typename T>
static void per_query_grad(const T* rows, int64_t stride, int64_t count, const QueryRow& q, const float* query_weight,
                           const float* negative_weight, T* to, bool streamed) {
  for (int64_t k = 0; k < count; ++k, rows += stride, to += q.dim) {
    const bool none = query_weight[k] == 0 && negative_weight[k] == 0;  // of a negative that is left out: it may be NaN
    int64_t i = 0;
    for (; none && i + W <= q.dim; i += W) streamed ? stream(to + i, all(0.0f)) : store(to + i, all(0.0f));
    for (; i + W <= q.dim; i += W) {
      vf x = query_weight[k] * load(q.query + i);
      if (q.normalize) x -= negative_weight[k] * load(rows + i);
      streamed ? stream(to + i, x) : store(to + i, x);
    }
    if (i == q.dim) continue;
    const int64_t rest = q.dim - i;
    vf x = query_weight[k] * load(q.query + i);
    if (none) x = all(0.0f);
    if (q.normalize && !none) x -= negative_weight[k] * load_some(rows + i, rest);
    store_some(to + i, x, rest);
  }
  if (streamed) fence();
}

template <typename T>
static PerQueryKernels<T> per_query_kernels() {
  return {per_query_read<T>, per_query_grad_weights, per_query_grad<T>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
