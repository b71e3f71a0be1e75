// CacheManager::check_integrity(): every count, link and number against everything that it follows from.
#include <algorithm>

#include "cache_manager.h"
#include "check.h"

namespace ppomax {

void CacheManager::check_integrity() const {
    pool_.check_integrity();
    check_rows();
    for (const auto& [id, index] : sequences_.by_id()) {
        const Sequence& s = sequences_[index];
        check_invariant(s.id == id, "sequence ", id, " is in the place of ", s.id);
        check_sequence(s);
        if (s.running() && is_current(s)) check_prefix(index);
    }
    check_queue();
    check_groups();
    check_batch();
    const auto references = count_references();
    for (BlockId block = 0; block < pool_.num_blocks(); ++block) {
        check_invariant(references[block] == pool_.ref_count(block), "block ", block, " has a count of ",
                        pool_.ref_count(block), " but ", references[block], " references");
    }
}

// Of the table: taken by one running sequence each, or free and empty.
void CacheManager::check_rows() const {
    std::vector<bool> seen(static_cast<std::size_t>(table_.rows()), false);
    for (std::size_t i = 0; i < running_.size(); ++i) {
        const Sequence& s = sequences_[running_[i]];
        check_invariant(s.row >= 0 && s.row < table_.rows() && !seen[s.row], "sequence ", s.id, " runs in row ", s.row);
        check_invariant(i == 0 || sequences_[running_[i - 1]].id < s.id, "sequence ", s.id, " runs out of order");
        seen[s.row] = true;
    }
    for (const Row row : table_.free_row_list()) {
        check_invariant(!seen[row], "row ", row, " is free twice or while a sequence runs in it");
        check_empty(row, 0);
        seen[row] = true;
    }
    check_invariant(std::ranges::count(seen, false) == 0, "a row is neither free nor taken");
    check_empty(table_.padding_row(), 0);
}

void CacheManager::check_empty(Row row, std::int64_t from) const {
    for (std::int64_t i = from; i < table_.columns(); ++i) {
        check_invariant(table_.at(row, i) == kReservedBlock, "block_table[", row, ", ", i, "] is ", table_.at(row, i));
    }
}

void CacheManager::check_sequence(const Sequence& s) const {
    check_invariant(1 <= s.prompt_tokens && s.prompt_tokens <= s.length() && s.length() < s.max_tokens, "sequence ",
                    s.id, " has ", s.length(), " tokens");
    check_invariant(s.written <= s.length() && s.num_blocks == blocks_for(s.written), "sequence ", s.id, " has ",
                    s.num_blocks, " blocks for ", s.written, " tokens");
    check_invariant(s.room == s.num_blocks * block_size_ - s.written, "sequence ", s.id, " has room for ", s.room);
    if (!s.running()) {
        check_invariant(s.written == 0 && s.prefilling, "sequence ", s.id, " waits and has blocks");
        return;
    }
    check_invariant(planned_ || s.prefilling || s.written == s.length() - 1, "sequence ", s.id, " has ", s.written,
                    " of ", s.length(), " tokens cached");
    for (std::int32_t i = 0; i < s.num_blocks; ++i) {
        const BlockId block = table_.at(s.row, i);
        check_invariant(block > kReservedBlock && block < pool_.num_blocks(), "block_table[", s.row, ", ", i, "] is ",
                        block);
    }
    check_empty(s.row, s.num_blocks);
    if (s.room == 0) return;
    const BlockId tail = table_.at(s.row, s.num_blocks - 1);
    check_invariant(s.next_slot == static_cast<std::int64_t>(tail + 1) * block_size_ - s.room, "sequence ", s.id,
                    " goes on at slot ", s.next_slot);
    check_invariant(!s.owns_tail || pool_.writable(tail), "sequence ", s.id, " does not own its last block ", tail);
}

// Its full blocks are cached under its tokens, each as the child of the one before.
void CacheManager::check_prefix(SequenceIndex index) const {
    const Sequence& s = sequences_[index];
    const PrefixIndex& prefixes = pool_.index();
    std::uint64_t hash = prefixes.root(s.epoch);
    BlockId parent = kNoBlock;
    for (std::int32_t i = 0; i < s.written / block_size_; ++i) {
        BlockId block = table_.at(s.row, i);
        for (const Replacement& replacement : replacements_) {
            if (replacement.sequence == index && replacement.position == i) block = replacement.block;
        }
        const auto tokens = std::span(s.tokens).subspan(i * block_size_, block_size_);
        const bool cached = prefixes.contains(block) && prefixes.epoch(block) == s.epoch &&
                            prefixes.parent(block) == parent && std::ranges::equal(prefixes.tokens(block), tokens);
        check_invariant(cached, "block ", block, " of sequence ", s.id, " is not cached under its tokens");
        hash = prefixes.extend(hash, tokens.data());
        parent = block;
    }
    check_invariant(s.hash == hash && s.parent == parent, "sequence ", s.id, " has lost its prefix chain");
}

void CacheManager::check_queue() const {
    std::int64_t queued = 0;
    SequenceIndex previous = kNoSequence;
    for (SequenceIndex i = sequences_.first_waiting(); i != kNoSequence; previous = i, i = sequences_[i].next) {
        const Sequence& s = sequences_[i];
        check_invariant(++queued <= sequences_.size() && s.previous == previous, "the queue is linked wrongly at ",
                        s.id);
        check_invariant(!s.running(), "sequence ", s.id, " waits and runs");
        check_invariant(previous == kNoSequence || sequences_[previous].id < s.id, "sequence ", s.id,
                        " waits out of order");
    }
    std::int64_t others = 0;
    for (const Group& group : groups_) others += std::ssize(group.others);
    check_invariant(queued + others + std::ssize(running_) == sequences_.size(), queued, " + ", others,
                    " sequences wait and ", running_.size(), " run, of ", sequences_.size());
}

void CacheManager::check_groups() const {
    std::size_t over = 0;
    for (GroupIndex i = 0; i < std::ssize(groups_); ++i) {
        const Group& group = groups_[i];
        const bool listed = std::ranges::count(holding_, i) == 1;
        check_invariant(listed == !group.held_blocks.empty(), "group ", i, " is listed wrongly as holding blocks");
        over += group.leader == kNoSequence;
        if (group.leader == kNoSequence) {
            check_invariant(group.others.empty() && !listed, "group ", i, " has no leader");
            continue;
        }
        check_invariant(sequences_[group.leader].group == i, "group ", i, " has a leader of another group");
        SequenceId youngest = sequences_[group.leader].id;
        for (auto other = group.others.rbegin(); other != group.others.rend(); ++other) {
            const Sequence& s = sequences_[*other];
            check_invariant(s.group == i && !s.running() && s.id > youngest, "sequence ", s.id,
                            " is wrong in group ", i);
            youngest = s.id;
        }
    }
    check_invariant(over == unused_groups_.size(), over, " groups are over, and ", unused_groups_.size(), " unused");
}

void CacheManager::check_batch() const {
    const auto copies = std::span(batch_.copies).first(2 * batch_.num_copies);
    for (std::size_t i = 1; i < copies.size(); i += 2) {
        for (std::size_t j = 0; j < copies.size(); ++j) {
            check_invariant(i == j || copies[i] != copies[j], "block ", copies[i], " is copied to and in another copy");
        }
    }
    check_invariant(std::ssize(sampled_) == batch_.num_samples || !planned_, "samples of nobody");
    std::vector<bool> written(static_cast<std::size_t>(pool_.num_blocks() * block_size_), false);
    for (std::size_t i = 0; i < batch_.tokens.size(); ++i) {
        const std::int64_t slot = batch_.slot_mapping[i];
        if (slot == kNoSlot) continue;
        const bool fresh = slot >= block_size_ && slot < std::ssize(written) && !written[slot];
        check_invariant(fresh && static_cast<std::int64_t>(i) < batch_.num_tokens, "slot_mapping[", i, "] is ", slot);
        written[slot] = true;
    }
    for (std::size_t i = 0; i < batch_.rows.size(); ++i) {
        const bool padding = static_cast<std::int64_t>(i) >= batch_.num_members;
        check_invariant(padding == (batch_.rows[i] == table_.padding_row()), "rows[", i, "] is ", batch_.rows[i]);
        check_invariant(!padding || batch_.seq_lens[i] == 1, "seq_lens[", i, "] is ", batch_.seq_lens[i]);
    }
}

std::vector<std::int32_t> CacheManager::count_references() const {
    std::vector<std::int32_t> references(static_cast<std::size_t>(pool_.num_blocks()), 0);
    references[kReservedBlock] = 1;
    for (const SequenceIndex index : running_) {
        for (const BlockId block : table_.row(sequences_[index].row, sequences_[index].num_blocks)) ++references[block];
    }
    for (const Group& group : groups_) {
        for (const BlockId block : group.held_blocks) ++references[block];
    }
    for (const Replacement& replacement : replacements_) ++references[replacement.block];
    return references;
}

}  // namespace ppomax
