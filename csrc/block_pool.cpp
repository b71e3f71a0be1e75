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

BlockPool::BlockPool(std::int64_t num_blocks, std::int64_t block_size, std::int64_t num_spaces,
                     std::uint64_t hash_mask)
    : blocks_(checked_num_blocks(num_blocks)), index_(num_blocks, block_size, hash_mask) {
    for (std::int64_t space = 0; space < num_spaces; ++space) spaces_.push_back({.epoch = ++epochs_});
    blocks_[kReservedBlock].ref_count = 1;
    for (auto block = static_cast<BlockId>(num_blocks - 1); block > kReservedBlock; --block) push_free(block);
}

BlockId BlockPool::allocate() {
    const BlockId block = first_free_ != kNoBlock ? take_free() : evict();
    if (block == kNoBlock) return kNoBlock;
    blocks_[block].ref_count = 1;
    note_peak();
    return block;
}

BlockId BlockPool::take_free() {
    const BlockId block = first_free_;
    first_free_ = blocks_[block].next;
    if (first_free_ == kNoBlock) last_free_ = kNoBlock;
    blocks_[block].next = kNoBlock;
    --free_blocks_;
    if (index_.contains(block)) index_.remove(block);  // cached in an epoch that is over
    return block;
}

BlockId BlockPool::evict() {
    BlockId oldest = kNoBlock;
    for (const Cached& space : spaces_) {
        const bool older = space.oldest != kNoBlock &&
                           (oldest == kNoBlock || blocks_[space.oldest].idle_since < blocks_[oldest].idle_since);
        if (older) oldest = space.oldest;
    }
    if (oldest == kNoBlock) return kNoBlock;
    unlink_idle(oldest);
    index_.remove(oldest);
    ++evictions_;
    return oldest;
}

void BlockPool::acquire(BlockId block) {
    Block& b = blocks_[block];
    if (b.ref_count == 0 && !b.pinned) unlink_idle(block);
    ++b.ref_count;
    note_peak();
}

void BlockPool::release(BlockId block) {
    const bool in_use = block > kReservedBlock && block < num_blocks() && blocks_[block].ref_count > 0;
    check_invariant(in_use, "block pool: block ", block, " is not in use");
    if (--blocks_[block].ref_count == 0 && !blocks_[block].pinned) retire(block);
}

void BlockPool::unpin(BlockId block) {
    Block& b = blocks_[block];
    if (b.pinned && b.ref_count == 0) retire(block);
    b.pinned = false;
}

void BlockPool::cache(BlockId block, Space space, const PrefixKey& key) {
    index_.insert(block, key);
    blocks_[block].space = space;
}

void BlockPool::forget(Space space) {
    Cached& s = spaces_[space];
    if (s.oldest != kNoBlock) {  // the whole list goes behind the free blocks
        (last_free_ == kNoBlock ? first_free_ : blocks_[last_free_].next) = s.oldest;
        last_free_ = s.newest;
    }
    free_blocks_ += s.idle_blocks;
    idle_blocks_ -= s.idle_blocks;
    s = {.epoch = ++epochs_};
}

void BlockPool::retire(BlockId block) {
    if (!index_.contains(block)) return push_free(block);
    if (index_.epoch(block) == epoch(blocks_[block].space)) return push_idle(block);
    index_.remove(block);
    push_free(block);
}

void BlockPool::push_free(BlockId block) {
    blocks_[block].next = first_free_;
    if (first_free_ == kNoBlock) last_free_ = block;
    first_free_ = block;
    ++free_blocks_;
}

void BlockPool::push_idle(BlockId block) {
    Block& b = blocks_[block];
    Cached& space = spaces_[b.space];
    b.idle_since = ++clock_;
    b.previous = space.newest;
    b.next = kNoBlock;
    (space.newest == kNoBlock ? space.oldest : blocks_[space.newest].next) = block;
    space.newest = block;
    ++space.idle_blocks;
    ++idle_blocks_;
}

