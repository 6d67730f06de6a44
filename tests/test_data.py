"""What the demo model is trained on and asked: right answers, sides that are apart, the tokenizer's tokens."""

from __future__ import annotations

from random import Random

import pytest
import torch
from tokenizers import Tokenizer
from twotower import data

TEXTS = ["", "plain", "tabs\tand\nlines  and spaces ", "héllo wörld, 日本語 🙂", "".join(map(chr, range(0x20)))]
PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_file_gives_the_same_ids(text: str, tmp_path):
    data.write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids == [data.BOS, *data.encode(text)]
    assert tokenizer.decode(ids) == text == data.decode(ids)


def test_every_byte_and_special_token_has_its_id(tmp_path):
    data.write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == data.VOCAB_SIZE == 260
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "<bos>", "<eos>", "<mask>")] == [0, 1, 2, 3]
    assert tokenizer.encode("a<eos>").ids == [1, 4 + ord("a"), 2]
    assert data.encode("\x00\x7f") == [4, 4 + 0x7F]


def solved(task: str, question: str) -> str:
    """The answer, found otherwise than the generator finds it."""
    if task == "sum":
        total, totals = 0, []
        for number in question.split():
            total += int(number)
            totals.append(str(total))
        return " ".join(totals)
    if task == "sort":
        return "".join(letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter in question)
    if task == "reverse":
        return "".join(question[i] for i in range(len(question) - 1, -1, -1))
    while any(pair in question for pair in ("()", "[]", "{}", "<>")):
        for pair in ("()", "[]", "{}", "<>"):
            question = question.replace(pair, "")
    return "".join(PAIRS[opening] for opening in reversed(question))


@pytest.mark.parametrize("task", data.TASKS)
def test_answers_are_right(task: str):
    random, prompts = Random(7), set()
    for i in range(300):
        problem = data.problem(random, held_out=i % 2 == 0, task=task)
        name, _, rest = problem.prompt.partition(" ")
        assert name == problem.task == task
        assert rest.endswith(": ")
        assert problem.answer == solved(task, rest.removesuffix(": "))
        prompts.add(problem.prompt)
    assert len(prompts) > 250


def test_sides_are_apart():
    """No held-out prompt ever appears in a training sequence."""
    rows = [row for step in range(30) for row in data.batch(3, step, 8, 256)[0].tolist()]
    trained = "\n".join("".join(chr(t - 4) if t >= 4 else "\n" for t in row) for row in rows)
    held_out = [p for task in data.TASKS for p in data.held_out_problems(task, 500)]
    assert all(p.held_out for p in held_out)
    assert not [p.prompt for p in held_out if p.prompt in trained]
    assert sum(1 for name in data.TASKS if f"\n{name} " in trained) == len(data.TASKS)  # and the search finds prompts


def test_no_held_out_line_is_in_the_training_text():
    """Topics of the documentation repeat one another, so that keeping some of them apart is not enough."""
    train, test = data.documentation(False), data.documentation(True)
    everything = " ".join(" ".join(train.values()).split())
    lines = [" ".join(line.split()) for text in test.values() for line in text.splitlines() if line.strip()]
    assert len(lines) > 40
    assert not [line for line in lines if line in everything]
    assert all(len(text) >= data.LEAST_PASSAGE for text in test.values())
    assert len(everything) > 200_000
    assert "The for statement is used to iterate over the elements of a sequence" in everything.replace('"', "")


def test_held_out_problems_are_different_and_always_the_same():
    problems = data.held_out_problems("sum", 300)
    assert len({p.prompt for p in problems}) == 300
    assert problems[:50] == data.held_out_problems("sum", 50)


def test_a_batch_is_a_function_of_seed_and_step():
    tokens, learned = data.batch(0, 5, 8, 256)
    assert tokens.shape == learned.shape == (8, 256)
    assert tokens.dtype == torch.int64
    assert learned.dtype == torch.bool
    again = data.batch(0, 5, 8, 256)
    assert torch.equal(tokens, again[0])
    assert torch.equal(learned, again[1])
    for other in (data.batch(0, 6, 8, 256), data.batch(1, 5, 8, 256), data.batch(0, 5, 8, 256, held_out=True)):
        assert not torch.equal(tokens, other[0])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_text(share: float):
    tokens, learned = data.batch(0, 0, 16, 256, text_share=share)
    prompts = [data.decode(row.tolist()).split(" ")[0] in data.TASKS for row in tokens]
    assert prompts == [share == 0] * 16
    assert (learned.float().mean() > 0.9) == (share == 1)


def test_what_is_learned_is_answers_and_text():
    """Prompts are given; behind an <eos> its block is filled with padding that can be predicted."""
    kinds = set()
    for step in range(10):
        for row, learned in zip(*data.batch(0, step, 8, 256), strict=True):
            ids = row.tolist()
            start = ids.index(data.BOS)
            assert not learned[: start + 1].any()
            text = data.decode(ids[start:])
            task = text.split(" ")[0]
            kinds.add(task if task in data.TASKS else "text")
            if task not in data.TASKS:
                assert learned[start + 1 :].all()
                continue
            prompt = len(data.encode(text[: text.index(": ") + 2]))
            end = ids.index(data.EOS) if data.EOS in ids else len(ids)
            assert not learned[: start + 1 + prompt].any()
            assert learned[start + 1 + prompt : end + 1].all()
            block_end = min(-(-(end + 1) // data.BLOCK_SIZE) * data.BLOCK_SIZE, len(ids))
            assert all(t == data.PAD for t in ids[end + 1 : block_end])
            assert learned[end + 1 : block_end].all()
    assert kinds == {*data.TASKS, "text"}
