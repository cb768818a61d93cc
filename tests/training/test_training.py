"""Training: the masks, the loss, self-play's turns, evaluation as served, export and resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dflash_chat.training.drafter import (
    Drafter,
    DrafterShape,
    FlexAttend,
    block_inputs,
    block_positions,
    dense_attend,
    dense_mask,
    initialise,
    tables,
)
from dflash_chat.training.evaluate import AnswerSet, accepted_everywhere, evaluate, walk
from dflash_chat.training.export import exported_tensors, read_checkpoint, write_checkpoint
from dflash_chat.training.loss import dpace_weights, head_loss
from dflash_chat.training.profile import profile
from dflash_chat.training.selfplay import (
    ASSISTANT,
    FORCED,
    OPENER,
    USER,
    Player,
    Scripts,
    Style,
    answer,
)
from dflash_chat.training.target import (
    Decoder,
    Shape,
    Target,
    build_target,
    full_forward,
    random_tensors,
)
from dflash_chat.training.train import (
    Options,
    Trainer,
    Weights,
    draw_anchors,
    labels_of,
    run,
)

CPU = torch.device("cpu")
SHAPE = Shape(48, 96, 4, 3, 1, 16, 96, 10_000.0, 1e-5, 512)
TAPS = (0, 1, 2)
END, MASK = 2, 7
SCRIPTS = Scripts(
    runs=((1, 20, 21), (20, 1), (END, 20, 1), (22, 1), (END, 22, 1), (30, 31, 32)),
    after=(OPENER, ASSISTANT, ASSISTANT, OPENER, OPENER, USER),
    starts=(0,),
    openers=(5,),
    close_user=1,
    cut_user=2,
    close_assistant=3,
    cut_assistant=4,
    end_id=END,
)
OPTIONS = Options(
    rows=8, length=64, ring=2, sequences=4, anchors=8, attention="dense", compiled=False,
    held_out=2, lr=3e-3, warmup=0.0,
    style=Style(assistant_limits=(6, 14), user_limits=(3, 6)),
)  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Target:
    return build_target(SHAPE, random_tensors(SHAPE, 0, std=0.15), TAPS, CPU, torch.float32)


@pytest.fixture
def shape() -> DrafterShape:
    return DrafterShape(SHAPE, layers=2, block=8, taps=TAPS, mask_id=MASK)


def drafter_of(shape: DrafterShape, target: Target) -> Drafter:
    drafter = Drafter(shape)
    initialise(drafter, target, torch.rand(target.feature_width) + 0.5, seed=1)
    return drafter


def draft_hidden(
    drafter: Drafter, target: Target, tokens: Tensor, features: Tensor, anchors: Tensor
) -> Tensor:
    block = drafter.shape.block
    with torch.no_grad():
        hidden: Tensor = drafter(
            features,
            block_inputs(target, tokens, anchors, drafter.shape),
            block_positions(anchors, block),
            tables(SHAPE, tokens.shape[1] + block, CPU),
            dense_attend(anchors, tokens.shape[1], block),
        )
    return hidden


def test_decoding_step_by_step_equals_the_full_forward(target: Target) -> None:
    tokens = torch.randint(0, SHAPE.vocab, (3, 20), generator=torch.Generator().manual_seed(1))
    features, hidden = full_forward(target, tokens)
    decoder = Decoder(target, 3, 20)
    decoder.tokens.copy_(tokens)
    for t in range(20):
        decoder.position.fill_(t)
        torch.testing.assert_close(
            decoder.step(), F.linear(hidden[:, t], target.head), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(decoder.features, features, rtol=1e-4, atol=1e-4)


def test_the_target_equals_transformers(target: Target) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE.vocab, hidden_size=SHAPE.hidden, intermediate_size=SHAPE.mlp,
        num_hidden_layers=SHAPE.layers, num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim, rms_norm_eps=SHAPE.eps,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(random_tensors(SHAPE, 0, std=0.15), strict=False)
    tokens = torch.randint(0, SHAPE.vocab, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = model(tokens, output_hidden_states=True)
    features, hidden = full_forward(target, tokens)
    logits = F.linear(hidden, target.head)
    torch.testing.assert_close(logits, theirs.logits, rtol=1e-4, atol=1e-4)
    taps = torch.cat([theirs.hidden_states[tap + 1] for tap in TAPS], dim=-1)
    torch.testing.assert_close(features, taps, rtol=1e-4, atol=1e-4)


def test_a_block_sees_context_before_its_anchor_and_itself() -> None:
    anchors = torch.tensor([[0, 3, 9], [2, 2, 11]])
    mask = dense_mask(anchors, context=12, block=4)
    for n in range(2):
        for q in range(12):
            for key in range(24):
                before = key < int(anchors[n, q // 4])
                own = (key - 12) // 4 == q // 4
                visible = before if key < 12 else own
                assert bool(mask[n, q, key]) == visible, (n, q, key)


def test_flex_attention_equals_dense_attention() -> None:
    g = torch.Generator().manual_seed(3)
    anchors = torch.randint(0, 256, (2, 32), generator=g).sort(dim=1).values
    q = torch.randn(2, 3, 256, 16, generator=g)
    k, v = (torch.randn(2, 1, 512, 16, generator=g) for _ in range(2))
    flex = FlexAttend(2, 32, 256, 8, CPU)
    flex.update(anchors.flip(0).contiguous())
    flex.update(anchors)
    expected = dense_attend(anchors, 256, 8)(q, k, v)
    torch.testing.assert_close(flex(q, k, v), expected, rtol=1e-4, atol=1e-5)
    tiles = flex.mask.to_dense()[:, 0].bool()
    mask = dense_mask(anchors, 256, 8).view(2, 2, 128, 4, 128)
    assert torch.equal(tiles, mask.any(4).any(2))


def test_blocks_do_not_see_each_other_nor_tokens_after_their_anchor(
    target: Target, shape: DrafterShape
) -> None:
    drafter = drafter_of(shape, target)
    g = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, SHAPE.vocab, (1, 40), generator=g)
    features, _ = full_forward(target, tokens)
    together = draft_hidden(drafter, target, tokens, features, torch.tensor([[5, 17, 30]]))
    alone = draft_hidden(drafter, target, tokens, features, torch.tensor([[17]]))
    torch.testing.assert_close(together[:, 8:16], alone, rtol=1e-4, atol=1e-5)
    features[:, 17:] = 1e3
    later = draft_hidden(drafter, target, tokens, features, torch.tensor([[17]]))
    torch.testing.assert_close(later, alone)


def test_dpace_weights_by_hand() -> None:
    q = torch.tensor([[0.5, 0.0, 1.0]])
    weights = dpace_weights(q, torch.ones(1, 3))
    # q̃ = .75, .5, 1 → prefixes .75, .375, .375
    torch.testing.assert_close(weights, torch.tensor([[1.5, 0.75, 0.375]]))
    cut = dpace_weights(q, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(cut, torch.tensor([[1.125, 0.375, 0.0]]))


def test_head_loss_gradient_equals_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dflash_chat.training.loss.CHUNK_ROWS", 10)
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(6, 3, 16, generator=g, requires_grad=True)
    head = torch.randn(40, 16, generator=g)
    labels = torch.randint(0, 40, (6, 3), generator=g)
    valid = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]])
    anchor_weight = torch.tensor([1.0, 1, 1, 1, 0, 1])
    out = head_loss(hidden, head, labels, valid, anchor_weight)
    (3 * out.loss).backward()
    plain = hidden.detach().requires_grad_()
    log_q = F.linear(plain, head).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    weights = dpace_weights(log_q.detach().exp(), valid) * anchor_weight[:, None]
    loss = -(weights * log_q).sum() / weights.sum()
    (3 * loss).backward()
    torch.testing.assert_close(out.loss, loss.detach())
    torch.testing.assert_close(hidden.grad, plain.grad)


def test_self_play_alternates_turns_and_marks_who_wrote_what(target: Target) -> None:
    style = Style(opener_share=0.5, assistant_limits=(4, 9), user_limits=(2, 5))
    player = Player(target, SCRIPTS, style, rows=16, length=96, seed=3)
    played = player.play(0)
    plan = player._plan.tolist()
    limits = player._limits.tolist()
    for row in range(16):
        ids, kinds = played.tokens[row].tolist(), played.kinds[row].tolist()
        at, turn, script, after = 0, 0, list(SCRIPTS.runs[0]), OPENER
        while at < 96:
            for token in script[: 96 - at]:
                assert (ids[at], kinds[at]) == (token, FORCED), (row, at)
                at += 1
            if after == OPENER:
                opener = plan[row][turn]
                turn += 1
                if opener >= 0:
                    script, after = list(SCRIPTS.runs[opener]), USER
                    continue
                after = USER
            written = 0
            while at < 96:
                assert kinds[at] == after, (row, at)
                written += 1
                at += 1
                if ids[at - 1] == END or written == limits[row][after]:
                    break
            ended = ids[at - 1] == END
            if after == USER:
                script, after = list(SCRIPTS.runs[1 if ended else 2]), ASSISTANT
            else:
                script, after = list(SCRIPTS.runs[3 if ended else 4]), OPENER


def test_greedy_rows_of_self_play_are_the_targets_argmax(target: Target) -> None:
    style = Style(assistant_temperatures=((0.0, 1.0),), assistant_limits=(4, 9), user_limits=(2, 5))
    played = Player(target, SCRIPTS, style, rows=4, length=48, seed=5).play(1)
    features, hidden = full_forward(target, played.tokens.long())
    best = F.linear(hidden, target.head).argmax(-1)
    answers = played.kinds[:, 1:] == ASSISTANT
    assert answers.any()
    assert torch.equal(best[:, :-1][answers], played.tokens[:, 1:][answers].long())
    torch.testing.assert_close(played.features[:, :-1], features[:, :-1], rtol=1e-4, atol=1e-4)


def test_anchors_stand_where_the_model_wrote_this_and_the_next_token() -> None:
    kinds = torch.tensor([[0, 0, 1, 1, 0, 2, 2, 2, 0, 0, 2, 2]], dtype=torch.uint8)
    g = torch.Generator().manual_seed(6)
    seen: set[int] = set()
    for _ in range(40):
        anchors, weight = draw_anchors(kinds, 3, 0.15, g)
        assert anchors[0].tolist() == sorted(anchors[0].tolist())
        assert weight.sum() == 3
        assert len(set(anchors[0].tolist())) == 3
        seen |= set(anchors[0].tolist())
    assert seen == {2, 5, 6, 10}
    _, weight = draw_anchors(kinds, 6, 0.15, g)
    assert weight.sum() == 4


def test_labels_stop_at_the_end_of_the_turn() -> None:
    tokens = torch.arange(100, 112, dtype=torch.int32)[None]
    kinds = torch.tensor([[0, 0, 1, 1, 0, 2, 2, 2, 0, 0, 2, 2]], dtype=torch.uint8)
    labels, valid = labels_of(tokens, kinds, torch.tensor([[5, 10]]), block=4)
    assert labels[0, 0].tolist() == [106, 107, 108]
    assert valid[0].tolist() == [[1, 1, 0], [1, 0, 0]]


def test_training_overfits_and_the_walk_agrees(target: Target, shape: DrafterShape) -> None:
    trainer = Trainer(target, SCRIPTS, shape, dataclasses.replace(OPTIONS, held_out=0, anchors=16))
    trainer.play_round()
    for _ in range(200):
        trainer.train_step(0.1)
    trainer.report()
    for _ in range(5):
        trainer.train_step(0.1)
    report = trainer.report()
    assert isinstance(report["survival"], list)
    assert report["survival"][0] > 0.9
    assert report["survival"][2] > 0.5 * report["survival"][0]


def test_the_walk_is_what_a_serving_loop_does(target: Target, shape: DrafterShape) -> None:
    drafter = drafter_of(shape, target)
    g = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, SHAPE.vocab, (2, 30), generator=g)
    features, _ = full_forward(target, tokens)
    # make the text repeat the drafts now and then, so that every length occurs
    starts, ends = (4, 7), (28, 30)
    for row in range(2):
        for at in range(starts[row], ends[row] - 3, 5):
            anchors = torch.tensor([[at]])
            part = slice(row, row + 1)
            hidden = draft_hidden(drafter, target, tokens[part], features[part], anchors)
            best = F.linear(hidden[0, 1:], target.head).argmax(-1)
            count = 1 + at % 4
            tokens[row, at + 1 : at + 1 + count] = best[:count]
    answers = AnswerSet("x", tokens.int(), features, starts, ends)
    histogram = [0] * shape.block
    for row in range(2):
        at = starts[row]
        while at + 1 < ends[row]:
            part = slice(row, row + 1)
            hidden = draft_hidden(
                drafter, target, tokens[part], features[part], torch.tensor([[at]])
            )
            drafts = F.linear(hidden[0, 1:], target.head).argmax(-1).tolist()
            rest = tokens[row, at + 1 : ends[row]].tolist()
            commit = 0
            while commit < min(len(rest), len(drafts)) and drafts[commit] == rest[commit]:
                commit += 1
            commit = min(commit + 1, len(rest))
            histogram[commit - 1] += 1
            at += commit
    result = evaluate(drafter, target, answers)
    assert list(result.histogram) == histogram
    assert sum(histogram[1:]) > 0
    committed = sum(e - s - 1 for s, e in zip(starts, ends, strict=True))
    assert result.tau == pytest.approx(committed / sum(histogram))
    held = accepted_everywhere(drafter, target, answers)
    assert [len(row) for row in held] == [24, 23]


def test_the_walk_by_hand() -> None:
    assert walk([2, 9, 9, 0, 1, 0, 0], block=8) == [1, 1, 1, 0, 0, 0, 0, 0]


def test_export_has_the_published_names_and_folds_the_scale(
    target: Target, shape: DrafterShape, tmp_path: Path
) -> None:
    drafter = drafter_of(shape, target)
    weights = Weights(drafter)
    tensors = exported_tensors(drafter, weights.by_name(weights.master))
    write_checkpoint(tmp_path, shape, tensors)
    stored = load_file(str(tmp_path / "model.safetensors"))
    per_layer = {
        "self_attn.q_proj.weight": (48, 48), "self_attn.k_proj.weight": (16, 48),
        "self_attn.v_proj.weight": (16, 48), "self_attn.o_proj.weight": (48, 48),
        "self_attn.q_norm.weight": (16,), "self_attn.k_norm.weight": (16,),
        "mlp.gate_proj.weight": (96, 48), "mlp.up_proj.weight": (96, 48),
        "mlp.down_proj.weight": (48, 96), "input_layernorm.weight": (48,),
        "post_attention_layernorm.weight": (48,),
    }  # fmt: skip
    expected = {f"layers.{i}.{name}": s for i in range(2) for name, s in per_layer.items()}
    expected |= {"fc.weight": (48, 144), "hidden_norm.weight": (48,), "norm.weight": (48,)}
    assert {name: tuple(t.shape) for name, t in stored.items()} == expected
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dflash_config"] == {"mask_token_id": MASK, "target_layer_ids": [0, 1, 2]}
    assert config["layer_types"] == ["full_attention"] * 2

    served = Drafter(shape)
    served.load_state_dict(read_checkpoint(tmp_path, served))
    features = torch.randn(1, 5, target.feature_width)
    torch.testing.assert_close(
        served.context(features), drafter.context(features), rtol=2e-2, atol=2e-2
    )
    again = read_checkpoint(tmp_path, drafter)
    torch.testing.assert_close(again["fc.weight"], drafter.fc.weight.detach(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_continues_exactly(
    target: Target, shape: DrafterShape, tmp_path: Path, optimizer: str
) -> None:
    options = dataclasses.replace(OPTIONS, optimizer=optimizer)

    def fresh() -> Trainer:
        return Trainer(target, SCRIPTS, shape, options)

    whole, first, second = fresh(), fresh(), fresh()
    for trainer in (whole, first):
        trainer.play_round()
        for step in range(3):
            trainer.train_step(step / 6)
    first.save(tmp_path / "state.pt")
    second.resume(tmp_path / "state.pt")
    for trainer in (whole, second):
        trainer.play_round()
        for step in range(3, 6):
            trainer.train_step(step / 6)
    assert whole.weights is not None
    assert second.weights is not None
    torch.testing.assert_close(second.weights.master, whole.weights.master, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(second.weights.ema, whole.weights.ema, rtol=1e-3, atol=1e-4)
    assert second.tokens_made == whole.tokens_made


def test_a_whole_run_reports_evaluates_exports_and_resumes(
    target: Target, shape: DrafterShape, tmp_path: Path
) -> None:
    options = dataclasses.replace(
        OPTIONS, minutes=0.1, eval_minutes=0.04, checkpoint_seconds=2, progress_seconds=0
    )
    lines: list[str] = []
    trainer = Trainer(target, SCRIPTS, shape, options)
    run(trainer, [], tmp_path, tmp_path / "drafter", lines.append)
    assert any(line.startswith("eval held-out: tau") for line in lines)
    assert any("tau~" in line for line in lines)
    again = Trainer(target, SCRIPTS, shape, dataclasses.replace(options, minutes=0.12))
    again.resume(tmp_path / "state.pt")
    steps = again.steps
    run(again, [], tmp_path, tmp_path / "drafter", lines.append)
    assert again.steps > steps
    started = Trainer(target, SCRIPTS, shape, dataclasses.replace(options, minutes=0.01))
    run(started, [], tmp_path, tmp_path / "b", lines.append, init_from=tmp_path / "drafter")


def test_answers_continue_each_prompt_greedily(target: Target) -> None:
    prompts = [[1, 20, 30], [1, 40, 41, 42, 43, 44]]
    ids, features = answer(target, prompts, 10, [0.0, 0.0])
    expected, hidden = full_forward(target, ids.long())
    best = F.linear(hidden, target.head).argmax(-1)
    for row, prompt in enumerate(prompts):
        assert ids[row, : len(prompt)].tolist() == prompt
        part = slice(len(prompt) - 1, ids.shape[1] - 1)
        assert torch.equal(best[row, part], ids[row, len(prompt) :].long())
    torch.testing.assert_close(features[:, :-1], expected[:, :-1], rtol=1e-4, atol=1e-4)


def test_profile_measures_every_part(target: Target, shape: DrafterShape) -> None:
    lines: list[str] = []
    profile(target, SCRIPTS, shape, OPTIONS, lines.append)
    assert any("optimiser" in line for line in lines)
