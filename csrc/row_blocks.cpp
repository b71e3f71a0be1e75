// The blocks in a running sequence's row: taken over, copied, filled, and found by others once they are full.
#include <algorithm>

#include "cache_manager.h"

namespace ppomax {

void CacheManager::take_row(Sequence& s, std::int64_t epoch, std::int64_t version) {
    s.row = table_.take_row();
    s.epoch = epoch;
    s.version = version;
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

// Makes sure of blocks for the tokens before `end`; false where the sequence itself had to give way. New blocks
// first: when all others have given way for them, the last block is its own, and a copy would be one too many.
bool CacheManager::make_writable(Sequence& s, std::int32_t end) {
    while (s.num_blocks < blocks_for(end)) {
        const BlockId block = pool_.allocate();
        if (block != kNoBlock) {
            table_.set(s.row, s.num_blocks++, block);
        } else if (!reclaim(s)) {
            return false;
        }
    }
    return s.room == 0 || s.owns_tail || own_tail(s);
}

// Copies the block that has room unless nobody else refers to it or may find it.
bool CacheManager::own_tail(Sequence& s) {
    const std::int32_t position = s.written / block_size_;
    const BlockId tail = table_.at(s.row, position);
    while (!pool_.writable(tail)) {
        const BlockId block = pool_.allocate();
        if (block != kNoBlock) {
            batch_.add_copy(tail, block);
            ++copies_;
            pool_.pin(tail);
            pool_.release(tail);
            table_.set(s.row, position, block);
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

}  // namespace ppomax
