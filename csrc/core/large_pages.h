// Large pages under large new tensors. The allocator asks the system for memory of this size anew each time, and the
// first write to each 4 KiB of it would wait for the system to clear a page: that takes longer than the writing.
#pragma once

#include "core/constants.h"
#include "core/tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastloss {

// Asks for them, where the system gives them to who asks ("madvise"), of the whole ones within the tensor.
inline void use_large_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 * kMiB;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(t.numel()) * t.element_size()) / kPage * kPage;
  if (last >= first + 2 * kPage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(t);
#endif
}

}  // namespace fastloss
