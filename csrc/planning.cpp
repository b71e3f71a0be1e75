// The plan of a step: who decodes, whose prompts are computed how far, who is admitted, who has to give way.
//
// Running sequences come in the order of their age, and the youngest gives way: so whoever has been planned
// keeps its blocks until commit().
#include <algorithm>
#include <numeric>
#include <utility>

#include "cache_manager.h"
#include "check.h"

namespace ppomax {

Step CacheManager::plan(std::int64_t prefill_tokens) {
    check_no_step("plan");
    check_budget(prefill_tokens);
    batch_.clear();
    for (auto* list : {&joined_, &sampled_}) list->clear();
    chunks_.clear();
    preempted_.clear();
    budget_ = prefill_tokens;

    plan_running();
    plan_waiting();
    const std::int64_t decodes = batch_.num_members;
    add_chunks();
    planned_ = batch_.num_members > 0;
    return {
        .num_tokens = batch_.num_tokens,
        .num_members = batch_.num_members,
        .num_decodes = decodes,
        .num_samples = batch_.num_samples,
        .num_copies = batch_.num_copies,
        .num_dirty_rows = std::ssize(table_.dirty_rows()),
        .preempted = preempted_,
        .finished = {},
    };
}

void CacheManager::plan_running() {
    // Both may end the list before its present end, and plan_chunk() may add to it after the present one.
    for (std::size_t i = 0; i < running_.size(); ++i) {
        const Sequence& s = sequences_[running_[i]];
        if (s.prefilling) {
            plan_chunk(running_[i]);
        } else if (s.written < s.length()) {
            plan_decode(running_[i]);
        }
    }
}

void CacheManager::plan_decode(SequenceIndex index) {
    Sequence& s = sequences_[index];
    if (s.room == 0 || !s.owns_tail) {
        if (!make_writable(s, s.written + 1)) return;
        enter_block(s);
    }
    batch_.add_decode(s.row, s.tokens.back(), s.written, s.next_slot, s.id);
    sampled_.push_back(index);
    ++s.written;
    ++s.next_slot;
    if (--s.room == 0) complete_block(index);
}

void CacheManager::plan_chunk(SequenceIndex index) {
    if (budget_ == 0) return;
    Sequence& s = sequences_[index];
    take_cached(s);
    const std::int32_t first_new = s.written;
    const std::int32_t start = std::min(first_new, s.length() - 1);
    const auto end = static_cast<std::int32_t>(std::min<std::int64_t>(s.length(), start + budget_));
    if (end > first_new && !make_writable(s, end)) return;
    write_until(index, end);
    chunks_.push_back({index, start, end, first_new, 0});
    budget_ -= end - start;
    prefill_tokens_ += end - start;
    if (end < s.length()) return;
    s.prefilling = false;
    if (s.group != kNoGroup) join_leader(chunks_.back());
}

void CacheManager::plan_waiting() {
    while (budget_ > 0 && table_.free_rows() > 0 && sequences_.first_waiting() != kNoSequence) {
        const SequenceIndex index = sequences_.first_waiting();
        const Sequence& s = sequences_[index];
        if (s.group != kNoGroup && groups_[s.group].held_epoch != pool_.epoch(s.space)) drop_held(groups_[s.group]);
        if (fits_now(s)) {
            admit(index);
        } else if (!running_.empty()) {
            return;
        } else {
            check_invariant(drop_youngest_held(), "sequence ", s.id, " does not fit the empty pool");
        }
    }
}

// Its present tokens and the next one, and a block to spare for each that runs.
bool CacheManager::fits_now(const Sequence& s) const {
    if (s.group != kNoGroup && !groups_[s.group].held_blocks.empty()) return spare_blocks() > 0;
    std::int64_t needed = blocks_for(s.length() + 1);
    PrefixKey key{pool_.index().root(pool_.epoch(s.space)), pool_.epoch(s.space), kNoBlock, s.tokens.data()};
    for (std::int32_t end = block_size_; end <= s.length(); end += block_size_, key.tokens += block_size_) {
        key.hash = pool_.index().extend(key.hash, key.tokens);
        key.parent = pool_.find(key);
        if (key.parent == kNoBlock) break;
        needed -= pool_.ref_count(key.parent) > 0;  // an idle one is available as long as it is not taken
    }
    return needed <= spare_blocks();
}

void CacheManager::admit(SequenceIndex index) {
    Sequence& s = sequences_[index];
    sequences_.dequeue(index);
    insert_running(index);
    s.row = table_.take_row();
    s.epoch = pool_.epoch(s.space);
    s.version = versions_[s.space];
    const bool held = s.group != kNoGroup && !groups_[s.group].held_blocks.empty();
    share(s, held ? groups_[s.group].held_blocks : std::span<const BlockId>{}, held ? s.length() : 0);
    plan_chunk(index);
}

void CacheManager::insert_running(SequenceIndex index) {
    const auto older = [this](SequenceIndex a, SequenceIndex b) { return sequences_[a].id < sequences_[b].id; };
    running_.insert(std::ranges::upper_bound(running_, index, older), index);
}

// Puts cached blocks into the row, where it ends at a block's edge, for as many of the next tokens as there are.
void CacheManager::take_cached(Sequence& s) {
    if (!is_current(s)) return;
    while (s.room == 0 && s.written + block_size_ <= s.length()) {
        const Token* tokens = s.tokens.data() + s.written;
        const std::uint64_t hash = pool_.index().extend(s.hash, tokens);
        const BlockId block = pool_.find({hash, s.epoch, s.parent, tokens});
        if (block == kNoBlock) return;
        pool_.acquire(block);
        table_.set(s.row, s.num_blocks++, block);
        s.written += block_size_;
        s.hash = hash;
        s.parent = block;
        hit_tokens_ += block_size_;
    }
}

// Starts the sequence's row with blocks of another one, whose first `written` tokens are the same.
void CacheManager::share(Sequence& to, std::span<const BlockId> blocks, std::int32_t written) {
    for (const BlockId block : blocks) {
        pool_.acquire(block);
        table_.set(to.row, to.num_blocks++, block);
    }
    to.written = written;
    to.room = to.num_blocks * block_size_ - written;
    if (to.room > 0) to.next_slot = static_cast<std::int64_t>(blocks.back() + 1) * block_size_ - to.room;
    to.hash = pool_.index().root(to.epoch);
    to.parent = kNoBlock;
    for (std::int32_t i = 0; i < written / block_size_; ++i) {
        to.hash = pool_.index().extend(to.hash, to.tokens.data() + i * block_size_);
        to.parent = blocks[i];
    }
    hit_tokens_ += written;
}

// The leader's prompt is computed in this step: others of its group sample from the same logits, as many as rows
// and blocks allow. If some have to wait, its blocks are held for them.
void CacheManager::join_leader(Chunk& chunk) {
    Sequence& leader = sequences_[chunk.sequence];
    const GroupIndex group = std::exchange(leader.group, kNoGroup);
    Group& g = groups_[group];
    if (is_current(leader)) {
        const auto blocks = table_.row(leader.row, leader.num_blocks);
        scratch_blocks_.assign(blocks.begin(), blocks.end());
        for (const Replacement& replacement : replacements_) {
            if (replacement.sequence == chunk.sequence) scratch_blocks_[replacement.position] = replacement.block;
        }
        leader.owns_tail = false;
        for (; !g.others.empty() && table_.free_rows() > 0 && spare_blocks() > 0; ++chunk.joined) {
            const SequenceIndex index = g.others.back();
            g.others.pop_back();
            Sequence& s = sequences_[index];
            s.group = kNoGroup;
            s.prefilling = false;
            s.row = table_.take_row();
            s.epoch = leader.epoch;
            s.version = leader.version;
            share(s, scratch_blocks_, leader.written);
            insert_running(index);
            joined_.push_back(index);
        }
        if (!g.others.empty() && g.held_blocks.empty()) {
            for (const BlockId block : scratch_blocks_) pool_.acquire(block);
            g.held_blocks = scratch_blocks_;
            g.held_epoch = leader.epoch;
            holding_.push_back(group);
        }
    }
    appoint_leader(group);
}

// Makes sure of blocks for the tokens before `end`; false where the sequence itself had to give way.
bool CacheManager::make_writable(Sequence& s, std::int32_t end) {
    if (s.room > 0 && !s.owns_tail && !own_tail(s)) return false;
    while (s.num_blocks < blocks_for(end)) {
        const BlockId block = pool_.allocate();
        if (block != kNoBlock) {
            table_.set(s.row, s.num_blocks++, block);
        } else if (!reclaim(s)) {
            return false;
        }
    }
    return true;
}

// Copies the last block unless nobody else refers to it or may find it.
bool CacheManager::own_tail(Sequence& s) {
    const BlockId tail = table_.at(s.row, s.num_blocks - 1);
    while (!pool_.writable(tail)) {
        const BlockId block = pool_.allocate();
        if (block != kNoBlock) {
            batch_.add_copy(tail, block);
            ++copies_;
            pool_.pin(tail);
            pool_.release(tail);
            table_.set(s.row, s.num_blocks - 1, block);
            s.next_slot += static_cast<std::int64_t>(block - tail) * block_size_;
            break;
        }
        if (!reclaim(s)) return false;
    }
    s.owns_tail = true;
    return true;
}

void CacheManager::enter_block(Sequence& s) {
    if (s.room > 0) return;
    s.next_slot = static_cast<std::int64_t>(table_.at(s.row, s.written / block_size_)) * block_size_;
    s.room = block_size_;
    s.owns_tail = true;
}

void CacheManager::write_until(SequenceIndex index, std::int32_t end) {
    Sequence& s = sequences_[index];
    while (s.written < end) {
        enter_block(s);
        const std::int32_t count = std::min(s.room, end - s.written);
        s.written += count;
        s.next_slot += count;
        s.room -= count;
        if (s.room == 0) complete_block(index);
    }
}

// The block of the last written token is full: from now on it is found by its tokens, unless one is already.
void CacheManager::complete_block(SequenceIndex index) {
    Sequence& s = sequences_[index];
    if (!is_current(s)) return;
    const Token* tokens = s.tokens.data() + s.written - block_size_;
    const PrefixKey key{pool_.index().extend(s.hash, tokens), s.epoch, s.parent, tokens};
    const std::int32_t position = s.written / block_size_ - 1;
    const BlockId cached = pool_.find(key);
    s.hash = key.hash;
    if (cached == kNoBlock) {
        s.parent = table_.at(s.row, position);
        pool_.cache(s.parent, s.space, key);
    } else {
        pool_.acquire(cached);
        replacements_.push_back({index, position, cached});
        s.parent = cached;
    }
}

// One thing to make room for a running sequence; false where that was to take its own blocks.
bool CacheManager::reclaim(const Sequence& s) {
    if (drop_youngest_held()) return true;
    check_invariant(running_.size() > 1, "sequence ", s.id, " does not fit the pool alone");
    const SequenceIndex youngest = running_.back();
    running_.pop_back();
    give_blocks_back(sequences_[youngest]);
    sequences_.enqueue(youngest);
    preempted_.push_back(sequences_[youngest].id);
    ++preemptions_;
    return sequences_[youngest].id != s.id;
}

void CacheManager::add_chunks() {
    auto joined = joined_.begin();
    for (const Chunk& chunk : chunks_) {
        const Sequence& s = sequences_[chunk.sequence];
        const auto tokens = std::span(s.tokens).subspan(chunk.start, chunk.end - chunk.start);
        const auto slots = batch_.add_chunk(s.row, tokens, chunk.start);
        for (std::int32_t i = chunk.first_new; i < chunk.end; ++i) {
            const std::int64_t block = table_.at(s.row, i / block_size_);
            slots[i - chunk.start] = block * block_size_ + i % block_size_;
        }
        if (chunk.end < s.length()) continue;
        sampled_.push_back(chunk.sequence);
        batch_.add_sample(s.id);
        for (std::int32_t i = 0; i < chunk.joined; ++i, ++joined) {
            sampled_.push_back(*joined);
            batch_.add_sample(sequences_[*joined].id);
        }
    }
}

}  // namespace ppomax
