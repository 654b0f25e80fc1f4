"""Write full_context.json, which tests what stays of full contexts: `python -m tests.vectors.make_full_context`.

What stays is found by looking at every prompt that leaves out whole turns, without the code that is tested.
"""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("full_context.json")


def encoded(messages: Sequence[Any]) -> list[int]:
    """Return a prompt: each message's content says a token, and how often it is there."""
    tokens = [2]
    for message in messages:
        token, count = map(int, message["content"].split())
        tokens += [token] * count
    return [*tokens, 3]


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens are the same at the beginning of both."""
    return len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))])


def what_stays(messages: list[Any], cache: list[int], max_seq_len: int) -> dict[str, Any]:
    """Return the prompt of a chat, what stays each time that its answer fills the context, and what is left out."""
    system = messages[0]["role"] == "system"
    users = [i for i, message in enumerate(messages) if i > system and message["role"] == "user"]
    starts = [int(system), *users]
    prompts = [encoded([*messages[:system], *messages[start:]]) for start in starts]
    turn = 0
    if len(prompts[0]) >= max_seq_len:
        tried = []
        for turn, prompt in enumerate(prompts):
            if len(prompt) < max_seq_len or prompt is prompts[-1]:
                tried.append((len(prompt) - shared(cache, prompt[:-1]), turn))
            if len(prompt) <= max_seq_len // 2:
                break
        turn = min(tried)[1]
    result: dict[str, Any] = {"prompt": prompts[turn], "dropped_messages": [starts[turn] - system], "shifts": []}
    answer, length = 0, len(prompts[turn])
    while length < max_seq_len:
        answer += max_seq_len - length
        later = range(turn + 1, len(prompts))
        half = [at for at in later if len(prompts[at]) + answer <= max_seq_len // 2]
        at = half[0] if half else len(prompts) - 1
        if at == turn or len(prompts[at]) + answer >= max_seq_len:
            break
        turn, length = at, len(prompts[at]) + answer
        result["shifts"].append([answer, length])
        result["dropped_messages"].append(starts[turn] - system)
    return {**result, "last_answer": answer}


def chats() -> list[dict[str, Any]]:
    """Return chats of random lengths, and caches that earlier turns left, with what stays of them."""
    rng = random.Random(57)
    cases = []
    for _ in range(80):
        roles = ["system"] * rng.randint(0, 1)
        for _ in range(rng.randint(0, 6)):  # some turns have calls of tools
            roles += ["user", *["assistant", "tool"] * rng.randint(0, 1), "assistant"]
        largest = rng.randint(3, 20)
        messages = [
            {"role": role, "content": f"{10 + i} {rng.randint(0, largest)}"} for i, role in enumerate([*roles, "user"])
        ]
        context, system = rng.randint(20, 80), roles.count("system")
        cache = encoded([*messages[:system], *messages[rng.randint(system, len(messages) - 1) : -1]])[:context]
        case = {"max_seq_len": context, "messages": messages, "cache": cache}
        cases.append(case | what_stays(messages, cache, context))
    return cases


def text() -> str:
    """Return the file's content: a line for each chat."""
    return '{"chats": [\n' + ",\n".join(json.dumps(chat) for chat in chats()) + "\n]}\n"


if __name__ == "__main__":
    FILE.write_text(text())
