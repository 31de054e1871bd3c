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

// What the forward leaves for the backward: "", "rows", "grads", "stash", "again", which saves() in
// fastloss/contrastive/save_plan.py explains, and decides in the same way.
enum class Saves { kNothing, kRows, kGrads, kStash, kAgain };

Saves saves_of(const LogitMatrix& p, const std::string& reduction, int64_t needs, double workspace_mib) {
  if (needs == 0) return Saves::kNothing;
  if (!p.symmetric && !(needs & kKey)) return Saves::kRows;
  const int64_t least = p.symmetric ? p.rows : std::min(p.rows, kLeastRows);
  const double mib = p.symmetric ? std::min(kChunk, workspace_mib / 3) : workspace_mib / 3;
  if (reduction != "none" && static_cast<double>(least * p.columns * 4) <= mib * kMiB) return Saves::kGrads;
  return fits_stash(p.rows, p.columns, workspace_mib) ? Saves::kStash : Saves::kAgain;
}

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
void grads_pass(SoftmaxLoss& call, double workspace_mib, float* stats, Made& made) {
  LogitMatrix& p = call.p;
  if (p.empty()) {
    torch::stable::zero_(made.key);
    return;
  }
  Statistics forward(p, stats);
  const double row_mib = static_cast<double>(p.columns * 4) / kMiB;
  const int64_t fit =
      std::max(static_cast<int64_t>(std::min(kChunk, workspace_mib / 3) / row_mib), std::min(p.rows, kLeastRows));
  const int64_t height = p.symmetric ? p.rows : std::min(p.rows, fit > kRows ? fit / kRows * kRows : fit);
  const bool of_keys = made.key.numel() > 0;
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
          set_slopes(call, i, call.share[i], stats[i], p.symmetric ? stats[2 * p.rows + i] : 0, rows, columns);
    Gradient gradient(p, std::move(rows), std::move(columns), std::move(positives));
    const Panels h(block, m, p.columns), back(turned, p.columns, m);
    gradient.chunk(raw, begin, 0, h, 0, 0, of_keys ? &back : nullptr);
    // Two small products start sooner side by side than each on all threads.
    const int64_t multiplications = p.rows * p.columns * p.width;
    const bool apart = multiplications > (torch::stable::get_num_threads() == 2 ? kBesideOfTwo : kBeside);
    for_each(
        2,
        [&](int64_t side) {
          if (side == 0 && made.query.numel() > 0) call.queries().put(begin, product(h, flipped(p.keys)), made.query);
          if (side == 1 && of_keys) below = product(back, flipped(slice(p.queries, 0, begin, m)), below);
        },
        apart ? 2 : 1);
    for (int64_t i = begin; i < begin + (made.scale.numel() > 0 ? m : 0); ++i)
      output<float>(made.scale)[i] = static_cast<float>(gradient.of_row_scale(i) * call.c[i] * call.factor);
  });
  if (of_keys) call.keys().put(0, *below, made.key);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> softmax_loss_fwd(
    const Tensor& query, const Tensor& key, std::optional<Tensor> scale, std::optional<Tensor> share,
    std::optional<Tensor> targets, double factor, bool include_positive, bool symmetric, bool normalize,
    std::string reduction, int64_t needs, double workspace_mib) {
  SoftmaxLoss call(query, key, scale, share, targets, factor, include_positive, symmetric, normalize, reduction);
  LogitMatrix& p = call.p;
  call.measure();
  const Saves saves = saves_of(p, reduction, needs, workspace_mib);
  const bool made = saves == Saves::kRows || saves == Saves::kGrads;
  const bool again = saves == Saves::kStash || saves == Saves::kAgain;
  Made grads{floats({made && needs & kQuery ? p.rows : 0, p.width}),
             floats({made && needs & kKey ? p.columns : 0, p.width}), vector(made && needs & kScale ? p.rows : 0)};
  std::vector<float> stats(p.directions() * 2 * p.rows);
  const int64_t part = saves == Saves::kAgain ? part_of_stash(p.columns, workspace_mib) : 0;
  Tensor stash = floats({saves == Saves::kStash ? p.rows : part, p.columns});
  if (saves == Saves::kRows) {
    Tensor pulls = floats({p.rows, p.width});
    make_pulls(p, workspace_mib, stats.data(), pulls);
    rows_pass(call, stats.data(), pulls, grads);
  } else if (saves == Saves::kGrads) {
    grads_pass(call, workspace_mib, stats.data(), grads);
  } else {
    if (const auto kept = make_statistics(p, workspace_mib, p.empty() ? 0 : stash.size(0), stats.data())) stash = *kept;
  }
  std::copy_n(stats.begin(), p.rows, call.lse.begin());
  if (symmetric) std::copy_n(stats.begin() + 2 * p.rows, p.rows, call.back.begin());
  Tensor state = floats({again ? 2 + symmetric : 0, p.rows});
  Tensor lengths = vector(again && normalize ? p.rows + p.columns : 0);
  if (again) {
    float* to = std::copy_n(call.positive.begin(), p.rows, output<float>(state));
    std::copy(call.back.begin(), call.back.end(), std::copy_n(call.lse.begin(), p.rows, to));
  }
  if (lengths.numel() > 0)
    std::copy_n(call.key_c.begin(), p.columns, std::copy_n(call.c.begin(), p.rows, output<float>(lengths)));
  return {losses(call, reduction), state, lengths, stash, grads.query, grads.key, grads.scale};
}

