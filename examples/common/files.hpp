// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a program leaves behind: text files in a folder, each complete or not there.

#include <rflow/file.hpp>

#include <filesystem>
#include <map>
#include <string>

namespace common {

/// Makes the folder where it is missing and writes the files, by name, over older ones.
inline void write_files(std::filesystem::path const& folder,
                        std::map<std::string, std::string> const& texts) {
  std::filesystem::create_directories(folder);
  for (auto const& [name, text] : texts) {
    rflow::atomic_writer out(folder / name);
    out.write(text);
    out.commit();
  }
}

}  // namespace common
