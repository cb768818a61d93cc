"""What drafts found in the text win, along answers of the default pair that were recorded once.

    python -m tests.bench.lookup record ANSWERS.jsonl [PROMPTS.jsonl] [--temperature T] [--every N]
    python -m tests.bench.lookup walk ANSWERS.jsonl … [--no-loops]

`record` decodes plainly and notes at every token what the drafter would have proposed there; a
prompt's turns are a chat. Without PROMPTS it takes `copying.jsonl`, questions whose answers repeat
them. `walk` decodes the same tokens with the real controller at stated times: without a lookup,
with one before every draft as on a CPU, and with one as CUDA graphs have it. As every choice is the
target's own, nothing else can come out. `--no-loops` ends an answer where its last 24 tokens have
stood in it before, which a larger model hardly does.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dflash_chat.runtime.controller import FOUND, Controller
from dflash_chat.runtime.costs import Costs, CostTable
from dflash_chat.runtime.lookup import Chances, Lookup
from dflash_chat.runtime.sampling import accepted

COPYING = Path(__file__).with_name("copying.jsonl")
SLOTS, MOST, LOOP = 7, 256, 24
WAYS = ("drafter alone", "before", "behind")
WAIT_MS = 0.04  # a GPU's, for a step that begins when the one before it has been read
TIMES = {  # ms of a draft and of passes by their rows, from NOTES.md
    "this CPU": (3.7, {1: 8.3, 2: 8.3, 3: 8.5, 4: 8.9, 5: 13.2, 8: 15.5}),
    "Gemma-4-26B-A4B bf16 H200": (0.70, {1: 2.56, 2: 3.41, 4: 4.54, 5: 5.10, 8: 6.35}),
    "Gemma-4-26B-A4B int4 H200": (0.71, {1: 2.01, 2: 2.26, 4: 2.66, 5: 3.06, 8: 3.52}),
    "Qwen3-8B bf16 H200": (0.95, {1: 4.24, 2: 4.26, 4: 4.29, 8: 4.36}),
}


@dataclass
class Answer:
    """Token ids of a prompt and its answer; at every token but the last the drafts behind it and
    the drafter's confidence in each.
    """

    turn: int
    prompt: list[int]
    answer: list[int]
    drafts: list[list[int]]
    sure: list[list[float]]


def record(source: Path, temperature: float, every: int) -> Iterator[Answer]:
    """Every `every`-th chat of a file, turn by turn."""
    import torch

    from dflash_chat import hub, pairs
    from dflash_chat.progress import Reporter
    from dflash_chat.runtime.api import EngineOptions, Message, SamplingParams
    from dflash_chat.runtime.sampling import Sampler
    from dflash_chat.runtime.session import Session

    with Reporter() as reporter:
        installed = hub.ensure(pairs.find("smollm2-135m"), "", reporter)
    session = Session.load(installed, EngineOptions("cpu"), lambda _: None)
    engine, drafter = session.engine, session.engine.drafter
    assert drafter is not None
    for line in source.read_text(encoding="utf-8").splitlines()[::every]:
        chat: list[Message] = []
        for turn, question in enumerate(json.loads(line)["turns"], 1):
            chat.append(Message("user", question))
            ids = session.tokenizer.render(chat)
            params = SamplingParams(temperature=temperature, seed=0, max_tokens=MOST)
            sampler, made = Sampler(params, ids), Answer(turn, list(ids), [], [], [])
            with torch.inference_mode():
                for step in engine.generate(ids, params, draft=False):
                    new = getattr(step, "tokens", ())
                    made.answer += new
                    sampler.accept(new)
                    if new and not getattr(step, "reason", ""):
                        tokens, chances = sampler.guess(drafter.draft(new[-1], SLOTS))
                        made.drafts.append(tokens.tolist())
                        made.sure.append([round(chance, 5) for chance in chances.tolist()])
            yield made
            said = [token for token in made.answer if token not in engine.stop_ids]
            chat.append(Message("assistant", session.tokenizer.decode(said)))


def end_of(answer: Answer, no_loops: bool) -> int:
    """Tokens to be decoded behind the first."""
    seen = set()
    for i in range(LOOP, len(answer.answer) + 1 if no_loops else 0):
        tail = tuple(answer.answer[i - LOOP : i])
        if tail in seen:
            return i - 1
        seen.add(tail)
    return len(answer.answer) - 1


def walk(
    answers: Sequence[Answer], times: tuple[float, dict[int, float]], way: str, no_loops: bool
) -> dict[int, tuple[int, int, float]]:
    """By turn: tokens, passes and milliseconds. `way`: "drafter alone" never looks up, "before"
    does before every draft, "behind" as `graphed.py`.
    """
    draft_ms, verify_ms = times
    rows = [(ms,) for ms in verify_ms.values()]
    table = CostTable.measured(tuple(verify_ms), (1,), [draft_ms], rows)
    controller, chances = Controller(Costs(table), SLOTS, late=False), Chances()
    sums: dict[int, tuple[int, int, float]] = {}
    for a in answers:
        controller.new_answer()
        lookup = Lookup([*a.prompt, a.answer[0]], chances)
        at, end, leads = 0, end_of(a, no_loops), way == "before"
        tokens, passes, ms = sums.get(a.turn, (0, 0, 0.0))
        while at < end:
            found = lookup.find(SLOTS)
            waited_ms = WAIT_MS if leads and way == "behind" else 0.0
            step = controller.decide(1, end - at, found.chances if leads else ())
            tempted = False
            if step.draft:
                controller.cut(step, a.sure[at][: step.width - 1])
            if way == "behind" and step.draft:
                step = controller.weigh(step, end - at, found.chances)
            elif way == "behind":
                tempted = controller.tempted(step, end - at, found.chances)
            leads = way == "before" or (way == "behind" and (step.why is FOUND or tempted))
            drafts = found.tokens if step.why is FOUND else a.drafts[at]
            right = accepted(drafts[: step.width - 1], a.answer[at + 1 : end + 1])
            right = min(right, end - at - 1)
            spent = draft_ms if step.draft else 0.0
            controller.observe(step, right, 1, spent, verify_ms[step.width])
            spent += waited_ms
            lookup.extend(a.answer[at + 1 : at + right + 2])
            at += right + 1
            passes, ms = passes + 1, ms + spent + verify_ms[step.width]
        sums[a.turn] = tokens + end, passes, ms
    return sums


def main() -> None:
    """Record or walk."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("answers", type=Path)
    recorder.add_argument("prompts", type=Path, nargs="?", default=COPYING)
    recorder.add_argument("--temperature", type=float, default=0.0)
    recorder.add_argument("--every", type=int, default=1)
    walker = commands.add_parser("walk")
    walker.add_argument("answers", type=Path, nargs="+")
    walker.add_argument("--no-loops", action="store_true")
    args = parser.parse_args()
    if args.command == "record":
        with args.answers.open("w", encoding="utf-8") as out:
            for answer in record(args.prompts, args.temperature, args.every):
                out.write(json.dumps(asdict(answer)) + "\n")
                out.flush()
        return
    for path in args.answers:
        answers = [Answer(**json.loads(line)) for line in path.read_text().splitlines()]
        for name, times in TIMES.items():
            ways = [walk(answers, times, way, args.no_loops) for way in WAYS]
            for turn, (count, _, without) in ways[0].items():
                for way, sums in zip(WAYS, ways, strict=True):
                    _, passes, ms = sums[turn]
                    print(
                        f"{path.stem} turn {turn}, {name}, {way}: tau {count / passes:.2f}, "
                        f"{count * times[1][1] / ms:.3f} × plain, {100 * (without / ms - 1):+.1f} %"
                    )


if __name__ == "__main__":
    main()
