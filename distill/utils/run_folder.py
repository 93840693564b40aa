"""What the folders of runs and sweeps hold, and where in a sweep's its jobs lie."""

from __future__ import annotations

from pathlib import Path

SUMMARY = "summary.json"
RECORD = Path(".hydra", "overrides.yaml")  # of what a job was told
ENDED = Path(".hydra", "ended")  # of a sweep's job that ended well and leaves no numbers
FAILED = Path(".hydra", "failed")  # of one that did not, since it was last begun
SWEEP = "multirun.yaml"  # Hydra's, in a sweep's folder
DEEPEST = 8  # folders between a sweep and a job


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, begun or finished."""
    return (folder / RECORD).is_file() or (folder / SUMMARY).is_file()


def jobs_in(folder: Path, depth: int = DEEPEST) -> list[Path]:
    """Return the folders of a sweep's jobs, however they are nested or named, 9 before 10.

    What is hidden, what lies in a job's folder and what belongs to a sweep within are passed over.
    """
    if not depth or not folder.is_dir():
        return []
    found: list[Path] = []
    inside = (path for path in folder.iterdir() if not path.name.startswith("."))
    for path in sorted(inside, key=lambda path: numbered(path.name)):
        if is_run(path):
            found.append(path)
        elif path.is_dir() and not path.is_symlink() and not (path / SWEEP).is_file():
            found += jobs_in(path, depth - 1)
    return found


def numbered(name: str) -> tuple[int, str]:
    """Return a sort key that puts job 10 after job 9."""
    return (int(name), "") if name.isdecimal() else (1 << 30, name)
