// Compiles simd.h and the file named by FASTLOSS_KERNELS once for each instruction set, in namespaces isa_default,
// isa_avx2, isa_avx512 and, with FASTLOSS_WITH_BF16 defined, isa_avx512_bf16. Both files must hold only static or
// inlined code of their own: no #include, and nothing of std, whose templates would be shared with code for other CPUs.

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only

#define FASTLOSS_ISA isa_default
#define FASTLOSS_BYTES 16
#include "core/simd.h"
#include FASTLOSS_KERNELS
#undef FASTLOSS_ISA
#undef FASTLOSS_BYTES

#if defined(__x86_64__)

#define FASTLOSS_ISA isa_avx2
#define FASTLOSS_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "core/simd.h"
#include FASTLOSS_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTLOSS_ISA
#undef FASTLOSS_BYTES

#define FASTLOSS_ISA isa_avx512
#define FASTLOSS_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#include "core/simd.h"
#include FASTLOSS_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTLOSS_ISA
#undef FASTLOSS_BYTES

#if defined(FASTLOSS_WITH_BF16)
#define FASTLOSS_ISA isa_avx512_bf16
#define FASTLOSS_BYTES 64
#define FASTLOSS_HAS_BF16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#endif
#include "core/simd.h"
#include FASTLOSS_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTLOSS_ISA
#undef FASTLOSS_BYTES
#undef FASTLOSS_HAS_BF16
#undef FASTLOSS_WITH_BF16
#endif  // FASTLOSS_WITH_BF16

#endif  // __x86_64__

#pragma GCC diagnostic pop
#undef FASTLOSS_KERNELS
