// The plain softmax losses from embeddings to loss, as softmax_loss.py defines them. With a_i, b_i the gradients of the
// log-sum-exps of row i and column i, the positive's logit has the gradient -a_i - b_i; LogitGradients makes H of them.

#include "contrastive/softmax_loss.h"
#include "contrastive/logit_gradients.h"
#include "contrastive/online_softmax.h"
#include "contrastive/weighted_keys.h"
#include "core/op.h"

namespace fastloss::softmax_loss {
namespace {

using torch::stable::new_empty;

// The products of the queries' and the keys' gradients run side by side, one thread each, if each has at most so many
// multiplications; where there are two threads in all, more, since neither product then has threads to synchronise.
constexpr int64_t kBeside = 1 << 22;
constexpr int64_t kBesideOfTwo = 1 << 29;
// "grads": the logits of a chunk of rows, and as much for their gradient and for its transpose; but at least so many
// rows, which fit where save_plan.py chooses "grads" (its LEAST_ROWS), as products of fewer are slow.
constexpr double kChunkMiB = 16;
constexpr int64_t kLeastRows = 64;

// The gradients of the log-sum-exps of row i (and column i) where loss_i counts `weight`, into `rows` (and `columns`);
// returns that of the positive.
float set_upstream(const SoftmaxLoss& loss, int64_t i, double weight, Upstream& rows, Upstream& columns) {
  float sum = 0;
  const auto set = [&](Upstream& to, double lse) {
    if (lse == -std::numeric_limits<double>::infinity()) return;
    to.grad_lse[0][i] = static_cast<float>(weight * loss.grad_lse(lse, loss.positive[i]));
    to.lse[0][i] = static_cast<float>(lse);
    sum -= to.grad_lse[0][i];
  };
  if (loss.p.symmetric) weight /= 2;
  set(rows, loss.row_lse[i]);
  if (loss.p.symmetric) set(columns, loss.column_lse[i]);
  return sum;
}

// H of rows begin .. begin + count, whose log-sum-exps are there, where loss_i counts weight[i].
LogitGradients logit_gradients(const SoftmaxLoss& loss, int64_t begin, int64_t count,
                               const std::vector<float>& weight) {
  const int64_t rows = loss.p.rows;
  Upstream of_rows(rows), of_columns(loss.p.symmetric ? rows : 0);
  std::vector<float> positive_grads(rows, 0.0f);
  for (int64_t i = begin; i < begin + count; ++i)
    positive_grads[i] = set_upstream(loss, i, weight[i], of_rows, of_columns);
  return LogitGradients(loss.p, std::move(of_rows), std::move(of_columns), std::move(positive_grads));
}

void write_scale_grads(const SoftmaxLoss& loss, const LogitGradients& gradients, int64_t begin, int64_t count,
                       Grads& grads) {
  for (int64_t i = begin; i < begin + count; ++i)
    output<float>(grads.scale)[i] =
        static_cast<float>(gradients.row_scale_grad(i) * loss.query_inverse_norm[i] * loss.fixed_scale);
}

// The log-sum-exps of `stats` [directions, 2, M] for rows begin .. begin + count.
void take_lse(SoftmaxLoss& loss, const std::vector<float>& stats, int64_t begin, int64_t count) {
  std::copy_n(stats.begin() + begin, count, loss.row_lse.begin() + begin);
  if (loss.p.symmetric) std::copy_n(stats.begin() + 2 * loss.p.rows + begin, count, loss.column_lse.begin() + begin);
}

// "grads": losses and gradients in one go, a chunk of rows and all their columns at a time. With two directions the
// gradients need the columns' log-sum-exps, hence all rows: then these are one chunk.
void make_grads(SoftmaxLoss& loss, double workspace_mib, std::vector<float>& stats, Grads& grads) {
  LogitMatrix& p = loss.p;
  if (p.empty()) {
    torch::stable::zero_(grads.key);
    return;
  }
  Statistics statistics(p, stats.data());
  const double row_mib = static_cast<double>(p.columns * 4) / kMiB;
  const int64_t fit =
      std::max(static_cast<int64_t>(std::min(kChunkMiB, workspace_mib / 3) / row_mib), std::min(p.rows, kLeastRows));
  const int64_t chunk_rows =
      p.symmetric ? p.rows : std::min(p.rows, fit > kTileRows ? fit / kTileRows * kTileRows : fit);
  const bool needs_query = grads.query.numel() > 0, needs_key = grads.key.numel() > 0;
  const Tensor memory = new_float32({chunk_rows, p.columns});
  const Tensor transposed_memory = new_float32({needs_key ? p.columns : 0, chunk_rows});
  std::optional<Tensor> key_grad;  // sum over the rows so far
  for_pieces(p.rows, chunk_rows, [&](int64_t begin, int64_t m) {
    const Tensor raw = p.products(begin, m, 0, p.columns);
    statistics.start_rows(begin, m);
    statistics.add_block(raw, 0, p.columns);
    statistics.finish_rows();
    statistics.finish_columns();
    take_lse(loss, stats, begin, m);
    LogitGradients gradients = logit_gradients(loss, begin, m, loss.row_weight);
    const Panels h(memory, m, p.columns), h_transposed(transposed_memory, p.columns, m);
    gradients.add_block(raw, begin, 0, {h, 0, 0, needs_key ? &h_transposed : nullptr});
    // Two small products start sooner side by side than each on all threads.
    const int64_t multiplications = p.rows * p.columns * p.dim;
    const bool apart = multiplications > (torch::stable::get_num_threads() == 2 ? kBesideOfTwo : kBeside);
    for_each(
        2,
        [&](int64_t side) {
          if (side == 0 && needs_query)
            loss.queries().write_grad(begin, product(h, transposed(p.key_factor)), grads.query);
          if (side == 1 && needs_key)
            key_grad = product(h_transposed, transposed(slice(p.query_factor, 0, begin, m)), key_grad);
        },
        apart ? 2 : 1);
    write_scale_grads(loss, gradients, begin, grads.scale.numel() > 0 ? m : 0, grads);
  });
  if (needs_key) loss.keys().write_grad(0, *key_grad, grads.key);
}

// What the backward of "logits" needs beside the logits: positives and log-sum-exps, and the inverse norms.
void save_rows(const SoftmaxLoss& loss, Saved& saved) {
  const LogitMatrix& p = loss.p;
  saved.stats = new_float32({2 + p.symmetric, p.rows});
  float* to = std::copy_n(loss.positive.begin(), p.rows, output<float>(saved.stats));
  std::copy(loss.column_lse.begin(), loss.column_lse.end(), std::copy_n(loss.row_lse.begin(), p.rows, to));
  if (!loss.normalize) return;
  saved.inverse_norms = new_float32(p.rows + p.columns);
  to = std::copy_n(loss.query_inverse_norm.begin(), p.rows, output<float>(saved.inverse_norms));
  std::copy_n(loss.key_inverse_norm.begin(), p.columns, to);
}
void load_rows(const Saved& saved, SoftmaxLoss& loss) {
  const LogitMatrix& p = loss.p;
  STD_TORCH_CHECK(saved.stats.numel() == (2 + p.symmetric) * p.rows, kOp, ": stats: expected what the forward saved");
  const float* from = input<float>(saved.stats);
  std::copy_n(from, p.rows, loss.positive.begin());
  std::copy_n(from + p.rows, p.rows, loss.row_lse.begin());
  if (p.symmetric) std::copy_n(from + 2 * p.rows, p.rows, loss.column_lse.begin());
  if (loss.normalize) {
    STD_TORCH_CHECK(saved.inverse_norms.numel() == p.rows + p.columns, kOp,
                    ": inverse_norms: expected what the forward saved");
    std::copy_n(input<float>(saved.inverse_norms), p.rows, loss.query_inverse_norm.begin());
    std::copy_n(input<float>(saved.inverse_norms) + p.rows, p.columns, loss.key_inverse_norm.begin());
  }
  loss.set_scales();
}

std::tuple<Tensor, Saved> softmax_loss_fwd(const Inputs& x) {
  const Save save = x.saves();
  SoftmaxLoss loss(kOp, x);
  LogitMatrix& p = loss.p;
  STD_TORCH_CHECK(x.saved_rows >= 0 && x.saved_rows <= (save == Save::kLogits ? p.rows : 0), kOp,
                  ": saved_rows: expected 0, or at most as many as queries with save=\"logits\"");
  STD_TORCH_CHECK(save != Save::kRowGrads || (!p.symmetric && !(x.needs & kKey)), kOp,
                  ": save: \"row_grads\" are of one direction, without the gradient of key");
  loss.measure();
  const int64_t needs = save == Save::kRowGrads || save == Save::kGrads ? x.needs : 0;
  Grads grads{new_float32({needs & kQuery ? p.rows : 0, p.dim}), new_float32({needs & kKey ? p.columns : 0, p.dim}),
              new_float32(needs & kScale ? p.rows : 0)};
  std::optional<Tensor> logits;
  std::vector<float> stats(p.directions() * 2 * p.rows);
  if (save == Save::kRowGrads) {
    Tensor weighted_keys = new_float32({p.rows, p.dim});
    make_weighted_keys(p, x.workspace_mib, stats.data(), weighted_keys);
    make_row_grads(loss, stats.data(), weighted_keys, grads);
  } else if (save == Save::kGrads) {
    make_grads(loss, x.workspace_mib, stats, grads);
  } else {
    logits = make_statistics(p, x.workspace_mib, p.empty() ? 0 : x.saved_rows, stats.data());
  }
  take_lse(loss, stats, 0, p.rows);
  Saved saved{new_float32({0, p.rows}),
              new_float32(0),
              logits.has_value() ? *logits : new_float32({x.saved_rows, p.columns}),
              grads.query,
              grads.key,
              grads.scale};
  if (save == Save::kLogits) save_rows(loss, saved);
  return {loss.result(), saved};
}

// The gradients where loss_i counts weight[i]; of the scale row by row.
Grads grads_of_logits(SoftmaxLoss& loss, const Inputs& x, const Tensor& saved_logits, const std::vector<float>& weight,
                      const Needs& needs) {
  LogitMatrix& p = loss.p;
  LogitGradients gradients = logit_gradients(loss, 0, p.rows, weight);
  Grads grads{new_empty(x.query, {needs.query ? p.rows : 0, p.dim}),
              new_empty(x.key, {needs.key ? p.columns : 0, p.dim}), new_float32(p.rows)};
  if (p.empty())
    torch::stable::zero_(grads.key);
  else
    make_embedding_grads(
        gradients, p, saved_logits, x.workspace_mib, {needs.query, needs.key},
        [&](int64_t begin, const Tensor& v) { loss.queries().write_grad(begin, v, grads.query); },
        [&](int64_t first, const Tensor& v) { loss.keys().write_grad(first, v, grads.key); });
  write_scale_grads(loss, gradients, 0, p.rows, grads);
  return grads;
}

Grads softmax_loss_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs) {
  const Save save = x.saves();
  STD_TORCH_CHECK(save != Save::kNothing, kOp, ": save: the forward was told to save nothing for a gradient");
  SoftmaxLoss loss(kOp, x);
  const LogitMatrix& p = loss.p;
  const Tensor up = as_contiguous(grad);
  std::vector<float> weight(p.rows);  // of what was saved of row i: of loss_i, or of row i of the result's gradient
  for (int64_t i = 0; i < p.rows; ++i) {
    const float g = input<float>(up)[loss.unreduced ? i : 0];
    weight[i] = save == Save::kGrads ? g : g * loss.row_weight[i];
  }
  Grads grads{new_empty(x.query, {0}), new_empty(x.key, {0}), saved.scale_grad};
  if (save == Save::kLogits) {
    load_rows(saved, loss);
    grads = grads_of_logits(loss, x, saved.logits, weight, needs);
    weight.assign(p.rows, 1.0f);
  } else {
    if (needs.query) grads.query = scaled_rows(saved.query_grad, [&](int64_t i) { return weight[i]; }, x.query);
    if (needs.key) grads.key = scaled_rows(saved.key_grad, [g = input<float>(up)[0]](int64_t) { return g; }, x.key);
  }
  if (!needs.query) grads.query = new_empty(x.query, {0});
  if (!needs.key) grads.key = new_empty(x.key, {0});
  const bool needs_scale = needs.scale && x.scale.has_value();
  grads.scale =
      needs_scale ? sum_of_scale_grads(grads.scale, [&](int64_t i) { return weight[i]; }, *x.scale) : new_float32(0);
  return grads;
}

}  // namespace
}  // namespace fastloss::softmax_loss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("softmax_loss_fwd", FASTLOSS_BOX(&fastloss::softmax_loss::softmax_loss_fwd));
  m.impl("softmax_loss_bwd", FASTLOSS_BOX(&fastloss::softmax_loss::softmax_loss_bwd));
}
