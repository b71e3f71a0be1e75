// Which block holds the K and V of a given prefix: a hash table with the links inside its entries.
//
// A full block is listed under the epoch of its weights, its own tokens and the block of the tokens before
// it. The 64-bit hash runs over all of these from the first token on, but only finds candidates: an entry
// matches where epoch, parent block and tokens are equal, so that by induction the whole prefix is. That
// holds as long as no block is given other content while a block of the same epoch that names it as parent
// is listed; whoever removes blocks removes children before parents.
//
// Ownership: the index owns its entries and a copy of each listed block's tokens. It refers to blocks by
// number and holds no reference to them; BlockPool, which owns the index, removes an entry before it gives
// the block away.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "types.h"

namespace ppomax {

struct PrefixKey {
    std::uint64_t hash;   // PrefixIndex::extend() over all blocks from root() to this one
    std::int64_t epoch;   // of the weights that K and V come from
    BlockId parent;       // holds the tokens before; kNoBlock for a sequence's first block
    const Token* tokens;  // [block_size]
};

class PrefixIndex {
public:
    // hash_mask is for tests: few bits make hashes collide.
    PrefixIndex(std::int64_t num_blocks, std::int64_t block_size, std::uint64_t hash_mask);

    std::uint64_t root(std::int64_t epoch) const;                           // the hash before the first block
    std::uint64_t extend(std::uint64_t hash, const Token* tokens) const;  // by one block

    BlockId find(const PrefixKey& key) const;  // kNoBlock where none matches
    void insert(BlockId block, const PrefixKey& key);  // of a block that is not listed
    void remove(BlockId block);                        // of a block that is

    bool contains(BlockId block) const { return entries_[block].next != kUnlisted; }
    std::int64_t epoch(BlockId block) const { return entries_[block].epoch; }
    BlockId parent(BlockId block) const { return entries_[block].parent; }
    std::span<const Token> tokens(BlockId block) const;

    // Throws std::logic_error unless every listed block is found in its bucket once, under the right hash.
    void check_integrity() const;

private:
    static constexpr BlockId kUnlisted = -2;

    struct Entry {
        std::uint64_t hash = 0;
        std::int64_t epoch = 0;
        BlockId parent = kNoBlock;
        BlockId next = kUnlisted;  // in the same bucket; kNoBlock at its end
    };

    BlockId& bucket(std::uint64_t hash) { return buckets_[hash & (buckets_.size() - 1)]; }
    void check_entry(BlockId block) const;

    std::int64_t block_size_;
    std::uint64_t hash_mask_;
    std::vector<std::uint64_t> factors_;  // [block_size], odd: one per position in a block
    std::vector<Entry> entries_;          // by block
    std::vector<Token> tokens_;           // [num_blocks, block_size]
    std::vector<BlockId> buckets_;  // first blocks; a power of two of them, so many that most hold one or none
};

}  // namespace ppomax
