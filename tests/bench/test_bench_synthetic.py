"""Synthetic acceptance: what a curve means, that it is reached at real cost, and that no server can be switched to it."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.drafters import OracleDrafter
from helpers.engines import FLAT, Result, greedy, make_engine, run, tiny_target
from helpers.tiny_model import save_tiny_model

from dspark import LLM
from dspark.bench.cli import main
from dspark.bench.synthetic import SyntheticAcceptance, force
from dspark.cluster.http.protocol import ChatBody, CompletionBody
from dspark.config_file import keys, load_config
from dspark.errors import ConfigError
from dspark.types import DraftTree, StepOutcome
from dspark.workers.verifier.judge import judge

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = "1.84,2.51,3.01,3.36,3.61,3.77,3.73,3.47"  # DeepSeek-V4-Pro with DSpark, by the length of the draft
BLOCK = 6


def test_a_curve_becomes_conditional_acceptance() -> None:
    """Every length up to the highest comes back; a draft that made things worse is never accepted, nor what follows it."""
    curve = SyntheticAcceptance.parse(PUBLISHED)
    assert [curve.expected_length(count) for count in range(7)] == pytest.approx([1.0, 1.84, 2.51, 3.01, 3.36, 3.61, 3.77])
    assert [curve.expected_length(count) for count in (7, 8, 20)] == pytest.approx([3.77] * 3)
    assert curve.at(0) == pytest.approx(0.84)
    assert curve.at(1) == pytest.approx(0.67 / 0.84)
    assert curve.text == PUBLISHED


def test_a_rate_never_ends() -> None:
    rate = SyntheticAcceptance.parse("0.8")
    assert [rate.at(position) for position in (0, 5, 60)] == [0.8, 0.8, 0.8]
    assert rate.expected_length(3) == pytest.approx(1 + 0.8 + 0.64 + 0.512)
    assert SyntheticAcceptance.parse("1").at(9) == 1.0
    assert SyntheticAcceptance.parse("1.5").at(1) == 0.0


@pytest.mark.parametrize("text", ["", "much", "-0.1", "nan", "2.5", "1.5,0.9", "1.2,1.9", "1.5,inf", "0.8,0.9"])
def test_what_no_drafter_could_do_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"synthetic acceptance {text!r}")):
        SyntheticAcceptance.parse(text)


def test_the_planner_is_told_the_curve() -> None:
    tree = DraftTree.chain("r", 5, [1, 2, 3], [0.1, 0.9, 0.5])
    engine = make_engine(tiny_target(), OracleDrafter({}, BLOCK))
    force(engine, SyntheticAcceptance.parse("1.5,1.75"))
    for _ in range(100):
        engine.survival.observe(tree, 3, range(3))
    engine.survival.learn()
    assert engine.survival.survival([tree])[0].tolist() == pytest.approx([0.5, 0.25, 0.0])


def forced(text: str, speculation: str, num_requests: int = 24, name: str = "r") -> list[Result]:
    """Answers of an engine whose drafter is nearly always wrong, but whose acceptance is forced."""
    target = tiny_target()
    prompts = [[2 + i, 40 + i, 7, 9] for i in range(num_requests)]
    truth = {f"{name}{i}": [*prompt, *[3] * 80] for i, prompt in enumerate(prompts)}
    engine = make_engine(target, OracleDrafter(truth, BLOCK, "adversarial"), speculation=speculation, costs=FLAT, max_batch_tokens=512)
    force(engine, SyntheticAcceptance.parse(text))
    return list(run(engine, [greedy(f"{name}{i}", prompt, 48) for i, prompt in enumerate(prompts)]).values())


def rounds(results: Sequence[Result]) -> tuple[int, int, int]:
    """(rounds, drafted, accepted) of rounds that could draft in full."""
    whole = [outcome for result in results for outcome in result.outcomes if outcome.drafted == BLOCK]
    return len(whole), sum(outcome.drafted for outcome in whole), sum(outcome.accepted for outcome in whole)


@pytest.mark.parametrize("text", ["1.6,1.9,2.05", "0.7"])
def test_acceptance_follows_the_curve(text: str) -> None:
    """Mean accepted length of full rounds, within five standard errors; every draft was really verified."""
    count, drafted, accepted = rounds(forced(text, f"static:{BLOCK}"))
    assert drafted == count * BLOCK
    assert count > 200
    assert 1 + accepted / count == pytest.approx(SyntheticAcceptance.parse(text).expected_length(BLOCK), abs=5 * 1.6 / count**0.5)


def test_a_rate_of_one_and_of_nothing() -> None:
    _, drafted, accepted = rounds(forced("1", f"static:{BLOCK}", 2))
    assert accepted == drafted > 0
    assert rounds(forced("0", f"static:{BLOCK}", 2))[2] == 0


def test_the_real_judge_works_for_every_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced verdicts replace real ones: the judge has looked at every row, so its cost is paid."""
    judged: list[int] = []

    def watching(logits: Any, items: Any) -> Any:
        judged.extend(len(item.drafted) for item in items)
        return judge(logits, items)

    monkeypatch.setattr("dspark.workers.verifier.engine.judge", watching)
    results = forced("0.5", "static:4", 3)
    assert sum(judged) == sum(outcome.drafted for result in results for outcome in result.outcomes) > 0


