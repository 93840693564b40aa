"""What a student says of image files: its likeliest classes, with calibrated probabilities."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import timm.data
import torch
from torch import Tensor, nn

from distill.data.sources.errors import reason
from distill.data.sources.images import MODES, decoded
from distill.data.sources.listing import hidden
from distill.models.bundle import facts_of, load_student, with_calibration
from distill.utils.errors import printable
from distill.utils.files import plain_cell, resolved_path, writing

FORMATS = ("csv", "jsonl")
CALIBRATIONS: dict[str, bool | str] = {"temperature": True, "vector": "vector", "none": False}
READERS = 4  # threads that decode images


@dataclass(frozen=True)
class Prediction:
    """What is said of one image: its likeliest classes and their probabilities, or an error."""

    path: str
    classes: Sequence[str] = ()
    probabilities: Sequence[float] = ()
    error: str | None = None


class Predictor:
    """A student bundle with all that an answer takes: preprocessing, class names, calibration.

    Args:
        bundle: a student bundle's folder.
        calibration: `temperature`, `vector` or `none`; the first two do nothing where the bundle
            has no such fit.
        topk: how many classes an answer names; None names five, or all where there are fewer.
        device: such as `cuda`; None is a GPU where there is one.

    Raises:
        FileNotFoundError: if it is no bundle.
        ValueError: if it is damaged, or `topk` is more than there are classes.
    """

    def __init__(
        self,
        bundle: Path,
        calibration: str = "temperature",
        topk: int | None = None,
        device: str | None = None,
    ) -> None:
        plain: Any = load_student(bundle)
        facts = facts_of(bundle, plain)
        classes = facts.get("classes")
        self.classes = classes or [str(k) for k in range(plain.num_classes)]
        self.topk = min(5, plain.num_classes) if topk is None else topk
        if not 1 <= self.topk <= plain.num_classes:
            raise ValueError(f"--topk {topk} is not from 1 to the student's {plain.num_classes}")
        settings = timm.data.resolve_model_data_config(plain)
        self.channels: int = settings["input_size"][0]
        if self.channels not in MODES:
            raise ValueError(f"{bundle} takes images of {self.channels} channels, not 1 or 3")
        if len(settings["mean"]) != self.channels:
            raise ValueError(
                f"{bundle} is damaged: its mean is of {len(settings['mean'])} channels and its "
                f"images have {self.channels}"
            )
        self.transform: Any = timm.data.create_transform(**settings, is_training=False)
        self.device = available(device)
        kind = CALIBRATIONS[calibration]
        model = with_calibration(plain, facts, kind) if kind else plain
        self.model: nn.Module = model.to(self.device)

    def read(self, path: str) -> Tensor | str:
        """Return the normalised view `[C, H, W]` of an image file, or what is wrong with it."""
        try:
            return self.transform(decoded(Path(path), self.channels))
        except Exception as error:  # decoders raise whatever they stumble on
            return reason(error)

    @torch.inference_mode()
    def answer(self, paths: Sequence[str], read: Sequence[Tensor | str]) -> list[Prediction]:
        """Return what is said of a batch of images, in their order."""
        views = [view for view in read if isinstance(view, Tensor)]
        predictions: Iterator[Prediction] = iter(())
        if views:
            # mps has no float64
            logits = self.model(torch.stack(views).to(self.device)).cpu().double()
            likeliest = logits.softmax(dim=1).topk(self.topk, dim=1)
            good = [p for p, view in zip(paths, read, strict=True) if isinstance(view, Tensor)]
            predictions = (
                Prediction(path, [self.classes[k] for k in classes], probabilities)
                for path, classes, probabilities in zip(
                    good, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True
                )
            )
        return [
            Prediction(path, error=view) if isinstance(view, str) else next(predictions)
            for path, view in zip(paths, read, strict=True)
        ]

    def predict(self, paths: Iterable[str], batch_size: int = 64) -> Iterator[Prediction]:
        """Yield what is said of image files, in their order."""
        with ThreadPoolExecutor(READERS) as pool:
            rest = iter(paths)
            while batch := list(islice(rest, batch_size)):
                yield from self.answer(batch, list(pool.map(self.read, batch)))


def available(device: str | None) -> torch.device:
    """Return the device of a name; by default a GPU where there is one."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {reason(error)}") from error
    return chosen


