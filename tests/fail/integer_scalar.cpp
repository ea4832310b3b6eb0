// expect: rflow: activations are float, double, rflow::f16 or rflow::bf16
// SPDX-License-Identifier: Apache-2.0
// Integers are quantised activations of unknown scale and offset.
#include <rflow/view.hpp>

#ifdef RFLOW_POSITIVE_CONTROL
using scalar = float;
#else
using scalar = int;
#endif

scalar const values[6] = {};
rflow::view<scalar> const x(values, 3, 2);
