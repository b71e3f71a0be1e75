// Which sequences run in the next step, and where the K and V of their tokens are.
//
// A sequence is submitted and waits; plan() admits it to a row of the block table, computes its prompt in one
// chunk or several, then one token a step; commit() appends what was sampled and ends it at a stop token or
// its limit. A step is plan(), the forward pass, commit(). In a step that is planned:
// - Copies of blocks are made first, then the members' new K and V are written (slot -1: they are there
//   already), then attention reads. So what one member writes is a cached prefix for those planned after it.
// - Members that decode come first, the oldest first; then those with a chunk of several tokens.
//
// Reuse of K and V
// - Full blocks are cached under (namespace, its epoch, all tokens up to the block's end). A sequence takes
//   the longest cached prefix when it is admitted and wherever a chunk starts at a block's edge. Its last
//   token is computed in any case, for its logits, without being written again where it is cached.
// - Where two sequences fill the same block in one step or in unaligned chunks, the later one changes over
//   to the earlier one's block at commit().
// - Samples of one prompt are a group: one of them, the leader, computes the prompt; the others take over its
//   blocks, a partial last one included, and sample from the same logits. Those without a row then wait, and
//   while they do, the group holds references to the prompt's blocks.
// - A block that others refer to or may find is copied before it is written to.
//
// Out of blocks: free blocks first, then idle cached ones, then those held for waiting samples, then those
// of the youngest running sequence, which waits again with all its tokens. A sequence that could not
// run alone is refused by submit(), so that the oldest one always gets on. Admission leaves one block to
// spare for each running sequence.
//
// Ownership: the manager owns the pool, the table, the sequences and the batch. References to blocks are
// held by the first num_blocks entries of each running sequence's row, by the groups' held_blocks, and by
// replacements_. K and V are the caller's; the manager never sees them. The exported arrays keep their
// addresses for the manager's life.
// One owner thread: no call may overlap another.
//
// A call that throws std::invalid_argument has changed nothing: everything is checked first, and what then
// changes state cannot fail. (Out of memory while a result is put together is the exception: reset().)
#pragma once

#include <cstdint>
#include <iterator>
#include <limits>
#include <span>
#include <vector>

#include "block_pool.h"
#include "block_table.h"
#include "sequences.h"
#include "step_batch.h"
#include "types.h"

namespace ppomax {

struct Sizes {
    std::int64_t num_blocks;  // the reserved block 0 included
    std::int64_t block_size;
    std::int64_t max_sequences;  // that run at the same time
    std::int64_t max_blocks_per_sequence;
    std::int64_t max_prefill_tokens = 8192;  // in one step
    std::int64_t namespaces = 1;
    std::uint64_t hash_mask = std::numeric_limits<std::uint64_t>::max();  // of the prefix index, for tests
};

struct Finished {
    SequenceId id;
    bool stopped;          // by a stop token or the caller; false: at its limit
    std::int64_t version;  // that its last tokens' cache was filled under
    std::vector<Token> response;
};

// A planned step; its arrays are in CacheManager::batch().
struct Step {
    std::int64_t num_tokens;
    std::int64_t num_members;
    std::int64_t num_decodes;  // the first members: one token each, the newest
    std::int64_t num_samples;
    std::int64_t num_copies;
    std::int64_t num_dirty_rows;
    std::vector<SequenceId> preempted;  // they wait again
    std::vector<Finished> finished;     // step() alone: what commit() returns
};

struct SequenceInfo {
    Row row;  // kNoRow while it waits
    std::int64_t length;
    std::int64_t prompt_tokens;
    std::int64_t max_tokens;
    std::int64_t cached_tokens;  // whose K and V are in its blocks
    std::int64_t version;        // that they were filled under; -1 while it waits
};

struct Statistics {
    std::int64_t free_blocks;
    std::int64_t cached_blocks;  // in use by nobody, and found again by their tokens
    std::int64_t blocks_in_use;
    std::int64_t peak_blocks_in_use;
    std::int64_t running;
    std::int64_t waiting;
    // Since construction:
    std::int64_t hit_tokens;      // taken from the cache or from the group's leader instead of computed
    std::int64_t prefill_tokens;  // computed, those of preempted sequences again
    std::int64_t evictions;
    std::int64_t preemptions;
    std::int64_t copies;  // of blocks, before a write
};

class CacheManager {
public:
    CacheManager(const Sizes& sizes, std::vector<Token> stop_tokens);
    CacheManager(const CacheManager&) = delete;  // the addresses of its arrays are promised to others
    CacheManager& operator=(const CacheManager&) = delete;

    // Queues one sequence per entry of max_new_tokens: samples of one prompt, a group. The first one's id;
    // the others' follow.
    SequenceId submit(std::span<const std::int64_t> prompt, std::span<const std::int64_t> max_new_tokens,
                      Space space);
    Step plan(std::int64_t prefill_tokens);
    // One sampled token per sample of the planned step; stopped is empty or says who ends with it.
    std::vector<Finished> commit(std::span<const std::int64_t> tokens, std::span<const bool> stopped);
    // commit(), where a step is planned, and plan().
    Step step(std::span<const std::int64_t> tokens, std::span<const bool> stopped, std::int64_t prefill_tokens);

