"""Which sequences run in the next step, and where the K and V of their tokens are (C++, csrc/).

A *sequence* has an id that is never used again, tokens (a prompt and a response), and while it runs a *row* of the
block table. A *slot* is the place of one token's K and V: block * block_size + offset. The manager deals out rows,
blocks and slots; it never sees KV memory (that is ppomax.engine.kv_cache.KVCache).

    manager.submit(prompt, max_new_tokens)      # [L], [n]: n samples of one prompt; any number of prompts
    step = manager.plan(prefill_tokens)
    while step.num_members:
        ...                                     # copy blocks, run the model over the step's tokens, sample
        step = manager.step(sampled, prefill_tokens)    # commit(sampled), then plan(prefill_tokens)
        ...                                     # step.finished

A planned step is one ragged batch: sequences that decode come first with one token each, then those whose prompts
are computed, in chunks that together stay within prefill_tokens. With prefill_tokens = 0 a step only decodes. Each
sequence whose tokens are all computed with the step samples a token; samples of one prompt, which is computed once,
share a row of logits. The step's arrays (tokens, positions, slot_mapping, rows, seq_lens, cu_seqlens, sample_ids,
sample_positions, copies, dirty_rows) hold until the next call that plans or resets. Entries past the step's counts
are padding, so that a batch of fixed size can run over them.

Before the model runs, `copies` must be made, and the `dirty_rows` of the block table brought to the device. Within
each layer all K and V of the step must be written before attention reads: sequences may read, from this step on,
what another one writes in it.

Out of blocks, the youngest running sequences are preempted: they wait, with all their tokens, to be computed again.
Weights: bump_version() says that they changed. What was cached is not found again; what runs goes on with its old
cache (SequenceInfo.version says which), until it ends or is preempted and computed again.

All arrays are read-only views without a copy of memory that is allocated once: their addresses never change, they
show every later call's result at once, and each keeps the manager alive. Array arguments are contiguous and of
exactly the dtype named: others are a TypeError.

A call that raises ValueError or TypeError has changed nothing. The GIL is released inside; a manager has one owner
thread, and a call from a second thread during another call raises RuntimeError.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

class Finished:
    """A sequence that has ended; its id is unknown from now on."""

    @property
    def id(self) -> int: ...
    @property
    def stopped(self) -> bool:
        """Ended by a stop token or by the caller; False: at its limit."""

    @property
    def version(self) -> int:
        """Of the weights when its cache was filled, or last filled again."""

    @property
    def response(self) -> npt.NDArray[np.int64]:
        """[n] int64: the tokens after the prompt, the stop token included. A new array each time."""

class Step:
    """What a planned step holds. Its arrays are the manager's: the first num_* entries of each."""

    @property
    def num_tokens(self) -> int:
        """T: tokens to compute."""

    @property
    def num_members(self) -> int:
        """S: sequences that they belong to. 0: there is nothing to run, and nothing to commit."""

    @property
    def num_decodes(self) -> int:
        """The first so many members compute one token, their newest."""

    @property
    def num_samples(self) -> int:
        """N: sequences whose next token is to be sampled. The first num_decodes are the members that decode."""

    @property
    def num_copies(self) -> int: ...
    @property
    def num_dirty_rows(self) -> int: ...
    @property
    def preempted(self) -> list[int]:
        """Ids of sequences that had to give their blocks back, the youngest first."""

    @property
    def finished(self) -> list[Finished]:
        """What commit() returned, for a step planned by step()."""

class SequenceInfo:
    """A sequence at the moment it was asked for."""

    @property
    def row(self) -> int:
        """Of the block table; -1 while it waits."""

    @property
    def length(self) -> int:
        """Tokens, prompt and response."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def max_tokens(self) -> int:
        """Prompt and response at most."""

    @property
    def cached_tokens(self) -> int:
        """The first so many tokens have their K and V in the row's blocks, or will have after the planned step."""

    @property
    def version(self) -> int:
        """Of the weights when its cache was filled; -1 while it waits."""