def image_files(given: Sequence[str], stdin: Iterable[str]) -> Iterable[str]:
    """Return the files that are meant: files themselves, all images in folders, `-` for a list.

    Raises:
        FileNotFoundError: for a folder without images, or if nothing that was named is there.
    """
    if not any(name == "-" or Path(name).exists() for name in given):
        raise FileNotFoundError(f"there is no {' and no '.join(given[:3])}")
    files: list[Iterable[str]] = []
    for name in given:
        if name == "-":
            files.append(line.rstrip("\r\n") for line in stdin if line.strip())
        elif Path(name).is_dir():
            files.append(images_in(Path(name)))
        else:  # one that is not there is skipped and counted like a broken one
            files.append([name])
    return chain.from_iterable(files)


def images_in(folder: Path) -> list[str]:
    """Return all images in a folder and the folders in it, sorted; hidden ones are counted."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    inside = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    shown = [p for p in inside if not any(map(hidden, Path(p).relative_to(folder).parts))]
    if not shown:
        raise FileNotFoundError(f"there are no images in {folder}")
    if left := len(inside) - len(shown):
        message = f"{folder}: {left} image{'s' * (left != 1)} in hidden files or folders not read"
        print(printable(f"distill-predict: {message}"), file=sys.stderr)
    return shown


def run(
    bundle: Path,
    given: Sequence[str],
    output: Path | None,
    form: str | None,
    batch_size: int,
    **options: Any,
) -> None:
    """Write what a student says of image files; see `distill-predict --help`.

    Raises:
        ValueError: if an option is wrong, or no image could be read.
        FileNotFoundError: if a file, a folder or the bundle is not there.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: give a number of at least 1")
    form = form or ("jsonl" if output and output.suffix in (".jsonl", ".ndjson") else "csv")
    if output is not None and output.is_dir():
        raise ValueError(f"--output {output} is a folder")
    files = image_files(given, sys.stdin)
    predictor = Predictor(bundle, **options)
    if resolved_path(bundle).is_file() and options.get("calibration") != "none":
        print(f"distill-predict: {bundle} is a checkpoint, for which no temperature was fitted: "
              "probabilities are the model's own", file=sys.stderr)  # fmt: skip
    good = bad = 0
    with ExitStack() as stack:
        file: IO[str] = sys.stdout
        if isinstance(file, TextIOWrapper):  # names of files need not be UTF-8
            file.reconfigure(errors="surrogateescape")
        if output is not None:
            binary = stack.enter_context(writing(output))
            text = TextIOWrapper(binary, "utf-8", "surrogateescape", newline="")
            file = stack.enter_context(text)
        write = WRITERS[form](file, predictor.topk)
        for one in predictor.predict(files, batch_size):
            if one.error is None:
                good += 1
                write(one)
            else:
                bad += 1
                print(printable(f"distill-predict: {one.path}: {one.error}"), file=sys.stderr)
        if not good:  # and nothing is written
            raise ValueError(f"none of {bad} images could be read" if bad else "no image was named")
    skipped = f", {bad} skipped" if bad else ""
    print(f"distill-predict: {good} image{'s' * (good != 1)}{skipped}", file=sys.stderr)


def csv_writer(file: IO[str], topk: int) -> Callable[[Prediction], None]:
    """Return what writes a row of CSV for each image, under a head."""
    rows = csv.writer(file, lineterminator="\n")
    pairs = [(f"class_{k}", f"probability_{k}") for k in range(1, topk + 1)]
    head = [["path", *(name for pair in pairs for name in pair)]]

    def write(one: Prediction) -> None:
        rows.writerows(head)
        head.clear()
        answers = zip(one.classes, one.probabilities, strict=True)
        cells = [cell for name, p in answers for cell in (plain_cell(name), f"{p:.6f}")]
        rows.writerow([plain_cell(one.path), *cells])

    return write


def jsonl_writer(file: IO[str], topk: int) -> Callable[[Prediction], None]:
    """Return what writes a line of JSON for each image."""

    def write(one: Prediction) -> None:
        answers = [
            {"class": name, "probability": round(p, 6)}
            for name, p in zip(one.classes, one.probabilities, strict=True)
        ]
        path = one.path.encode("utf-8", "backslashreplace").decode()  # JSON has no other bytes
        file.write(json.dumps({"path": path, "classes": answers}, ensure_ascii=False) + "\n")

    return write


WRITERS = dict(zip(FORMATS, (csv_writer, jsonl_writer), strict=True))
