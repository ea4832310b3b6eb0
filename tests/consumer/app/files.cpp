// SPDX-License-Identifier: Apache-2.0
#include <rflow/safetensors.hpp>

int main() { return 0; }
