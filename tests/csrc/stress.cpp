// Random operations on the KV-cache manager, checked against a simulated KV memory in which every token is a
// unique number: whatever the manager does, each row must find its own tokens again through the block table.
// test_stress.py builds this with sanitizers. Arguments: operations per setting, seed.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <random>
#include <stdexcept>
#include <vector>

#include "block_pool.h"
#include "cache_manager.h"

using namespace ppomax;

namespace {

using Tokens = std::vector<std::int64_t>;

void expect(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(what);
}

template <typename Error, typename Call>
void expect_error(Call call) {
    try {
        call();
    } catch (const Error&) {
        return;
    }
    throw std::runtime_error("a wrong call was accepted");
}

struct Sizes {
    std::int64_t num_blocks, block_size, max_sequences, max_blocks;
};

class Stress {
public:
    Stress(const Sizes& sizes, std::uint64_t seed)
        : manager_(sizes.num_blocks, sizes.block_size, sizes.max_sequences, sizes.max_blocks),
          memory_(static_cast<std::size_t>(sizes.num_blocks * sizes.block_size), -1),
          most_tokens_(std::min(sizes.max_blocks, sizes.num_blocks - 1) * sizes.block_size),
          random_(seed) {}

    void run(std::int64_t operations) {
        for (std::int64_t i = 0; i < operations; ++i) {
            switch (below(8)) {
                case 0: case 1: admit(); break;
                case 2: release(); break;
                case 3: wrong_call(); break;
                default: step();
            }
            manager_.check_integrity();
            check_memory();
        }
        manager_.release(running_rows());
        manager_.check_integrity();
        const Statistics end = manager_.statistics();
        expect(end.blocks_in_use == 0 && end.reserved_blocks == 0 && end.rows_in_use == 0, "blocks leaked");
    }

private:
    std::int64_t below(std::int64_t end) {
        return std::uniform_int_distribution<std::int64_t>(0, end - 1)(random_);
    }

    std::vector<Row> running_rows() const {
        std::vector<Row> rows;
        for (const auto& [row, tokens] : tokens_) rows.push_back(row);
        return rows;
    }

    std::vector<Row> some_rows(bool may_grow) {
        std::vector<Row> rows;
        for (const Row row : running_rows()) {
            const bool fits = !may_grow || std::ssize(tokens_[row]) < max_tokens_[row];
            if (fits && below(4) > 0) rows.push_back(row);
        }
        std::shuffle(rows.begin(), rows.end(), random_);
        return rows;
    }

    void write(Row row, std::int64_t slot) {
        expect(slot >= manager_.block_size(), "a token was sent to the reserved block");
        memory_.at(static_cast<std::size_t>(slot)) = ++newest_token_;
        tokens_[row].push_back(newest_token_);
    }

    void admit() {
        const std::int64_t max_tokens = 1 + below(most_tokens_);
        const std::int64_t prompt_tokens = 1 + below(max_tokens);
        const Statistics before = manager_.statistics();
        const Row row = manager_.admit(prompt_tokens, max_tokens);
        const std::int64_t needed = (max_tokens + manager_.block_size() - 1) / manager_.block_size();
        const bool fits = before.rows_in_use < manager_.max_sequences() &&
                          needed <= before.free_blocks - before.reserved_blocks;
        expect(fits == (row != kNoRow), "admission disagrees with the free blocks and rows");
        if (row == kNoRow) return;
        expect(!tokens_.contains(row), "a running row was given away");
        Tokens slots(static_cast<std::size_t>(prompt_tokens));
        manager_.prefill_slots(row, slots);
        for (const auto slot : slots) write(row, slot);
        max_tokens_[row] = max_tokens;
    }

    void step() {
        const auto rows = some_rows(true);
        manager_.step(rows);
        for (std::size_t i = 0; i < rows.size(); ++i) write(rows[i], manager_.slot_mapping()[i]);
    }

    void release() {
        auto rows = some_rows(false);
        rows.resize(std::min<std::size_t>(rows.size(), 2));
        manager_.release(rows);
        for (const Row row : rows) forget(row);
    }

    // The good rows come first, so that a call without a first phase would change them.
    void wrong_call() {
        auto rows = some_rows(true);
        const auto row = static_cast<Row>(below(manager_.max_sequences() + 2) - 1);  // or one past an end
        const bool wrong = !tokens_.contains(row) || std::ranges::find(rows, row) != rows.end();
        rows.push_back(row);
        if (wrong || std::ssize(tokens_.at(row)) == max_tokens_.at(row)) {
            expect_error<std::invalid_argument>([&] { manager_.step(rows); });
        }
        if (wrong) expect_error<std::invalid_argument>([&] { manager_.release(rows); });
        expect_error<std::invalid_argument>([&] { manager_.admit(1, most_tokens_ + 1); });
        expect_error<std::invalid_argument>([&] { manager_.admit(0, 1); });
    }

    void forget(Row row) {
        tokens_.erase(row);
        max_tokens_.erase(row);
    }

    void check_memory() const {
        expect(manager_.statistics().rows_in_use == std::ssize(tokens_), "rows_in_use is wrong");
        for (const auto& [row, tokens] : tokens_) {
            expect(manager_.lengths()[row] == std::ssize(tokens), "a length is wrong");
            const auto blocks = manager_.block_table().subspan(row * manager_.max_blocks_per_sequence());
            const auto block_size = manager_.block_size();
            for (std::int64_t i = 0; i < std::ssize(tokens); ++i) {
                const auto slot = blocks[i / block_size] * block_size + i % block_size;
                expect(memory_.at(static_cast<std::size_t>(slot)) == tokens[i], "a row lost a token");
            }
        }
    }

    CacheManager manager_;
    Tokens memory_;
    std::int64_t most_tokens_;
    std::int64_t newest_token_ = 0;
    std::map<Row, Tokens> tokens_;
    std::map<Row, std::int64_t> max_tokens_;
    std::mt19937_64 random_;
};

void exhaust_pool() {
    BlockPool pool(4);
    for (int i = 0; i < 3; ++i) pool.allocate();
    expect_error<std::logic_error>([&] { pool.allocate(); });
    pool.release(2);
    for (const BlockId id : {2, 0, -1, 4}) expect_error<std::logic_error>([&] { pool.release(id); });
    pool.check_integrity();
    expect(pool.allocate() == 2 && pool.peak_blocks_in_use() == 3, "the freed block did not come back");
    expect_error<std::invalid_argument>([] { BlockPool too_small(1); });
}

}  // namespace

int main(int argc, char** argv) try {
    const std::int64_t operations = argc > 1 ? std::atoll(argv[1]) : 10000;
    const std::uint64_t seed = argc > 2 ? static_cast<std::uint64_t>(std::atoll(argv[2])) : 0;
    exhaust_pool();
    const Sizes settings[] = {
        {12, 3, 8, 5},  // blocks are short
        {64, 4, 4, 6},  // rows are short
        {24, 1, 6, 9},  // a block per token
        {9, 16, 8, 1},  // a block per sequence
        {5, 2, 3, 8},   // a sequence fits a row and not the pool
    };
    for (const Sizes& sizes : settings) Stress(sizes, seed).run(operations);
    std::puts("ok");
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
