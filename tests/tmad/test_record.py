"""The numerical record: losses of a tiny run, kept in `tests/assets/` and changed only knowingly.

A change that is meant to alter numbers (an initialisation, a loss, the order of draws) writes the record anew with
`python -m tests.tmad.test_record` and says so in its commit message; any other change must leave it as it is.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tmad.tiny import make_state, train, with_optim

RECORD = Path(__file__).resolve().parents[1] / "assets" / "tiny_losses.json"


def tiny_run() -> dict[str, list[dict[str, float]]]:
    """The losses of five coarse and five joint steps, each on a batch of its own."""
    torch.set_num_threads(1)
    state = make_state(with_optim(lr=2e-4))
    return {
        phase: [
            {name: value for name, value in metrics.items() if name.startswith(("loss/", "penalty/"))}
            for metrics in train(state, 5, phase)
        ]
        for phase in ("coarse", "joint")
    }


def test_the_losses_of_the_tiny_run_are_those_on_record() -> None:
    recorded = json.loads(RECORD.read_text())
    run = tiny_run()
    for phase, history in recorded.items():
        assert len(run[phase]) == len(history) == 5
        for step, expected in enumerate(history):
            # Processors differ in the order of their sums.
            assert run[phase][step] == pytest.approx(expected, rel=1e-4), f"{phase} step {step}"


if __name__ == "__main__":
    RECORD.write_text(json.dumps(tiny_run(), indent=1) + "\n")
