// The checks of what PyTorch and CUDA return. Of torch's other headers those of 2.10 and 2.11 do not include them, and have
// the first under another name, without the error's message.
#pragma once

#include <torch/csrc/stable/macros.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#include <torch/headeronly/util/shim_utils.h>
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif
