"""Python imports this at start: it notes which GPUs a process sees when it imports torch."""

import os
import sys


class Watch:
    at_import = None

    def find_spec(self, name, path=None, target=None):
        if name == "torch" and self.at_import is None:
            Watch.at_import = os.environ.get("CUDA_VISIBLE_DEVICES", "")


sys.meta_path.insert(0, Watch())
