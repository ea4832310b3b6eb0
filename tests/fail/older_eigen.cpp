// expect: rflow: Eigen 3.4 or newer is needed
// first: rflow: Eigen 3.4 or newer is needed
// flags: -I@HERE@/old_eigen
// SPDX-License-Identifier: Apache-2.0
// Some systems still have 3.3 first among the include directories.
#include <rflow/rflow.hpp>
