"""A student on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token

from distill.data.sources.errors import reason
from distill.models.bundle import CARD, load_student, read_facts
from distill.models.checkpoint import FACTS, TIMM_CONFIG, WEIGHTS
from distill.utils.reading import inside


def push_student(
    bundle: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a student bundle's four files, after loading it as anybody else would.

    Who may is decided by the token that `hf auth login` has stored, or that `HF_TOKEN` holds.

    Args:
        bundle: the bundle's folder.
        repository: `OWNER/NAME`; it is made where it does not exist.
        private: whether a repository that is made is private.
        revision: a branch that exists; None is the main one.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: if it is no bundle.
        ValueError: if the bundle is damaged, or the Hub refuses.
    """
    folder = Path(bundle)
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file: the Hub takes a student bundle, such as RUN/student or "
            "RUN/student_best"
        )
    if repository.count("/") != 1:
        raise ValueError(f"{repository} is not OWNER/NAME")
    if get_token() is None:
        raise ValueError("there is no token: run `hf auth login`, or set HF_TOKEN")
    load_student(folder, calibrated=True)
    if (folder / CARD).is_symlink() or (folder / CARD).exists():
        inside(folder, CARD)
    about = f"{read_facts(folder).get('architecture') or 'student'} by distill"
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[WEIGHTS, TIMM_CONFIG, FACTS, CARD],
            revision=revision,
            commit_message=message or f"Upload {about}",
        )
    except Exception as error:  # the network's errors are of many kinds
        raise ValueError(f"cannot push to {repository}: {reason(error)}") from error
    return commit.commit_url


def has_licence(bundle: str | Path) -> bool:
    """Whether the bundle's card says under which licence the student is."""
    card = Path(bundle) / CARD
    try:
        return bool(ModelCard.load(card).data.license)
    except Exception:  # no card, or one whose head is not YAML
        return False