class Statistics:
    """Counts at the moment they were asked for. free + cached + in use == num_blocks - 1 (the reserved block 0)."""

    @property
    def free_blocks(self) -> int:
        """Whose content is nobody's."""

    @property
    def cached_blocks(self) -> int:
        """In use by nobody, found again by their tokens, evicted where no block is free."""

    @property
    def blocks_in_use(self) -> int:
        """In a running sequence's row, or held for samples that wait for a row."""

    @property
    def peak_blocks_in_use(self) -> int:
        """The largest blocks_in_use so far."""

    @property
    def running(self) -> int:
        """Sequences with a row."""

    @property
    def waiting(self) -> int:
        """Sequences without one."""

    @property
    def hit_tokens(self) -> int:
        """Tokens so far whose K and V were there when their sequence came to them: cached, or those of its group."""

    @property
    def prefill_tokens(self) -> int:
        """Tokens so far that were computed other than by decoding, after a preemption again."""

    @property
    def evictions(self) -> int:
        """Cached blocks that were given away so far."""

    @property
    def preemptions(self) -> int: ...
    @property
    def copies(self) -> int:
        """Blocks copied so far because a sequence was about to write to a block that others refer to."""

class KVCacheManager:
    """Sequences over one pool of blocks. Block 0 is reserved: unused entries of the block table point at it."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_sequences: int,
        max_blocks_per_sequence: int,
        *,
        max_prefill_tokens: int = 8192,
        stop_tokens: Sequence[int] = [],
        namespaces: int = 1,
    ) -> None:
        """Allocate everything but the sequences' tokens. num_blocks counts the reserved block 0.

        max_sequences run at the same time. A sequence ends with the first of stop_tokens that it samples. Cached
        prefixes belong to one of the namespaces (one per model whose K and V share the pool), each with a version.

        Raises ValueError unless num_blocks >= 2, the other sizes are positive, each fits int32, and so do
        max_blocks_per_sequence * block_size and max_sequences + max_prefill_tokens.
        """

    def submit(self, prompt: npt.NDArray[np.int64], max_new_tokens: npt.NDArray[np.int64], namespace: int = 0) -> int:
        """Queue len(max_new_tokens) sequences, each with its own limit: samples of one prompt ([L], [n], int64).

        Returns the first one's id; the others' follow. May be called while a step is planned.

        Raises ValueError for an empty argument, a token outside int32 or negative, an unknown namespace, and naming
        the sizes where len(prompt) + max_new_tokens never fits a row or the pool.
        """

    def plan(self, prefill_tokens: int) -> Step:
        """The next step. Prefill tokens are at most prefill_tokens <= max_prefill_tokens; decodes are not counted.

        Where the budget is not 0, at least one sequence gets on, unless there is none.
        Raises ValueError while a step is planned, or for a budget out of range.
        """

    def commit(self, tokens: npt.NDArray[np.int64], stopped: npt.NDArray[np.bool_] | None = None) -> list[Finished]:
        """End the planned step: tokens[i] ([num_samples] int64) is sample_ids[i]'s next token.

        A sequence ends with a stop token, at its limit, or where stopped[i] ([num_samples] bool) says so.
        Raises ValueError where no step is planned, for wrong lengths, and for a token that is none.
        """

    def step(
        self, tokens: npt.NDArray[np.int64], prefill_tokens: int, stopped: npt.NDArray[np.bool_] | None = None
    ) -> Step:
        """commit(tokens, stopped), where a step is planned, then plan(prefill_tokens), in one call."""

    def fork(self, id: int, num_tokens: int) -> int:
        """A new sequence with the first num_tokens tokens of another one, and its limit. Returns its id.

        It shares the blocks, a partial last one included, which is copied when one of the two writes to it; without
        a free row it waits. Its next token is its own; where num_tokens were computed already, the last one is
        computed again for its logits, without being written. Raises ValueError for an unknown id, unless
        1 <= num_tokens <= its length, and while a step is planned.
        """

    def preempt(self, ids: npt.NDArray[np.int64]) -> None:
        """Make running sequences ([n] int64) wait and be computed again, under new weights say.

        Raises ValueError where one is unknown, named twice or not running, and while a step is planned.
        """

    def release(self, ids: npt.NDArray[np.int64]) -> None:
        """End sequences ([n] int64), running or waiting. Their full blocks stay cached.

        Raises ValueError where one is unknown (a double release) or named twice, and while a step is planned.
        """

    def reset(self) -> None:
        """End all sequences, drop the planned step and forget everything cached. Ids and versions go on.

        The way out after a forward pass that failed: what its step was to write is not there.
        """

    def bump_version(self, namespace: int = 0) -> int:
        """New weights: nothing cached so far is found again. O(1). Returns the new version.

        Raises ValueError for an unknown namespace, and while a step is planned.
        """

    def version(self, namespace: int = 0) -> int:
        """How often bump_version() was called."""

    def clear_cache(self) -> None:
        """Forget everything cached, of all namespaces, as if their weights had changed; versions stay.

        Raises ValueError while a step is planned.
        """

    def sequence(self, id: int) -> SequenceInfo:
        """ValueError for an id that was never given or whose sequence has ended."""

    def tokens_of(self, id: int) -> npt.NDArray[np.int64]:
        """[length] int64: prompt and response so far, a new array. ValueError as for sequence()."""

    def check_integrity(self) -> None:
        """Compare all tables, counts and lists; RuntimeError says what is inconsistent. For tests."""

    @property
    def statistics(self) -> Statistics: ...
    @property
    def block_table(self) -> npt.NDArray[np.int32]:
        """[max_sequences + 1, max_blocks_per_sequence] int32. Entry j of a running sequence's row is the block of its
        tokens j * block_size and on; other entries are 0, as is the whole last row, which padding uses."""

    @property
    def dirty_rows(self) -> npt.NDArray[np.int32]:
        """[max_sequences] int32: the first num_dirty_rows rows of the block table have changed since the last
        committed step was planned."""

    @property
    def copies(self) -> npt.NDArray[np.int32]:
        """[max_sequences, 2] int32: blocks (source, destination) to copy before the step's K and V are written. No
        destination is another copy's source."""

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """[max_sequences + max_prefill_tokens] int64: T packed tokens; padding 0."""

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """[max_sequences + max_prefill_tokens] int64: of the packed tokens in their sequences; padding 0."""

    @property
    def slot_mapping(self) -> npt.NDArray[np.int64]:
        """[max_sequences + max_prefill_tokens] int64: of the packed tokens; -1: K and V are there already, or
        padding."""

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """[max_sequences] int64: S rows of the block table; padding max_sequences, the last one."""

    @property
    def seq_lens(self) -> npt.NDArray[np.int32]:
        """[max_sequences] int32: tokens of S sequences that attention reads, the step's included; padding 1."""

    @property
    def cu_seqlens(self) -> npt.NDArray[np.int32]:
        """[max_sequences + 1] int32: member i's packed tokens are cu_seqlens[i] to cu_seqlens[i + 1]; no padding."""

    @property
    def sample_ids(self) -> npt.NDArray[np.int64]:
        """[max_sequences] int64: the ids of N sequences that sample; padding -1."""

    @property
    def sample_positions(self) -> npt.NDArray[np.int64]:
        """[max_sequences] int64: which packed token's logits each sample comes from; padding 0."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, the reserved one included."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""

    @property
    def max_sequences(self) -> int:
        """Rows."""

    @property
    def max_blocks_per_sequence(self) -> int:
        """Columns of the block table."""

    @property
    def max_prefill_tokens(self) -> int:
        """The largest budget of a step."""
