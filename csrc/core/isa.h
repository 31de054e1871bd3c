// The instruction set that a call runs with, chosen of those that for_each_isa.h has compiled for.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastloss {

// 0: the compiler's default target, 1: AVX2, 2: AVX-512, 3: that and its products of bfloat16. FASTLOSS_CPU lowers it
// and is read at every call, so that a test can go through all the paths of one machine;
// what the CPU does not have is never chosen.
inline int cpu_level() {
#if defined(__x86_64__)
  static const int best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 ? avx512 ? 2 + (__builtin_cpu_supports("avx512bf16") != 0) : 1 : 0;
  }();
  const char* wanted = std::getenv("FASTLOSS_CPU");
  if (wanted == nullptr || *wanted == '\0') return best;
  const std::string name = wanted;
  const int level = name == "default" ? 0 : name == "avx2" ? 1 : name == "avx512" ? 2 : name == "avx512_bf16" ? 3 : -1;
  STD_TORCH_CHECK(level >= 0, "FASTLOSS_CPU: expected default, avx2, avx512 or avx512_bf16, got ", name);
  return std::min(best, level);
#else
  return 0;
#endif
}

// The version of a call that the CPU should run: FASTLOSS_PICK(kernels<T>(kind)).
#if defined(__x86_64__)
#define FASTLOSS_PICK(...) \
  (cpu_level() >= 2 ? isa_avx512::__VA_ARGS__ : cpu_level() == 1 ? isa_avx2::__VA_ARGS__ : isa_default::__VA_ARGS__)
#else
#define FASTLOSS_PICK(...) (isa_default::__VA_ARGS__)
#endif

}  // namespace fastloss
