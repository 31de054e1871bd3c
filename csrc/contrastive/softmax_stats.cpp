// Statistics of the logits of softmax contrastive losses. Logits exist one chunk at a time (or, where they are
// few, all are kept): a library's matrix product writes them, one pass over tiles reads them. The backward: gradients
// of the embeddings, their scales and biases.

#include "contrastive/logit_gradients.h"
#include "contrastive/online_softmax.h"
#include "contrastive/weighted_keys.h"
#include "core/op.h"

namespace fastloss {
namespace {

struct Inputs {
  Tensor query, key, row_scale;
  Given column_scale, bias, targets, row_ids, column_ids, ceiling;
  Form form;
  double hardness, workspace_mib;
  std::string save;
  template <typename F>
  void fields(const F& f) {
    f(query), f(key), f(row_scale), f(column_scale), f(bias), f(targets), f(row_ids), f(column_ids), f(ceiling);
    f(form), f(hardness), f(workspace_mib), f(save);
  }
};

struct Saved {
  Tensor stats, logits, weighted_keys;
  template <typename F>
  void fields(const F& f) {
    f(stats), f(logits), f(weighted_keys);
  }
};

struct Grads {
  Tensor query, key, row_scale, column_scale, bias;
  template <typename F>
  void fields(const F& f) {
    f(query), f(key), f(row_scale), f(column_scale), f(bias);
  }
};

struct Needs {
  bool query, key, row_scale, column_scale, bias;
  template <typename F>
  void fields(const F& f) {
    f(query), f(key), f(row_scale), f(column_scale), f(bias);
  }
};

LogitMatrix matrix_of(const Inputs& x) {
  LogitMatrix p(x.query, x.key, x.form, x.hardness);
  p.scales(x.row_scale, x.column_scale, x.bias);
  p.masks(x.targets, x.row_ids, x.column_ids, x.ceiling);
  return p;
}

Saved softmax_stats_fwd(const Inputs& x) {
  STD_TORCH_CHECK(x.save.empty() || x.save == "weighted_keys" || x.save == "logits",
                  "softmax_stats: the C++ kernels know no save ", x.save);
  LogitMatrix p = matrix_of(x);
  const auto empty = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(x.row_scale, shape); };
  const bool sums = x.save == "weighted_keys", logits = x.save == "logits";
  Saved saved{empty({p.directions(), p.statistics(), p.rows}), empty({0}),
              empty({sums ? p.sums() : 0, p.rows, p.width})};
  if (sums) {
    make_weighted_keys(p, x.workspace_mib, output<float>(saved.stats), saved.weighted_keys);
    return saved;
  }
  const auto kept = make_statistics(p, x.workspace_mib, logits ? p.rows : 0, output<float>(saved.stats));
  if (logits) saved.logits = kept.has_value() ? *kept : empty({p.rows, p.columns});
  return saved;
}

// Adds h + hardness (h + g): h is the weighted key at 1 + hardness times its upstream gradient, g the one at hardness.
// h and g nearly cancel, so they are added before they are multiplied by the hardness.
void add_hard(int64_t width, float hardness, const HardGrads<float>& grads,
              const HardGrads<const float*>& weighted_keys, float* to) {
  for (int64_t d = 0; d < width; ++d) {
    const float h = grads.harder * weighted_keys.harder[d];
    to[d] += h + hardness * (h + grads.hard * weighted_keys.hard[d]);
  }
}

// The gradients of queries and their scales (empty: not needed) from what the forward has made.
void from_weighted_keys(const LogitMatrix& p, const Upstream& upstream, const Tensor& weighted_keys, Tensor& query_grad,
                        Tensor& scale_grad) {
  const int64_t factors = static_cast<int64_t>(p.factors.size());
  const float* from = input<float>(weighted_keys);
  for_dtype(query_grad.scalar_type(), "softmax_stats", [&](auto element) {
    using T = decltype(element);
    T* to = query_grad.numel() > 0 ? output<T>(query_grad) : nullptr;
    for_each(blocks_of(p.rows, kRows), [&](int64_t block) {
      std::vector<float> t(p.width);
      for (int64_t i = block * kRows; i < std::min((block + 1) * kRows, p.rows); ++i) {
        std::fill(t.begin(), t.end(), 0.0f);
        const auto sum = [&](int64_t a) { return from + (a * p.rows + i) * p.width; };
        const auto add = [&](float weight, const float* more) {
          for (int64_t d = 0; d < p.width; ++d) t[d] += weight * more[d];
        };
        add(upstream.grad[0][i], sum(0));
        if (p.hard())
          add_hard(p.width, p.hardness(), {upstream.grad[1][i], upstream.grad[2][i]}, {sum(1), sum(2)}, t.data());
        if (p.moments) add(upstream.sum[i], sum(factors));
        double along = 0;
        const float* x = input<float>(p.query) + i * p.width;
        for (int64_t d = 0; d < p.width; ++d) along += static_cast<double>(x[d]) * t[d];
        if (scale_grad.numel() > 0) output<float>(scale_grad)[i] = static_cast<float>(along);
        for (int64_t d = 0; to && d < p.width; ++d) to[i * p.width + d] = static_cast<T>(p.row_scale[i] * t[d]);
      }
    });
  });
}

Grads softmax_stats_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs) {
  LogitMatrix p = matrix_of(x);
  const Tensor upstream = torch::stable::contiguous(grad), stats = torch::stable::contiguous(saved.stats);
  const auto none = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  const Tensor& row_scale = x.row_scale;
  Upstream of_rows(p, upstream, stats, 0);
  Tensor query_grad = needs.query ? torch::stable::new_empty(x.query, {p.rows, p.width}) : none(x.query);
  if (x.save == "weighted_keys") {
    STD_TORCH_CHECK(!needs.key && !needs.column_scale && !needs.bias,
                    "softmax_stats: the forward saved nothing for this gradient");
    Tensor scale_grad = needs.row_scale ? torch::stable::new_empty(row_scale, {p.rows}) : none(row_scale);
    from_weighted_keys(p, of_rows, saved.weighted_keys, query_grad, scale_grad);
    return {query_grad, none(x.key), scale_grad, none(row_scale), none(row_scale)};
  }
  Gradient gradient(p, std::move(of_rows), p.symmetric ? Upstream(p, upstream, stats, p.directions() - 1) : Upstream());
  gradient.needs_column_scale = needs.column_scale;
  gradient.needs_bias = needs.bias;
  Tensor key_grad = needs.key ? torch::stable::new_empty(x.key, {p.columns, p.width}) : none(x.key);
  if (p.empty()) {
    torch::stable::zero_(query_grad);
    torch::stable::zero_(key_grad);
  } else {
    const auto put = [](Tensor& to, int64_t begin, const Tensor& from) {
      Tensor part = slice(to, 0, begin, from.size(0));
      torch::stable::copy_(part, from);
    };
    make_gradients(
        gradient, p, saved.logits, x.workspace_mib, needs.query, needs.key,
        [&](int64_t begin, const Tensor& v) { put(query_grad, begin, v); },
        [&](int64_t first, const Tensor& u) { put(key_grad, first, u); });
  }
  return {query_grad, key_grad, needs.row_scale ? gradient.row_scale(row_scale) : none(row_scale),
          needs.column_scale ? gradient.column_scale(row_scale) : none(row_scale),
          needs.bias ? gradient.bias(row_scale) : none(row_scale)};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("softmax_stats_fwd", FASTLOSS_BOX(&fastloss::softmax_stats_fwd));
  m.impl("softmax_stats_bwd", FASTLOSS_BOX(&fastloss::softmax_stats_bwd));
}
