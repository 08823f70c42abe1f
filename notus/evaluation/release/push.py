"""Upload an exported folder to the hub, in one commit; login and access are checked before any work.

The token is the hub client's own: `hf auth login`, or HF_TOKEN. Tested against a local stand-in for the hub's API, with
plain LFS uploads; against the hub itself, and its Xet storage: not run.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from notus.evaluation.results import hub_id
from notus.runtime.process import first_line

if TYPE_CHECKING:
    from notus.evaluation.read_run import Run

# Files that may hold a path of this machine. A vocabulary is none: any string may be a token of it.
_TEXTS = (".json", ".md", ".jinja", ".txt", ".py", ".yaml", ".yml", ".jsonl")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
_REMEDIES = {
    401: "the hub does not accept the login: run `hf auth login`, or set HF_TOKEN to a token that is valid",
    403: "the token may not write there: make one with write access to that repository or organisation",
    404: "there is no such repository or revision, or the token may not see it",
    429: "the hub has had too many requests: wait some minutes",
    409: "it exists already, or is being changed at this moment",
}


@dataclasses.dataclass(frozen=True)
class Destination:
    """A repository of the hub: its id, whether it is to be private, the branch (None: main), the commit's message."""

    repo_id: str
    private: bool = True
    revision: str | None = None
    message: str | None = None


def open_repository(destination: Destination) -> Destination:
    """Log in and find or create the repository, before the export's work; return the destination with its full id.

    Prints which files the repository already holds. Raises ValueError without a login or write access, if what should
    be private is public, or if the hub does not answer.
    """
    api = HfApi()
    with _hub_errors("log in to the hub"):
        user = api.whoami()["name"]
    repo_id = destination.repo_id if "/" in destination.repo_id else f"{user}/{destination.repo_id}"
    with _hub_errors(f"open {repo_id} on the hub"):
        api.create_repo(repo_id, private=destination.private, exist_ok=True)
        api.auth_check(repo_id, write=True)
        if destination.revision is not None:
            api.create_branch(repo_id, branch=destination.revision, exist_ok=True)
        info = api.model_info(repo_id, revision=destination.revision)
    if destination.private and not info.private:
        raise ValueError(
            f"{repo_id} is public, so everybody would see the model: give --public if they may, or make it private in "
            "its settings on the hub"
        )
    if info.private and not destination.private:
        print(f"note: {repo_id} is private, and stays so; its settings on the hub change that", flush=True)
    held = [file.rfilename for file in info.siblings or () if file.rfilename != ".gitattributes"]  # every one has it
    if held:
        names = ", ".join(held[:5]) + (f" and {len(held) - 5} other files" if len(held) > 5 else "")
        print(f"note: {repo_id} holds {names} already; files of the same name are replaced, others stay", flush=True)
    return dataclasses.replace(destination, repo_id=repo_id)


def upload(folder: Path, destination: Destination) -> str:
    """Commit the folder's files, all or none, and return the repository's address. Raises ValueError if that fails.

    `upload_folder` would make several commits of a large folder.
    """
    api = HfApi()
    with _hub_errors(
        f"upload to {destination.repo_id}", f"{folder} is complete: the same command pushes it, without export"
    ):
        api.create_commit(
            destination.repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files_of(folder)],
            commit_message=destination.message or "Model, tokenizer and card",
            revision=destination.revision,
        )
    branch = f"/tree/{destination.revision}" if destination.revision else ""
    return f"{api.endpoint}/{destination.repo_id}{branch}"


def files_of(folder: Path) -> list[str]:
    """Return what is uploaded: every file but hidden ones, by its path in the folder."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def listing(folder: Path, destination: Destination) -> str:
    """Return what `upload` would send, with sizes in bytes."""
    kind = "private" if destination.private else "public"
    lines = [f"  {(folder / name).stat().st_size:>15,}  {name}" for name in files_of(folder)]
    branch = f", branch {destination.revision}" if destination.revision else ""
    return "\n".join([f"would upload to {destination.repo_id} ({kind}{branch}), bytes and name:", *lines])


def check_no_paths(folder: Path, paths: Iterable[str]) -> None:
    """Raise ValueError, naming file and path, if a text file to be uploaded names one of these places."""
    patterns = {path: re.compile(rf"(?:(?<![\w/.-])|(?<=file://)){re.escape(path)}(?![\w-])") for path in paths}
    for name in files_of(folder):
        if not name.endswith(_TEXTS) or Path(name).name in _VOCABULARIES:
            continue
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        found = next((path for path, pattern in patterns.items() if pattern.search(text)), None)
        if found is not None:
            raise ValueError(f"{folder / name}: names {found}, a place on this machine; take that out before --push")


def private_paths(run: "Run") -> list[str]:
    """Return the places on this machine that a run names, and the user's home: no published file may hold them."""
    data, settings = run.settings["data"], run.settings
    names = [str(run.folder), run.base, *(source["path"] for source in [*data["train"], *(data["eval"] or [])])]
    keys = (("data", "cache_dir"), ("training", "output_dir"), ("reference", "cache_dir"), ("reference", "model"))
    names += [str(name) for section, key in keys if (name := settings.get(section, {}).get(key))]
    if str(data.get("chat_template")).endswith(".jinja"):
        names.append(data["chat_template"])
    paths = [Path(name).expanduser() for name in names if hub_id(name) is None]
    found = {str(place) for path in paths for place in (path.absolute(), path.resolve())}  # as written, and its target
    return sorted(path for path in {*found, str(Path.home())} if path != "/")


@contextlib.contextmanager
def _hub_errors(what: str, remedy: str | None = None) -> Iterator[None]:
    """Turn whatever goes wrong with the hub into one line for the user."""
    try:
        yield
    except Exception as error:  # the client, its HTTP library and its storage library raise errors of every kind
        raise ValueError(f"cannot {what}: {_reason(error)}{'; ' + remedy if remedy else ''}") from error


def _reason(error: BaseException) -> str:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if any(isinstance(link, LocalTokenNotFoundError) for link in chain):
        return "there is no login; run `hf auth login`, or set HF_TOKEN"
    answer = next((link.response for link in chain if isinstance(link, HfHubHTTPError)), None)
    if answer is None:  # the outer error may say no more than that a file failed
        outer, inner = first_line(chain[0]), first_line(chain[-1])
        way_out = "; HF_HUB_DISABLE_XET=1 does without that storage" if "xet" in inner else ""
        return (outer if inner in outer else f"{outer} ({inner})") + way_out
    said = answer.headers.get("X-Error-Message")
    remedy = _REMEDIES.get(answer.status_code, "the hub has a fault; try again later")
    if answer.status_code == 400:  # what is wrong with the files, in several lines
        remedy = " ".join(str(error).split())
    return f"{remedy} (HTTP {answer.status_code}{': ' + said if said else ''})"
