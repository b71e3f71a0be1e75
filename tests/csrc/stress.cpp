// Random operations on the KV-cache manager, checked against a simulated KV memory: K and V of a token depend on
// the weights and on all tokens up to it, so each slot holds one number per (namespace, version, tokens). Whatever
// the manager shares, copies, evicts and preempts, each running sequence must find the numbers of its own tokens.
// test_stress.py builds this with sanitizers. Arguments: operations, seed.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "block_pool.h"
#include "cache_manager.h"

using namespace ppomax;

namespace {

using Tokens = std::vector<std::int64_t>;
constexpr Token kStop = 3;  // tokens go from 0 to 3, so that sequences have prefixes in common

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

struct Model {  // what is known of a sequence without any block
    Tokens tokens;
    std::int64_t max_tokens;
    Space space;
};

class Stress {
public:
    Stress(const Sizes& sizes, std::uint64_t seed)
        : manager_(sizes, {kStop}),
          sizes_(sizes),
          memory_(static_cast<std::size_t>(sizes.num_blocks * sizes.block_size), 0),
          device_table_(static_cast<std::size_t>(sizes.max_sequences * sizes.max_blocks_per_sequence), kReservedBlock),
          longest_(std::min(sizes.max_blocks_per_sequence, sizes.num_blocks - 1) * sizes.block_size),
          random_(seed) {
        for (std::int64_t i = 0; i < longest_; ++i) base_.push_back(below(3));
        for (auto& weight : stop_weights_) weight = below(2) ? 10 : 100;
    }

    void run(std::int64_t operations) {
        for (std::int64_t i = 0; i < operations; ++i) {
            operate();
            manager_.check_integrity();
            const Statistics now = manager_.statistics();
            expect(now.running + now.waiting == std::ssize(models_), "a sequence got lost");
            const auto blocks = now.free_blocks + now.cached_blocks + now.blocks_in_use;
            expect(blocks == sizes_.num_blocks - 1, "a block got lost");
        }
        while (!models_.empty()) step(sizes_.max_prefill_tokens);
        manager_.check_integrity();
        expect(manager_.statistics().blocks_in_use == 0, "blocks leaked");
        if (planned_) manager_.commit({}, {});
    }

private:
    std::int64_t below(std::int64_t end) { return std::uniform_int_distribution<std::int64_t>(0, end - 1)(random_); }

    void operate() {
        const auto draw = below(100);
        if (draw < 60) return step(below(3) ? sizes_.max_prefill_tokens : below(sizes_.max_prefill_tokens + 1));
        if (draw < 75) return submit();
        if (draw < 80) return wrong_call();
        if (draw == 80) return reset();
        if (planned_) return commit();
        if (draw < 87) return fork();
        if (draw < 90) return preempt();
        if (draw < 94) return release();
        if (draw == 94) return manager_.clear_cache();
        if (draw == 95) return (void)manager_.bump_version(static_cast<Space>(below(sizes_.namespaces)));
    }

    std::vector<SequenceId> some(bool running) {
        std::vector<SequenceId> ids;
        for (const auto& [id, model] : models_) {
            if (below(4) == 0 && (!running || manager_.sequence(id).row != kNoRow)) ids.push_back(id);
        }
        std::shuffle(ids.begin(), ids.end(), random_);
        return ids;
    }

    void submit() {
        if (models_.size() > 12) return;
        const auto length = 1 + below(std::min<std::int64_t>(longest_ - 1, 1 + below(20)));
        Tokens prompt(base_.begin(), base_.begin() + length);
        if (below(2)) prompt.back() = below(3);
        Tokens limits(static_cast<std::size_t>(1 + below(4)));
        for (auto& limit : limits) limit = 1 + below(longest_ - length);
        const auto space = static_cast<Space>(below(sizes_.namespaces));
        SequenceId id = manager_.submit(prompt, limits, space);
        for (const auto limit : limits) models_[id++] = {prompt, length + limit, space};
    }

