// What a forward pass leaves: sampled tokens, sequences that end with them, blocks that turned out to be double.
#include <algorithm>
#include <utility>

#include "cache_manager.h"
#include "check.h"

namespace ppomax {

std::vector<Finished> CacheManager::commit(std::span<const std::int64_t> tokens, std::span<const bool> stopped) {
    check_argument(planned_, "commit: no step is planned");
    check_sampled(tokens, stopped);
    planned_ = false;
    table_.clear_dirty();
    replace_duplicates();
    for (std::int64_t i = 0; i < batch_.num_copies; ++i) pool_.unpin(batch_.copies[2 * i]);

    std::vector<Finished> finished;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
        Sequence& s = sequences_[sampled_[i]];
        s.tokens.push_back(static_cast<Token>(tokens[i]));
        const bool stop = is_stop(s.tokens.back()) || (!stopped.empty() && stopped[i]);
        if (!stop && s.length() < s.max_tokens) continue;
        finished.push_back({s.id, stop, s.version, {s.tokens.begin() + s.prompt_tokens, s.tokens.end()}});
        end(sampled_[i]);
    }
    if (!finished.empty()) {
        std::erase_if(running_, [this](SequenceIndex index) { return !sequences_[index].running(); });
    }
    return finished;
}

Step CacheManager::step(std::span<const std::int64_t> tokens, std::span<const bool> stopped,
                        std::int64_t prefill_tokens) {
    check_budget(prefill_tokens);
    std::vector<Finished> finished;
    if (planned_) {
        finished = commit(tokens, stopped);
    } else {
        check_argument(tokens.empty(), "step: ", tokens.size(), " sampled tokens, but no step is planned");
    }
    Step step = plan(prefill_tokens);
    step.finished = std::move(finished);
    return step;
}

bool CacheManager::is_stop(Token token) const {
    return std::ranges::find(stop_tokens_, token) != stop_tokens_.end();
}

// The sequence's own block has been written by now; from here on it reads the one that was cached first, as
// those after it in its prefix chain name that one as parent.
void CacheManager::replace_duplicates() {
    for (const Replacement& replacement : replacements_) {
        const Row row = sequences_[replacement.sequence].row;
        pool_.release(table_.at(row, replacement.position));
        table_.set(row, replacement.position, replacement.block);
    }
    replacements_.clear();
}

void CacheManager::check_sampled(std::span<const std::int64_t> tokens, std::span<const bool> stopped) const {
    check_argument(std::ssize(tokens) == batch_.num_samples, "the planned step samples ", batch_.num_samples,
                   " tokens, got ", tokens.size());
    check_argument(stopped.empty() || stopped.size() == tokens.size(), "stopped has ", stopped.size(),
                   " entries for ", tokens.size(), " tokens");
    check_tokens(tokens, "tokens");
}

void CacheManager::check_budget(std::int64_t prefill_tokens) const {
    check_argument(prefill_tokens >= 0 && prefill_tokens <= sizes_.max_prefill_tokens,
                   "prefill_tokens must be from 0 to ", sizes_.max_prefill_tokens, ", got ", prefill_tokens);
}

}  // namespace ppomax
