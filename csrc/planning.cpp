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

// For most sequences of most steps this is all that there is to do.
inline void CacheManager::plan_decode(SequenceIndex index) {
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
    take_row(s, pool_.epoch(s.space), versions_[s.space]);
    const bool held = s.group != kNoGroup && !groups_[s.group].held_blocks.empty();
    share(s, held ? groups_[s.group].held_blocks : std::span<const BlockId>{}, held ? s.length() : 0);
    plan_chunk(index);
}

void CacheManager::insert_running(SequenceIndex index) {
    const auto older = [this](SequenceIndex a, SequenceIndex b) { return sequences_[a].id < sequences_[b].id; };
    running_.insert(std::ranges::upper_bound(running_, index, older), index);
}

// The leader's prompt is computed in this step: others of its group sample from the same logits, as many as rows
// and blocks allow. If some have to wait, its blocks are held for them.
void CacheManager::join_leader(Chunk& chunk) {
    Sequence& leader = sequences_[chunk.sequence];
    const GroupIndex group = std::exchange(leader.group, kNoGroup);
    Group& g = groups_[group];
    if (is_current(leader)) {
        list_prompt_blocks(chunk.sequence);
        leader.owns_tail = false;
        for (; !g.others.empty() && table_.free_rows() > 0 && spare_blocks() > 0; ++chunk.joined) {
            join(g.others.back(), leader);
            g.others.pop_back();
        }
        if (!g.others.empty() && g.held_blocks.empty()) hold_blocks(group, leader.epoch);
    }
    appoint_leader(group);
}

// As they will be after this step: replacements are made by then.
void CacheManager::list_prompt_blocks(SequenceIndex index) {
    const auto blocks = table_.row(sequences_[index].row, sequences_[index].num_blocks);
    prompt_blocks_.assign(blocks.begin(), blocks.end());
    for (const Replacement& replacement : replacements_) {
        if (replacement.sequence == index) prompt_blocks_[replacement.position] = replacement.block;
    }
}

void CacheManager::join(SequenceIndex index, const Sequence& leader) {
    Sequence& s = sequences_[index];
    s.group = kNoGroup;
    s.prefilling = false;
    take_row(s, leader.epoch, leader.version);
    share(s, prompt_blocks_, leader.written);
    insert_running(index);
    joined_.push_back(index);
}

void CacheManager::hold_blocks(GroupIndex group, std::int64_t epoch) {
    for (const BlockId block : prompt_blocks_) pool_.acquire(block);
    groups_[group].held_blocks = prompt_blocks_;
    groups_[group].held_epoch = epoch;
    holding_.push_back(group);
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
