"""What the command line may set, parsed and checked: `-o key=value` becomes frozen dataclasses.

Knows the keys, their types and their ranges. Knows neither pairs, nor files, nor the engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from dflash_chat.errors import UsageError
from dflash_chat.runtime.api import EngineOptions, SamplingParams

DEFAULT_PAIR = "smollm2-135m"
_SEED_LIMIT = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """Everything `-o` can say. `quant` is the name of a build; "" leaves the choice to the pair."""

    sampling: SamplingParams = SamplingParams()
    engine: EngineOptions = EngineOptions()
    quant: str = ""


@dataclass(frozen=True)
class OnceArgs:
    """`dflash-chat --once`: `prompt` already holds what came through stdin. `extract` prints the
    first code block of the answer instead of the answer.
    """

    prompt: str
    pair: str = DEFAULT_PAIR
    system: str = ""
    settings: Settings = Settings()
    draft: bool = True
    stats: bool = False
    json: bool = False
    extract: bool = False


@dataclass(frozen=True)
class BenchArgs:
    """`dflash-chat bench`, or with `sweep` every width of a pass. `prompts` None takes the built-in
    ones; `limit` 0 takes all of them.
    """

    pair: str = DEFAULT_PAIR
    prompts: Path | None = None
    settings: Settings = Settings()
    limit: int = 0
    json: bool = False
    sweep: bool = False


@dataclass(frozen=True)
class RandomBenchArgs:
    """`dflash-chat bench --random-weights`. Acceptance is dictated: by a mean length (bonus
    included), or by a1 and r, position i being accepted with chance a1·r^i; both 0 takes the three
    lengths of the benchmark notes. `widths` empty takes every captured one. Of the `options`, those
    that choose the format of the drafter and the heads count. `sweep` runs whole answers instead:
    plain, every width, and the controller.
    """

    pair: str
    quant: str = "bf16"
    context: int = 2048
    widths: tuple[int, ...] = ()
    accept_length: float = 0.0
    accept_curve: tuple[float, float] = (0.0, 0.0)
    options: EngineOptions = EngineOptions()
    json: bool = False
    sweep: bool = False


@dataclass(frozen=True)
class _Number:
    """Range of one key; `above` excludes the lower end."""

    low: float
    high: float
    whole: bool = False
    above: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.high == _SEED_LIMIT:
            return f"{kind}, {self.low} or more"
        return f"{kind} {'above' if self.above else 'from'} {self.low} up to {self.high}"

    def read(self, text: str) -> float | int | None:
        """The value, or None if `text` is no such number."""
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            return None
        return value if self.holds(value) else None

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range (NaN never does)."""
        return (self.low < value if self.above else self.low <= value) and value <= self.high


SAMPLING_RANGES = {
    "temperature": _Number(0, 5),
    "top_k": _Number(0, 1_000_000, whole=True),
    "top_p": _Number(0, 1, above=True),
    "min_p": _Number(0, 1),
    "repetition_penalty": _Number(0, 10, above=True),
    "presence_penalty": _Number(-2, 2),
    "frequency_penalty": _Number(-2, 2),
    "max_tokens": _Number(1, 1_000_000, whole=True),
    "seed": _Number(0, _SEED_LIMIT, whole=True),
}
_ENGINE_RANGES = {
    "ctx": ("context_tokens", _Number(16, 1_048_576, whole=True)),
    "k": ("draft_tokens", _Number(1, 64, whole=True)),
    "threads": ("threads", _Number(1, 1024, whole=True)),
}
_CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "fp32", "bf16"),
    "drafter": ("auto", "bf16", "fp8"),
    "head": ("auto", "own", "fp8", "screened"),
    "lookup": ("on", "off"),
}
_QUANT = re.compile(r"[a-z0-9][a-z0-9._-]*")
_DRAFT_ROWS = _Number(1, 1_048_576, whole=True)
KEYS = (*SAMPLING_RANGES, "stop", *_ENGINE_RANGES, "draft_head", *_CHOICES, "quant")


def parse_options(options: Iterable[str], sampling: SamplingParams = SamplingParams()) -> Settings:
    """Settings from `key=value` texts on top of `sampling`; the last one wins, `stop` adds up."""
    settings = Settings(sampling=sampling)
    for option in options:
        key, equals, value = option.partition("=")
        key = key.strip().lower().replace("-", "_")
        if not equals:
            raise UsageError(
                f"option {option!r}: expected key=value", hint=f"keys: {', '.join(KEYS)}"
            )
        settings = _set(settings, key, value)
    return settings


