"""The installed commands: thin, instant to start, and their errors are one line.

Nothing heavy is imported before a task runs, so that `--help` and tab completion are instant.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

import distill.config.resolvers  # noqa: F401  (the configuration files call them)
from distill.config.explain import MISTAKES, one_line, out_of_memory, refuse, refuse_mistake
from distill.config.overrides import CONF, flags_and_overrides, in_hydras_order, typed
from distill.utils import signals
from distill.utils.files import COMMAND, resolved_path
from distill.utils.memory import keep_freed_memory
from distill.utils.process import as_program, import_heavy
from distill.utils.ranks import first_of_run
from distill.utils.run_folder import ENDED, FAILED, SUMMARY

PROGRAMS = {
    "train": "distill",
    "evaluate": "distill-eval",
    "fill_store": "distill-store",
    "distill.deploy.export.export": "distill-export",
}
HYDRA = "1.3"  # the version whose behaviour is meant
ADVICE = (  # of the libraries below; a user of this one cannot act on it
    ".*does not have many workers",
    ".*LeafSpec",
    "Checkpoint directory",  # of a run that goes on; others have theirs set aside
    ".*is smaller than the logging interval",
    "Experiment logs directory",
    "The dirpath has changed",
    "The `srun` command is available",  # one process is all that was requested
)

# Our presets of other launchers have the names of the plugins' own, on purpose.
warnings.filterwarnings("ignore", message="(?s).*is validated against ConfigStore schema")


PLAN = "plan"  # the word before a command that is only planned
PLAN_HELP = """distill plan OVERRIDES… says what a run of OVERRIDES would take; nothing is trained.

  distill plan data=folder data.root=photos             images, steps, memory, bytes and hours
  distill plan -m objective.temperature=1,2,4 seed=0,1  all jobs of a sweep together
  plan.devices=[1,2,8]    numbers of devices whose hours are said
  plan.seconds=3          how long a loader of pictures is timed
  plan.json=FILE          all numbers, too

A few steps are measured here with random weights of the same models. Nothing is left behind.
All other options are those of a run: distill --help"""


@as_program
def train() -> None:
    """`distill`: train a student under its teacher; `distill plan`: say what that would take."""
    if PLAN in sys.argv[1:]:
        sys.argv.remove(PLAN)
        plan()
    else:
        run_command("train", "train")


def plan() -> None:
    """Plan the command that is typed behind `plan`."""
    parser = Parser(prog="distill plan", add_help=False)
    flags, overrides = flags_and_overrides(parser, sys.argv[1:])
    if flags["help"]:
        print(PLAN_HELP)
        return
    others = [f"--{name.replace('_', '-')}" for name, given in flags.items()
              if given and name not in ("multirun", "run")]  # fmt: skip
    if others:
        parser.error(f"plan takes no {', '.join(others)}")
    with mistakes_refused(explain=os.environ.get("HYDRA_FULL_ERROR") != "1"):
        import_task("distill.plan.command").run(flags, overrides)


@as_program
def evaluate() -> None:
    """`distill-eval`: judge a trained student."""
    run_command("eval", "evaluate")


@as_program
def store() -> None:
    """`distill-store`: keep the teacher's answers ahead of training."""
    run_command("train", "fill_store")


@as_program
def export() -> None:
    """`distill-export`: write a student for other runtimes, and judge each file."""
    run_command("export", "distill.deploy.export.export")


@as_program
def report() -> None:
    """`distill-report`: rebuild the pages of runs and sweeps from their files."""
    parser = Parser(
        prog="distill-report",
        description="Write report.html into each run and sweep, from the files that are there; for "
        "several sweeps, one leaderboard over all of them.",
    )
    parser.add_argument("paths", metavar="RUN_OR_SWEEP", nargs="+", type=given_path)
    parser.add_argument(
        "--output",
        type=given_path,
        default=Path("reports.html"),
        help="the page over several (%(default)s)",
    )
    arguments = parser.parse_intermixed_args()
    if arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a folder")
    if len(arguments.paths) == 1 and arguments.output != parser.get_default("output"):
        parser.error("--output is for several runs or sweeps; one has its page in its own folder")
    with explained_in_one_line("distill-report"):
        written = import_heavy("distill.report").write_pages(arguments.paths, arguments.output)
    print("\n".join(map(str, written)))


