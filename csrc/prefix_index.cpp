#include "prefix_index.h"

#include <algorithm>
#include <bit>

#include "check.h"

namespace ppomax {

namespace {

// Every bit of the result depends on every bit of x: two rounds of xor-shift and multiply.
std::uint64_t mix(std::uint64_t x) {
    x = (x ^ (x >> 31)) * 0x7fb5d329728ea185u;
    x = (x ^ (x >> 27)) * 0x81dadef4bc2dd44du;
    return x ^ (x >> 33);
}

}  // namespace

PrefixIndex::PrefixIndex(std::int64_t num_blocks, std::int64_t block_size, std::uint64_t hash_mask)
    : block_size_(block_size),
      hash_mask_(hash_mask),
      factors_(static_cast<std::size_t>(block_size)),
      entries_(static_cast<std::size_t>(num_blocks)),
      tokens_(static_cast<std::size_t>(num_blocks * block_size)),
      buckets_(std::bit_ceil(static_cast<std::size_t>(4 * num_blocks)), kNoBlock) {
    for (std::size_t i = 0; i < factors_.size(); ++i) factors_[i] = mix(i + 1) | 1;
}

std::uint64_t PrefixIndex::root(std::int64_t epoch) const {
    return mix(static_cast<std::uint64_t>(epoch) + 0x9e3779b97f4a7c15u) & hash_mask_;
}

// A sum of products, which the processor computes several at a time; only the last mix waits for the hash.
std::uint64_t PrefixIndex::extend(std::uint64_t hash, const Token* tokens) const {
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < factors_.size(); ++i) sum += factors_[i] * static_cast<std::uint32_t>(tokens[i]);
    return mix(mix(hash + 1) ^ sum) & hash_mask_;
}

BlockId PrefixIndex::find(const PrefixKey& key) const {
    BlockId block = buckets_[key.hash & (buckets_.size() - 1)];
    for (; block != kNoBlock; block = entries_[block].next) {
        const Entry& entry = entries_[block];
        if (entry.hash == key.hash && entry.epoch == key.epoch && entry.parent == key.parent &&
            std::ranges::equal(tokens(block), std::span(key.tokens, factors_.size()))) {
            return block;
        }
    }
    return kNoBlock;
}

void PrefixIndex::insert(BlockId block, const PrefixKey& key) {
    check_invariant(!contains(block), "prefix index: block ", block, " is listed already");
    BlockId& first = bucket(key.hash);
    entries_[block] = {key.hash, key.epoch, key.parent, first};
    first = block;
    std::copy_n(key.tokens, block_size_, tokens_.begin() + block * block_size_);
}

void PrefixIndex::remove(BlockId block) {
    check_invariant(contains(block), "prefix index: block ", block, " is not listed");
    BlockId* link = &bucket(entries_[block].hash);
    while (*link != block) link = &entries_[*link].next;
    *link = entries_[block].next;
    entries_[block].next = kUnlisted;
}

std::span<const Token> PrefixIndex::tokens(BlockId block) const {
    return {tokens_.data() + block * block_size_, static_cast<std::size_t>(block_size_)};
}

void PrefixIndex::check_integrity() const {
    std::size_t walked = 0;
    std::vector<bool> found(entries_.size(), false);
    for (std::size_t i = 0; i < buckets_.size(); ++i) {
        for (BlockId block = buckets_[i]; block != kNoBlock; block = entries_[block].next) {
            check_invariant(++walked <= entries_.size() && !found[block], "prefix index: bucket ", i,
                            " leads to block ", block, " again");
            check_invariant((entries_[block].hash & (buckets_.size() - 1)) == i, "prefix index: block ", block,
                            " is in the wrong bucket");
            check_entry(block);
            found[block] = true;
        }
    }
    for (std::size_t block = 0; block < entries_.size(); ++block) {
        check_invariant(found[block] == contains(static_cast<BlockId>(block)), "prefix index: block ", block,
                        " is in no bucket");
    }
}

void PrefixIndex::check_entry(BlockId block) const {
    const Entry& entry = entries_[block];
    const bool orphan = entry.parent != kNoBlock &&
                        (!contains(entry.parent) || entries_[entry.parent].epoch != entry.epoch);
    if (orphan) return;  // of an epoch that is over: BlockPool checks that
    const std::uint64_t before = entry.parent == kNoBlock ? root(entry.epoch) : entries_[entry.parent].hash;
    check_invariant(entry.hash == extend(before, tokens(block).data()), "prefix index: block ", block,
                    " is listed under a wrong hash");
}

}  // namespace ppomax
