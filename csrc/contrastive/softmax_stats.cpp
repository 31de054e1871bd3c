// Statistics of the logits of softmax contrastive losses, as softmax_stats.py defines them, and the gradients of
// embeddings, scales and biases. Logits exist one block at a time, or all of them where they are saved: a library's
// matrix product writes them, one pass over tiles reads them.

#include "contrastive/logit_gradients.h"
#include "contrastive/online_softmax.h"
#include "contrastive/save.h"
#include "contrastive/weighted_keys.h"
#include "core/op.h"

namespace fastloss {
namespace {

constexpr char kOp[] = "softmax_stats";

struct Inputs {
  Tensor query, key, row_scale;
  OptionalTensor column_scale, bias, targets, row_ids, column_ids, logit_limit;
  Form form;
  double hardness, workspace_mib;
  std::string save;
  OptionalTensor pair_spans, pair_words;
  FASTLOSS_FIELDS(query, key, row_scale, column_scale, bias, targets, row_ids, column_ids, logit_limit, form, hardness,
                  workspace_mib, save, pair_spans, pair_words)
  Save saves() const { return save_of(kOp, save, {Save::kNothing, Save::kWeightedKeys, Save::kLogits}); }
};
struct Saved {
  Tensor stats, logits, weighted_keys;
  FASTLOSS_FIELDS(stats, logits, weighted_keys)
};
template <typename T>
struct PerInput {
  T query, key, row_scale, column_scale, bias;
  FASTLOSS_FIELDS(query, key, row_scale, column_scale, bias)
};
using Grads = PerInput<Tensor>;
using Needs = PerInput<bool>;

LogitMatrix logit_matrix(const Inputs& x) {
  LogitMatrix p(kOp, x.query, x.key, x.form, x.hardness);
  p.set_scales(x.row_scale, x.column_scale, x.bias);
  p.set_targets(x.targets);
  p.set_ids(x.row_ids, x.column_ids);
  p.set_logit_limit(x.logit_limit);
  p.set_pairs(x.pair_spans, x.pair_words);
  return p;
}

Saved softmax_stats_fwd(const Inputs& x) {
  const Save save = x.saves();
  LogitMatrix p = logit_matrix(x);
  const auto new_empty = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(x.row_scale, shape); };
  Saved saved{new_empty({p.directions(), p.stats_count(), p.rows}), new_float32(0),
              new_empty({save == Save::kWeightedKeys ? p.sums_count() : 0, p.rows, p.dim})};
  if (save == Save::kWeightedKeys) {
    STD_TORCH_CHECK(!p.symmetric, kOp, ": save: \"weighted_keys\" are for one direction");
    make_weighted_keys(p, x.workspace_mib, output<float>(saved.stats), saved.weighted_keys);
    return saved;
  }
  const bool saves_logits = save == Save::kLogits;
  const auto logits = make_statistics(p, x.workspace_mib, saves_logits ? p.rows : 0, output<float>(saved.stats));
  if (saves_logits) saved.logits = logits.has_value() ? *logits : new_float32({p.rows, p.columns});
  return saved;
}

// Adds h + hardness (h + g) to `to`, where h and g are the weighted keys of the log-sum-exps at 1 + hardness and at
// hardness, each times its gradient. h and g nearly cancel, so they are added before they are multiplied by hardness.
void add_hardness(int64_t dim, float hardness, const HardnessGrads<float>& grads,
                  const HardnessGrads<const float*>& weighted_keys, float* to) {
  for (int64_t d = 0; d < dim; ++d) {
    const float h = grads.lse_1p_beta * weighted_keys.lse_1p_beta[d];
    to[d] += h + hardness * (h + grads.lse_beta * weighted_keys.lse_beta[d]);
  }
}

// Writes the gradients of queries and their scales (empty: not needed) from the weighted keys of the forward.
void grads_of_weighted_keys(const LogitMatrix& p, const Upstream& up, const Tensor& weighted_keys, Grads& grads) {
  const int64_t powers = static_cast<int64_t>(p.powers.size());
  const float* sums = input<float>(weighted_keys);
  for_dtype(grads.query.scalar_type(), kOp, [&](auto element) {
    using T = decltype(element);
    T* to = grads.query.numel() > 0 ? output<T>(grads.query) : nullptr;
    for_each(blocks_of(p.rows, kTileRows), [&](int64_t block) {
      std::vector<float> t(p.dim);  // the gradient of row_scale_i query_i
      for (int64_t i = block * kTileRows; i < std::min((block + 1) * kTileRows, p.rows); ++i) {
        std::fill(t.begin(), t.end(), 0.0f);
        const auto of_sum = [&](int64_t a) { return sums + (a * p.rows + i) * p.dim; };
        const auto add = [&](float weight, const float* more) {
          for (int64_t d = 0; d < p.dim; ++d) t[d] += weight * more[d];
        };
        add(up.grad_lse[0][i], of_sum(0));
        if (p.has_hardness())
          add_hardness(p.dim, p.hardness(), {up.grad_lse[1][i], up.grad_lse[2][i]}, {of_sum(1), of_sum(2)}, t.data());
        if (p.moments) add(up.grad_sum[i], of_sum(powers));
        double dot = 0;
        const float* query = input<float>(p.query) + i * p.dim;
        for (int64_t d = 0; d < p.dim; ++d) dot += static_cast<double>(query[d]) * t[d];
        if (grads.row_scale.numel() > 0) output<float>(grads.row_scale)[i] = static_cast<float>(dot);
        for (int64_t d = 0; to && d < p.dim; ++d) to[i * p.dim + d] = static_cast<T>(p.row_scale[i] * t[d]);
      }
    });
  });
}

// The same, and the gradients of keys, their scales and biases, from products that were saved or are made again.
void grads_of_products(LogitMatrix& p, LogitGradients& gradients, const Inputs& x, const Tensor& saved_logits,
                       const Needs& needs, Grads& grads) {
  gradients.needs_column_scale = needs.column_scale;
  gradients.needs_bias = needs.bias;
  if (p.empty()) {
    torch::stable::zero_(grads.query);
    torch::stable::zero_(grads.key);
  } else {
    const auto put = [](Tensor& to, int64_t begin, const Tensor& from) {
      Tensor part = slice(to, 0, begin, from.size(0));
      torch::stable::copy_(part, from);
    };
    make_embedding_grads(
        gradients, p, saved_logits, x.workspace_mib, {needs.query, needs.key},
        [&](int64_t begin, const Tensor& from) { put(grads.query, begin, from); },
        [&](int64_t first, const Tensor& from) { put(grads.key, first, from); });
  }
  if (needs.row_scale) grads.row_scale = gradients.row_scale_grad();
  if (needs.column_scale) grads.column_scale = gradients.column_scale_grad();
  if (needs.bias) grads.bias = gradients.bias_grad();
}

Grads softmax_stats_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs) {
  const Save save = x.saves();
  LogitMatrix p = logit_matrix(x);
  const Tensor grad_stats = as_contiguous(grad), stats = as_contiguous(saved.stats);
  const auto new_like = [](const Tensor& t, bool needed) {
    return needed ? torch::stable::new_empty(t, {t.size(0), t.size(1)}) : torch::stable::new_empty(t, {0});
  };
  Grads grads{new_like(x.query, needs.query), new_like(x.key, needs.key), new_float32(0), new_float32(0),
              new_float32(0)};
  Upstream rows(p, grad_stats, stats, 0);
  if (save == Save::kWeightedKeys) {
    STD_TORCH_CHECK(!needs.key && !needs.column_scale && !needs.bias, kOp,
                    ": save: \"weighted_keys\" leave no gradient of key, column_scale and bias");
    if (needs.row_scale) grads.row_scale = new_float32(p.rows);
    grads_of_weighted_keys(p, rows, saved.weighted_keys, grads);
    return grads;
  }
  LogitGradients gradients(p, std::move(rows),
                           p.symmetric ? Upstream(p, grad_stats, stats, p.directions() - 1) : Upstream());
  grads_of_products(p, gradients, x, saved.logits, needs, grads);
  return grads;
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("softmax_stats_fwd", FASTLOSS_BOX(&fastloss::softmax_stats_fwd));
  m.impl("softmax_stats_bwd", FASTLOSS_BOX(&fastloss::softmax_stats_bwd));
}
