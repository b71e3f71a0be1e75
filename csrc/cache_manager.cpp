// What callers do to sequences: submit, fork, preempt, release; versions and statistics.
#include "cache_manager.h"

#include <algorithm>
#include <utility>

#include "check.h"

namespace ppomax {

namespace {

constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();

void check_size(std::int64_t value, const char* name) {
    check_argument(value >= 1 && value <= kMaxInt32, name, " must be from 1 to ", kMaxInt32, ", got ", value);
}

Sizes checked_sizes(const Sizes& sizes) {
    check_size(sizes.block_size, "block_size");
    check_size(sizes.max_sequences, "max_sequences");
    check_size(sizes.max_blocks_per_sequence, "max_blocks_per_sequence");
    check_size(sizes.max_prefill_tokens, "max_prefill_tokens");
    check_size(sizes.namespaces, "namespaces");
    check_argument(sizes.block_size <= kMaxInt32 / sizes.max_blocks_per_sequence, "max_blocks_per_sequence ",
                   sizes.max_blocks_per_sequence, " x block_size ", sizes.block_size,
                   " is more tokens than an int32 length holds");
    check_argument(sizes.max_sequences + sizes.max_prefill_tokens <= kMaxInt32, "max_sequences ", sizes.max_sequences,
                   " + max_prefill_tokens ", sizes.max_prefill_tokens, " is more tokens than an int32 offset holds");
    return sizes;
}

}  // namespace

CacheManager::CacheManager(const Sizes& sizes, std::vector<Token> stop_tokens)
    : sizes_(checked_sizes(sizes)),
      block_size_(static_cast<std::int32_t>(sizes.block_size)),
      stop_tokens_(std::move(stop_tokens)),
      pool_(sizes.num_blocks, sizes.block_size, sizes.namespaces, sizes.hash_mask),
      table_(sizes.max_sequences, sizes.max_blocks_per_sequence),
      batch_(sizes.max_sequences, sizes.max_prefill_tokens, table_.padding_row()),
      versions_(static_cast<std::size_t>(sizes.namespaces), 0) {
    const auto rows = static_cast<std::size_t>(sizes.max_sequences);
    for (auto* list : {&running_, &joined_, &sampled_}) list->reserve(rows);
    preempted_.reserve(rows);
    chunks_.reserve(rows);
    replacements_.reserve(2 * rows + static_cast<std::size_t>(sizes.max_prefill_tokens / sizes.block_size));
    prompt_blocks_.reserve(static_cast<std::size_t>(sizes.max_blocks_per_sequence));
}

SequenceId CacheManager::submit(std::span<const std::int64_t> prompt, std::span<const std::int64_t> max_new_tokens,
                                Space space) {
    checked(space);
    check_argument(!prompt.empty(), "a prompt has at least 1 token");
    check_argument(!max_new_tokens.empty(), "max_new_tokens has one entry per sample, at least 1");
    check_tokens(prompt, "prompt");
    for (const auto limit : max_new_tokens) check_fits(std::ssize(prompt), limit);

    const std::vector<Token> tokens(prompt.begin(), prompt.end());
    const GroupIndex group = max_new_tokens.size() > 1 ? new_group() : kNoGroup;
    std::vector<SequenceIndex> samples;
    for (const auto limit : max_new_tokens) {
        samples.push_back(sequences_.create(tokens, std::ssize(tokens) + limit));
        sequences_[samples.back()].space = space;
        sequences_[samples.back()].group = group;
    }
    if (group != kNoGroup) {
        groups_[group].leader = samples.front();
        groups_[group].others.assign(samples.rbegin(), samples.rend() - 1);
    }
    sequences_.enqueue(samples.front());
    return sequences_[samples.front()].id;
}

SequenceId CacheManager::fork(SequenceId parent, std::int64_t num_tokens) {
    check_no_step("fork");
    const SequenceIndex from = sequences_.find(parent);
    const std::int64_t length = sequences_[from].length();
    check_argument(num_tokens >= 1 && num_tokens <= length, "sequence ", parent, " has ", length,
                   " tokens, asked to fork it after ", num_tokens);
    const auto first = sequences_[from].tokens.begin();
    const SequenceIndex to = sequences_.create({first, first + num_tokens}, sequences_[from].max_tokens);
    Sequence& s = sequences_[from];
    Sequence& child = sequences_[to];
    child.space = s.space;
    child.prompt_tokens = std::min(child.prompt_tokens, s.prompt_tokens);
    if (!s.running() || table_.free_rows() == 0) {
        sequences_.enqueue(to);
        return child.id;
    }
    const auto written = std::min(s.written, child.length());
    take_row(child, s.epoch, s.version);
    share(child, table_.row(s.row, blocks_for(written)), written);
    s.owns_tail = false;
    child.prefilling = child.length() - written != 1;
    insert_running(to);
    return child.id;
}

void CacheManager::preempt(std::span<const SequenceId> ids) {
    check_no_step("preempt");
    const auto indices = find_all(ids);
    for (const auto index : indices) {
        check_argument(sequences_[index].running(), "sequence ", sequences_[index].id, " is not running");
    }
    for (const auto index : indices) {
        give_blocks_back(sequences_[index]);
        sequences_.enqueue(index);
    }
    std::erase_if(running_, [this](SequenceIndex index) { return !sequences_[index].running(); });
    preemptions_ += std::ssize(ids);
}

void CacheManager::release(std::span<const SequenceId> ids) {
    check_no_step("release");
    const auto indices = find_all(ids);
    for (const auto index : indices) end(index);
    std::erase_if(running_, [this](SequenceIndex index) { return !sequences_[index].running(); });
}

std::int64_t CacheManager::bump_version(Space space) {
    checked(space);
    check_no_step("bump_version");
    pool_.forget(space);
    return ++versions_[space];
}

void CacheManager::clear_cache() {
    check_no_step("clear_cache");
    while (drop_youngest_held()) {}
    for (Space space = 0; space < std::ssize(versions_); ++space) pool_.forget(space);
}

void CacheManager::reset() {
    for (const Replacement& replacement : replacements_) pool_.release(replacement.block);
    replacements_.clear();
    for (std::int64_t i = 0; i < batch_.num_copies; ++i) pool_.unpin(batch_.copies[2 * i]);
    batch_.clear();
    planned_ = false;
    for (const auto index : running_) give_blocks_back(sequences_[index]);
    running_.clear();
    clear_cache();
    groups_.clear();
    unused_groups_.clear();
    sequences_.clear();
}

// Takes the sequence out of everything but running_.
void CacheManager::end(SequenceIndex index) {
    Sequence& s = sequences_[index];
    if (s.running()) {
        give_blocks_back(s);
    } else if (s.group == kNoGroup || groups_[s.group].leader == index) {
        sequences_.dequeue(index);
    }
    if (s.group != kNoGroup) leave_group(index);
    sequences_.erase(index);
}

// The last block first: idle blocks are evicted in this order, and free ones handed out in the other.
void CacheManager::give_blocks_back(Sequence& s) {
    for (std::int64_t i = s.num_blocks; i-- > 0;) pool_.release(table_.at(s.row, i));
    table_.give_back(s.row, s.num_blocks);
    s.row = kNoRow;
    s.num_blocks = s.written = s.room = 0;
    s.prefilling = true;
    s.owns_tail = false;
    s.version = -1;
}

GroupIndex CacheManager::new_group() {
    if (unused_groups_.empty()) {
        groups_.emplace_back();
        for (auto* list : {&holding_, &unused_groups_}) list->reserve(groups_.capacity());
        return static_cast<GroupIndex>(groups_.size() - 1);
    }
    const GroupIndex group = unused_groups_.back();
    unused_groups_.pop_back();
    return group;
}

void CacheManager::leave_group(SequenceIndex index) {
    const GroupIndex group = std::exchange(sequences_[index].group, kNoGroup);
    if (groups_[group].leader == index) {
        appoint_leader(group);
    } else {
        std::erase(groups_[group].others, index);
    }
}

// The next one waits in the queue for all of them; without one the group is over.
void CacheManager::appoint_leader(GroupIndex group) {
    Group& g = groups_[group];
    if (g.others.empty()) {
        drop_held(g);
        g.leader = kNoSequence;
        unused_groups_.push_back(group);
        return;
    }
    g.leader = g.others.back();
    g.others.pop_back();
    sequences_.enqueue(g.leader);
}

void CacheManager::drop_held(Group& group) {
    if (group.held_blocks.empty()) return;
    for (auto block = group.held_blocks.rbegin(); block != group.held_blocks.rend(); ++block) pool_.release(*block);
    group.held_blocks.clear();
    std::erase(holding_, static_cast<GroupIndex>(&group - groups_.data()));
}

bool CacheManager::drop_youngest_held() {
    if (holding_.empty()) return false;
    drop_held(groups_[holding_.back()]);
    return true;
}

SequenceInfo CacheManager::sequence(SequenceId id) const {
    const Sequence& s = sequences_[sequences_.find(id)];
    return {s.row, s.length(), s.prompt_tokens, s.max_tokens, s.written, s.version};
}

std::span<const Token> CacheManager::tokens(SequenceId id) const { return sequences_[sequences_.find(id)].tokens; }

Statistics CacheManager::statistics() const {
    return {
        .free_blocks = pool_.free_blocks(),
        .cached_blocks = pool_.idle_blocks(),
        .blocks_in_use = pool_.blocks_in_use(),
        .peak_blocks_in_use = pool_.peak_blocks_in_use(),
        .running = std::ssize(running_),
        .waiting = sequences_.size() - std::ssize(running_),
        .hit_tokens = hit_tokens_,
        .prefill_tokens = prefill_tokens_,
        .evictions = pool_.evictions(),
        .preemptions = preemptions_,
        .copies = copies_,
    };
}

Space CacheManager::checked(Space space) const {
    check_argument(space >= 0 && space < std::ssize(versions_), "unknown namespace ", space, ": they go from 0 to ",
                   versions_.size() - 1);
    return space;
}

void CacheManager::check_tokens(std::span<const std::int64_t> tokens, const char* what) const {
    const auto wrong = std::ranges::find_if(tokens, [](std::int64_t token) { return token < 0 || token > kMaxInt32; });
    if (wrong == tokens.end()) return;
    fail<std::invalid_argument>(what, "[", wrong - tokens.begin(), "] is ", *wrong, ", tokens go from 0 to ",
                                kMaxInt32);
}

void CacheManager::check_fits(std::int64_t prompt_tokens, std::int64_t max_new_tokens) const {
    check_size(max_new_tokens, "max_new_tokens");
    const std::int64_t longest = prompt_tokens + max_new_tokens;
    const std::int64_t needed = blocks_for(longest);
    check_argument(needed <= table_.columns(), "a sequence of ", prompt_tokens, " + ", max_new_tokens,
                   " tokens never fits a row of ", table_.columns(), " blocks of ", block_size_);
    check_argument(needed < pool_.num_blocks(), "a sequence of ", prompt_tokens, " + ", max_new_tokens,
                   " tokens needs ", needed, " blocks of ", block_size_, " and never fits the pool of ",
                   pool_.num_blocks() - 1);
}

void CacheManager::check_no_step(const char* call) const {
    check_argument(!planned_, call, ": a step is planned; commit it first, or reset()");
}

std::vector<SequenceIndex> CacheManager::find_all(std::span<const SequenceId> ids) const {
    std::vector<SequenceId> sorted(ids.begin(), ids.end());
    std::ranges::sort(sorted);
    const auto twice = std::ranges::adjacent_find(sorted);
    if (twice != sorted.end()) fail<std::invalid_argument>("sequence ", *twice, " is named twice in one call");
    std::vector<SequenceIndex> indices;
    for (const auto id : ids) indices.push_back(sequences_.find(id));
    return indices;
}

}  // namespace ppomax
