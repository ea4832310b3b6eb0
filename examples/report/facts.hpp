// SPDX-License-Identifier: Apache-2.0
#pragma once

// Whether what a file says of itself, and what its numbers look like, fits how it was read.

#include <rflow/file.hpp>

#include <string>

#include "load.hpp"
#include "options.hpp"

namespace report {

/// Refuses an array of three or four axes whose order nothing tells: more sites than tokens, a name
/// as of one layer, a first axis of 1; and one of two axes, which is but one site. With --axes
/// everything is clear.
/// @param stem  the file's name without its extension
/// @throws unusable
void require_clear_axes(std::string const& path, std::string const& stem, rflow::tensor const& x,
                        options const& asked);

/// What the axes of an array of three look like, if another order looks better: the mean cosine of
/// neighbours, of up to 64 pairs along each axis. A hint: tokens too can resemble their neighbours.
/// @return a note, or nothing
std::string axes_hint(rflow::tensor const& x);

/// Holds what a capture says of itself against its tensors, sets its depth and notes what is odd.
/// @throws unusable where they contradict each other
void compare_facts(capture& c);

/// Notes that the last site may be the final norm: by the model, or since all its rows have one
/// norm.
void note_list_end(capture& c, options const& asked);

}  // namespace report
