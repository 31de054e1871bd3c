// Statistics of the logits of softmax contrastive losses: forward. Logits exist one chunk at a time (or as the stash,
// where they are few): a library's matrix product writes them, one pass over tiles reads them.

#include "contrastive_pulls.h"
#include "contrastive_statistics.h"

#define FASTLOSS_KERNELS "contrastive_simd.h"
#include "each_isa.h"

namespace fastloss {

ContrastiveKernels contrastive_kernels() { return FASTLOSS_PICK(contrastive_kernels()); }

namespace {

std::tuple<Tensor, Tensor, Tensor> contrastive_fwd(
    const Tensor& query, const Tensor& key, const Tensor& row_scale, std::optional<Tensor> column_scale,
    std::optional<Tensor> bias, std::optional<Tensor> excluded, std::optional<Tensor> row_ids,
    std::optional<Tensor> column_ids, std::optional<Tensor> ceiling, std::string kind, double hardness,
    double workspace_mib, bool keep_pulls) {
  Problem p(query, key, kind, hardness);
  p.scales(row_scale, column_scale, bias);
  p.masks(excluded, row_ids, column_ids, ceiling);
  Tensor stats = torch::stable::new_empty(row_scale, {p.directions(), p.statistics(), p.rows});
  const auto single = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(row_scale, shape); };
  Tensor pulls = single({keep_pulls ? p.sums() : 0, p.rows, p.width});
  if (keep_pulls) {
    make_pulls(p, workspace_mib, output<float>(stats), pulls);
    return {stats, single({0}), pulls};
  }
  const bool keep = fits_stash(p.rows, p.columns, workspace_mib);
  const std::optional<Tensor> kept = make_statistics(p, workspace_mib, keep ? p.rows : 0, output<float>(stats));
  if (kept.has_value()) return {stats, *kept, pulls};
  return {stats, keep ? single({p.rows, p.columns}) : single({0}), pulls};
}

}  // namespace
}  // namespace fastloss

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) { m.impl("contrastive_fwd", FASTLOSS_BOX(&fastloss::contrastive_fwd)); }
