// The plain softmax losses from embeddings to loss, as softmax_loss.py defines them. With a_i, b_i the gradients
// of the log-sum-exps n_i, n'_i, the positive's logit has the gradient -a_i - b_i; Gradient makes H from them all.

#include "contrastive/softmax_loss.h"
#include "contrastive/logit_gradients.h"
#include "contrastive/online_softmax.h"
#include "contrastive/weighted_keys.h"
#include "core/op.h"

namespace fastloss {
namespace {

using torch::stable::new_empty;

// The products of the queries' and the keys' gradients run side by side, one thread each, if each has at most so many
// multiplications; where there are two threads in all, more, since neither product then has threads to synchronise.
constexpr int64_t kBeside = 1 << 22;
constexpr int64_t kBesideOfTwo = 1 << 29;
// "grads": rows of a chunk, at least; MiB of its logits at most, as of their gradient and of its transpose.
constexpr int64_t kLeastRows = 64;
constexpr double kChunk = 16;

struct Inputs {
  Tensor query, key;
  Given scale, row_weight, targets;
  double fixed_scale;
  bool include_positive, symmetric, normalize;
  std::string reduction;
  int64_t needs;
  std::string save;  // "", "row_grads", "grads" or "logits": fastloss/contrastive/save_plan.py
  int64_t saved_rows;
  double workspace_mib;
  template <typename F>
  void fields(const F& f) {
    f(query), f(key), f(scale), f(row_weight), f(targets), f(fixed_scale), f(include_positive), f(symmetric);
    f(normalize), f(reduction), f(needs), f(save), f(saved_rows), f(workspace_mib);
  }
};

struct Saved {
  Tensor stats, inverse_norms, logits, query_grad, key_grad, scale_grad;
  template <typename F>
  void fields(const F& f) {
    f(stats), f(inverse_norms), f(logits), f(query_grad), f(key_grad), f(scale_grad);
  }
};

struct Forward {
  Tensor out;
  Saved saved;
  template <typename F>
  void fields(const F& f) {
    f(out), f(saved);
  }
};

struct Needs {
  bool query, key, scale;
  template <typename F>
  void fields(const F& f) {
    f(query), f(key), f(scale);
  }
};

// The gradients of the log-sum-exps of row i (and column i) for a weight w of loss_i; returns that of the positive.
float set_slopes(const SoftmaxLoss& call, int64_t i, double w, double forth, double back, Upstream& rows,
                 Upstream& columns) {
  float total = 0;
  const auto set = [&](Upstream& to, double n) {
    if (n == -std::numeric_limits<double>::infinity()) return;
    to.grad[0][i] = static_cast<float>(w * call.slope(n, call.positive[i]));
    to.lse[0][i] = static_cast<float>(n);
    total -= to.grad[0][i];
  };
  if (call.p.symmetric) w /= 2;
  set(rows, forth);
  if (call.p.symmetric) set(columns, back);
  return total;
}

// "grads": losses and gradients in one go, a chunk of rows and all their columns at a time. With two directions the
// gradients need the columns' log-sum-exps, hence all rows: then these are one chunk.
void grads_pass(SoftmaxLoss& call, double workspace_mib, float* stats, LossGrads& grads) {
  LogitMatrix& p = call.p;
  if (p.empty()) {
    torch::stable::zero_(grads.key);
    return;
  }
  Statistics forward(p, stats);
  const double row_mib = static_cast<double>(p.columns * 4) / kMiB;
  const int64_t fit =
      std::max(static_cast<int64_t>(std::min(kChunk, workspace_mib / 3) / row_mib), std::min(p.rows, kLeastRows));
  const int64_t height = p.symmetric ? p.rows : std::min(p.rows, fit > kRows ? fit / kRows * kRows : fit);
  const bool of_keys = grads.key.numel() > 0;
  const Tensor block = floats({height, p.columns}), turned = floats({of_keys ? p.columns : 0, height});
  std::optional<Tensor> below;
  for_pieces(p.rows, height, [&](int64_t begin, int64_t m) {
    const Tensor raw = p.raw(begin, m, 0, p.columns);
    forward.start(begin, m);
    forward.chunk(raw, 0, p.columns);
    forward.finish_rows();
    forward.finish_columns();
    Upstream rows(p.rows), columns(p.symmetric ? p.rows : 0);
    std::vector<float> positives(p.rows);
    for (int64_t i = begin; i < begin + m; ++i)
      positives[i] =
          set_slopes(call, i, call.row_weight[i], stats[i], p.symmetric ? stats[2 * p.rows + i] : 0, rows, columns);
    Gradient gradient(p, std::move(rows), std::move(columns), std::move(positives));
    const Panels h(block, m, p.columns), back(turned, p.columns, m);
    gradient.chunk(raw, begin, 0, h, 0, 0, of_keys ? &back : nullptr);
    // Two small products start sooner side by side than each on all threads.
    const int64_t multiplications = p.rows * p.columns * p.width;
    const bool apart = multiplications > (torch::stable::get_num_threads() == 2 ? kBesideOfTwo : kBeside);
    for_each(
        2,
        [&](int64_t side) {
          if (side == 0 && grads.query.numel() > 0) call.queries().put(begin, product(h, flipped(p.keys)), grads.query);
          if (side == 1 && of_keys) below = product(back, flipped(slice(p.queries, 0, begin, m)), below);
        },
        apart ? 2 : 1);
    for (int64_t i = begin; i < begin + (grads.scale.numel() > 0 ? m : 0); ++i)
      output<float>(grads.scale)[i] = static_cast<float>(gradient.of_row_scale(i) * call.c[i] * call.fixed_scale);
  });
  if (of_keys) call.keys().put(0, *below, grads.key);
}

// The statistics and inverse norms that the backward of "logits" starts from.
void save_statistics(const SoftmaxLoss& call, Saved& saved) {
  const LogitMatrix& p = call.p;
  saved.stats = floats({2 + p.symmetric, p.rows});
  float* to = std::copy_n(call.positive.begin(), p.rows, output<float>(saved.stats));
  std::copy(call.back.begin(), call.back.end(), std::copy_n(call.lse.begin(), p.rows, to));
  if (!call.normalize) return;
  saved.inverse_norms = vector(p.rows + p.columns);
  to = std::copy_n(call.c.begin(), p.rows, output<float>(saved.inverse_norms));
  std::copy_n(call.key_c.begin(), p.columns, to);
}

void load_statistics(const Saved& saved, SoftmaxLoss& call) {
  const int64_t rows = call.p.rows;
  const float* from = input<float>(saved.stats);
  std::copy_n(from, rows, call.positive.begin());
  std::copy_n(from + rows, rows, call.lse.begin());
  if (call.p.symmetric) std::copy_n(from + 2 * rows, rows, call.back.begin());
  if (call.normalize) {
    std::copy_n(input<float>(saved.inverse_norms), rows, call.c.begin());
    std::copy_n(input<float>(saved.inverse_norms) + rows, call.p.columns, call.key_c.begin());
  }
  call.set_scales();
}

Forward softmax_loss_fwd(const Inputs& x) {
  const bool row_grads = x.save == "row_grads", of_out = x.save == "grads", logits = x.save == "logits";
  STD_TORCH_CHECK(row_grads || of_out || logits || x.save.empty(), "softmax_loss: the C++ kernels know no save ",
                  x.save);
  SoftmaxLoss call(x, x.targets, x.symmetric);
  LogitMatrix& p = call.p;
  call.measure();
  const auto rows_of = [&](int64_t count, int64_t bit) { return (row_grads || of_out) && x.needs & bit ? count : 0; };
  LossGrads grads{floats({rows_of(p.rows, kQuery), p.width}), floats({rows_of(p.columns, kKey), p.width}),
                  vector(rows_of(p.rows, kScale))};
  std::vector<float> stats(p.directions() * 2 * p.rows);
  Tensor saved_logits = floats({x.saved_rows, p.columns});
  if (row_grads) {
    Tensor weighted_keys = floats({p.rows, p.width});
    make_weighted_keys(p, x.workspace_mib, stats.data(), weighted_keys);
    rows_pass(call, stats.data(), weighted_keys, grads);
  } else if (of_out) {
    grads_pass(call, x.workspace_mib, stats.data(), grads);
  } else {
    const auto kept = make_statistics(p, x.workspace_mib, p.empty() ? 0 : x.saved_rows, stats.data());
    if (kept.has_value()) saved_logits = *kept;
  }
  std::copy_n(stats.begin(), p.rows, call.lse.begin());
  if (x.symmetric) std::copy_n(stats.begin() + 2 * p.rows, p.rows, call.back.begin());
  Saved saved{floats({0, p.rows}), vector(0), saved_logits, grads.query, grads.key, grads.scale};
  if (logits) save_statistics(call, saved);
  return {losses(call, x.reduction), saved};
}

// Both directions' gradients of the log-sum-exps, of the positives, and so those of the embeddings.
LossGrads from_statistics(SoftmaxLoss& call, const Inputs& x, const Tensor& logits, const std::vector<float>& upstream,
                          const Needs& needs) {
  LogitMatrix& p = call.p;
  Upstream forth(p.rows), back(p.symmetric ? p.rows : 0);
  std::vector<float> positives(p.rows, 0.0f);
  for (int64_t i = 0; i < p.rows; ++i)
    positives[i] = set_slopes(call, i, upstream[i], call.lse[i], p.symmetric ? call.back[i] : 0, forth, back);
  Gradient gradient(p, std::move(forth), std::move(back), std::move(positives));
  LossGrads grads{new_empty(x.query, {needs.query ? p.rows : 0, p.width}),
                  new_empty(x.key, {needs.key ? p.columns : 0, p.width}), vector(p.rows)};
  if (p.empty())
    torch::stable::zero_(grads.key);
  else
    make_gradients(
        gradient, p, logits, x.workspace_mib, needs.query, needs.key,
        [&](int64_t begin, const Tensor& v) { call.queries().put(begin, v, grads.query); },
        [&](int64_t first, const Tensor& u) { call.keys().put(first, u, grads.key); });
  for (int64_t i = 0; i < p.rows; ++i)
    output<float>(grads.scale)[i] = static_cast<float>(gradient.of_row_scale(i) * call.c[i] * call.fixed_scale);
  return grads;
}

LossGrads softmax_loss_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs) {
  SoftmaxLoss call(x, x.targets, x.symmetric);
  const LogitMatrix& p = call.p;
  const Tensor up = torch::stable::contiguous(grad);
  std::vector<float> upstream(p.rows);
  for (int64_t i = 0; i < p.rows; ++i) {
    const float g = input<float>(up)[x.reduction == "none" ? i : 0];
    upstream[i] = x.save == "grads" ? g : g * call.row_weight[i];
  }
  LossGrads grads{new_empty(x.query, {0}), new_empty(x.key, {0}), saved.scale_grad};
  if (x.save != "logits") {
    STD_TORCH_CHECK(!x.save.empty(), "softmax_loss: the forward saved nothing for a backward");
    if (needs.query) grads.query = scaled(saved.query_grad, [&](int64_t i) { return upstream[i]; }, x.query);
    if (needs.key) grads.key = scaled(saved.key_grad, [g = input<float>(up)[0]](int64_t) { return g; }, x.key);
  } else {
    load_statistics(saved, call);
    grads = from_statistics(call, x, saved.logits, upstream, needs);
    upstream.assign(p.rows, 1.0f);
  }
  if (!needs.query) grads.query = new_empty(x.query, {0});
  if (!needs.key) grads.key = new_empty(x.key, {0});
  if (!needs.scale || !x.scale.has_value()) return {grads.query, grads.key, vector(0)};
  double total = 0;
  for (int64_t i = 0; i < p.rows; ++i) total += static_cast<double>(upstream[i]) * input<float>(grads.scale)[i];
  Tensor of_scale = empty_like(*x.scale, ScalarType::Float);
  output<float>(of_scale)[0] = static_cast<float>(total);
  return {grads.query, grads.key, of_scale};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("softmax_loss_fwd", FASTLOSS_BOX(&fastloss::softmax_loss_fwd));
  m.impl("softmax_loss_bwd", FASTLOSS_BOX(&fastloss::softmax_loss_bwd));
}
