// SPDX-License-Identifier: Apache-2.0
#pragma once

// A folder that appears complete or not at all.

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace report {

/// Whether reports hold a file of this name. A folder with any other is never replaced.
bool is_report_file(std::string_view name);

/// Whether the folder could be made: its parent exists and can be written to, and nothing is lost
/// but, if `replace`, an earlier report. Links are followed.
/// @throws std::runtime_error with one line if not
void check_target(std::filesystem::path const& target, bool replace,
                  std::vector<std::string> const& inputs);

/// Calls write(folder) with a new folder beside the target and gives it the target's name when that
/// returns. If anything fails, nothing stays behind and what was there before stays as it was.
/// @throws what check_target throws
void publish(std::filesystem::path const& target, bool replace,
             std::vector<std::string> const& inputs,
             std::function<void(std::filesystem::path const&)> const& write);

}  // namespace report
