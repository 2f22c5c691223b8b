// What norms on the CPU end with, numbered as the home page of batch norm does.
#pragma once

#include <cstdint>

namespace ssl_fast {

enum Activation : int64_t { kIdentity, kReLU, kLeakyReLU, kSiLU, kGELU };
constexpr float kNegativeSlope = 0.01f;

}  // namespace ssl_fast
