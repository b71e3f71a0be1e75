"""Files to turns: three formats, plain and gzip; what is tolerated, skipped, raised; splits and order."""

import gzip
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ppomax.engine.data import (
    Dialogue,
    Pair,
    ShuffledStream,
    Turn,
    context_of,
    read_dialogues,
    read_pairs,
    read_prompts,
    split_by_context,
)
from ppomax.engine.errors import InputError

HH_NAME = "hh_rlhf_harmless_base_test.jsonl.gz"
HH_FILE = Path(os.environ.get("PPOMAX_HH_DATA", Path(__file__).parents[2].parent / "shared" / "data" / HH_NAME))
needs_hh = pytest.mark.skipif(
    not HH_FILE.is_file(),
    reason="needs harmless-base/test.jsonl.gz of anthropics/hh-rlhf (GitHub); name it in PPOMAX_HH_DATA",
)
READERS = [read_dialogues, read_pairs, read_prompts]


def user(text: str) -> Turn:
    return Turn("user", text)


def assistant(text: str) -> Turn:
    return Turn("assistant", text)


def message(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def hh(*texts: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write(path: Path, text: str | bytes, zipped: bool = False) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


PROMPT = (user("Is Mars red?"), assistant("Yes."), user("为什么?"))
PAIR = (PROMPT, (assistant("因为铁锈。"),), (assistant("No idea."),))
TEXTS = ["Is Mars red?", "Yes.", "为什么?"]
MESSAGES = [message(turn.role, turn.content) for turn in PROMPT]
GOOD, BAD = message("assistant", "因为铁锈。"), message("assistant", "No idea.")
TAGGED = ["Human: Is Mars red?", "<|MOSS|> Yes.", "<|Human|>为什么?", "Assistant: 因为铁锈。"]

PAIR_FILES = {
    "hh": jsonl({"chosen": hh(*TEXTS, "因为铁锈。"), "rejected": hh(*TEXTS, "No idea."), "extra": 1}),
    "moss": json.dumps([{"chosen": [*TEXTS, "因为铁锈。"], "rejected": [*TEXTS, "No idea."]}]),
    "moss-tagged": json.dumps([{"chosen": TAGGED, "rejected": [*TAGGED[:3], "Assistant:No idea."]}], indent=1),
    "chat": jsonl({"prompt": MESSAGES, "chosen": [GOOD], "rejected": [BAD], "score": 0.5}),
    "chat-implicit": jsonl({"chosen": [*MESSAGES, GOOD], "rejected": [*MESSAGES, BAD]}),
    "chat-both": jsonl({"prompt": MESSAGES, "chosen": [*MESSAGES, GOOD], "rejected": [*MESSAGES, BAD]}),
    "chat-answers": jsonl({"prompt": MESSAGES, "chosen": "因为铁锈。", "rejected": "No idea."}),
    "hh-prompt": jsonl({"prompt": hh(*TEXTS) + "\n\nAssistant:", "chosen": " 因为铁锈。", "rejected": " No idea."}),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", PAIR_FILES)
def test_pairs_of_every_format(tmp_path: Path, name: str, zipped: bool) -> None:
    path = write(tmp_path / "data", PAIR_FILES[name], zipped)  # the name says nothing
    (pair,) = read_pairs(path)
    assert (pair.prompt, pair.chosen, pair.rejected) == PAIR
    assert read_prompts(path) == [Dialogue(PROMPT, pair.source)]
    assert read_dialogues(path) == [Dialogue(PROMPT + pair.chosen, pair.source)]
    assert pair.source == f"{path}[0]" if name.startswith("moss") else f"{path}:1"


DIALOGUE_FILES = {
    "moss": json.dumps([[*TEXTS, "因为铁锈。"]]),
    "moss-tagged": json.dumps([TAGGED]),
    "chat": jsonl({"messages": [*MESSAGES, GOOD]}),
    "chat-list": json.dumps([{"messages": [*MESSAGES, GOOD]}]),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", DIALOGUE_FILES)
def test_dialogues_of_every_format(tmp_path: Path, name: str, zipped: bool) -> None:
    path = write(tmp_path / "data.gz" if zipped else tmp_path / "data.txt", DIALOGUE_FILES[name], zipped)
    assert read_dialogues(str(path))[0].turns == (*PROMPT, assistant("因为铁锈。"))
    assert read_prompts(path)[0].turns == PROMPT


PROMPT_FILES = {
    "moss": json.dumps([TEXTS]),
    "moss-tagged": json.dumps([TAGGED[:3]]),
    "chat-messages": jsonl({"messages": MESSAGES}),
    "chat-prompt": jsonl({"prompt": MESSAGES}),
    "hh-prompt": jsonl({"prompt": hh(*TEXTS) + "\n\nAssistant:"}),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompts_of_every_format(tmp_path: Path, name: str) -> None:
    assert read_prompts(write(tmp_path / "data", PROMPT_FILES[name]))[0].turns == PROMPT


def test_standard_strings(tmp_path: Path) -> None:
    record = {"prompt": "The sky is", "chosen": " blue.", "rejected": " Human: green."}
    (pair,) = read_pairs(write(tmp_path / "a.jsonl", jsonl(record)))
    assert pair.prompt == (user("The sky is"),)
    assert (pair.chosen, pair.rejected) == ((assistant("blue."),), (assistant("Human: green."),))


def test_several_files_of_mixed_formats_keep_their_order(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, text, name == "hh") for name, text in PAIR_FILES.items()]
    pairs = read_pairs(paths)
    assert [pair.source.rsplit(":", 1)[0].split("[")[0] for pair in pairs] == [str(path) for path in paths]
    assert {(pair.prompt, pair.chosen, pair.rejected) for pair in pairs} == {PAIR}


def test_lines_of_mixed_formats_bom_blank_lines_and_crlf(tmp_path: Path) -> None:
    text = jsonl({"messages": [*MESSAGES, GOOD]}) + "\r\n" + PAIR_FILES["hh"].replace("\n", "\r\n")
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + text.encode())
    assert [item.source for item in read_prompts(path)] == [f"{path}:1", f"{path}:3"]


def test_other_line_separators_belong_to_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl({"prompt": "a\u2028b\x85c"}))
    assert read_prompts(path)[0].turns == (user("a\u2028b\x85c"),)


@pytest.mark.parametrize("tagged", [False, True], ids=["plain", "tagged"])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_moss_roles_do_not_depend_on_who_speaks_last(tmp_path: Path, length: int, tagged: bool) -> None:
    texts = [f"{('Human: ', 'Assistant: ')[i % 2]}t{i}" if tagged else f"t{i}" for i in range(length)]
    path = write(tmp_path / "a.json", json.dumps([texts]))
    turns = tuple((user, assistant)[i % 2](f"t{i}") for i in range(length))
    assert read_prompts(path)[0].turns == turns[: length - (length + 1) % 2]
    if length > 1:
        assert read_dialogues(path)[0].turns == turns[: length - length % 2]


def test_moss_tags_decide_only_where_every_turn_has_one(tmp_path: Path) -> None:
    texts = [
        ["Assistant: Hello.", "Human: Hi.", "Assistant: Well?"],
        ["Hi.", "Human: who?", "<|Human|> you."],
    ]
    tagged, plain = read_dialogues(write(tmp_path / "a.json", json.dumps(texts)))
    assert tagged.turns == (assistant("Hello."), user("Hi."), assistant("Well?"))
    assert plain.turns == (user("Hi."), assistant("Human: who?"))


def test_hh_splits_at_the_two_markers_alone(tmp_path: Path) -> None:
    text = "\n\nHuman: a\n\nHumans: b \n\nAssistant: Human: c\nAssistant: d\n\nHuman:\n\nAssistant: e"
    path = write(tmp_path / "a.jsonl", jsonl({"chosen": text, "rejected": text + "!"}))
    assert read_prompts(path)[0].turns == (
        user("a\n\nHumans: b"),
        assistant("Human: c\nAssistant: d"),
        user(""),  # an empty turn in the context is kept
    )


def test_hh_speaker_named_twice_goes_on_speaking(tmp_path: Path) -> None:
    record = {"chosen": hh("a", "b") + "\n\nAssistant:  c", "rejected": hh("a", "d")}
    (pair,) = read_pairs(write(tmp_path / "a.jsonl", jsonl(record)))
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        (user("a"),),
        (assistant("b\n\nc"),),
        (assistant("d"),),
    )


def test_sides_that_differ_early_keep_several_turns(tmp_path: Path) -> None:
    record = {"chosen": hh("a", "b", "c", "d", "e", "f"), "rejected": hh("a", "b", "c", "D", "e", "f")}
    (pair,) = read_pairs(write(tmp_path / "a.jsonl", jsonl(record)))
    assert pair.prompt == (user("a"), assistant("b"), user("c"))
    assert pair.chosen == (assistant("d"), user("e"), assistant("f"))
    assert pair.rejected == (assistant("D"), user("e"), assistant("f"))


def test_an_answer_that_begins_the_other_side_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    record = {"chosen": hh("a", "b"), "rejected": hh("a", "b", "c", "d")}
    (pair,) = read_pairs(write(tmp_path / "a.jsonl", jsonl(record)))
    assert pair.prompt == (user("a"),)
    assert pair.rejected == (assistant("b"), user("c"), assistant("d"))


def test_system_turn_and_trailing_user_turn(tmp_path: Path) -> None:
    system = message("system", "Be brief.")
    path = write(tmp_path / "a.jsonl", jsonl({"messages": [system, *MESSAGES]}))
    assert read_prompts(path)[0].turns == (Turn("system", "Be brief."), *PROMPT)
    assert read_dialogues(path)[0].turns == (Turn("system", "Be brief."), *PROMPT[:2])


# What always raises


BROKEN_FILES = {
    "json": (jsonl({"prompt": "a"}) + '{"prompt": "b"', ":2: expected JSON, found an error: "),
    "json list": ('[\n ["a"],\n ["b"\n]', ":4: expected JSON, found an error: "),
    "deep json": ("[" * 100_000, ":1: expected JSON, found an error: "),
    "utf-8": (
        jsonl({"prompt": "a"}).encode() + b'{"prompt": "\xff"}\n',
        ":2: expected UTF-8, found the byte 0xff",
    ),
    "empty": (" \n", ": expected records, found an empty file"),
    "empty list": ("[]", ": expected records, found an empty list"),
    "number": (jsonl({"prompt": "a"}, 3), ":2: expected an object or a list of turns, found a number"),
    "no field": (jsonl({"text": "a"}), ":1: expected a field 'messages', 'prompt' or 'chosen', found: text"),
    "one side": (jsonl({"chosen": hh("a", "b")}), ":1: rejected: expected this field beside"),
    "null side": (
        jsonl({"chosen": hh("a", "b"), "rejected": None}),
        ":1: rejected: expected a list of turns or",
    ),
    "no roles": (jsonl({"chosen": "a", "rejected": "b"}), ":1: chosen: expected a field 'prompt' too"),
    "messages": (jsonl({"messages": {"role": "user"}}), ":1: messages: expected a list of turns or a string"),
    "message": (jsonl({"messages": [message("user", "a"), "b"]}), ":1: messages[1]: expected 'role' and"),
    "role": (jsonl({"messages": [message("human", "a")]}), ":1: messages[0].role: expected 'system', 'user'"),
    "no content": (
        jsonl({"messages": [{"role": "user"}]}),
        ":1: messages[0].content: expected a string, found",
    ),
    "content": (
        jsonl({"messages": [message("user", 3)]}),
        ":1: messages[0].content: expected a string, found a",
    ),
    "late system": (
        jsonl({"messages": [message("user", "a"), message("system", "b")]}),
        ":1: messages[1].role: expected 'system' in the first message only",
    ),
    "prompt": (jsonl({"prompt": 3}), ":1: prompt: expected a list of turns or a string, found a number"),
    "foreign side": (
        jsonl({"prompt": "a", "chosen": [message("user", "b"), GOOD], "rejected": "c"}),
        ":1: chosen: expected an answer, or a dialogue that starts as 'prompt' does",
    ),
    "moss type": (
        json.dumps([["a"], ["a", None]]),
        "[1]: turns[0]: expected 'role' and 'content', found a string",
    ),
    "surrogate": ('{"prompt": "\\ud800"}', ":1: prompt: expected Unicode text, found a lone surrogate"),
}


@pytest.mark.parametrize("on_bad", ["skip", "raise"])
@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_raise_and_name_the_place(tmp_path: Path, name: str, on_bad: str) -> None:
    text, expected = BROKEN_FILES[name]
    path = write(tmp_path / "a.jsonl", text)
    with pytest.raises(InputError) as caught:
        read_prompts(path, on_bad=on_bad)
    assert str(caught.value).startswith(f"{path}{expected}")
    assert "\n" not in str(caught.value)


def test_unreadable_paths_raise(tmp_path: Path) -> None:
    broken = gzip.compress(jsonl({"prompt": "a" * 1000}).encode())
    cases = {
        tmp_path / "missing.jsonl": "expected a readable file: No such file or directory",
        tmp_path: "expected a file, found a directory",
        write(tmp_path / "cut.gz", broken[:-12]): "expected gzip data, found a broken file",
        write(tmp_path / "flipped", broken[:20] + b"\x00\xff" + broken[22:]): "expected gzip data, found a broken",
        write(tmp_path / "plain.gz", jsonl({"prompt": "a"})): "expected gzip data, found a broken file",
    }
    for path, expected in cases.items():
        with pytest.raises(InputError) as caught:
            read_prompts(path)
        assert str(caught.value).startswith(f"{path}: {expected}")


def test_no_path_and_unknown_policy_raise(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one file"):
        read_prompts([])
    with pytest.raises(InputError, match="on_bad: expected 'raise' or 'skip', found 'drop'"):
        read_prompts(tmp_path, on_bad="drop")  # type: ignore[arg-type]


# What is skipped or raises


BAD_RECORDS = {
    "no answer": (read_dialogues, {"prompt": "a"}, "turns: expected at least one assistant turn"),
    "no question": (read_dialogues, {"messages": [GOOD]}, "turns: expected a user turn"),
    "silent turn": (read_dialogues, ["a", "", "b", "c"], "assistant turn: expected text, found none"),
    "no dialogue": (read_dialogues, {"messages": []}, "messages: expected turns, found an empty list"),
    "no turns": (read_prompts, [], "turns: expected turns, found an empty list"),
    "no prompt": (read_prompts, {"messages": [GOOD]}, "prompt: expected a user turn with text"),
    "blank prompt": (read_prompts, {"prompt": " \n"}, "prompt: expected a user turn with text"),
    "answered": (
        read_prompts,
        {"prompt": [*MESSAGES, GOOD]},
        "prompt: expected a user turn last, found assistant",
    ),
    "empty chosen": (
        read_pairs,
        {"chosen": hh("a", ""), "rejected": hh("a", "b")},
        "chosen: expected a final answer, found empty text",
    ),
    "empty rejected": (
        read_pairs,
        {"prompt": "a", "chosen": "b", "rejected": " "},
        "rejected: expected a final answer, found empty text",
    ),
    "equal": (
        read_pairs,
        {"chosen": hh("a", "b"), "rejected": hh("a", "b ")},
        "chosen, rejected: expected a difference, found none",
    ),
    "no common prompt": (
        read_pairs,
        {"chosen": hh("a", "b"), "rejected": hh("A", "c")},
        "chosen, rejected: expected a common beginning that ends with a user turn",
    ),
    "ends with user": (
        read_pairs,
        {"chosen": hh("a", "b", "c"), "rejected": hh("a", "b", "c", "d")},
        "chosen: expected an answer, found a user turn",
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_are_skipped_and_counted_or_raise(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    reader, record, expected = BAD_RECORDS[name]
    good = {"chosen": hh("x", "y"), "rejected": hh("x", "z")}
    path = write(tmp_path / "a.json", json.dumps([good, record, good, record]))
    with pytest.raises(InputError) as caught:
        reader(path)
    assert str(caught.value).startswith(f"{path}[1]: {expected}")
    with caplog.at_level(logging.WARNING):
        assert [item.source for item in reader(path, on_bad="skip")] == [f"{path}[0]", f"{path}[2]"]
    assert caplog.messages == [f"{path}: skipped 2 of 4 records; the first: {caught.value}"]


def test_a_file_of_bad_records_alone_raises(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl({"prompt": "a"}))
    with pytest.raises(InputError, match=r"a\.jsonl:1: turns: .* no other record of the file is usable"):
        read_dialogues(path, on_bad="skip")


def test_dialogues_are_no_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", PAIR_FILES["hh"] + jsonl({"messages": [*MESSAGES, GOOD]}))
    with pytest.raises(InputError, match=r"a\.jsonl:2: expected a pair, 'chosen' and 'rejected', found one"):
        read_pairs(path)


# The real file


@needs_hh
def test_real_file_loads(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pairs, dialogues = read_pairs(HH_FILE, on_bad="skip"), read_dialogues(HH_FILE, on_bad="skip")
        prompts = read_prompts(HH_FILE, on_bad="skip")
    # Four chosen answers are empty; as prompts all 2,312 records serve.
    assert (len(pairs), len(dialogues), len(prompts)) == (2308, 2308, 2312)
    assert [text.split(";")[0].split(": ")[1] for text in caplog.messages] == ["skipped 4 of 2312 records"] * 2
    assert {len(pair.chosen) for pair in pairs} | {len(pair.rejected) for pair in pairs} == {1}
    assert all(turn.content for item in dialogues + prompts for turn in item.turns)
    for item in dialogues:
        assert [turn.role for turn in item.turns] == ["user", "assistant"] * (len(item.turns) // 2)
    assert Counter(Counter(item.turns for item in prompts).values()) == {1: 2308, 2: 2}
    with pytest.raises(InputError, match=":87: chosen: expected a final answer, found empty text"):
        read_pairs(HH_FILE)


@needs_hh
def test_real_file_split_by_context() -> None:
    pairs = read_pairs(HH_FILE, on_bad="skip")
    train, held = split_by_context(pairs, 0.1, seed=0)
    assert len(train) + len(held) == len(pairs)
    assert 0.08 < len(held) / len(pairs) < 0.12
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held}
    # The same contexts fall on the same side, read as something else.
    prompts_held = split_by_context(read_prompts(HH_FILE), 0.1, seed=0)[1]
    assert {pair.source for pair in held} <= {prompt.source for prompt in prompts_held}


# Splitting and order


def dialogue(prompt: str, answer: str = "b") -> Dialogue:
    return Dialogue((user(prompt), assistant(answer)), "here")


@given(
    st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=30).filter(lambda texts: len(set(texts)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=50)
def test_split_separates_contexts(texts: list[str], held_out: float, seed: int) -> None:
    items = [dialogue(text, str(i)) for i, text in enumerate(texts)]
    train, held = split_by_context(items, held_out, seed)
    assert sorted(train + held, key=items.index) == items
    assert train == sorted(train, key=items.index)
    assert train
    assert held
    assert not {context_of(item) for item in train} & {context_of(item) for item in held}
    assert (train, held) == split_by_context(items, held_out, seed)


def test_split_fraction_seed_and_stability() -> None:
    items = [dialogue(f"question {i}") for i in range(2000)]
    held = split_by_context(items, 0.25, seed=1)[1]
    assert 440 < len(held) < 560
    assert held != split_by_context(items, 0.25, seed=2)[1]
    more = [*items, *(dialogue(f"other {i}") for i in range(500))]
    assert split_by_context(more, 0.25, seed=1)[1][: len(held)] == held
    assert split_by_context(items, 0.0, seed=1) == (items, [])


def test_split_knows_the_context_of_a_pair() -> None:
    pair = Pair((user("a"),), (assistant("b"), user("c"), assistant("d")), (assistant("e"),), "here")
    assert context_of(pair) == context_of(dialogue("a")) == (user("a"),)


def test_split_rejects_impossible_requests() -> None:
    items = [dialogue("a", "1"), dialogue("a", "2")]
    with pytest.raises(InputError, match="at least 2 different contexts, found 1"):
        split_by_context(items, 0.5, seed=0)
    for held_out in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match=r"held_out: expected a fraction in \[0, 1\)"):
            split_by_context(items, held_out, seed=0)


@given(st.integers(1, 20), st.integers(0, 10**6), st.integers(0, 50), st.integers(0, 50))
@settings(deadline=None)
def test_stream_resumes_from_its_position_alone(n: int, seed: int, a: int, b: int) -> None:
    whole = ShuffledStream(n, seed).take(a + b)
    first, second = ShuffledStream(n, seed), ShuffledStream(n, seed)
    head = first.take(a)
    second.position = first.position
    assert head + second.take(b) == whole
    assert second.position == a + b
    for epoch in range((a + b) // n):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_stream_differs_between_epochs_and_seeds() -> None:
    order = ShuffledStream(50, 0).take(100)
    assert order[:50] != order[50:]
    assert order[:50] != ShuffledStream(50, 1).take(50)
    stream = ShuffledStream(50, 0)
    stream.position = 70
    stream.position = 10  # back as well as forth
    assert stream.take(5) == order[10:15]


def test_stream_is_the_same_in_another_process() -> None:
    code = "from ppomax.engine.data import ShuffledStream; print(ShuffledStream(7, 3).take(20))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(ShuffledStream(7, 3).take(20))


def test_stream_rejects_bad_numbers() -> None:
    for n, seed in ((0, 0), (1, -1)):
        with pytest.raises(InputError, match="at least 1 item and a seed >= 0"):
            ShuffledStream(n, seed)
    stream = ShuffledStream(3, 0)
    with pytest.raises(InputError, match="stream position: expected a number >= 0, found -1"):
        stream.position = -1
    with pytest.raises(InputError, match="take a number >= 0"):
        stream.take(-1)
