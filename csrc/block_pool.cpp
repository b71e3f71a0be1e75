#include "block_pool.h"

#include <algorithm>
#include <limits>

#include "check.h"

namespace ppomax {

namespace {

std::size_t checked_num_blocks(std::int64_t num_blocks) {
    constexpr auto most = std::numeric_limits<BlockId>::max();
    check_argument(num_blocks >= 2 && num_blocks <= most, "num_blocks must be from 2 (block 0 is reserved)",
                   " to ", most, ", got ", num_blocks);
    return static_cast<std::size_t>(num_blocks);
}

}  // namespace

BlockPool::BlockPool(std::int64_t num_blocks)
    : blocks_(checked_num_blocks(num_blocks)), first_free_(1), free_blocks_(num_blocks - 1) {
    blocks_[kReservedBlock] = {1, kNoBlock};
    for (BlockId id = 1; id < num_blocks; ++id) blocks_[id] = {0, id + 1};
    blocks_.back().next_free = kNoBlock;
}

BlockId BlockPool::allocate() {
    check_invariant(first_free_ != kNoBlock, "block pool: none of ", num_blocks() - 1, " blocks is free");
    const BlockId id = first_free_;
    first_free_ = blocks_[id].next_free;
    blocks_[id] = {1, kNoBlock};
    --free_blocks_;
    peak_blocks_in_use_ = std::max(peak_blocks_in_use_, blocks_in_use());
    return id;
}

void BlockPool::release(BlockId id) {
    const bool in_use = id > kReservedBlock && id < num_blocks() && blocks_[id].ref_count > 0;
    check_invariant(in_use, "block pool: block ", id, " is not in use");
    if (--blocks_[id].ref_count > 0) return;
    blocks_[id].next_free = first_free_;
    first_free_ = id;
    ++free_blocks_;
}

void BlockPool::check_integrity() const {
    check_invariant(blocks_[kReservedBlock].ref_count == 1, "block pool: block 0 has lost its reference");
    std::int64_t walked = 0;
    for (BlockId id = first_free_; id != kNoBlock; id = blocks_[id].next_free) {
        check_invariant(id > kReservedBlock && id < num_blocks(), "block pool: the free list leads to ", id);
        check_invariant(blocks_[id].ref_count == 0, "block pool: block ", id, " is free and referenced");
        check_invariant(++walked <= free_blocks_, "block pool: the free list is longer than ", free_blocks_);
    }
    check_invariant(walked == free_blocks_, "block pool: the free list is shorter than ", free_blocks_);
    const auto unreferenced = std::count_if(blocks_.begin(), blocks_.end(),
                                            [](const Block& block) { return block.ref_count == 0; });
    check_invariant(unreferenced == free_blocks_, "block pool: ", unreferenced - free_blocks_,
                    " blocks without references are not on the free list");
    check_invariant(peak_blocks_in_use_ >= blocks_in_use(), "block pool: more in use than the peak");
}

}  // namespace ppomax
