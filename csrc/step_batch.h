// The packed batch of one step: what the forward pass and the sampler read.
//
// Ownership: the batch owns its arrays, allocated once for the largest step at fixed addresses; only the
// CacheManager writes them. Entries past the counts are padding that a batch of fixed size may run over:
// token 0 at position 0 with slot -1 (nothing is written), one token long, in the table's padding row.
#pragma once

#include <span>
#include <vector>

#include "types.h"

namespace ppomax {

class StepBatch {
public:
    StepBatch(std::int64_t max_sequences, std::int64_t max_prefill_tokens, Row padding_row);

    void clear();  // an empty batch, all padding
    // A member that computes its newest token and samples the next one. Before all chunks, so that it has the
    // same place among tokens, members and samples.
    void add_decode(Row row, Token token, std::int64_t position, std::int64_t slot, SequenceId id) {
        const std::int64_t place = num_tokens;
        tokens[place] = token;
        positions[place] = position;
        slot_mapping[place] = slot;
        rows[place] = row;
        seq_lens[place] = static_cast<std::int32_t>(position + 1);
        cu_seqlens[place + 1] = static_cast<std::int32_t>(place + 1);
        sample_ids[place] = id;
        sample_positions[place] = place;
        num_tokens = num_members = num_samples = place + 1;
    }
    // A member that computes several tokens, from position on; their slots are the caller's to fill in.
    std::span<std::int64_t> add_chunk(Row row, std::span<const Token> chunk, std::int64_t position);
    // A sequence whose next token comes from the logits of the token that was added last.
    void add_sample(SequenceId id) {
        sample_ids[num_samples] = id;
        sample_positions[num_samples++] = num_tokens - 1;
    }
    void add_copy(BlockId source, BlockId destination) {
        copies[2 * num_copies] = source;
        copies[2 * num_copies++ + 1] = destination;
    }

    std::int64_t num_tokens = 0;   // T
    std::int64_t num_members = 0;  // S: sequences with tokens in this step
    std::int64_t num_samples = 0;  // N
    std::int64_t num_copies = 0;
    std::vector<std::int64_t> tokens;            // [T]
    std::vector<std::int64_t> positions;         // [T]
    std::vector<std::int64_t> slot_mapping;      // [T]
    std::vector<std::int64_t> rows;              // [S] of the block table
    std::vector<std::int32_t> seq_lens;          // [S] tokens in the cache, this step's included
    std::vector<std::int32_t> cu_seqlens;        // [S + 1]
    std::vector<std::int64_t> sample_ids;        // [N]
    std::vector<std::int64_t> sample_positions;  // [N] in the packed tokens
    std::vector<BlockId> copies;                 // [copies, 2]

private:
    Row padding_row_;
};

}  // namespace ppomax
