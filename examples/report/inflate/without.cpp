// SPDX-License-Identifier: Apache-2.0
#include "../open.hpp"

namespace report {

rflow::inflater inflater_here() { return nullptr; }

}  // namespace report
