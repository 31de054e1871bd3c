// The kernels of logit_matrix.h, for each instruction set.

#include "contrastive/logit_matrix.h"
#include "core/isa.h"

#define FASTLOSS_KERNELS "contrastive/softmax_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {

ContrastiveKernels contrastive_kernels() { return FASTLOSS_PICK(contrastive_kernels()); }

}  // namespace fastloss