    void commit() {
        const auto& ids = manager_.batch().sample_ids;
        std::vector<std::pair<SequenceId, std::int64_t>> sampled;
        for (std::int64_t i = 0; i < manager_.batch().num_samples; ++i) {
            const auto weight = stop_weights_[ids[i] % 2];
            sampled.emplace_back(ids[i], below(weight) == 0 ? kStop : below(3));
        }
        Tokens tokens;
        for (const auto& [id, token] : sampled) tokens.push_back(token);
        std::set<SequenceId> ended;
        for (const Finished& finished : manager_.commit(tokens, {})) ended.insert(finished.id);
        planned_ = false;
        for (const auto& [id, token] : sampled) {
            Model& model = models_.at(id);
            model.tokens.push_back(token);
            const bool ends = token == kStop || std::ssize(model.tokens) == model.max_tokens;
            expect(ends == ended.contains(id), "a sequence ended at the wrong time");
            if (ends) models_.erase(id);
        }
    }

    void step(std::int64_t budget) {
        if (planned_) commit();
        std::set<SequenceId> before;
        for (const auto& [id, model] : models_) {
            if (manager_.sequence(id).row != kNoRow) before.insert(id);
        }
        const Step step = manager_.plan(budget);
        for (const auto id : step.preempted) before.erase(id);
        for (const auto& [id, model] : models_) {
            const bool old = before.contains(id) || manager_.sequence(id).row == kNoRow;
            const auto version = manager_.sequence(id).version;
            expect(old || version == manager_.version(model.space), "started with an old version");
        }
        planned_ = step.num_members > 0;
        expect(planned_ || models_.empty() || budget == 0, "nobody gets on");
        expect(step.num_tokens - step.num_decodes <= budget, "over the budget");
        compute();
    }

    // The number of each of the sequence's tokens.
    Tokens contents(const Model& model, std::int64_t version) {
        Tokens numbers;
        std::int64_t number = -1 - version * sizes_.namespaces - model.space;
        for (const auto token : model.tokens) {
            number = numbers_.try_emplace({number, token}, std::ssize(numbers_) + 1).first->second;
            numbers.push_back(number);
        }
        return numbers;
    }

    // What a forward pass does; then a look at all that attention may read, through a table on another device.
    void compute() {
        const StepBatch& batch = manager_.batch();
        const auto size = sizes_.block_size;
        for (const Row row : manager_.block_table().dirty_rows()) {
            const auto blocks = manager_.block_table().row(row, sizes_.max_blocks_per_sequence);
            std::ranges::copy(blocks, device_table_.begin() + row * std::ssize(blocks));
        }
        for (std::int64_t i = 0; i < batch.num_copies; ++i) {
            std::copy_n(memory_.begin() + batch.copies[2 * i] * size, size,
                        memory_.begin() + batch.copies[2 * i + 1] * size);
        }
        std::map<std::int64_t, Tokens> rows;
        std::map<std::int64_t, const Model*> owners;
        for (const auto& [id, model] : models_) {
            const SequenceInfo info = manager_.sequence(id);
            if (info.row == kNoRow) continue;
            rows[info.row] = contents(model, info.version);
            owners[info.row] = &model;
        }
        Tokens computed;
        for (std::int64_t i = 0; i < batch.num_members; ++i) {
            for (std::int64_t t = batch.cu_seqlens[i]; t < batch.cu_seqlens[i + 1]; ++t) {
                expect(batch.tokens[t] == owners.at(batch.rows[i])->tokens.at(batch.positions[t]), "a wrong token");
                computed.push_back(rows.at(batch.rows[i])[batch.positions[t]]);
                if (batch.slot_mapping[t] != kNoSlot) memory_.at(batch.slot_mapping[t]) = computed.back();
            }
        }
        for (std::int64_t i = 0; i < batch.num_samples; ++i) {
            const Row row = manager_.sequence(batch.sample_ids[i]).row;
            expect(computed.at(batch.sample_positions[i]) == rows.at(row).back(), "logits of other tokens");
        }
        for (const auto& [id, model] : models_) {
            const SequenceInfo info = manager_.sequence(id);
            for (std::int64_t i = 0; i < info.cached_tokens; ++i) {
                const auto block = device_table_[info.row * sizes_.max_blocks_per_sequence + i / size];
                expect(memory_.at(block * size + i % size) == rows.at(info.row)[i], "a sequence lost a token");
            }
        }
    }

