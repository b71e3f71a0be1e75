// The physical blocks of the KV cache: how many references each one has, and which are free.
//
// Ownership: the pool owns block ids and their counts, never KV memory. allocate() gives the caller one
// reference, and each reference is given back by exactly one release(); a block returns to the free list
// when its last reference goes. Block 0 is reserved: it is never handed out and never free, so that
// block-table entries of nothing may point at it.
// Not thread-safe: the pool belongs to its CacheManager, which has one owner thread.
#pragma once

#include <cstdint>
#include <vector>

namespace ppomax {

using BlockId = std::int32_t;
inline constexpr BlockId kReservedBlock = 0;
inline constexpr BlockId kNoBlock = -1;

struct Block {
    std::int32_t ref_count;
    BlockId next_free;  // threads the free list through the blocks; kNoBlock at its end and in used blocks
};

class BlockPool {
public:
    // Throws std::invalid_argument unless 2 <= num_blocks <= 2^31 - 1.
    explicit BlockPool(std::int64_t num_blocks);

    // Throws std::logic_error where no block is free: ask free_blocks() first.
    BlockId allocate();
    // Throws std::logic_error, changing nothing, for a block that is not in use (double release, block 0,
    // out of range).
    void release(BlockId block);

    // Zero for a free block; std::out_of_range for an id that is no block's.
    std::int32_t ref_count(BlockId id) const { return blocks_.at(static_cast<std::size_t>(id)).ref_count; }
    std::int64_t num_blocks() const { return static_cast<std::int64_t>(blocks_.size()); }
    std::int64_t free_blocks() const { return free_blocks_; }
    std::int64_t blocks_in_use() const { return num_blocks() - 1 - free_blocks_; }
    std::int64_t peak_blocks_in_use() const { return peak_blocks_in_use_; }

    // Walks every block; throws std::logic_error at the first inconsistency.
    void check_integrity() const;

private:
    std::vector<Block> blocks_;
    BlockId first_free_;
    std::int64_t free_blocks_;
    std::int64_t peak_blocks_in_use_ = 0;
};

}  // namespace ppomax
