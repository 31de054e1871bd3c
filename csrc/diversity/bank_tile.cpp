// The kernels over a tile of the bank, compiled for each instruction set.

#include "diversity/bank_tile.h"
#include "core/isa.h"

#define FASTLOSS_KERNELS "diversity/bank_tile_simd.h"
#include "core/for_each_isa.h"

namespace fastloss {

BankKernels bank_kernels() { return FASTLOSS_PICK(bank_kernels()); }

}  // namespace fastloss