@as_program
def predict() -> None:
    """`distill-predict`: what a student says of image files."""
    parser = Parser(
        prog="distill-predict",
        description="Write a student's likeliest classes for image files, with their calibrated "
        "probabilities. Images that cannot be read are named and skipped.",
    )
    parser.add_argument("student", type=given_path, help="a student bundle, or a .ckpt")
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="files, folders, or - for a list on stdin"
    )
    parser.add_argument("--output", type=given_path, help="a file; the screen without it")
    parser.add_argument("--format", choices=("csv", "jsonl"), help="by --output's ending, else csv")
    parser.add_argument("--topk", type=int, help="classes of each answer (5)")
    parser.add_argument(
        "--calibration", choices=("temperature", "vector", "none"), default="temperature",
        help="what was fitted on validation and is applied (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (%(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:1; a GPU where there is one")
    add_imports(parser)
    given = vars(parser.parse_intermixed_args())
    with explained_in_one_line("distill-predict"):
        import_own(given.pop("imports"))
        import_heavy("distill.deploy.predict").run(
            given.pop("student"), given.pop("images"), given.pop("output"), given.pop("format"),
            **given,
        )  # fmt: skip


@as_program
def push() -> None:
    """`distill-push`: upload a student to the Hugging Face Hub."""
    parser = Parser(
        prog="distill-push",
        description="Upload a student bundle to the Hugging Face Hub, under the token of "
        "`hf auth login` or HF_TOKEN.",
    )
    parser.add_argument("student", type=given_path, help="a student bundle: RUN/student")
    parser.add_argument("repository", metavar="OWNER/NAME", help="is made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a private one")
    parser.add_argument("--revision", help="a branch that exists")
    parser.add_argument("--message", help="of the commit")
    add_imports(parser)
    given = vars(parser.parse_intermixed_args())
    with explained_in_one_line("distill-push"):
        import_own(given.pop("imports"))
        hub = import_heavy("distill.deploy.hub")
        bundle, repository = given.pop("student"), given.pop("repository")
        address = hub.push_student(bundle, repository, **given)
    print(address)
    print(f'timm.create_model("hf-hub:{repository}", pretrained=True)')
    if not hub.has_licence(bundle):
        print(f"{bundle}/README.md names no licence: only you know it", file=sys.stderr)


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Let a command import modules that register the architecture of its student with timm."""
    parser.add_argument(
        "--imports", action="append", default=[], metavar="MODULE",
        help="of yours, which registers the student's architecture with timm",
    )  # fmt: skip


def import_own(names: Sequence[str]) -> None:
    """Import a user's own modules, and nothing heavy where there are none."""
    if names:
        import_heavy("distill.models.own").import_modules(names)


