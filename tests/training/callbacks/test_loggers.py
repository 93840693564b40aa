"""A log back end that is down is refused at the start, and does not end a run later."""

import logging

import pytest
from pytorch_lightning.loggers import Logger

from distill.training.callbacks.loggers import begin


class Remote(Logger):
    name, version = "remote", "0"

    def __init__(self, up):
        self.up, self.got = up, []

    def log_hyperparams(self, params):
        self.log_metrics(params)

    def log_metrics(self, metrics, step=None):
        if not self.up:
            raise ConnectionError("connection refused\nlong story")
        self.got.append(metrics)


def test_it_is_refused_in_one_line_before_anything_is_lost():
    with pytest.raises(ValueError, match=r"^Remote cannot be reached: connection refused; logger="):
        begin(Remote(up=False), {"seed": 0})


def test_later_it_is_said_once(caplog):
    caplog.set_level(logging.WARNING, "distill")
    logger = Remote(up=True)
    begin(logger, {"seed": 0})
    logger.up = False
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step=step)
    logger.up = True
    logger.log_metrics({"loss": 2.0}, step=3)
    assert logger.got == [{"seed": 0}, {"loss": 2.0}]
    assert caplog.text.count("Remote fails") == 1
