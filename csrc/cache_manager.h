// Rows (running sequences) and what the attention kernels read about them: block table, lengths, slots.
//
// Ownership
// - The manager owns the pool and, for every entry of a block-table row below the row's block count, one
//   reference to that block. A row belongs to the caller from admit() until release(); then its index is
//   used again.
// - A running row holds a promise of all blocks its max_tokens could need and takes them lazily, so that
//   appending to an admitted row cannot run out of blocks.
// - The three exported arrays are allocated once and keep their addresses for the manager's life; callers
//   read them, only the manager writes. Slot s is token s % block_size of block s / block_size; the memory
//   behind the slots is the caller's, and the manager never sees it.
// - One owner thread: no call may overlap another.
//
// Every call has two phases: it checks its arguments and the room, then changes state in a way that cannot
// fail. A call that throws std::invalid_argument has changed nothing.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "block_pool.h"

namespace ppomax {

using Row = std::int32_t;
inline constexpr Row kNoRow = -1;
inline constexpr std::int64_t kNoSlot = -1;  // in the slot mapping: write nothing

struct Statistics {
    std::int64_t free_blocks;         // in no block table; reserved_blocks of them are promised
    std::int64_t blocks_in_use;       // in a block table; block 0 is not counted
    std::int64_t reserved_blocks;     // promised to running rows and not taken yet
    std::int64_t rows_in_use;
    std::int64_t peak_blocks_in_use;  // the largest blocks_in_use so far
};

class CacheManager {
public:
    CacheManager(std::int64_t num_blocks, std::int64_t block_size, std::int64_t max_sequences,
                 std::int64_t max_blocks_per_sequence);
    CacheManager(const CacheManager&) = delete;  // the addresses of its arrays are promised to others
    CacheManager& operator=(const CacheManager&) = delete;

    // A row for a sequence of prompt_tokens that may grow to max_tokens; kNoRow where rows or blocks are
    // short at present; std::invalid_argument where it could never fit.
    Row admit(std::int64_t prompt_tokens, std::int64_t max_tokens);
    std::int64_t prompt_tokens(Row row) const { return running(row).prompt_tokens; }
    // Where the K and V of the row's prompt go; slots.size() must be prompt_tokens(row).
    void prefill_slots(Row row, std::span<std::int64_t> slots) const;
    // Appends one token to each row. slot_mapping()[i] is the slot of rows[i]'s new token, then kNoSlot.
    void step(std::span<const Row> rows);
    void release(std::span<const Row> rows);

    std::span<const std::int32_t> block_table() const { return block_table_; }  // [max_sequences, max_blocks]
    std::span<const std::int32_t> lengths() const { return lengths_; }  // [max_sequences]
    std::span<const std::int64_t> slot_mapping() const { return slot_mapping_; }  // [max_sequences]

    std::int64_t num_blocks() const { return pool_.num_blocks(); }
    std::int64_t block_size() const { return block_size_; }
    std::int64_t max_sequences() const { return static_cast<std::int64_t>(sequences_.size()); }
    std::int64_t max_blocks_per_sequence() const { return max_blocks_; }
    Statistics statistics() const;

    // Compares everything with everything else; throws std::logic_error at the first inconsistency.
    void check_integrity() const;

private:
    struct Sequence {
        std::int64_t last_slot = kNoSlot;  // of the newest token
        std::int64_t named_in = 0;         // the last call that named this row: finds duplicates
        std::int32_t prompt_tokens = 0;
        std::int32_t max_tokens = 0;
        std::int32_t length = 0;
        std::int32_t num_blocks = 0;
        std::int32_t room = 0;  // slots left in the last block
        bool running = false;
    };

    const Sequence& running(Row row) const;
    void check_rows(std::span<const Row> rows);
    void check_sequence(Row row) const;
    std::vector<std::int32_t> count_references() const;
    std::int64_t blocks_for(std::int64_t tokens) const { return (tokens + block_size_ - 1) / block_size_; }
    std::int64_t promised_blocks(const Sequence& s) const { return blocks_for(s.max_tokens) - s.num_blocks; }
    std::span<BlockId> blocks_of(Row row);
    std::span<const BlockId> blocks_of(Row row) const;
    BlockId append_block(Row row);
    void append_token(Row row);

    BlockPool pool_;
    std::int64_t block_size_;
    std::int64_t max_blocks_;
    std::int64_t reserved_blocks_ = 0;
    std::int64_t calls_ = 0;
    std::int64_t stepped_rows_ = 0;  // entries of the slot mapping that the last step wrote
    std::vector<Sequence> sequences_;
    std::vector<Row> free_rows_;  // a stack; never grows past the max_sequences it starts with
    std::vector<BlockId> block_table_;
    std::vector<std::int32_t> lengths_;
    std::vector<std::int64_t> slot_mapping_;
};

}  // namespace ppomax
