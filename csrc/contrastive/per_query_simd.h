// Logits, log-sum-exps and gradients of a row's own negatives; included by for_each_isa.h.

namespace fastloss {
namespace FASTLOSS_ISA {

// The sum of the lanes, in halves.
FASTLOSS_INLINE float total(vf x) {
  typedef float four __attribute__((vector_size(16)));
  four part[W / 4];
  __builtin_memcpy(part, &x, sizeof x);
  for (int h = W / 8; h > 0; h /= 2)
    for (int k = 0; k < h; ++k) part[k] += part[k + h];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

// <q, n> and <n, n> of R negatives, in one read of them; what is `ahead` of them is fetched into the L2 cache.
template <int R, typename T>
FASTLOSS_INLINE void each_products(const T* rows, int64_t stride, int64_t ahead, const EachQuery& q, float* dot,
                                   float* square) {
  vf product[R] = {}, length[R] = {};
  const int64_t whole = q.width / W * W;
  for (int64_t i = 0; i < whole; i += W) {
    const vf at = load(q.query + i);
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(rows + r * stride + i + ahead, 0, 2);
      const vf x = load(rows + r * stride + i);
      product[r] += at * x;
      length[r] += x * x;
    }
  }
  for (int r = 0; r < R; ++r) {
    if (whole < q.width) {
      const vf x = load_some(rows + r * stride + whole, q.width - whole);
      product[r] += load(q.query + whole) * x;
      length[r] += x * x;
    }
    dot[r] = total(product[r]);
    square[r] = total(length[r]);
  }
}

// sum = factor sum + sum_r weight_r n_r
template <int R, typename T>
FASTLOSS_INLINE void each_pull(const T* rows, int64_t stride, int64_t width, const float* weight, float factor,
                               float* sum) {
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    vf x = load(sum + i) * factor;
    for (int r = 0; r < R; ++r) x += weight[r] * load(rows + r * stride + i);
    store(sum + i, x);
  }
  if (i == width) return;
  vf x = load(sum + i) * factor;
  for (int r = 0; r < R; ++r) x += weight[r] * load_some(rows + r * stride + i, width - i);
  store(sum + i, x);
}

// One piece of a row's negatives: running maximum and sums; `pulls` (one sum of vectors for each power, then the plain
// one), `logits` and `inverse` only where they are not null.
template <typename T>
static void each_read(const T* rows, int64_t stride, int64_t count, const EachQuery& q, EachPart& part, float* pulls,
                      float* logits, float* inverse) {
  vd sums[3] = {};
  float most = kLowest;
  const int64_t near = kGroup * stride, far = kAhead / (int64_t)sizeof(T), ahead = near > far ? near : far;
  for (int64_t k = 0; k < count; k += kGroup, rows += kGroup * stride) {
    const int n = (int)(count - k < kGroup ? count - k : kGroup);
    float dot[kGroup], square[kGroup], c[kLanes] = {}, s[kLanes];
    int r = 0;
    for (; r + 4 <= n; r += 4) each_products<4>(rows + r * stride, stride, ahead, q, dot + r, square + r);
    for (; r < n; ++r) each_products<1>(rows + r * stride, stride, ahead, q, dot + r, square + r);
    const float before = most;
    for (r = 0; r < n; ++r) {
      c[r] = !q.normalize ? 1.0f : square[r] <= kTinySquare ? 0.0f : 1.0f / __builtin_sqrtf(square[r]);
      if (q.normalize && square[r] > 3.4028235e38f) c[r] = __builtin_nanf("");  // of a length that is not known, not 0
      s[r] = q.scale * (c[r] * dot[r]);
      if (logits) logits[k + r] = s[r] > q.ceiling ? -__builtin_inff() : s[r];
      if (logits) inverse[k + r] = c[r];
      if (s[r] > q.ceiling) {
        s[r] = -__builtin_inff();
      } else {
        most = s[r] > most ? s[r] : most;
        part.sum += s[r];
        part.count += 1;
      }
    }
    for (; r < kLanes; ++r) s[r] = -__builtin_inff();
    for (int a = 0; a < q.powers + q.moments; ++a) {
      const bool plain = a == q.powers;
      const float power = plain ? 0.0f : q.power[a];
      float weight[kLanes];
      for (r = 0; r < kGroup; r += W) {
        const vf x = load(s + r);
        const vf p = plain ? (x == -__builtin_inff() ? all(0.0f) : all(1.0f)) : exp(power * (x - most));
        if (!plain) {
          const float factor = r ? 1.0f : exp(all(power * (before - most)))[0];
          sums[a] = sums[a] * (double)factor + __builtin_convertvector(p, vd);
        }
        store(weight + r, p * load(c + r));
      }
      if (!pulls) continue;
      float* sum = pulls + a * padded(q.width);
      const float factor = plain ? 1.0f : exp(all(power * (before - most)))[0];
      if (n == kGroup) {
        each_pull<kGroup>(rows, stride, q.width, weight, factor, sum);
        continue;
      }
      for (r = 0; r < n; ++r) each_pull<1>(rows + r * stride, stride, q.width, weight + r, r ? 1.0f : factor, sum);
    }
  }
  part.most = most;
  for (int a = 0; a < q.powers; ++a) part.total[a] = sum(sums[a]);
}

// What n <= kSlopes logits pull at their negatives: dn = along q - back n.
static void each_slopes(const float* logits, const float* inverse, int64_t n, const EachQuery& q, const EachSlope& g,
                        float* along, float* back) {
  for (int64_t k = 0; k < n; k += W) {
    const vf given = k + W <= n ? load(logits + k) : load_some(logits + k, n - k);
    const vf c = k + W <= n ? load(inverse + k) : load_some(inverse + k, n - k);
    const vi out = given == -__builtin_inff();
    const vf s = out ? all(0.0f) : given;
    vf slope = g.sum + g.mass[0] * exp(s - g.lse[0]);
    if (q.powers == 3) {
      const vf d = s - g.most, h = g.mass[1] * exp(q.power[1] * d - g.lse[1]);
      slope += h + q.power[2] * (h + g.mass[2] * exp(q.power[2] * d - g.lse[2]));
    }
    slope = out ? all(0.0f) : slope;
    store(along + k, slope * q.scale * c);
    store(back + k, slope * s * c * c);
  }
}

template <typename T>
static void each_grad(const T* rows, int64_t stride, int64_t count, const EachQuery& q, const float* along,
                      const float* back, T* to, bool streamed) {
  for (int64_t k = 0; k < count; ++k, rows += stride, to += q.width) {
    int64_t i = 0;
    for (; i + W <= q.width; i += W) {
      vf x = along[k] * load(q.query + i);
      if (q.normalize) x -= back[k] * load(rows + i);
      streamed ? stream(to + i, x) : store(to + i, x);
    }
    if (i == q.width) continue;
    const int64_t rest = q.width - i;
    vf x = along[k] * load(q.query + i);
    if (q.normalize) x -= back[k] * load_some(rows + i, rest);
    store_some(to + i, x, rest);
  }
  if (streamed) fence();
}

template <typename T>
static EachKernels<T> each_kernels() {
  return {each_read<T>, each_slopes, each_grad<T>};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