void BlockPool::unlink_idle(BlockId block) {
    const Block& b = blocks_[block];
    Cached& space = spaces_[b.space];
    (b.previous == kNoBlock ? space.oldest : blocks_[b.previous].next) = b.next;
    (b.next == kNoBlock ? space.newest : blocks_[b.next].previous) = b.previous;
    --space.idle_blocks;
    --idle_blocks_;
}

void BlockPool::note_peak() { peak_blocks_in_use_ = std::max(peak_blocks_in_use_, blocks_in_use()); }

void BlockPool::check_integrity() const {
    index_.check_integrity();
    check_invariant(blocks_[kReservedBlock].ref_count == 1 && !index_.contains(kReservedBlock),
                    "block pool: block 0 is no longer reserved");
    std::vector<bool> listed(blocks_.size(), false);
    check_free(listed);
    std::int64_t idle = 0;
    for (const Cached& space : spaces_) {
        check_idle(space, listed);
        idle += space.idle_blocks;
    }
    check_invariant(idle == idle_blocks_, "block pool: ", idle, " blocks are idle, not ", idle_blocks_);
    for (BlockId block = 1; block < num_blocks(); ++block) check_block(block, listed[block]);
    check_invariant(peak_blocks_in_use_ >= blocks_in_use(), "block pool: more in use than the peak");
}

void BlockPool::check_free(std::vector<bool>& seen) const {
    std::int64_t walked = 0;
    BlockId last = kNoBlock;
    for (BlockId block = first_free_; block != kNoBlock; last = block, block = blocks_[block].next) {
        check_invariant(block > kReservedBlock && block < num_blocks() && !seen[block],
                        "block pool: the free list leads to ", block);
        const bool stale = index_.contains(block) && index_.epoch(block) != epoch(blocks_[block].space);
        check_invariant(stale || !index_.contains(block), "block pool: block ", block, " is free and cached");
        seen[block] = true;
        ++walked;
    }
    check_invariant(walked == free_blocks_ && last == last_free_, "block pool: the free list has ", walked,
                    " blocks, not ", free_blocks_);
}

void BlockPool::check_idle(const Cached& space, std::vector<bool>& seen) const {
    std::int64_t walked = 0;
    BlockId last = kNoBlock;
    for (BlockId block = space.oldest; block != kNoBlock; last = block, block = blocks_[block].next) {
        const Block& b = blocks_[block];
        check_invariant(!seen[block] && b.previous == last, "block pool: idle block ", block, " is linked wrongly");
        check_invariant(index_.contains(block) && index_.epoch(block) == space.epoch, "block pool: idle block ",
                        block, " is not cached");
        check_invariant(last == kNoBlock || blocks_[last].idle_since < b.idle_since, "block pool: idle block ",
                        block, " is out of order");
        const BlockId parent = index_.parent(block);
        check_invariant(parent == kNoBlock || !seen[parent], "block pool: block ", parent,
                        " would be evicted before its child ", block);
        seen[block] = true;
        ++walked;
    }
    check_invariant(walked == space.idle_blocks && last == space.newest, "block pool: ", walked,
                    " idle blocks, not ", space.idle_blocks);
}

void BlockPool::check_block(BlockId block, bool listed) const {
    const Block& b = blocks_[block];
    check_invariant(b.ref_count >= 0 && listed == (b.ref_count == 0 && !b.pinned), "block pool: block ", block,
                    " has ", b.ref_count, " references and is ", listed ? "" : "not ", "on a list");
    if (!index_.contains(block) || index_.epoch(block) != epoch(b.space)) return;
    const BlockId parent = index_.parent(block);
    if (parent == kNoBlock) return;
    check_invariant(index_.contains(parent) && index_.epoch(parent) == index_.epoch(block), "block pool: block ",
                    block, " is cached and its parent ", parent, " is not");
    check_invariant(blocks_[parent].ref_count >= b.ref_count, "block pool: block ", block,
                    " has more references than its parent ", parent);
}

}  // namespace ppomax
