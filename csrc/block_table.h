// The block table that attention kernels read, and which of its rows are taken.
//
// Ownership: the table owns its memory, allocated once at a fixed address, and its rows; it holds numbers
// of blocks and no references to them. A row belongs to one running sequence from take_row() to give_back().
// One row more than sequences can run stands at the end: never taken, it points at the reserved block
// throughout, for the padding of batches of a fixed size.
#pragma once

#include <algorithm>
#include <numeric>
#include <span>
#include <vector>

#include "types.h"

namespace ppomax {

class BlockTable {
public:
    BlockTable(std::int64_t rows, std::int64_t columns)
        : columns_(columns),
          blocks_(static_cast<std::size_t>((rows + 1) * columns), kReservedBlock),
          free_rows_(static_cast<std::size_t>(rows)),
          dirty_(static_cast<std::size_t>(rows), false) {
        std::iota(free_rows_.rbegin(), free_rows_.rend(), 0);  // row 0 on top
        dirty_rows_.reserve(static_cast<std::size_t>(rows));
    }

    std::int64_t rows() const { return static_cast<std::int64_t>(dirty_.size()); }
    std::int64_t columns() const { return columns_; }
    Row padding_row() const { return static_cast<Row>(rows()); }
    std::int64_t free_rows() const { return static_cast<std::int64_t>(free_rows_.size()); }

    Row take_row() {
        const Row row = free_rows_.back();
        free_rows_.pop_back();
        return row;
    }
    // The row's first `used` entries point at the reserved block again.
    void give_back(Row row, std::int64_t used) {
        std::fill_n(blocks_.begin() + row * columns_, used, kReservedBlock);
        free_rows_.push_back(row);
    }

    BlockId at(Row row, std::int64_t column) const { return blocks_[row * columns_ + column]; }
    std::span<const BlockId> row(Row row, std::int64_t used) const {
        return {blocks_.data() + row * columns_, static_cast<std::size_t>(used)};
    }
    void set(Row row, std::int64_t column, BlockId block) {
        blocks_[row * columns_ + column] = block;
        if (!dirty_[row]) dirty_rows_.push_back(row);
        dirty_[row] = true;
    }

    // The rows set() changed since clear_dirty().
    std::span<const Row> dirty_rows() const { return dirty_rows_; }
    void clear_dirty() {
        for (const Row row : dirty_rows_) dirty_[row] = false;
        dirty_rows_.clear();
    }
    std::span<const BlockId> blocks() const { return blocks_; }  // [rows + 1, columns]
    std::span<const Row> free_row_list() const { return free_rows_; }

private:
    std::int64_t columns_;
    std::vector<BlockId> blocks_;
    std::vector<Row> free_rows_;  // a stack
    std::vector<bool> dirty_;
    std::vector<Row> dirty_rows_;
};

}  // namespace ppomax
