// SPDX-License-Identifier: Apache-2.0
#include <rflow/inflate.hpp>

#include "../open.hpp"

namespace report {

rflow::inflater inflater_here() { return rflow::zlib_inflate; }

}  // namespace report
