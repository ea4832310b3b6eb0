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

/// What the order of the axes looks like, if another looks better: by the mean cosine of neighbours, of
/// up to 64 pairs in 16 places along sites, tokens and batch. A hint: tokens too can resemble their
/// neighbours. Where nothing was said it also tells that sites and batch look alike.
/// @param sites    of one array
/// @param guessed  that array, if nothing was said; looked at in no other case
/// @param said     --axes, as letters
/// @return a note, or nothing
std::string axes_hint(rflow::site_set const& sites, rflow::tensor const* guessed,
                      std::string const& said);

/// Holds what a capture says of itself against its tensors, sets its depth and notes what is odd.
/// @throws unusable where they contradict each other
void compare_facts(capture& c);

/// Notes that the last site may be the final norm: by the model, or since all its rows have one
/// norm, or (of arrays, which have no names to tell) since its norms jump.
void note_list_end(capture& c, options const& asked);

}  // namespace report
