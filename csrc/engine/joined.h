// Sums whose terms are charged together.
#pragma once

#include "engine/program.h"

namespace pycert::engine {

// Whether a centred walk charges the layer that makes input j of the addition with the addition: its rows are the same,
// and it has no constants there.
inline bool joins(const Program& program, const Node& addition, size_t j) {
  if (addition.inputs[0] == addition.inputs[1]) return false;
  const Node& node = program.node(addition.inputs[j]);
  const bool mixes = node.op == Op::Linear || node.op == Op::Conv;
  return mixes && node.depends_on_input && node.consumers.size() == 1;
}

}  // namespace pycert::engine
