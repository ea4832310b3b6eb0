// SPDX-License-Identifier: Apache-2.0
#pragma once

// A folder that appears complete or not at all.

#include <filesystem>
#include <functional>

namespace report {

/// Whether the folder could be made: its parent exists and can be written to, and nothing is lost.
/// @throws std::runtime_error with one line if not
void check_target(std::filesystem::path const& target, bool replace);

/// Calls write(folder) with a new folder beside the target and gives it the target's name when that
/// returns. If anything fails, nothing stays behind and what was there before stays as it was.
void publish(std::filesystem::path const& target, bool replace,
             std::function<void(std::filesystem::path const&)> const& write);

}  // namespace report
