// Statistics of rows together with their weighted keys, for the forward of one direction whose keys need no gradient.
#pragma once

#include "contrastive/logit_matrix.h"

namespace fastloss {

// Writes stats [1, stats, rows] and weighted_keys [sums, rows, D] in one pass over blocks of columns. The weighted keys
// are the gradient of each statistic by query_i, without row_scale_i: of the log-sum-exp of power f
// sum_j w_j column_scale_j key_j, with w_j = e^(f s_j) / sum_k e^(f s_k); of the sum sum_j column_scale_j key_j.
void make_weighted_keys(LogitMatrix& p, double workspace_mib, float* stats, Tensor& weighted_keys);

}  // namespace fastloss
