// Statistics of rows together with their weighted sums of keys, for the forward of one direction whose columns need no
// gradient.
#pragma once

#include "contrastive/logit_matrix.h"

namespace fastloss {

// stats [1, statistics, rows] and weighted_keys [sums, rows, width], in one pass over blocks of columns: with p_j =
// e^(f s_j) over their sum, that of lse_A(f s) is sum_j p_j column_scale_j key_j, that of the sum is sum_{j in A}
// column_scale_j key_j.
void make_weighted_keys(LogitMatrix& p, double workspace_mib, float* stats, Tensor& weighted_keys);

}  // namespace fastloss
