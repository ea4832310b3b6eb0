// SPDX-License-Identifier: Apache-2.0
#pragma once

// The flow pass and the Gram pass for a device of many small threads: functors, and the order in which
// they run. Not a public interface: on_cuda in cuda.cuh gives it a device, a class with
//
//     group                       some threads (lanes) that share an item: lane(), sum(), max(), sync()
//     each_index(count, f)        f(i) for every i, in any order
//     each_group(count, f)        f(i, group) for every i, in any order
//     allocate(bytes)             an owner of memory, with data()
//     upload, download, zero      copies between host and device, wait() ends them all
//     source(stack, arena, bound) where the rows of a stack are read from
//     product, pair_products      inner products, column-major as BLAS has them
//
// and some sizes. Work is cut by the shape of the data and these sizes alone, and every sum has an
// owner: results do not depend on how many threads there are.

#include <rflow/detail/cuda/flow.cuh>
#include <rflow/detail/cuda/gram.cuh>
