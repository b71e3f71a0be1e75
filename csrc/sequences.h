// The sequences that have been submitted and have not ended, and the queue of those that wait to run.
//
// Ownership: the table owns the sequences and their tokens; it knows of blocks and rows by number alone, and
// whoever ends a sequence gives back its blocks and its row first. An index is a place in the table: it is
// valid until erase() and then used again, while an id is never used again. References to sequences
// are valid until the next create().
#pragma once

#include <unordered_map>
#include <vector>

#include "types.h"

namespace ppomax {

using SequenceIndex = std::int32_t;
using GroupIndex = std::int32_t;
inline constexpr SequenceIndex kNoSequence = -1;
inline constexpr GroupIndex kNoGroup = -1;

struct Sequence {
    // What each step reads and writes, in one cache line
    alignas(64) std::vector<Token> tokens;  // prompt and response; its capacity is max_tokens from the start
    SequenceId id = -1;
    std::int64_t next_slot = kNoSlot;  // of token `written`, where room > 0
    std::int32_t written = 0;  // K and V of so many tokens are in its blocks, or will be after the present step
    std::int32_t room = 0;     // slots left in the block of token `written`; 0: that block is not in use yet
    std::int32_t max_tokens = 0;
    Row row = kNoRow;        // kNoRow: it waits
    bool prefilling = true;  // not all of its tokens have been computed since it got its row
    bool owns_tail = false;  // nobody else refers to the block that has room

    std::int32_t num_blocks = 0;  // entries of its row of the block table
    // Of the blocks that are full, under the epoch of the weights at admission:
    BlockId parent = kNoBlock;  // the last one
    std::uint64_t hash = 0;
    std::int64_t epoch = 0;
    std::int64_t version = -1;  // of the weights at admission
    std::int32_t prompt_tokens = 0;
    Space space = 0;
    GroupIndex group = kNoGroup;
    SequenceIndex previous = kNoSequence;  // in the queue
    SequenceIndex next = kNoSequence;

    std::int32_t length() const { return static_cast<std::int32_t>(tokens.size()); }
    bool running() const { return row != kNoRow; }
};

class SequenceTable {
public:
    // Ids count up from call to call.
    SequenceIndex create(std::vector<Token> tokens, std::int64_t max_tokens);
    void erase(SequenceIndex index);
    void clear();
    // Throws std::invalid_argument for an id that was never given or has ended.
    SequenceIndex find(SequenceId id) const;
    Sequence& operator[](SequenceIndex index) { return sequences_[index]; }
    const Sequence& operator[](SequenceIndex index) const { return sequences_[index]; }
    std::int64_t size() const { return static_cast<std::int64_t>(by_id_.size()); }
    const std::unordered_map<SequenceId, SequenceIndex>& by_id() const { return by_id_; }

    // The queue is sorted by id.
    void enqueue(SequenceIndex index);
    void dequeue(SequenceIndex index);
    SequenceIndex first_waiting() const { return first_; }

private:
    void grow();

    std::vector<Sequence> sequences_;
    std::vector<SequenceIndex> unused_;  // places, the lowest last
    std::unordered_map<SequenceId, SequenceIndex> by_id_;
    SequenceId next_id_ = 0;
    SequenceIndex first_ = kNoSequence;
    SequenceIndex last_ = kNoSequence;
};

}  // namespace ppomax
