#include "step_batch.h"

#include <algorithm>
#include <numeric>

namespace ppomax {

StepBatch::StepBatch(std::int64_t max_sequences, std::int64_t max_prefill_tokens, Row padding_row)
    : tokens(static_cast<std::size_t>(max_sequences + max_prefill_tokens), 0),
      positions(tokens.size(), 0),
      slot_mapping(tokens.size(), kNoSlot),
      rows(static_cast<std::size_t>(max_sequences), padding_row),
      seq_lens(rows.size(), 1),
      cu_seqlens(rows.size() + 1, 0),
      sample_ids(rows.size(), -1),
      sample_positions(rows.size(), 0),
      copies(2 * rows.size(), kReservedBlock),
      padding_row_(padding_row) {}

void StepBatch::clear() {
    std::fill_n(tokens.begin(), num_tokens, 0);
    std::fill_n(positions.begin(), num_tokens, 0);
    std::fill_n(slot_mapping.begin(), num_tokens, kNoSlot);
    std::fill_n(rows.begin(), num_members, padding_row_);
    std::fill_n(seq_lens.begin(), num_members, 1);
    std::fill_n(sample_ids.begin(), num_samples, -1);
    std::fill_n(sample_positions.begin(), num_samples, 0);
    num_tokens = num_members = num_samples = num_copies = 0;
}

std::span<std::int64_t> StepBatch::add_chunk(Row row, std::span<const Token> chunk, std::int64_t position) {
    const auto start = num_tokens;
    std::ranges::copy(chunk, tokens.begin() + start);
    std::iota(positions.begin() + start, positions.begin() + start + std::ssize(chunk), position);
    num_tokens += std::ssize(chunk);
    rows[num_members] = row;
    seq_lens[num_members] = static_cast<std::int32_t>(position + std::ssize(chunk));
    cu_seqlens[++num_members] = static_cast<std::int32_t>(num_tokens);
    return std::span(slot_mapping).subspan(static_cast<std::size_t>(start), chunk.size());
}

}  // namespace ppomax
