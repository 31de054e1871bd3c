// A call of the plain softmax losses: lengths, positives, what follows from the log-sum-exps.
#pragma once

#include "contrastive/norms.h"

#include <cmath>

namespace fastloss {

constexpr int64_t kQuery = 1, kKey = 2, kScale = 4, kNegatives = 8;  // bits of `needs`

struct SoftmaxLoss {
  LogitMatrix p;
  double scale = 1;  // the tensor's value; `fixed_scale` is the number beside it
  const double fixed_scale;
  const bool include_positive, normalize;
  std::vector<int64_t> target;
  std::vector<float> row_weight;           // the weight of loss_i in the result, over M for a mean
  std::vector<float> c, key_c;             // inverse lengths, or 1
  std::vector<float> positive, lse, back;  // p and n of the rows; n' of the columns, if symmetric

  // `x` has the fields of an op's Inputs: query, key, scale, row_weight, fixed_scale, include_positive, normalize and
  // reduction.
  template <typename Inputs>
  SoftmaxLoss(const Inputs& x, const Given& targets, bool symmetric)
      : p(x.query, x.key, form(x.query, x.key, !targets.has_value(), symmetric), 0.0),
        fixed_scale(x.fixed_scale),
        include_positive(x.include_positive),
        normalize(x.normalize) {
    if (x.scale.has_value()) {
      STD_TORCH_CHECK(x.scale->numel() == 1 && x.scale->scalar_type() == ScalarType::Float,
                      "softmax_loss: expected one float32 scale");
      scale = input<float>(*x.scale)[0];
    }
    STD_TORCH_CHECK(!symmetric || !targets.has_value(), "softmax_loss: symmetric takes no targets");
    p.masks(targets, std::nullopt, std::nullopt, std::nullopt);
    target = p.excluded;
    for (int64_t i = 0; i < p.rows; ++i) {
      if (p.diagonal) target[i] = i;
      STD_TORCH_CHECK(target[i] >= 0 && target[i] < p.columns, "softmax_loss: targets are out of key's rows");
    }
    const double rows = x.reduction == "mean" ? static_cast<double>(p.rows) : 1.0;
    row_weight = padded(x.row_weight, ScalarType::Float, p.rows, p.rows, 1.0f);
    for (float& w : row_weight) w = static_cast<float>(w / rows);
    c.assign(p.rows, 1.0f);
    key_c.assign(p.padded_columns, 1.0f);
    positive.resize(p.rows);
    lse.resize(p.rows);
    back.resize(p.symmetric ? p.rows : 0);
  }

  static Form form(const Tensor& query, const Tensor& key, bool diagonal, bool symmetric) {
    return {.diagonal = diagonal, .symmetric = symmetric, .bfloat16 = are_bfloat16(query, key)};
  }

  // The scales of rows and columns from the inverse lengths.
  void set_scales() {
    p.bias.assign(p.padded_columns, 0.0f);
    p.column_scale = key_c;
    p.row_scale.resize(p.rows);
    for (int64_t i = 0; i < p.rows; ++i) p.row_scale[i] = static_cast<float>(c[i] * (scale * fixed_scale));
  }

  void measure() {
    const auto kernels = contrastive_kernels();
    if (normalize)
      each_row(p.columns, p.width, [&](int64_t j) {
        const float* key = input<float>(p.key) + j * p.width;
        key_c[j] = inverse_length(kernels.products(key, key, p.width).own);
      });
    each_row(p.rows, p.width, [&](int64_t i) {
      const OwnAndBoth got =
          kernels.products(input<float>(p.query) + i * p.width, input<float>(p.key) + target[i] * p.width, p.width);
      if (normalize) c[i] = inverse_length(got.own);
      positive[i] = static_cast<float>(got.both * c[i] * key_c[target[i]] * (scale * fixed_scale));
    });
    set_scales();
  }

