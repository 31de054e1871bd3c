// What an op of a target image and a predicted one has for each of them.
#pragma once

#include "core/op.h"

namespace fastloss {

template <typename T>
struct PerImage {
  T image, image_pred;
  FASTLOSS_FIELDS(image, image_pred)
};

}  // namespace fastloss
