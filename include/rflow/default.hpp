// SPDX-License-Identifier: Apache-2.0
#pragma once

// The one conditional of the library: metrics bring the CPU backend with them, except in a CUDA
// translation unit, which should not see Eigen unless it asks.

#include <rflow/backend.hpp>

#ifndef __CUDACC__
#include <rflow/eigen.hpp>
#endif
