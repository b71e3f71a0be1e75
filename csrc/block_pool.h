// The blocks of the KV cache: how many references each one has, which of them can be handed out, and which
// can be found again by their tokens.
//
// Ownership: the pool owns block numbers, their counts and the prefix index, never KV memory. allocate()
// and acquire() each give the caller one reference, which exactly one release() gives back. Without
// references a block is
// - free: its content is nobody's. Blocks whose content was never cached are handed out first, then those
//   of epochs that are over.
// - idle: cached in its namespace's present epoch, so that find() may bring it back. Idle blocks are
//   evicted when no block is free, the one that has been idle longest first. Whoever gives back a
//   sequence's blocks does so from its last one to its first, so that children are evicted before parents.
// - pinned: its content is still needed as the source of a copy; unpin() makes it free or idle.
// Block 0 is reserved: it is never handed out, so that table entries of nothing may point at it.
// Not thread-safe: the pool belongs to its CacheManager, which has one owner thread.
#pragma once

#include <cstdint>
#include <vector>

#include "prefix_index.h"
#include "types.h"

namespace ppomax {

class BlockPool {
public:
    // Throws std::invalid_argument unless 2 <= num_blocks <= 2^31 - 1; the other sizes are positive.
    BlockPool(std::int64_t num_blocks, std::int64_t block_size, std::int64_t num_spaces, std::uint64_t hash_mask);

    // kNoBlock where no block is free or idle.
    BlockId allocate();
    // One more reference to a block that is in use or idle.
    void acquire(BlockId block);
    // Throws std::logic_error, changing nothing, for a block without references (double free, block 0, out
    // of range).
    void release(BlockId block);
    void pin(BlockId block) { blocks_[block].pinned = true; }
    void unpin(BlockId block);

    // The block that holds this prefix under its namespace's present epoch; kNoBlock where there is none.
    BlockId find(const PrefixKey& key) const { return index_.find(key); }
    // From now on find() finds this block, which is in use and not cached.
    void cache(BlockId block, Space space, const PrefixKey& key);
    // Starts a new epoch: nothing cached before is found again, and idle blocks become free. O(1).
    void forget(Space space);

    // One reference, and content that nobody else may find: can be written to.
    bool writable(BlockId block) const { return blocks_[block].ref_count == 1 && !index_.contains(block); }
    // Zero without references; std::out_of_range for a number that is no block's.
    std::int32_t ref_count(BlockId block) const { return blocks_.at(static_cast<std::size_t>(block)).ref_count; }
    std::int64_t epoch(Space space) const { return spaces_[space].epoch; }
    const PrefixIndex& index() const { return index_; }

    std::int64_t num_blocks() const { return static_cast<std::int64_t>(blocks_.size()); }
    std::int64_t free_blocks() const { return free_blocks_; }
    std::int64_t idle_blocks() const { return idle_blocks_; }
    std::int64_t available() const { return free_blocks_ + idle_blocks_; }
    std::int64_t blocks_in_use() const { return num_blocks() - 1 - available(); }
    std::int64_t peak_blocks_in_use() const { return peak_blocks_in_use_; }
    std::int64_t evictions() const { return evictions_; }

    // Walks every block; throws std::logic_error at the first inconsistency.
    void check_integrity() const;

private:
    struct Block {
        std::int64_t idle_since = 0;  // ticks of clock_
        std::int32_t ref_count = 0;
        Space space = 0;              // of the content, where it is cached
        BlockId previous = kNoBlock;  // in the list of idle blocks
        BlockId next = kNoBlock;      // in the list of idle or of free blocks
        bool pinned = false;
    };

    struct Cached {  // a namespace
        std::int64_t epoch;
        BlockId oldest = kNoBlock;  // the list of its idle blocks
        BlockId newest = kNoBlock;
        std::int64_t idle_blocks = 0;
    };

    BlockId take_free();
    BlockId evict();
    void retire(BlockId block);
    void push_free(BlockId block);
    void push_idle(BlockId block);
    void unlink_idle(BlockId block);
    void note_peak();
    void check_free(std::vector<bool>& seen) const;
    void check_idle(const Cached& space, std::vector<bool>& seen) const;
    void check_block(BlockId block, bool listed) const;

    std::vector<Block> blocks_;
    PrefixIndex index_;
    std::vector<Cached> spaces_;
    BlockId first_free_ = kNoBlock;
    BlockId last_free_ = kNoBlock;
    std::int64_t free_blocks_ = 0;
    std::int64_t idle_blocks_ = 0;
    std::int64_t peak_blocks_in_use_ = 0;
    std::int64_t evictions_ = 0;
    std::int64_t epochs_ = 0;  // of all namespaces: an epoch's number is nobody else's
    std::int64_t clock_ = 0;
};

}  // namespace ppomax
