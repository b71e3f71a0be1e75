"""Block tables, lengths and slots of the paged KV cache (C++, csrc/).

A *row* is a running sequence, a *slot* is the place of one token's K and V: block * block_size + offset. The
manager deals out rows, blocks and slots; it never sees KV memory (that is ppomax.engine.kv_cache.KVCache).

The three arrays are read-only views without a copy of memory that is allocated once: their addresses never
change, they show every later call's result at once, and each keeps the manager alive.

A call that raises ValueError or TypeError has changed nothing. The GIL is released inside; a manager has one
owner thread, and a call from a second thread during another call raises RuntimeError.
"""

import numpy as np
import numpy.typing as npt

class Statistics:
    """The counts at the moment they were asked for. Always free_blocks + blocks_in_use == num_blocks - 1."""

    @property
    def free_blocks(self) -> int:
        """Blocks in no block table. New sequences can have free_blocks - reserved_blocks of them."""

    @property
    def blocks_in_use(self) -> int:
        """Blocks in at least one block table. The reserved block 0 is not counted."""

    @property
    def reserved_blocks(self) -> int:
        """Blocks that running rows have been promised and have not taken yet."""

    @property
    def rows_in_use(self) -> int:
        """Running sequences."""

    @property
    def peak_blocks_in_use(self) -> int:
        """The largest blocks_in_use so far."""

class KVCacheManager:
    """Rows and blocks of up to max_sequences running sequences over one pool of blocks.

    Block 0 is never handed out: unused entries of the block table point at it.
    """

    def __init__(self, num_blocks: int, block_size: int, max_sequences: int, max_blocks_per_sequence: int) -> None:
        """Allocate everything. num_blocks counts the reserved block 0.

        Raises ValueError unless num_blocks >= 2, the other sizes are positive, each fits int32 and so does
        max_blocks_per_sequence * block_size (lengths are int32).
        """

    def admit(self, prompt_tokens: int, max_tokens: int) -> int:
        """Take a row for a sequence of prompt_tokens that may grow to max_tokens (prompt included).

        All blocks that max_tokens could need are promised to the row, so step() cannot run out of blocks;
        those of the prompt are taken at once. lengths[row] becomes prompt_tokens: the caller writes the
        prompt's K and V to prefill_slots(row) before anything reads the row.

        Returns the row, or -1 where rows or blocks are short at present (retry after a release).
        Raises ValueError naming the sizes where the sequence could never fit, or unless
        1 <= prompt_tokens <= max_tokens.
        """

    def prefill_slots(self, row: int) -> npt.NDArray[np.int64]:
        """The slots of the row's prompt, [prompt_tokens] int64, a new array.

        Raises ValueError for a row that is not running.
        """

    def step(self, rows: npt.NDArray[np.int32]) -> None:
        """Append one token to each of rows ([n] int32, contiguous, no duplicates): one call per decode step.

        lengths[rows] grows by 1, a new block enters the block table where the last one was full,
        slot_mapping[i] is the slot of the new token of rows[i], and slot_mapping[n:] is -1.

        Raises ValueError, with nothing changed for any row, where one is not running, is named twice or has
        reached its max_tokens; TypeError for another dtype or a non-contiguous array.
        """

    def release(self, rows: npt.NDArray[np.int32]) -> None:
        """End the sequences of rows ([n] int32, contiguous, no duplicates): their blocks are free at once.

        The rows' lengths become 0 and their block-table entries 0; a later admit() uses the indices again.

        Raises ValueError, with nothing changed, where a row is not running (a double release) or is named
        twice; TypeError for another dtype or a non-contiguous array.
        """

    def check_integrity(self) -> None:
        """Compare all tables, counts and lists; RuntimeError says what is inconsistent. For tests."""

    @property
    def block_table(self) -> npt.NDArray[np.int32]:
        """[max_sequences, max_blocks_per_sequence] int32. Entry j of a running row is the block of its tokens
        j * block_size and on; entries past the row's blocks, and rows that are not running, are 0."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """[max_sequences] int32: tokens of each row, the last step's new one included; 0 where none runs."""

    @property
    def slot_mapping(self) -> npt.NDArray[np.int64]:
        """[max_sequences] int64: the slots of the last step's new tokens in the order of its rows, then -1
        (write nothing)."""

    @property
    def statistics(self) -> Statistics: ...
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
