// A call of the plain softmax losses: inverse norms, positives, and what follows from the log-sum-exps.
#pragma once

#include "contrastive/norms.h"
#include "contrastive/save.h"
#include "core/op.h"

#include <cmath>

namespace fastloss {
namespace softmax_loss {

constexpr char kOp[] = "softmax_loss";

struct Inputs {
  Tensor query, key;
  OptionalTensor scale, row_weight, targets;
  double fixed_scale = 1;
  bool include_positive = true, symmetric = false, normalize = false;
  std::string reduction;
  int64_t needs = 0;
  std::string save;
  int64_t saved_rows = 0;
  double workspace_mib = 0;
  FASTLOSS_FIELDS(query, key, scale, row_weight, targets, fixed_scale, include_positive, symmetric, normalize,
                  reduction, needs, save, saved_rows, workspace_mib)
  Save saves() const { return save_of(kOp, save, {Save::kNothing, Save::kRowGrads, Save::kGrads, Save::kLogits}); }
};
struct Saved {
  Tensor stats, inverse_norms, logits, query_grad, key_grad, scale_grad;
  FASTLOSS_FIELDS(stats, inverse_norms, logits, query_grad, key_grad, scale_grad)
};
template <typename T>
struct PerInput {
  T query, key, scale;
  FASTLOSS_FIELDS(query, key, scale)
};
using Grads = PerInput<Tensor>;
using Needs = PerInput<bool>;

}  // namespace softmax_loss

constexpr int64_t kQuery = 1, kKey = 2, kScale = 4, kNegatives = 8;  // bits of `needs`, as in save_plan.py

// What both plain losses compute beside the logits: the one of shared keys, and the one of each query's own negatives,
// which gives query and key alone.
struct SoftmaxLoss {
  LogitMatrix p;
  double scale = 1;  // the tensor of this name; `fixed_scale` multiplies it
  const double fixed_scale;
  const bool include_positive, normalize, unreduced;
  std::vector<int64_t> target;                              // column of each row's positive
  std::vector<float> row_weight;                            // of loss_i in the result; over M for a mean
  std::vector<float> query_inverse_norm, key_inverse_norm;  // 1 without `normalize`
  std::vector<float> positive;                              // p_i
  std::vector<float> row_lse, column_lse;                   // n of rows and, with `symmetric`, of columns

  SoftmaxLoss(const char* op, const softmax_loss::Inputs& x)
      : p(op, x.query, x.key,
          {.diagonal = !x.targets.has_value(), .symmetric = x.symmetric, .bfloat16 = are_bfloat16(x.query, x.key)}),
        fixed_scale(x.fixed_scale),
        include_positive(x.include_positive),
        normalize(x.normalize),
        unreduced(x.reduction == "none") {
    if (x.scale.has_value()) {
      STD_TORCH_CHECK(x.scale->numel() == 1 && x.scale->scalar_type() == ScalarType::Float, op,
                      ": scale: expected one float32 number");
      scale = input<float>(*x.scale)[0];
    }
    STD_TORCH_CHECK(!x.symmetric || !x.targets.has_value(), op, ": targets: expected none with symmetric");
    p.set_targets(x.targets);
    target = p.targets;
    for (int64_t i = 0; i < p.rows; ++i) {
      if (p.diagonal) target[i] = i;
      STD_TORCH_CHECK(target[i] >= 0 && target[i] < p.columns, op, ": targets: targets are out of key's rows");
    }
    const double rows = x.reduction == "mean" ? static_cast<double>(p.rows) : 1.0;
    row_weight = p.row_operand("row_weight", x.row_weight, 1.0f);
    for (float& w : row_weight) w = static_cast<float>(w / rows);
    query_inverse_norm.assign(p.rows, 1.0f);
    key_inverse_norm.assign(p.padded_columns, 1.0f);
    positive.resize(p.rows);
    row_lse.resize(p.rows);
    column_lse.resize(p.symmetric ? p.rows : 0);
  }

  // The scales of rows and columns from the inverse norms.
  void set_scales() {
    p.column_scale = key_inverse_norm;
    p.row_scale.resize(p.rows);
    for (int64_t i = 0; i < p.rows; ++i)
      p.row_scale[i] = static_cast<float>(query_inverse_norm[i] * (scale * fixed_scale));
  }

  // Inverse norms, positives, scales.
  void measure() {
    const auto kernels = contrastive_kernels();
    const float *queries = input<float>(p.query), *keys = input<float>(p.key);
    if (normalize)
      each_row(p.columns, p.dim, [&](int64_t j) {
        const float* key = keys + j * p.dim;
        key_inverse_norm[j] = inverse_norm(kernels.square_and_dot(key, key, p.dim).square);
      });
    each_row(p.rows, p.dim, [&](int64_t i) {
      const SquareAndDot found = kernels.square_and_dot(queries + i * p.dim, keys + target[i] * p.dim, p.dim);
      if (normalize) query_inverse_norm[i] = inverse_norm(found.square);
      positive[i] =
          static_cast<float>(found.dot * query_inverse_norm[i] * key_inverse_norm[target[i]] * (scale * fixed_scale));
    });
    set_scales();
  }

