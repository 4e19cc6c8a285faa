// What the processor and its operating system can run. The only place with conditions on the architecture,
// beside the headers of the instruction sets themselves.
#pragma once

namespace fewbits {

// Null when this machine runs `isa` (a name as in CMakeLists.txt), else what it lacks.
const char *missing_for(const char *isa);

}  // namespace fewbits
