// Every header that the kernels of a SIMD level share with other code, to be included before the level's target is set:
// an inline function compiled for AVX-512 could otherwise be the one that the linker keeps for the whole program, and
// crash a machine without it.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "gemm.h"
#include "levels.h"
