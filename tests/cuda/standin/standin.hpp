// SPDX-License-Identifier: Apache-2.0
#pragma once

// What tests may ask of the stand-in for CUDA and cuBLAS.

namespace standin {

/// The k-th call from now on fails, k ≥ 1; 0: none does.
void fail_at(int k);
/// Calls since fail_at.
int calls();
/// Device and pinned memory, streams, events, pools and handles that were made and not destroyed.
int alive();

}  // namespace standin
