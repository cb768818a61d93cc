"""Command line of the training program: `python -m dflash_chat.training COMMAND …`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dflash_chat.errors import EXIT_OK, UsageError, UserError
from dflash_chat.training.drafter import Drafter, DrafterShape
from dflash_chat.training.evaluate import answer_sets, evaluate, read_prompts
from dflash_chat.training.export import exported_tensors, read_checkpoint, write_checkpoint
from dflash_chat.training.profile import profile
from dflash_chat.training.scripts import MASK_TOKEN, Encode, build_scripts, random_scripts
from dflash_chat.training.selfplay import Scripts, Style
from dflash_chat.training.target import (
    SMOLLM2_135M,
    Target,
    build_target,
    load_target,
    random_tensors,
)
from dflash_chat.training.train import Options, Trainer, Weights, run

TAPS = (1, 8, 14, 20, 27)
BLOCK = 8
LAYERS = 3
RANDOM_MASK_ID = 7


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m dflash_chat.training", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text)
        sub.add_argument("--target", type=Path, help="the target's GGUF file")
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        sub.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
        return sub

    def evals(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--eval", action="append", default=[], metavar="NAME=FILE", help="prompts, JSONL"
        )
        sub.add_argument("--new-tokens", type=int, default=256)

    train = command("run", "play and train until the minutes are over")
    profiling = command("profile", "check the kernels and time every part")
    for sub in (train, profiling):
        _add_options(sub)
    evals(train)
    train.add_argument("--out", type=Path, required=True, help="folder of the training state")
    train.add_argument("--export-to", type=Path, help="drafter folder; default OUT/drafter")
    train.add_argument("--resume", action="store_true", help="continue from OUT/state.pt")
    train.add_argument("--init-from", type=Path, help="start from an exported drafter")
    profiling.add_argument("--random-target", action="store_true", help="real shapes, no weights")

    evaluation = command("evaluate", "acceptance length of an exported drafter")
    evals(evaluation)
    evaluation.add_argument("--drafter", type=Path, required=True)

    exporting = command("export", "write the drafter of a training state")
    exporting.add_argument("--state", type=Path, required=True)
    exporting.add_argument("--to", type=Path, required=True)
    exporting.add_argument("--average", action="store_true", help="the averaged weights")
    return top


def _add_options(sub: argparse.ArgumentParser) -> None:
    for option in dataclasses.fields(Options):
        if option.name == "style":
            continue
        flag = "--" + option.name.replace("_", "-")
        if isinstance(option.default, bool):
            sub.add_argument(flag, action=argparse.BooleanOptionalAction, default=option.default)
            continue
        sub.add_argument(flag, type=type(option.default), default=option.default)
    sub.add_argument(
        "--temperatures", default="", metavar="T:SHARE,…", help="assistant turns of self-play"
    )
    sub.add_argument("--opener-share", type=float, default=Style.opener_share)


def _options(args: argparse.Namespace) -> Options:
    names = {option.name for option in dataclasses.fields(Options)} - {"style"}
    style = Style(opener_share=args.opener_share)
    if args.temperatures:
        pairs = [pair.split(":") for pair in args.temperatures.split(",")]
        heats = tuple((float(heat), float(share)) for heat, share in pairs)
        style = dataclasses.replace(style, assistant_temperatures=heats)
    options = Options(**{name: getattr(args, name) for name in names}, style=style)
    for name, allowed in (
        ("optimizer", ("adamw", "muon")),
        ("attention", ("flex", "dense")),
        ("init", ("target", "random")),
    ):
        if getattr(options, name) not in allowed:
            raise UsageError(f"--{name} takes one of {', '.join(allowed)}")
    return options


def _target(args: argparse.Namespace) -> Target:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if getattr(args, "random_target", False):
        return build_target(SMOLLM2_135M, random_tensors(SMOLLM2_135M, 0), TAPS, device, dtype)
    if args.target is None:
        raise UsageError("--target is missing", "give the target's GGUF file")
    return load_target(args.target, TAPS, device, dtype)


def _text(args: argparse.Namespace) -> tuple[Encode, Scripts, int]:
    """The target's own tokenizer, self-play's scripts in its ids, and the mask id."""
    if getattr(args, "random_target", False):
        return (lambda text: [17]), random_scripts(SMOLLM2_135M.vocab), RANDOM_MASK_ID
    from dflash_chat.training.text import encoder

    encode = encoder(args.target)
    (mask_id,) = encode(MASK_TOKEN)
    return encode, build_scripts(encode), mask_id


def _prompts(entries: Sequence[str]) -> dict[str, list[str]]:
    out = {}
    for entry in entries:
        name, found, file = entry.partition("=")
        if not found:
            raise UsageError(f"--eval takes NAME=FILE, not {entry}")
        out[name] = read_prompts(Path(file))
    return out


def _run(args: argparse.Namespace) -> None:
    options = _options(args)
    target = _target(args)
    encode, scripts, mask_id = _text(args)
    shape = DrafterShape(target.shape, LAYERS, BLOCK, TAPS, mask_id)
    sets = answer_sets(target, encode, scripts.end_id, _prompts(args.eval), args.new_tokens)
    say(f"target ready, {len(sets)} evaluation sets")
    trainer = Trainer(target, scripts, shape, options)
    if args.resume:
        trainer.resume(args.out / "state.pt")
        say(f"resumed at step {trainer.steps}, {trainer.elapsed / 60:.1f} min")
    run(trainer, sets, args.out, args.export_to or args.out / "drafter", say, args.init_from)


def _profile(args: argparse.Namespace) -> None:
    options = _options(args)
    target = _target(args)
    _, scripts, mask_id = _text(args)
    profile(target, scripts, DrafterShape(target.shape, LAYERS, BLOCK, TAPS, mask_id), options, say)


def _evaluate(args: argparse.Namespace) -> None:
    target = _target(args)
    encode, scripts, mask_id = _text(args)
    shape = DrafterShape(target.shape, LAYERS, BLOCK, TAPS, mask_id)
    drafter = Drafter(shape).to(target.device)
    drafter.load_state_dict(read_checkpoint(args.drafter, drafter))
    drafter.to(target.dtype)
    prompts = _prompts(args.eval)
    for part in answer_sets(target, encode, scripts.end_id, prompts, args.new_tokens):
        say(evaluate(drafter, target, part).line())


def _export(args: argparse.Namespace) -> None:
    target = _target(args)
    _, _, mask_id = _text(args)
    shape = DrafterShape(target.shape, LAYERS, BLOCK, TAPS, mask_id)
    drafter = Drafter(shape)
    state = torch.load(args.state, map_location="cpu", weights_only=True)
    drafter.feature_rms.copy_(state["feature_rms"])
    flat = state["ema" if args.average else "master"]
    write_checkpoint(args.to, shape, exported_tensors(drafter, Weights(drafter).by_name(flat)))


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    commands = {"run": _run, "profile": _profile, "evaluate": _evaluate, "export": _export}
    try:
        commands[args.command](args)
    except UserError as error:
        say(f"{error.message} {error.hint}".strip())
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
