"""Edits of logits on the device against the plain reference and the verifier's laws; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import random as stdlib_random
from dataclasses import replace

import pytest
import torch
from helpers.kernel_checks import DEVICE, random
from helpers.triton_interpreter import mend_interpreter

from dspark.kernels import edit_logits as kernel
from dspark.sampling import SamplingParams
from dspark.workers.verifier.laws import Block, edit

pytest.importorskip("triton")
mend_interpreter()

VOCAB, LENGTH, PROMPT = 70, 3, 9
STOPS = (5, 17, 60)
KINDS = [
    SamplingParams(),
    SamplingParams(logit_bias={5: 3.5, 69: -100.0, 0: 1.25}),
    SamplingParams(presence_penalty=0.7, frequency_penalty=-0.4),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(min_tokens=6),
    SamplingParams(repetition_penalty=0.8, presence_penalty=1.0, frequency_penalty=0.3, logit_bias={3: -2.0, 17: 9.0}, min_tokens=4),
]


def ints(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


class Step:
    """Requests of all kinds with outputs and drafts of all lengths, behind one another; a row of nobody's after each."""

    def __init__(self, seed: int) -> None:
        choose = stdlib_random.Random(seed)
        self.samplings = [KINDS[(seed + i) % len(KINDS)] for i in range(7)]
        self.prompts = [[choose.randrange(VOCAB) for _ in range(PROMPT)] for _ in self.samplings]
        self.outputs = [[choose.randrange(20) for _ in range(choose.choice([0, 2, 12]))] for _ in self.samplings]
        self.drafts = [[choose.randrange(20) for _ in range(choose.choice([0, 1, LENGTH]))] for _ in self.samplings]
        requests, depths, positions = [], [], []
        for r, (output, draft) in enumerate(zip(self.outputs, self.drafts, strict=True)):
            requests += [r] * (len(draft) + 1) + [-1]
            depths += [*range(len(draft) + 1), 0]
            positions += [PROMPT + len(output) + j for j in range(len(draft) + 1)] + [0]
        self.rows = kernel.EditRows(ints(requests), ints(depths), ints(positions, torch.int64))
        self.padded = torch.full((len(self.drafts), LENGTH), 10**6, dtype=torch.int64, device=DEVICE)
        for row, draft in zip(self.padded, self.drafts, strict=True):
            row[: len(draft)] = ints(draft, torch.int64)
        self.counts = torch.zeros(len(self.drafts) + 2, VOCAB, dtype=torch.int32, device=DEVICE)
        places = []
        for r, sampling in enumerate(self.samplings):
            has_counts = sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty
            places.append(len(self.drafts) + 1 - r if has_counts else -1)
            if not has_counts:
                continue
            for token in set(self.prompts[r]):
                self.counts[places[-1], token] += 1
            for token in self.outputs[r]:
                self.counts[places[-1], token] += 2
        biases = [list(sampling.logit_bias.items()) for sampling in self.samplings]
        stops = [STOPS if sampling.min_tokens else () for sampling in self.samplings]
        starts = [[0], [0]]
        for listed, lists in zip(starts, (biases, stops), strict=True):
            for one in lists:
                listed.append(listed[-1] + len(one))
        scales = [[getattr(s, name) for s in self.samplings] for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")]
        self.edits = kernel.Edits(
            ints(places),
            *(torch.tensor(scale, dtype=torch.float32, device=DEVICE) for scale in scales),
            ints(starts[0]),
            ints([token for bias in biases for token, _ in bias]),
            torch.tensor([value for bias in biases for _, value in bias], dtype=torch.float32, device=DEVICE),
            ints(starts[1]),
            ints([token for ids in stops for token in ids]),
            ints([PROMPT + sampling.min_tokens for sampling in self.samplings], torch.int64),
        )

    def expected(self, logits: torch.Tensor) -> torch.Tensor:
        """By the verifier's laws, request by request."""
        rows, start = logits.float().clone(), 0
        for sampling, prompt, output, draft in zip(self.samplings, self.prompts, self.outputs, self.drafts, strict=True):
            block = Block(sampling, prompt, output, draft, STOPS)
            if block.needs_edit:
                edit(rows[start : start + block.num_rows], block)
            start += block.num_rows + 1
        return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seed", range(6))
def test_rows_are_edited_as_the_laws_say(seed: int, dtype: torch.dtype) -> None:
    step = Step(seed)
    wide = random(len(step.rows.requests), VOCAB + 3, dtype=dtype, seed=seed) * 3
    logits = wide[:, :VOCAB]
    for compute in (kernel.launch, kernel.reference):
        if compute is kernel.reference and DEVICE.type == "cuda":
            continue
        out = torch.full((len(logits), VOCAB), torch.nan, device=DEVICE)
        compute(logits, step.rows, step.edits, step.padded, step.counts, out)
        torch.testing.assert_close(out, step.expected(logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [kernel.launch_count, kernel.reference_count])
def test_what_a_step_commits_is_counted(count: object) -> None:
    if DEVICE.type == "cuda" and count is kernel.reference_count:
        pytest.skip("the reference is for CPUs")
    tokens = ints([7, 7, 7, -1, 3, -1, -1, -1, 5, 6, -1, -1, 9, 9, 9, 9], torch.int64).view(4, 4)
    accepted, judged, places = ints([2, 0, 1, 3]), ints([3, 0, 1, -1]), ints([1, -1, 0, 2])
    counts = torch.ones(3, VOCAB, dtype=torch.int32, device=DEVICE)
    count(tokens, accepted, judged, places, counts)  # type: ignore[operator]
    expected = torch.ones_like(counts)
    expected[1, 7] = 7
    expected[0, 5] = expected[0, 6] = 3
    assert torch.equal(counts, expected)


def test_a_step_without_requests_is_a_copy() -> None:
    step = Step(0)
    rows = replace(step.rows, requests=torch.full_like(step.rows.requests, -1))
    logits, out = random(len(rows.requests), VOCAB), torch.full((len(rows.requests), VOCAB), torch.nan, device=DEVICE)
    kernel.launch(logits, rows, step.edits, step.padded, step.counts, out)
    assert torch.equal(out, logits)
