// Ops whose arguments and results are structs. A struct names its fields once more, in the order of the op's schema:
//
//   struct Inputs {
//     Tensor image, image_pred;
//     double p;
//     FASTLOSS_FIELDS(image, image_pred, p)
//   };
//   Grads example_bwd(const Tensor& grad, const Inputs& x, const Saved& saved, const Needs& needs);
//
// A field may be a struct again. The dispatcher, which knows no structs, passes one value per field.
#pragma once

#include "core/interrupt.h"
#include "core/tensors.h"

namespace fastloss {

#define FASTLOSS_FIELDS(...) \
  template <typename F>      \
  void fields(const F& f) {  \
    f(__VA_ARGS__);          \
  }

template <typename T>
concept Fields = requires(T t) { t.fields([](auto&...) {}); };

// The next value on the dispatcher's stack, or the next values, one per field.
template <typename T>
T take(const StableIValue*& stack) {
  if constexpr (Fields<T>) {
    T value{};
    value.fields([&](auto&... field) { ((field = take<std::remove_reference_t<decltype(field)>>(stack)), ...); });
    return value;
  } else {
    return torch::stable::detail::to<T>(*stack++);
  }
}

template <typename T>
void put(StableIValue*& stack, T& value) {
  if constexpr (Fields<T>)
    value.fields([&](auto&... field) { (put(stack, field), ...); });
  else
    *stack++ = torch::stable::detail::from(value);
}

template <typename... T>
void put(StableIValue*& stack, std::tuple<T...>& values) {
  std::apply([&](auto&... value) { (put(stack, value), ...); }, values);
}

template <typename Function>
struct Boxed;
template <typename Out, typename... Args>
struct Boxed<Out (*)(Args...)> {
  template <auto function>
  static void run(StableIValue* stack, uint64_t, uint64_t) {
    const Call call;
    const StableIValue* next = stack;
    const std::tuple<std::remove_cvref_t<Args>...> args{take<std::remove_cvref_t<Args>>(next)...};  // left to right
    Out out = std::apply(function, args);
    put(stack, out);
  }
};

// In the place of TORCH_BOX.
#define FASTLOSS_BOX(function) (&fastloss::Boxed<decltype(function)>::run<(function)>)

}  // namespace fastloss
