"""What of a run depends on how many epochs it has, and what does not."""

import pytest
from hydra import compose, initialize_config_dir

from distill.config import read
from distill.config.overrides import CONF
from distill.training import prolonging, resume


@pytest.fixture
def composed(tmp_path):
    def make(*overrides):
        given = (f"paths.output_dir={tmp_path}", "resume=auto", *overrides)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", overrides=given)

    return make


@pytest.mark.parametrize(
    ("overrides", "obstacle"),
    [
        (("scheduler=null",), None),
        (("scheduler.sched=step", "+scheduler.decay_epochs=2"), None),
        (("scheduler.sched=multistep", "+scheduler.decay_milestones=[2,4]"), None),
        (("scheduler.sched=step", "+scheduler.decay_epochs=2", "scheduler.warmup_epochs=1"), None),
        (("+scheduler.num_epochs=20",), None),
        ((), "scheduler.sched=cosine"),
        (("scheduler.sched=poly",), "scheduler.sched=poly"),
        (("scheduler=null", "annealing=linear"), "annealing"),
        (("scheduler=null", "annealing=linear", "annealing.duration=3"), None),
        (("scheduler=null", "annealing=cosine", "annealing.duration=3", "annealing.warmup=0.5"),
         "annealing"),
        (("scheduler=null", "annealing=step", "annealing.duration=4", "annealing.unit=step"), None),
        (("scheduler=null", "callbacks=[checkpoints,ema,early_stopping]"), None),
        (("scheduler=null", "callbacks=[checkpoints,sparsity]"), "callbacks.sparsity"),
        (("scheduler=null", "callbacks=[checkpoints,fake_quantize]"), "callbacks.fake_quantize"),
        (("scheduler=null", "objective.sample_selection.small_loss=0.6"), None),
    ],
)  # fmt: skip
def test_a_run_is_prolonged_only_where_its_epochs_would_have_been_the_same(
    composed, overrides, obstacle
):
    before = read.plain(composed(*overrides, "trainer.max_epochs=6"))
    longer = composed(*overrides, "trainer.max_epochs=8")
    assert prolonging.obstacle(longer, 6) == obstacle
    if obstacle is None:
        assert resume.prolongs(before, longer)
        assert not resume.prolongs(before, composed(*overrides, "trainer.max_epochs=8", "seed=1"))
        assert not resume.prolongs(before, composed(*overrides, "trainer.max_epochs=4"))
    else:
        said = r"was laid out for trainer\.max_epochs=6, .* student\.checkpoint=.* another run"
        with pytest.raises(ValueError, match=said):
            resume.prolongs(before, longer)
