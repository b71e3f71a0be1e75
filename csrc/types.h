// The words of the manager. A slot is the place of one token's K and V: block * block_size + offset.
#pragma once

#include <cstdint>

namespace ppomax {

using Token = std::int32_t;
using BlockId = std::int32_t;
using Row = std::int32_t;         // of the block table
using Space = std::int32_t;       // a namespace of cached prefixes: the weights of one model
using SequenceId = std::int64_t;  // counts up and is never used again

inline constexpr BlockId kReservedBlock = 0;  // never handed out: what unused table entries point at
inline constexpr BlockId kNoBlock = -1;
inline constexpr Row kNoRow = -1;
inline constexpr std::int64_t kNoSlot = -1;  // in the slot mapping: write nothing

}  // namespace ppomax
