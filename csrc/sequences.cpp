#include "sequences.h"

#include <algorithm>
#include <utility>

#include "check.h"

namespace ppomax {

// What may run out of memory comes first: a create() that throws leaves no sequence behind.
SequenceIndex SequenceTable::create(std::vector<Token> tokens, std::int64_t max_tokens) {
    Sequence sequence;
    sequence.prompt_tokens = static_cast<std::int32_t>(tokens.size());
    sequence.max_tokens = static_cast<std::int32_t>(max_tokens);
    sequence.tokens = std::move(tokens);
    sequence.tokens.reserve(static_cast<std::size_t>(max_tokens));
    if (unused_.empty()) grow();
    by_id_.emplace(next_id_, unused_.back());
    const SequenceIndex index = unused_.back();
    unused_.pop_back();
    sequence.id = next_id_++;
    sequences_[index] = std::move(sequence);
    return index;
}

void SequenceTable::grow() {
    const auto old_size = sequences_.size();
    const auto new_size = std::max<std::size_t>(16, 2 * old_size);
    unused_.reserve(new_size);
    sequences_.resize(new_size);
    for (auto i = new_size; i > old_size; --i) unused_.push_back(static_cast<SequenceIndex>(i - 1));
}

void SequenceTable::erase(SequenceIndex index) {
    by_id_.erase(sequences_[index].id);
    sequences_[index] = Sequence{};
    unused_.push_back(index);
}

void SequenceTable::clear() {
    sequences_.clear();
    unused_.clear();
    by_id_.clear();
    first_ = last_ = kNoSequence;
}

SequenceIndex SequenceTable::find(SequenceId id) const {
    const auto found = by_id_.find(id);
    check_argument(found != by_id_.end(), "unknown sequence ", id, ": it was never submitted, or it has ended");
    return found->second;
}

// Most are new and go to the end; those that ran before are older than most and go near the front.
void SequenceTable::enqueue(SequenceIndex index) {
    Sequence& s = sequences_[index];
    s.next = last_ != kNoSequence && sequences_[last_].id < s.id ? kNoSequence : first_;
    while (s.next != kNoSequence && sequences_[s.next].id < s.id) s.next = sequences_[s.next].next;
    s.previous = s.next == kNoSequence ? last_ : sequences_[s.next].previous;
    (s.previous == kNoSequence ? first_ : sequences_[s.previous].next) = index;
    (s.next == kNoSequence ? last_ : sequences_[s.next].previous) = index;
}

void SequenceTable::dequeue(SequenceIndex index) {
    Sequence& s = sequences_[index];
    (s.previous == kNoSequence ? first_ : sequences_[s.previous].next) = s.next;
    (s.next == kNoSequence ? last_ : sequences_[s.next].previous) = s.previous;
    s.previous = s.next = kNoSequence;
}

}  // namespace ppomax
