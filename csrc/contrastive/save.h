// The words of an op's input `save`: what its forward leaves for its backward. save_plan.py explains and chooses them.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

namespace fastloss {

enum class Save { kNothing, kWeightedKeys, kRowGrads, kGrads, kLogits };

// The word `save` of an op whose C++ kernels know the words of `known`.
inline Save save_of(const char* op, const std::string& save, std::initializer_list<Save> known) {
  static constexpr const char* kWords[] = {"", "weighted_keys", "row_grads", "grads", "logits"};
  for (Save word : known)
    if (save == kWords[static_cast<int>(word)]) return word;
  STD_TORCH_CHECK(false, op, ": save: the C++ kernels cannot save \"", save, "\"");
  return Save::kNothing;
}

}  // namespace fastloss
