"""Uploads exported files to a model repository of the Hugging Face hub, and asks whether the hub answers.

The token is the one that `huggingface_hub` finds: HF_TOKEN, or what `hf auth login` stored. HF_ENDPOINT
chooses another hub.
"""

import contextlib
import dataclasses
import pathlib
import shlex
from collections.abc import Iterable, Iterator, Mapping

from wan_jax.errors import UserError

CONNECT_SECONDS = 4


def unreachable() -> str:
    """Return why the hub cannot be reached, after one attempt of `CONNECT_SECONDS`; "" if it answers.

    `huggingface_hub` itself tries for half a minute before it looks into its cache.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except _connection_errors() as error:
        return _first_line(error)
    return ""


def _connection_errors() -> tuple[type[Exception], ...]:
    """Return the errors without an answer of the hub; those of its HTTP client by their base class."""
    from huggingface_hub.errors import HfHubHTTPError

    clients = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    return (OSError, ValueError, RuntimeError, *clients)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@dataclasses.dataclass(frozen=True)
class Publishing:
    """How exported files are described and published.

    Attributes:
        card: whether a model card, README.md with pictures, is written into the destination, if that
            is a folder.
        base_model: hub id of the base model for the card; "": the one that was converted, if known.
        license: of what was trained, for the card, as the hub names it.
        repository: hub id, OWNER/NAME, to upload to; "": none.
        private: whether the repository is private.
    """

    card: bool = True
    base_model: str = ""
    license: str = "apache-2.0"
    repository: str = ""
    private: bool = False

    def check(self) -> None:
        """Raise `UserError` where an id is not valid, or an upload would be refused: no token, or a
        wrong one. A hub that cannot be reached is no error yet, the files can be written.
        """
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        for flag, value in (("base_model", self.base_model), ("push_to_hub", self.repository)):
            try:
                if value and "/" not in value:
                    raise HFValidationError("expected OWNER/NAME")
                if value:
                    validate_repo_id(value)
            except HFValidationError as error:
                raise UserError(f"--{flag}={value} is not a hub id: {error}") from None
        if not self.repository:
            if self.private:
                raise UserError(
                    "--private is for a repository of --push_to_hub, which is not given"
                )
            return
        what = f"--push_to_hub={self.repository}"
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{what}: HF_HUB_OFFLINE is set; unset it, or export without the upload"
            )
        if not get_token():
            raise UserError(
                f"{what}: there is no token for the hub; set HF_TOKEN to one with write access, or "
                "run `hf auth login`"
            )
        if not unreachable():
            with _explained(what):
                HfApi().whoami()

    def upload(self, files: Mapping[str, pathlib.Path | bytes]) -> str:
        """Make the repository if needed, upload {name in it: file or content} in one commit, and return
        its address. Raises `UserError`, also where `private` is set and the repository is public.
        """
        from huggingface_hub import CommitOperationAdd, HfApi, constants

        api, what = HfApi(), f"--push_to_hub={self.repository}"
        if reason := unreachable():
            raise UserError(f"{what}: the hub {constants.ENDPOINT} cannot be reached ({reason})")
        with _explained(what):
            url = api.create_repo(self.repository, private=self.private or None, exist_ok=True)
            if self.private and not api.repo_info(self.repository).private:
                raise UserError(
                    f"{what} exists already and is public, which --private does not change: give "
                    "another repository, or make it private in its settings. Nothing was uploaded"
                )
            api.create_commit(
                self.repository,
                [
                    CommitOperationAdd(
                        name, content if isinstance(content, bytes) else str(content)
                    )
                    for name, content in files.items()
                ],
                commit_message="Upload LoRA",
            )
        return str(url)

    def command(self, folder: pathlib.Path, names: Iterable[str]) -> str:
        """Return the command that uploads files of a folder later, by their names in it."""
        private = ["--private"] if self.private else []
        include = [part for name in names for part in ("--include", name)]
        return shlex.join(["hf", "upload", self.repository, str(folder), ".", *include, *private])


LOCAL = Publishing()  # a card, and no upload


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise `UserError` for what the hub refuses, and where it cannot be reached."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        advice = {
            401: "the hub does not know the token; set HF_TOKEN to one with write access, or run "
            "`hf auth login`",
            403: "the token may not write there; use one with write access to this owner",
            404: "there is no such owner, or the token may not see it",
        }.get(status, "try again")
        raise UserError(f"{what}: {_first_line(error)}: {advice}") from None
    except _connection_errors() as error:
        raise UserError(
            f"{what}: the upload to {constants.ENDPOINT} failed ({_first_line(error)}); check the network"
        ) from None