def _set(settings: Settings, key: str, value: str) -> Settings:
    if key == "stop":
        if not value:
            raise UsageError("option stop: the text must not be empty")
        text = value.replace("\\n", "\n").replace("\\t", "\t")
        stop = (*settings.sampling.stop, text)
        return replace(settings, sampling=replace(settings.sampling, stop=stop))
    if key == "quant":
        name = value.strip().lower()
        if not _QUANT.fullmatch(name):
            raise UsageError(f"option quant={value}: expected the name of a build")
        return replace(settings, quant=name)
    if key == "draft_head":
        return replace(settings, engine=_with_draft_head(settings.engine, value))
    if key in SAMPLING_RANGES:
        number = _number(key, value, SAMPLING_RANGES[key])
        return replace(settings, sampling=replace(settings.sampling, **{key: number}))  # type: ignore[arg-type]
    if key in _ENGINE_RANGES:
        field, limits = _ENGINE_RANGES[key]
        number = _number(key, value, limits)
        return replace(settings, engine=replace(settings.engine, **{field: number}))  # type: ignore[arg-type]
    if key in _CHOICES:
        choice = value.strip().lower()
        if choice not in _CHOICES[key]:
            raise UsageError(f"option {key}={value}: expected one of {', '.join(_CHOICES[key])}")
        return replace(settings, engine=replace(settings.engine, **{key: choice}))  # type: ignore[arg-type]
    raise UsageError(f"there is no option {key!r}", hint=suggest(key, KEYS))


def _with_draft_head(engine: EngineOptions, value: str) -> EngineOptions:
    """`auto`, `own`, `fp8`, the number of rows, or both: `fp8:ROWS`."""
    word, colon, count = value.strip().lower().partition(":")
    if word in ("auto", "own", "fp8") and not colon:
        return replace(engine, draft_head=word, draft_rows=0)
    word, count = (word, count) if colon else ("auto", word)
    rows = _DRAFT_ROWS.read(count)
    if rows is None or word not in ("auto", "fp8"):
        raise UsageError(
            f"option draft_head={value}: expected own, fp8, a number of rows, or fp8:rows",
            hint="e.g. draft_head=16000, or draft_head=fp8:16000",
        )
    return replace(engine, draft_head=word, draft_rows=int(rows))


def _number(key: str, text: str, limits: _Number) -> float | int:
    value = limits.read(text.strip())
    if value is None:
        hint = "tokens of context, e.g. ctx=8192" if key == "ctx" else ""
        raise UsageError(f"option {key}={text}: expected {limits}", hint)
    return value


def sampling_option(option: str, sampling: SamplingParams) -> SamplingParams:
    """`sampling` with one `key=value` changed. Raises UsageError, for what is fixed while a pair is
    loaded, too.
    """
    key, equals, _ = option.partition("=")
    if not equals:
        raise UsageError("/set needs a key and a value.", "For example /set temperature=0.7")
    settings = parse_options([option], sampling)
    if settings != Settings(settings.sampling):
        raise UsageError(
            f"{key} is fixed while a pair is loaded.",
            f"Give it at the start: dflash-chat -o {option}",
        )
    return settings.sampling


def draft_choice(word: str, most: int, pinned: int) -> tuple[bool, int]:
    """Whether `/draft WORD` drafts, and how many tokens, 0 for as many as pay.

    `most` is what the drafter proposes; `pinned` what the engine was loaded with, 0 if it has
    measured what pays. Raises UsageError.
    """
    word = word.lower()
    if word.isascii() and word.isdigit() and 1 <= int(word) <= most:
        return True, int(word)
    if word not in ("on", "off", "auto"):
        raise UsageError(
            f"/draft is on, off, auto or a number from 1 to {most}.", "For example /draft auto"
        )
    if word == "auto" and pinned:
        raise UsageError(
            f"The engine was started with k={pinned} and has not measured what pays.",
            "Start it without -o k.",
        )
    return word != "off", 0


def draft_choice_words(draft: bool, tokens: int) -> str:
    """A choice of `draft_choice` in words."""
    if not draft:
        return "off"
    return f"{tokens} tokens in every pass" if tokens else "on"


def suggest(word: str, known: Iterable[str]) -> str:
    """The hint after a misspelt word: the nearest three, or all there are."""
    names = list(known)
    near = get_close_matches(word.lower(), names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