    // These five change what a planned step relies on, and throw while one is.
    SequenceId fork(SequenceId parent, std::int64_t num_tokens);
    void preempt(std::span<const SequenceId> ids);
    void release(std::span<const SequenceId> ids);
    std::int64_t bump_version(Space space);
    void clear_cache();
    // Drops the planned step, every sequence and everything cached.
    void reset();

    SequenceInfo sequence(SequenceId id) const;
    std::span<const Token> tokens(SequenceId id) const;
    std::int64_t version(Space space) const { return versions_[checked(space)]; }
    Statistics statistics() const;
    const StepBatch& batch() const { return batch_; }
    const BlockTable& block_table() const { return table_; }
    const Sizes& sizes() const { return sizes_; }

    // Compares everything with everything else; throws std::logic_error at the first inconsistency.
    void check_integrity() const;

private:
    // Samples of one prompt of which none has its first token yet.
    struct Group {
        SequenceIndex leader = kNoSequence;    // first of those that wait, or computing the prompt
        std::vector<SequenceIndex> others;     // not in the queue; the oldest last
        std::vector<BlockId> held_blocks;      // of the prompt
        std::int64_t held_epoch = 0;
    };

    struct Chunk {  // of a member that computes several tokens: [start, end)
        SequenceIndex sequence;
        std::int32_t start;
        std::int32_t end;
        std::int32_t first_new;  // tokens before it are cached already
        std::int32_t joined;     // others of its group that sample from its last token
    };

    struct Replacement {  // sequence filled a block that was cached already
        SequenceIndex sequence;
        std::int32_t position;
        BlockId block;  // the cached one
    };

    // Arguments (cache_manager.cpp)
    Space checked(Space space) const;
    void check_tokens(std::span<const std::int64_t> tokens, const char* what) const;
    void check_fits(std::int64_t prompt_tokens, std::int64_t max_new_tokens) const;
    void check_sampled(std::span<const std::int64_t> tokens, std::span<const bool> stopped) const;
    void check_budget(std::int64_t prefill_tokens) const;
    void check_no_step(const char* call) const;
    std::vector<SequenceIndex> find_all(std::span<const SequenceId> ids) const;

    // Commit (commit.cpp)
    bool is_stop(Token token) const;
    void replace_duplicates();

    // Life of a sequence (cache_manager.cpp)
    void give_blocks_back(Sequence& s);
    void end(SequenceIndex index);
    void leave_group(SequenceIndex index);
    void appoint_leader(GroupIndex group);
    GroupIndex new_group();
    void drop_held(Group& group);
    bool drop_youngest_held();

    // Planning (planning.cpp)
    void plan_running();
    void plan_decode(SequenceIndex index);
    void plan_chunk(SequenceIndex index);
    void plan_waiting();
    bool fits_now(const Sequence& s) const;
    void admit(SequenceIndex index);
    void insert_running(SequenceIndex index);
    void join_leader(Chunk& chunk);
    void list_prompt_blocks(SequenceIndex index);
    void join(SequenceIndex index, const Sequence& leader);
    void hold_blocks(GroupIndex group, std::int64_t epoch);
    bool reclaim(const Sequence& s);
    void add_chunks();

    // Blocks of a row (row_blocks.cpp)
    void take_row(Sequence& s, std::int64_t epoch, std::int64_t version);
    void share(Sequence& to, std::span<const BlockId> blocks, std::int32_t written);
    void take_cached(Sequence& s);
    bool make_writable(Sequence& s, std::int32_t end);
    bool own_tail(Sequence& s);
    void enter_block(Sequence& s);
    void write_until(SequenceIndex index, std::int32_t end);
    void complete_block(SequenceIndex index);

    // Integrity (integrity.cpp)
    void check_rows() const;
    void check_empty(Row row, std::int64_t from) const;
    void check_sequence(const Sequence& s) const;
    void check_prefix(SequenceIndex index) const;
    void check_queue() const;
    void check_groups() const;
    void check_batch() const;
    std::vector<std::int32_t> count_references() const;

    std::int64_t blocks_for(std::int64_t tokens) const { return (tokens + block_size_ - 1) / block_size_; }
    std::int64_t spare_blocks() const { return pool_.available() - std::ssize(running_); }
    bool is_current(const Sequence& s) const { return s.epoch == pool_.epoch(s.space); }

    Sizes sizes_;
    std::int32_t block_size_;
    std::vector<Token> stop_tokens_;
    BlockPool pool_;
    BlockTable table_;
    StepBatch batch_;
    SequenceTable sequences_;
    std::vector<std::int64_t> versions_;  // by namespace
    std::vector<Group> groups_;
    std::vector<GroupIndex> unused_groups_;
    std::vector<GroupIndex> holding_;     // groups with held_blocks, the latest last
    std::vector<SequenceIndex> running_;  // the oldest first
    std::int64_t preemptions_ = 0;
    std::int64_t hit_tokens_ = 0;
    std::int64_t prefill_tokens_ = 0;
    std::int64_t copies_ = 0;

    // Of the planned step
    bool planned_ = false;
    std::int64_t budget_ = 0;                // prefill tokens left
    std::vector<Chunk> chunks_;
    std::vector<SequenceIndex> joined_;      // by chunks in order: Chunk::joined of them each
    std::vector<SequenceIndex> sampled_;     // whom each sample is for
    std::vector<Replacement> replacements_;  // each holds a reference to its block
    std::vector<SequenceId> preempted_;
    std::vector<BlockId> prompt_blocks_;     // of the leader whose group joins it
};

}  // namespace ppomax