// Both directions' gradients of the log-sum-exps, of the positives, and so those of the embeddings.
Made from_state(SoftmaxLoss& call, const Tensor& stash, const std::vector<float>& upstream, double workspace_mib,
                const Tensor& query, const Tensor& key, bool needs_query, bool needs_key) {
  LogitMatrix& p = call.p;
  Upstream forth(p.rows), back(p.symmetric ? p.rows : 0);
  std::vector<float> positives(p.rows, 0.0f);
  for (int64_t i = 0; i < p.rows; ++i)
    positives[i] = set_slopes(call, i, upstream[i], call.lse[i], p.symmetric ? call.back[i] : 0, forth, back);
  Gradient gradient(p, std::move(forth), std::move(back), std::move(positives));
  Made made{new_empty(query, {needs_query ? p.rows : 0, p.width}), new_empty(key, {needs_key ? p.columns : 0, p.width}),
            vector(p.rows)};
  if (p.empty())
    torch::stable::zero_(made.key);
  else
    make_gradients(
        gradient, p, stash, workspace_mib, needs_query, needs_key,
        [&](int64_t begin, const Tensor& v) { call.queries().put(begin, v, made.query); },
        [&](int64_t first, const Tensor& u) { call.keys().put(first, u, made.key); });
  for (int64_t i = 0; i < p.rows; ++i)
    output<float>(made.scale)[i] = static_cast<float>(gradient.of_row_scale(i) * call.c[i] * call.factor);
  return made;
}

std::tuple<Tensor, Tensor, Tensor> softmax_loss_bwd(
    const Tensor& grad, const Tensor& query, const Tensor& key, std::optional<Tensor> scale,
    std::optional<Tensor> share, std::optional<Tensor> targets, double factor, bool include_positive, bool symmetric,
    bool normalize, std::string reduction, int64_t needs, double workspace_mib, const Tensor& state,
    const Tensor& lengths, const Tensor& stash, const Tensor& query_grad, const Tensor& key_grad,
    const Tensor& scale_grad, bool needs_query, bool needs_key, bool needs_scale) {
  SoftmaxLoss call(query, key, scale, share, targets, factor, include_positive, symmetric, normalize, reduction);
  const LogitMatrix& p = call.p;
  const Saves saves = saves_of(p, reduction, needs, workspace_mib);
  const Tensor up = torch::stable::contiguous(grad);
  std::vector<float> upstream(p.rows);
  for (int64_t i = 0; i < p.rows; ++i) {
    const float g = input<float>(up)[reduction == "none" ? i : 0];
    upstream[i] = saves == Saves::kGrads ? g : g * call.share[i];
  }
  Made made{new_empty(query, {0}), new_empty(key, {0}), scale_grad};
  if (saves == Saves::kRows || saves == Saves::kGrads) {
    if (needs_query) made.query = scaled(query_grad, [&](int64_t i) { return upstream[i]; }, query);
    if (needs_key) made.key = scaled(key_grad, [g = input<float>(up)[0]](int64_t) { return g; }, key);
  } else {
    std::copy_n(input<float>(state), p.rows, call.positive.begin());
    std::copy_n(input<float>(state) + p.rows, p.rows, call.lse.begin());
    if (symmetric) std::copy_n(input<float>(state) + 2 * p.rows, p.rows, call.back.begin());
    if (normalize) {
      std::copy_n(input<float>(lengths), p.rows, call.c.begin());
      std::copy_n(input<float>(lengths) + p.rows, p.columns, call.key_c.begin());
    }
    call.set_scales();
    made = from_state(call, stash, upstream, workspace_mib, query, key, needs_query, needs_key);
    upstream.assign(p.rows, 1.0f);
  }
  if (!needs_query) made.query = new_empty(query, {0});
  if (!needs_key) made.key = new_empty(key, {0});
  if (!needs_scale || !scale.has_value()) return {made.query, made.key, vector(0)};
  double total = 0;
  for (int64_t i = 0; i < p.rows; ++i) total += static_cast<double>(upstream[i]) * input<float>(made.scale)[i];
  Tensor of_scale = empty_like(*scale, ScalarType::Float);
  output<float>(of_scale)[0] = static_cast<float>(total);
  return {made.query, made.key, of_scale};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("softmax_loss_fwd", FASTLOSS_BOX(&fastloss::softmax_loss_fwd));
  m.impl("softmax_loss_bwd", FASTLOSS_BOX(&fastloss::softmax_loss_bwd));
}
