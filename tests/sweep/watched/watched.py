"""A loss that notes which process computes it, for which job, when, and which GPUs it sees."""

import json
import os
import time

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from sitecustomize import Watch
from torch.nn.functional import cross_entropy


def loss(student, target):
    seen = {
        "job": OmegaConf.select(HydraConfig.get(), "job.num"),  # None of a single run
        "pid": os.getpid(),
        "time": time.monotonic(),
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "gpu_at_import": Watch.at_import,
    }
    with open(os.environ["WATCHED"], "a") as file:
        file.write(json.dumps(seen) + "\n")
    time.sleep(0.1)
    while os.path.exists(os.environ["WATCHED"] + ".hold"):
        time.sleep(0.05)
    return cross_entropy(student, target)
