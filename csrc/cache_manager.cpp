#include "cache_manager.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "check.h"

namespace ppomax {

namespace {

constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();

std::int64_t positive(std::int64_t value, const char* name) {
    check_argument(value >= 1 && value <= kMaxInt32, name, " must be from 1 to ", kMaxInt32, ", got ", value);
    return value;
}

}  // namespace

CacheManager::CacheManager(std::int64_t num_blocks, std::int64_t block_size, std::int64_t max_sequences,
                           std::int64_t max_blocks_per_sequence)
    : pool_(num_blocks),
      block_size_(positive(block_size, "block_size")),
      max_blocks_(positive(max_blocks_per_sequence, "max_blocks_per_sequence")),
      sequences_(static_cast<std::size_t>(positive(max_sequences, "max_sequences"))),
      free_rows_(sequences_.size()),
      block_table_(sequences_.size() * static_cast<std::size_t>(max_blocks_), kReservedBlock),
      lengths_(sequences_.size(), 0),
      slot_mapping_(sequences_.size(), kNoSlot) {
    check_argument(block_size_ <= kMaxInt32 / max_blocks_, "max_blocks_per_sequence ", max_blocks_,
                   " x block_size ", block_size_, " is more tokens than an int32 length holds");
    std::iota(free_rows_.rbegin(), free_rows_.rend(), 0);  // row 0 on top
}

Row CacheManager::admit(std::int64_t prompt_tokens, std::int64_t max_tokens) {
    check_argument(1 <= prompt_tokens && prompt_tokens <= max_tokens,
                   "need 1 <= prompt_tokens <= max_tokens, got prompt_tokens ", prompt_tokens,
                   " and max_tokens ", max_tokens);
    check_argument(max_tokens <= max_blocks_ * block_size_, "a sequence of ", max_tokens,
                   " tokens never fits a row of ", max_blocks_, " blocks of ", block_size_);
    const std::int64_t needed = blocks_for(max_tokens);
    check_argument(needed < num_blocks(), "a sequence of ", max_tokens, " tokens needs ", needed,
                   " blocks of ", block_size_, " and never fits the pool of ", num_blocks() - 1);
    if (free_rows_.empty() || needed > pool_.free_blocks() - reserved_blocks_) return kNoRow;

    const Row row = free_rows_.back();
    free_rows_.pop_back();
    reserved_blocks_ += needed;
    Sequence& sequence = sequences_[row];
    sequence.running = true;
    sequence.prompt_tokens = sequence.length = lengths_[row] = static_cast<std::int32_t>(prompt_tokens);
    sequence.max_tokens = static_cast<std::int32_t>(max_tokens);
    std::int64_t end = 0;  // of the last block's slots
    for (std::int64_t i = blocks_for(prompt_tokens); i > 0; --i) end = (append_block(row) + 1) * block_size_;
    sequence.room = static_cast<std::int32_t>(sequence.num_blocks * block_size_ - prompt_tokens);
    sequence.last_slot = end - sequence.room - 1;
    return row;
}

void CacheManager::prefill_slots(Row row, std::span<std::int64_t> slots) const {
    check_argument(std::ssize(slots) == prompt_tokens(row), "an array of ", slots.size(), " slots for row ",
                   row, " with a prompt of ", prompt_tokens(row));
    for (const BlockId block : blocks_of(row)) {
        const auto part = slots.first(std::min(slots.size(), static_cast<std::size_t>(block_size_)));
        std::iota(part.begin(), part.end(), block * block_size_);
        slots = slots.subspan(part.size());
    }
}

void CacheManager::step(std::span<const Row> rows) {
    check_rows(rows);
    for (const Row row : rows) {
        const Sequence& sequence = sequences_[row];
        check_argument(sequence.length < sequence.max_tokens, "row ", row, " has reached its max_tokens of ",
                       sequence.max_tokens);
    }
    auto slot = slot_mapping_.begin();
    for (const Row row : rows) {
        append_token(row);
        *slot++ = sequences_[row].last_slot;
    }
    std::fill(slot, std::max(slot, slot_mapping_.begin() + stepped_rows_), kNoSlot);
    stepped_rows_ = std::ssize(rows);
}

void CacheManager::release(std::span<const Row> rows) {
    check_rows(rows);
    for (const Row row : rows) {
        const auto blocks = blocks_of(row);
        // Last block first: the free list is a stack and so hands them out in ascending order again.
        std::for_each(blocks.rbegin(), blocks.rend(), [this](BlockId block) { pool_.release(block); });
        std::fill(blocks.begin(), blocks.end(), kReservedBlock);
        reserved_blocks_ -= promised_blocks(sequences_[row]);
        sequences_[row] = Sequence{};
        lengths_[row] = 0;
        free_rows_.push_back(row);
    }
}

Statistics CacheManager::statistics() const {
    return {
        .free_blocks = pool_.free_blocks(),
        .blocks_in_use = pool_.blocks_in_use(),
        .reserved_blocks = reserved_blocks_,
        .rows_in_use = std::ssize(sequences_) - std::ssize(free_rows_),
        .peak_blocks_in_use = pool_.peak_blocks_in_use(),
    };
}

const CacheManager::Sequence& CacheManager::running(Row row) const {
    check_argument(row >= 0 && row < max_sequences(), "unknown row ", row, ": rows go from 0 to ",
                   max_sequences() - 1);
    check_argument(sequences_[row].running, "row ", row, " is not running: never admitted, or released");
    return sequences_[row];
}

void CacheManager::check_rows(std::span<const Row> rows) {
    ++calls_;
    for (const Row row : rows) {
        check_argument(running(row).named_in != calls_, "row ", row, " is named twice in one call");
        sequences_[row].named_in = calls_;
    }
}

std::span<BlockId> CacheManager::blocks_of(Row row) {
    return {block_table_.data() + row * max_blocks_, static_cast<std::size_t>(sequences_[row].num_blocks)};
}

std::span<const BlockId> CacheManager::blocks_of(Row row) const {
    return {block_table_.data() + row * max_blocks_, static_cast<std::size_t>(sequences_[row].num_blocks)};
}

BlockId CacheManager::append_block(Row row) {
    const BlockId block = pool_.allocate();  // cannot be out of blocks: reserved_blocks_ <= free_blocks()
    --reserved_blocks_;
    ++sequences_[row].num_blocks;
    return blocks_of(row).back() = block;
}

void CacheManager::append_token(Row row) {
    Sequence& sequence = sequences_[row];
    if (sequence.room == 0) {
        sequence.last_slot = append_block(row) * block_size_;
        sequence.room = static_cast<std::int32_t>(block_size_);
    } else {
        ++sequence.last_slot;
    }
    --sequence.room;
    lengths_[row] = ++sequence.length;
}

void CacheManager::check_integrity() const {
    pool_.check_integrity();
    std::int64_t rows_in_use = 0;
    std::int64_t reserved_blocks = 0;
    for (Row row = 0; row < max_sequences(); ++row) {
        check_sequence(row);
        rows_in_use += sequences_[row].running;
        reserved_blocks += promised_blocks(sequences_[row]);
    }
    check_invariant(reserved_blocks == reserved_blocks_, "rows may take ", reserved_blocks,
                    " more blocks, but ", reserved_blocks_, " are reserved");
    check_invariant(reserved_blocks <= pool_.free_blocks(), reserved_blocks, " blocks are reserved, but ",
                    pool_.free_blocks(), " are free");
    const auto references = count_references();
    for (BlockId id = 0; id < num_blocks(); ++id) {
        check_invariant(references[id] == pool_.ref_count(id), "block ", id, " has a count of ",
                        pool_.ref_count(id), " but ", references[id], " references");
    }
    check_invariant(rows_in_use == statistics().rows_in_use, rows_in_use, " rows are running, but ",
                    free_rows_.size(), " are free");
    std::vector<bool> listed(sequences_.size(), false);
    for (const Row row : free_rows_) {
        check_invariant(row >= 0 && row < max_sequences() && !sequences_[row].running && !listed[row],
                        "row ", row, " is on the list of free rows twice or while it is running");
        listed[row] = true;
    }
    for (std::int64_t i = 0; i < max_sequences(); ++i) {
        const auto slot = slot_mapping_[i];
        const bool is_slot = slot >= block_size_ && slot < num_blocks() * block_size_;
        check_invariant(i < stepped_rows_ ? is_slot : slot == kNoSlot, "slot_mapping[", i, "] is ", slot);
    }
}

void CacheManager::check_sequence(Row row) const {
    const Sequence& sequence = sequences_[row];
    check_invariant(lengths_[row] == sequence.length, "lengths[", row, "] is ", lengths_[row], ", not ",
                    sequence.length);
    const bool length_holds = sequence.running ? 1 <= sequence.prompt_tokens &&
                                                     sequence.prompt_tokens <= sequence.length &&
                                                     sequence.length <= sequence.max_tokens
                                               : sequence.length == 0 && sequence.max_tokens == 0;
    check_invariant(length_holds, "row ", row, " has a length of ", sequence.length);
    check_invariant(sequence.num_blocks == blocks_for(sequence.length), "row ", row, " has ",
                    sequence.num_blocks, " blocks for ", sequence.length, " tokens");
    for (std::int64_t i = 0; i < max_blocks_; ++i) {
        const BlockId block = block_table_[row * max_blocks_ + i];
        const bool is_block = block > kReservedBlock && block < num_blocks();
        check_invariant(i < sequence.num_blocks ? is_block : block == kReservedBlock, "block_table[", row,
                        ", ", i, "] is ", block);
    }
    if (!sequence.running) return;
    const std::int64_t offset = (sequence.length - 1) % block_size_;
    check_invariant(sequence.last_slot == blocks_of(row).back() * block_size_ + offset, "row ", row,
                    " ends at slot ", sequence.last_slot);
    check_invariant(sequence.room == block_size_ - 1 - offset, "row ", row, " has room for ", sequence.room);
}

std::vector<std::int32_t> CacheManager::count_references() const {
    std::vector<std::int32_t> references(static_cast<std::size_t>(num_blocks()), 0);
    references[kReservedBlock] = 1;
    for (Row row = 0; row < max_sequences(); ++row) {
        for (const BlockId block : blocks_of(row)) ++references[block];
    }
    return references;
}

}  // namespace ppomax