  static double loss(bool include_positive, double n, double positive) {
    if (n == -std::numeric_limits<double>::infinity()) return 0;
    const double x = n - positive;
    return include_positive ? std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))) : x;
  }
  // d loss / d n; NaN where the loss is infinite, as of an infinite embedding: a loss scaler must not step on it
  double slope(double n, double at) const {
    if (n == -std::numeric_limits<double>::infinity()) return 0;
    if (n - at == std::numeric_limits<double>::infinity()) return std::numeric_limits<double>::quiet_NaN();
    return include_positive ? 1 / (1 + std::exp(at - n)) : 1;
  }
  double loss_of(int64_t i) const {
    const double forth = loss(include_positive, lse[i], positive[i]);
    return p.symmetric ? (forth + loss(include_positive, back[i], positive[i])) / 2 : forth;
  }

  Lengths queries() const { return {p.query, normalize ? c.data() : nullptr}; }
  Lengths keys() const { return {p.key, normalize ? key_c.data() : nullptr}; }
};

struct LossGrads {
  Tensor query, key, scale;
  template <typename F>
  void fields(const F& f) {
    f(query), f(key), f(scale);
  }
};

// Turns row i of `weighted_keys`, the sum of keys in d n_i / d query_i, into d loss_i / d query_i; `stats` are the n_i.
// Where grads.key has memory, d loss_i by the positive's key goes to that key's row: no two rows may share a positive
// then.
inline void rows_pass(const SoftmaxLoss& call, const float* stats, Tensor& weighted_keys, LossGrads& grads) {
  const LogitMatrix& p = call.p;
  const auto kernels = contrastive_kernels();
  float* to = output<float>(weighted_keys);
  each_row(p.rows, p.width, [&](int64_t i) {
    float* t = to + i * p.width;
    const int64_t j = call.target[i];
    const float *row = input<float>(p.query) + i * p.width, *key = input<float>(p.key) + j * p.width;
    if (call.row_weight[i] == 0) {  // left out, be it NaN
      std::fill_n(t, p.width, 0.0f);
      if (grads.scale.numel() > 0) output<float>(grads.scale)[i] = 0;
      if (grads.key.numel() > 0) std::fill_n(output<float>(grads.key) + j * p.width, p.width, 0.0f);
      return;
    }
    kernels.combine(t, 1.0f, key, -call.key_c[j], p.width, t);
    const double slope = call.slope(stats[i], call.positive[i]), along = kernels.products(row, t, p.width).both;
    if (grads.scale.numel() > 0)
      output<float>(grads.scale)[i] = static_cast<float>(slope * along * call.c[i] * call.fixed_scale);
    const double factor = slope * p.row_scale[i], less = call.normalize ? factor * along * call.c[i] * call.c[i] : 0;
    kernels.combine(t, static_cast<float>(factor), row, static_cast<float>(-less), p.width, t);
    if (grads.key.numel() == 0) return;
    const double c = call.key_c[j], back = -factor * c;
    const double own = call.normalize ? back * kernels.products(row, key, p.width).both * c * c : 0;
    kernels.combine(row, static_cast<float>(back), key, static_cast<float>(-own), p.width,
                    output<float>(grads.key) + j * p.width);
  });
  if (grads.query.numel() > 0) grads.query = weighted_keys;
}

// Losses [rows], or reduced.
inline Tensor losses(const SoftmaxLoss& call, const std::string& reduction) {
  const bool each = reduction == "none";
  Tensor out = each ? vector(call.p.rows) : scalar();
  double total = 0;
  for (int64_t i = 0; i < call.p.rows; ++i) {
    const double loss = call.row_weight[i] == 0 ? 0 : call.row_weight[i] * call.loss_of(i);
    if (each) output<float>(out)[i] = static_cast<float>(loss);
    total += loss;
  }
  if (!each) output<float>(out)[0] = static_cast<float>(total);
  return out;
}

}  // namespace fastloss
