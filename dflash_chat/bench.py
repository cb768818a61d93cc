"""`dflash-chat bench`: the same prompts with and without drafting, in one process.

Reports pooled sums, never means of ratios: tau, histogram, tok/s of both ways and their ratio, and
how many greedy outputs were identical. The order of the two ways alternates from prompt to prompt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflash_chat import hub, once, pairs
from dflash_chat.errors import EXIT_OK, UsageError
from dflash_chat.progress import Reporter
from dflash_chat.runtime.api import (
    Finished,
    Generate,
    Message,
    ModelInfo,
    Progress,
    SamplingParams,
    Spec,
    Tokens,
)
from dflash_chat.settings import BenchArgs
from dflash_chat.speed import Survival

if TYPE_CHECKING:
    from dflash_chat.hub import Installed
    from dflash_chat.runtime.session import Session

PLAIN, CONTROLLER = 0, -1  # ways of decoding; another is the number of tokens always drafted
_SEED = 0  # sampled runs are repeatable unless -o seed says otherwise


@dataclass(frozen=True)
class Way:
    """Pooled figures of one way of decoding. `decode_s` covers `decoded` tokens, which would have
    taken plain decoding `plain_s` by what each answer knew of it. `why` is the last step's.
    """

    spec: Spec = field(default_factory=Spec)
    decoded: int = 0
    decode_s: float = 0.0
    plain_s: float = 0.0
    why: str = ""

    @property
    def tok_s(self) -> float:
        """Σ tokens ÷ Σ seconds."""
        return self.decoded / self.decode_s if self.decode_s else 0.0

    @property
    def ar_tok_s(self) -> float:
        """Plain decoding by the plain passes among these answers; 0 where it is not known."""
        return self.decoded / self.plain_s if self.plain_s else 0.0

    @property
    def step_ms(self) -> float:
        """Σ milliseconds ÷ Σ passes."""
        return 1000 * self.decode_s / self.spec.steps if self.spec.steps else 0.0

    @property
    def survival(self) -> Survival | None:
        """How far drafts survived; None if none was verified."""
        shares = self.spec.survival
        return Survival(shares, self.decoded) if shares else None

    def plus(self, finished: Finished) -> Way:
        """With one more answer."""
        timing = finished.timing
        decoded = max(0, finished.usage.completion - 1)  # the first token is prefill's
        return Way(
            self.spec.merge(finished.spec),
            self.decoded + decoded,
            self.decode_s + timing.decode_s,
            self.plain_s + (decoded / timing.ar_tok_s if timing.ar_tok_s else 0.0),
            finished.why or self.why,
        )


def run(args: BenchArgs) -> int:
    """Run and print. Raises UsageError for a prompt file that cannot be used."""
    prompts, sampling = chosen(args)
    _, session = load(args)
    drafted, plain, identical = Way(), Way(), 0
    for number, prompt in enumerate(prompts):
        answers: dict[bool, tuple[str, Finished]] = {}
        for draft in (True, False) if number % 2 else (False, True):
            answers[draft] = answer(session, prompt, sampling, draft)
        drafted, plain = drafted.plus(answers[True][1]), plain.plus(answers[False][1])
        identical += answers[True][0] == answers[False][0]
        done = number + 1
        sys.stderr.write(
            f"{done}/{len(prompts)}  tau {drafted.spec.tau:.2f}  drafted {drafted.tok_s:.1f}  "
            f"plain {plain.tok_s:.1f} tok/s  identical {identical}/{done}\n"
        )
    report = as_json(session.info, len(prompts), sampling, drafted, plain, identical)
    sys.stdout.write(json.dumps(report) if args.json else in_words(report))
    sys.stdout.write("\n")
    return EXIT_OK


def chosen(args: BenchArgs) -> tuple[list[str], SamplingParams]:
    """The prompts, and sampling that is the same in every run."""
    sampling = args.settings.sampling
    if sampling.temperature > 0 and sampling.seed is None:
        sampling = replace(sampling, seed=_SEED)
    return read_prompts(args.prompts)[: args.limit or None], sampling


def load(args: BenchArgs) -> tuple[Installed, Session]:
    """The pair, fetched if need be, in this process."""
    with Reporter() as reporter:
        installed = hub.ensure(pairs.find(args.pair), args.settings.quant, reporter)
        from dflash_chat.runtime import session as runtime  # torch comes in here, not before

        def loading(progress: Progress) -> None:
            reporter(progress.stage, progress.done, progress.total)

        return installed, runtime.Session.load(installed, args.settings.engine, loading)


def answer(
    session: Session, prompt: str, sampling: SamplingParams, draft: bool, draft_tokens: int = 0,
    before: tuple[Message, ...] = (), cancelled: Callable[[], bool] = lambda: False,
) -> tuple[str, Finished]:  # fmt: skip
    """Text and figures of one answer, behind a chat; `draft_tokens` as in `Generate`."""
    request = Generate(0, (*before, Message("user", prompt)), sampling, draft, draft_tokens)
    pieces: list[str] = []
    for event in session.generate(request, cancelled):
        if isinstance(event, Tokens):
            pieces.append(event.text)
        elif isinstance(event, Finished):
            return "".join(pieces), event
    raise AssertionError("a generation ends with Finished")


def as_json(
    info: ModelInfo,
    prompts: int,
    sampling: SamplingParams,
    drafted: Way,
    plain: Way,
    identical: int,
) -> dict[str, Any]:
    """The object of `bench --json`; field names are part of the interface."""
    return {
        "pair": info.pair,
        "device": info.device,
        "dtype": info.dtype,
        "kernels": info.kernels,
        "draft_tokens": info.draft_tokens,
        "prompts": prompts,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "spec": drafted.spec.to_json(),
        "timing": {
            "ar_tok_s": round(drafted.ar_tok_s, 2),
            "speedup": round(drafted.tok_s / drafted.ar_tok_s, 4) if drafted.ar_tok_s else 0.0,
        },
        "why": drafted.why,
        "drafted_tok_s": round(drafted.tok_s, 2),
        "plain_tok_s": round(plain.tok_s, 2),
        "speedup": round(drafted.tok_s / plain.tok_s, 4) if plain.tok_s else 0.0,
        "tokens": {"drafted": drafted.decoded, "plain": plain.decoded},
        "identical": identical,
        "versions": info.versions,
    }


def in_words(report: dict[str, Any]) -> str:
    """The same for people."""
    spec, live = report["spec"], report["timing"]
    passes = max(1, spec["steps"])
    bars = "\n".join(
        f"  {committed:2d} committed  {count / passes:6.1%}  {'█' * round(40 * count / passes)}"
        for committed, count in enumerate(spec["histogram"], 1)
    )
    return (
        f"{report['pair']} on {report['device']} ({report['dtype']}, {report['kernels']}), "
        f"k = {report['draft_tokens']}, temperature {report['temperature']:g}, "
        f"{report['prompts']} prompts of at most {report['max_tokens']} tokens\n"
        f"tau        {spec['tau']:.3f} = {spec['tau'] - 1:.3f} drafted + 1   "
        f"({spec['steps']} verify passes, {spec['accept_rate']:.1%} of drafted tokens accepted)\n"
        f"{bars}\n"
        f"widths     {once.width_words(spec['widths'])}; the last: {report['why'] or 'none'}\n"
        f"drafted    {report['drafted_tok_s']:.1f} tok/s\n"
        f"plain      {report['plain_tok_s']:.1f} tok/s\n"
        f"speed-up   {report['speedup']:.3f}×   (by the plain passes among the drafted ones "
        f"{live['speedup']:.3f}×, {live['ar_tok_s']:.1f} tok/s)\n"
        f"identical  {report['identical']} of {report['prompts']} answers"
    )


def read_prompts(path: Path | None) -> list[str]:
    """First turns of a JSONL file with `prompt` or `turns` per line; None reads the built-in
    ones.
    """
    if path is None:
        source = files("dflash_chat").joinpath("prompts.jsonl").read_text(encoding="utf-8")
        return _parse(source.splitlines(), "prompts.jsonl")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text") from error
    return _parse(lines, str(path))


def _parse(lines: Iterable[str], name: str) -> list[str]:
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row["prompt"] if "prompt" in row else row["turns"][0]
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise UsageError(
                f"{name}, line {number}: not a prompt",
                'each line is a JSON object with "prompt", or with "turns" like MT-bench',
            ) from error
        if not isinstance(prompt, str) or not prompt:
            raise UsageError(f"{name}, line {number}: the prompt must be a non-empty text")
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f"{name}: no prompts in it")
    return prompts