def given_path(text: str) -> Path:
    """Return the path that an argument means."""
    try:
        return resolved_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and where the usage is."""
        refuse(ValueError(f"{message} (see {self.prog} --help)"), self.prog)


@contextmanager
def explained_in_one_line(program: str) -> Iterator[None]:
    """End what a person can put right in one line and exit code 2."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or it is flushed there
        raise SystemExit(141) from None
    except (ValueError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        refuse(error, program)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def run_command(config_name: str, task: str) -> None:
    """Run a task under Hydra, ending mistakes in one line and exit code 2."""
    with explained_in_one_line(PROGRAMS[task]):
        sys.argv[1:] = in_hydras_order(Parser(PROGRAMS[task], add_help=False), sys.argv[1:])
    # Hydra is set to raise, so that the explaining is ours. The second variable tells the
    # processes that a run starts (one per device) that no user requested tracebacks.
    if os.environ.get("HYDRA_FULL_ERROR") == "1" and "DISTILL_EXPLAIN" not in os.environ:
        return hydra_main(config_name, task, explain=False)
    os.environ["HYDRA_FULL_ERROR"] = os.environ["DISTILL_EXPLAIN"] = "1"
    with mistakes_refused(explain=True):
        hydra_main(config_name, task, explain=True)


@contextmanager
def mistakes_refused(explain: bool) -> Iterator[None]:
    """End a person's mistakes in one line and exit code 2, where explained; Ctrl-C in 130."""
    try:
        yield
    except Exception as error:
        if explain:
            refuse_mistake(error)
        raise
    except KeyboardInterrupt as stop:
        print(f"distill: interrupted{f': {stop}' if stop.args else ''}", file=sys.stderr)
        raise SystemExit(130) from None


def hydra_main(config_name: str, task: str, explain: bool) -> None:
    """Hand the command line to Hydra."""
    command = hydra.main(version_base=HYDRA, config_path=str(CONF), config_name=config_name)
    try:
        with signals.heeded(), COMMAND:
            command(Task(task, explain))()
    except signals.Preempted as stop:
        if first_of_run():
            print(f"distill: {stop}: {stop.advice or 'stopped'}", file=sys.stderr)
        raise SystemExit(signals.PREEMPTED) from None


@dataclass(frozen=True)
class Task:
    """What a command does with a configuration, which can be sent to another process.

    Args:
        name: of a function of `distill.run`, or with its module before it.
        explain: whether mistakes end in one line.
    """

    name: str
    explain: bool

    def __call__(self, cfg: DictConfig, **sharing: Any) -> Any:
        """Run; a job of a sweep that fails says so and leaves the others alone.

        Args:
            cfg: the configuration.
            **sharing: the job's part in what jobs of one process share, if they take turns.
        """
        keep_freed_memory()  # here, as a launcher may run this in another process
        module, _, name = self.name.rpartition(".")
        function = getattr(import_task(module or "distill.run"), name)
        try:
            run = partial(noted, partial(function, **sharing))
            return self.explained(run, cfg) if self.explain else run(cfg)
        except signals.Preempted as stop:
            stop.advice = stop.advice or how_to_go_on(cfg)
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(how_to_go_on(cfg)) from None

    def explained(self, function: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
        """Run, and say in one line what a person can put right."""
        try:
            return function(cfg)
        except Exception as error:
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                refuse_mistake(error)  # here: Hydra would say a line of its own before ours
                raise
            if out_of_memory(error):  # who runs several at a time may try again
                raise
            report_failure(error)
        return None  # not NaN, at which Optuna's sweeper ends the search


def report_failure(error: Exception) -> None:
    """Say that a job of a sweep failed: in one line, or with its traceback where nobody erred."""
    if isinstance(error, MISTAKES):
        print(f"distill: job {job_name()}: {one_line(error)}", file=sys.stderr)
    else:
        logging.getLogger("distill").exception("job %s failed", job_name())


def noted(function: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Run, and note of a job of a sweep that it failed, or that it left no numbers on purpose."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return function(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    for mark in (ENDED, FAILED):
        (folder / mark).unlink(missing_ok=True)
    try:
        outcome = function(cfg)
    except Exception:
        note(folder / FAILED)
        raise
    if not (folder / SUMMARY).is_file():
        note(folder / ENDED)
    return outcome


def note(mark: Path) -> None:
    """Leave an empty file beside Hydra's record, where that is kept."""
    if mark.parent.is_dir():
        mark.touch()


def job_name() -> str:
    """Return what the job of a sweep that runs here is called: its folder in the sweep's."""
    config = HydraConfig.get()
    sweep = os.path.join(config.runtime.cwd, config.sweep.dir)  # a job may be in its own folder
    return Path(os.path.relpath(config.runtime.output_dir, sweep)).as_posix()


def how_to_go_on(cfg: DictConfig) -> str:
    """Return what to add to a command that was told to end."""
    if "resume" not in cfg:
        return "stopped; the same command again does it anew"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweep_goes_on(HydraConfig.get().sweep.dir)
    folder = os.path.relpath(cfg.paths.output_dir, HydraConfig.get().runtime.cwd)
    again = typed("hydra.run.dir", folder)
    return f"stopped; the same command with {again} resume=auto goes on"


def sweep_goes_on(folder: str) -> str:
    """Return what to add to the command of a sweep that was told to end."""
    return f"stopped; the same command with {typed('sweep.resume', folder)} goes on"


def import_task(name: str) -> ModuleType:
    """Import what runs, and silence the advice of its libraries."""
    module = import_heavy(name)
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not first_of_run():  # the first process speaks for all
        logging.getLogger("distill").setLevel(logging.WARNING)
    for message in ADVICE:
        warnings.filterwarnings("ignore", message=message)
    return module
