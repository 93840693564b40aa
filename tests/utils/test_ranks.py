"""Which process speaks for a run, as torchrun, srun and Lightning leave it in the environment."""

import pytest

from distill.utils.ranks import VARIABLES, first_of_run


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "4", "LOCAL_RANK": "0"}, False),  # the first of another machine
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, False),
        ({"SLURM_PROCID": "1", "RANK": "0"}, True),  # torchrun inside of Slurm's second task
    ],
)
def test_one_process_of_a_run_speaks(monkeypatch, environment, first):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert first_of_run() is first