    void fork() {
        const auto ids = some(false);
        if (ids.empty()) return;
        const Model parent = models_.at(ids[0]);
        const auto count = 1 + below(std::ssize(parent.tokens));
        const SequenceId child = manager_.fork(ids[0], count);
        Tokens tokens(parent.tokens.begin(), parent.tokens.begin() + count);
        models_[child] = {std::move(tokens), parent.max_tokens, parent.space};
    }

    void preempt() { manager_.preempt(some(true)); }

    void release() {
        const auto ids = some(false);
        manager_.release(ids);
        for (const auto id : ids) models_.erase(id);
    }

    void reset() {
        manager_.reset();
        models_.clear();
        planned_ = false;
        expect(manager_.statistics().free_blocks == sizes_.num_blocks - 1, "reset() left blocks behind");
    }

    // Good ids come first, so that a call without a first phase would change them.
    void wrong_call() {
        auto ids = some(false);
        ids.push_back(ids.empty() || below(2) ? 1 << 30 : ids.front());
        const Tokens token{1}, too_many(100, 0), too_long{1, longest_};
        expect_error<std::invalid_argument>([&] { manager_.release(ids); });
        expect_error<std::invalid_argument>([&] { manager_.preempt(ids); });
        expect_error<std::invalid_argument>([&] { manager_.submit(token, too_long, 0); });
        expect_error<std::invalid_argument>([&] { manager_.step(too_many, {}, 0); });
        if (planned_) expect_error<std::invalid_argument>([&] { manager_.plan(0); });
    }

    CacheManager manager_;
    Sizes sizes_;
    Tokens memory_;
    std::vector<BlockId> device_table_;
    std::int64_t longest_;
    bool planned_ = false;
    Tokens base_;
    std::int64_t stop_weights_[2];
    std::map<SequenceId, Model> models_;
    std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> numbers_;
    std::mt19937_64 random_;
};

void exhaust_pool() {
    BlockPool pool(4, 1, 1, ~std::uint64_t{0});
    for (int i = 0; i < 3; ++i) pool.allocate();
    expect(pool.allocate() == kNoBlock, "a block from nowhere");
    pool.release(2);
    for (const BlockId id : {2, 0, -1, 4}) expect_error<std::logic_error>([&] { pool.release(id); });
    pool.check_integrity();
    expect(pool.allocate() == 2 && pool.peak_blocks_in_use() == 3, "the freed block did not come back");
    expect_error<std::invalid_argument>([] { BlockPool too_small(1, 1, 1, 0); });
}

// Every hash is the same: tokens, parents and epochs alone tell prefixes apart.
void collide() {
    PrefixIndex index(8, 2, 0);
    const Token tokens[] = {1, 2, 3, 4};
    const PrefixKey keys[] = {
        {0, 1, kNoBlock, tokens}, {0, 1, kNoBlock, tokens + 2}, {0, 1, 3, tokens}, {0, 2, 3, tokens}};
    for (BlockId block = 3; block < 7; ++block) index.insert(block, keys[block - 3]);
    for (BlockId block = 3; block < 7; ++block) expect(index.find(keys[block - 3]) == block, "another block's tokens");
    expect(index.find({0, 1, kNoBlock, tokens + 1}) == kNoBlock, "tokens that nobody has");
    index.remove(4);
    expect(index.find(keys[1]) == kNoBlock && index.find(keys[0]) == 3, "removed the wrong entry");
    index.check_integrity();
}

}  // namespace

int main(int argc, char** argv) try {
    const std::int64_t operations = argc > 1 ? std::atoll(argv[1]) : 10000;
    const std::uint64_t seed = argc > 2 ? static_cast<std::uint64_t>(std::atoll(argv[2])) : 0;
    exhaust_pool();
    collide();
    constexpr std::int64_t kRun = 250;
    std::mt19937_64 random(seed);
    const auto draw = [&](std::int64_t first, std::int64_t last) {
        return std::uniform_int_distribution<std::int64_t>(first, last)(random);
    };
    for (std::int64_t done = 0; done < operations; done += kRun) {
        Sizes sizes{draw(4, 17), draw(1, 4), draw(1, 6), draw(2, 12), draw(1, 9), draw(1, 2)};
        if (draw(0, 1)) sizes.hash_mask = 1;
        Stress(sizes, random()).run(kRun);
    }
    std::puts("ok");
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