def test_the_same_positions_are_accepted_in_every_mode() -> None:
    """Keyed by prompt and position: a repeat commits the same rounds, and a longer draft never accepts less."""
    first, again, longer = (forced("0.6", mode, 4, name) for mode, name in (("static:2", "a"), ("static:2", "b"), ("static:6", "c")))
    assert [result.tokens for result in first] == [result.tokens for result in again]
    assert [[o.accepted for o in result.outcomes] for result in first] == [[o.accepted for o in result.outcomes] for result in again]
    long = {(place, start_of(o)): o.accepted for place, result in enumerate(longer) for o in result.outcomes if o.drafted == BLOCK}
    short = {(place, start_of(o)): o.accepted for place, result in enumerate(first) for o in result.outcomes if o.drafted == 2}
    shared = [(long[key], short[key]) for key in long.keys() & short.keys()]
    assert len(shared) > 10
    assert all(min(of_six, 2) == of_two for of_six, of_two in shared)


def start_of(outcome: StepOutcome) -> int:
    """Position at which a round began."""
    return outcome.base_len - len(outcome.tokens)


def test_adaptive_plans_by_the_curve() -> None:
    """The drafter says 0.99 of every token; the curve says that the third never stands, so it is not verified."""
    results = forced("1.9,2.7", "adaptive", 4)
    windows = {outcome.drafted for result in results for outcome in result.outcomes[4:-4]}
    assert max(windows) == 2


def test_text_is_the_real_one_as_far_as_the_real_judge_agrees() -> None:
    """Cutting what the real judge accepts commits its own tokens; only forcing what it rejects makes the text worthless."""
    target = tiny_target()
    plain = run(make_engine(target, speculation="off"), [greedy("r", [5, 6, 7], 24)])["r"].tokens
    engine = make_engine(target, OracleDrafter({"r": [5, 6, 7, *plain]}, BLOCK), speculation="static:4")
    force(engine, SyntheticAcceptance.parse("0.5"))
    assert run(engine, [greedy("r", [5, 6, 7], 24)])["r"].tokens == plain


def test_no_setting_of_an_engine_or_a_server_leads_to_it() -> None:
    """Not a key, not a variable, not a field of a request: unknown ones are refused or ignored, and nothing else is called so."""
    assert not [key.path for key in keys() if "synthetic" in key.path or "judge" in key.path]
    for name in ("DSPARK_SYNTHETIC_ACCEPTANCE", "DSPARK_SYNTHETIC", "DSPARK_JUDGE"):
        with pytest.raises(ConfigError, match="unknown environment variable"):
            load_config(None, {name: "0.8"}, {})
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(None, {}, {"engine.synthetic_acceptance": "0.8"})
    for body in (ChatBody, CompletionBody):
        assert not [name for name in body.model_fields if "synthetic" in name]


def test_an_engine_loads_with_the_real_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHETIC_ACCEPTANCE", "0.8")
    with LLM(str(save_tiny_model(tmp_path)), drafter="ngram", speculation="static:2", kv_tokens=256, profile=False) as llm:
        assert llm.engine.judge is judge


def outside_of_the_bench() -> list[Path]:
    """Every file of the product that a server could run."""
    rooms = ("dspark", "cluster", "workers", "router", "kernels", "deploy", "training")
    return [file for room in rooms for file in (ROOT / room).rglob("*.py") if "bench" not in file.relative_to(ROOT).parts]


def test_nothing_outside_of_the_bench_knows_it() -> None:
    """Nobody imports the module, nobody else replaces an engine's judge, and only the command line imports the bench at all."""
    files = outside_of_the_bench()
    assert ROOT / "workers/verifier/engine.py" in files
    for file in files:
        source = file.read_text()
        assert "bench.synthetic" not in source, file
        assert not re.search(r"synthetic.?acceptance", source, re.IGNORECASE), file
        if "dspark.bench" in source:
            assert file in (ROOT / "dspark/cli.py",), file
        assert replaced_judges(source) == ["self.judge"] * (file == ROOT / "workers/verifier/engine.py"), file
    assert replaced_judges((ROOT / "bench/synthetic.py").read_text()) == ["engine.judge"]


def replaced_judges(source: str) -> list[str]:
    """Assignments to an attribute ``judge``."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Assign, ast.AnnAssign))]
    targets = [target for node in nodes for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    return [ast.unparse(target) for target in targets if isinstance(target, ast.Attribute) and target.attr == "judge"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--synthetic-acceptance", "0.8", "--check-lossless"], "nothing to check"),
        (["--synthetic-acceptance", "0.8", "--modes", "plain,tree"], "says nothing about siblings"),
        (["--synthetic-acceptance", "3"], "is not possible"),
        (["--resume"], "there is none"),
        (["--concurrency", "1,2", "--requests", "1,2,3"], "--requests has 3 values"),
    ],
)
def test_flags_that_contradict_each_other(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["offline", *flags])