  // Of the log-sum-exp n and the positive's logit.
  double loss(double lse, double positive) const {
    if (lse == -std::numeric_limits<double>::infinity()) return 0;
    const double x = lse - positive;
    return include_positive ? std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))) : x;
  }
  // d loss / d n; NaN where the loss is infinite, as of an infinite embedding: a loss scaler must not step on it
  double grad_lse(double lse, double positive) const {
    if (lse == -std::numeric_limits<double>::infinity()) return 0;
    if (lse - positive == std::numeric_limits<double>::infinity()) return std::numeric_limits<double>::quiet_NaN();
    return include_positive ? 1 / (1 + std::exp(positive - lse)) : 1;
  }
  double row_loss(int64_t i) const {
    const double of_row = loss(row_lse[i], positive[i]);
    return p.symmetric ? (of_row + loss(column_lse[i], positive[i])) / 2 : of_row;
  }
  // loss_i [M], or their reduction.
  Tensor result() const {
    const Tensor out = unreduced ? new_float32(p.rows) : new_float32();
    double sum = 0;
    for (int64_t i = 0; i < p.rows; ++i) {
      const double loss = row_weight[i] == 0 ? 0 : row_weight[i] * row_loss(i);
      if (unreduced) output<float>(out)[i] = static_cast<float>(loss);
      sum += loss;
    }
    if (!unreduced) output<float>(out)[0] = static_cast<float>(sum);
    return out;
  }

  Embeddings queries() const { return {p.query, normalize ? query_inverse_norm.data() : nullptr}; }
  Embeddings keys() const { return {p.key, normalize ? key_inverse_norm.data() : nullptr}; }
};

// The gradient of the one number `scale`, from those of each row.
template <typename Weight>
Tensor sum_of_scale_grads(const Tensor& scale_grads, const Weight& weight, const Tensor& scale) {
  double sum = 0;
  for (int64_t i = 0; i < scale_grads.numel(); ++i)
    sum += static_cast<double>(weight(i)) * input<float>(scale_grads)[i];
  const Tensor to = empty_like(scale, ScalarType::Float);
  output<float>(to)[0] = static_cast<float>(sum);
  return to;
}

// From lse[i] = n_i and the sum of keys in d n_i / d query_i, row i of `weighted_keys`: the gradients of each loss_i,
// where `grads` has memory for them. That of the positive's key goes to this key's row, so no two rows may share a
// positive then. The memory of `weighted_keys` becomes grads.query.
inline void make_row_grads(const SoftmaxLoss& loss, const float* lse, Tensor& weighted_keys,
                           softmax_loss::Grads& grads) {
  const LogitMatrix& p = loss.p;
  const auto kernels = contrastive_kernels();
  float* sums = output<float>(weighted_keys);
  float* key_grad = grads.key.numel() > 0 ? output<float>(grads.key) : nullptr;
  float* scale_grad = grads.scale.numel() > 0 ? output<float>(grads.scale) : nullptr;
  each_row(p.rows, p.dim, [&](int64_t i) {
    float* to = sums + i * p.dim;
    const int64_t j = loss.target[i];
    const float *query = input<float>(p.query) + i * p.dim, *key = input<float>(p.key) + j * p.dim;
    if (loss.row_weight[i] == 0) {  // left out, be it NaN
      std::fill_n(to, p.dim, 0.0f);
      if (scale_grad) scale_grad[i] = 0;
      if (key_grad) std::fill_n(key_grad + j * p.dim, p.dim, 0.0f);
      return;
    }
    const double query_c = loss.query_inverse_norm[i], key_c = loss.key_inverse_norm[j];
    kernels.combine(to, 1.0f, key, -loss.key_inverse_norm[j], p.dim, to);
    const double grad_lse = loss.grad_lse(lse[i], loss.positive[i]), dot = kernels.square_and_dot(query, to, p.dim).dot;
    if (scale_grad) scale_grad[i] = static_cast<float>(grad_lse * dot * query_c * loss.fixed_scale);
    const double weight = grad_lse * p.row_scale[i];
    const double query_weight = loss.normalize ? weight * dot * query_c * query_c : 0;
    kernels.combine(to, static_cast<float>(weight), query, static_cast<float>(-query_weight), p.dim, to);
    if (!key_grad) return;
    const double negative_weight = -weight * key_c;
    const double key_weight =
        loss.normalize ? negative_weight * kernels.square_and_dot(query, key, p.dim).dot * key_c * key_c : 0;
    kernels.combine(query, static_cast<float>(negative_weight), key, static_cast<float>(-key_weight), p.dim,
                    key_grad + j * p.dim);
  });
  if (grads.query.numel() > 0) grads.query = weighted_keys;
}

}  // namespace fastloss
