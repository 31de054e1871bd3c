// Statistics of rows together with their pulls, for the forward of one direction whose columns need no gradient.
#pragma once

#include "contrastive/logit_matrix.h"

namespace fastloss {

// stats [1, statistics, rows] and pulls [sums, rows, width], in one pass over blocks of columns: with p_j = e^(f s_j)
// over their sum, the pull of lse_A(f s) is sum_j p_j column_scale_j key_j, that
// of the sum is sum_{j in A} column_scale_j key_j.
void make_pulls(LogitMatrix& p, double workspace_mib, float* stats, Tensor& pulls);

}  // namespace fastloss
