// The kernels of matmul.h, for each instruction set.

#include "core/matmul.h"
#include "core/isa.h"

#define FASTLOSS_KERNELS "core/matmul_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {

MatmulKernels matmul_kernels() { return FASTLOSS_PICK(matmul_kernels()); }

}  // namespace fastloss
