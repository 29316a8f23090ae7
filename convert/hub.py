"""Uploads exported files to a model repository of the Hugging Face hub.

The token is the one that `huggingface_hub` finds: HF_TOKEN, or what `hf auth login` stored. HF_ENDPOINT
chooses another hub.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

from wan_jax.errors import UserError


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
        """Raise `UserError` where an id is not valid, or an upload cannot begin: no token, no network."""
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
        with _explained(what):
            HfApi().whoami()

    def upload(self, files: Mapping[str, pathlib.Path | bytes]) -> str:
        """Make the repository if needed, upload {name in it: file or content} in one commit, and return
        its address. Raises `UserError`, also where `private` is set and the repository is public.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        api, what = HfApi(), f"--push_to_hub={self.repository}"
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


LOCAL = Publishing()  # a card, and no upload


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise `UserError` for what the hub refuses, and where it cannot be reached."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    # and the error of its HTTP client, of which those without a connection derive
    kinds: list[type[Exception]] = [OSError, ValueError, RuntimeError]
    kinds += [k for k in HfHubHTTPError.__mro__ if k.__name__ == "HTTPError"]
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
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{what}: {reason}: {advice}") from None
    except tuple(kinds) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{what}: the upload to {constants.ENDPOINT} failed ({reason}); check the network, and run "
            "the same command with --overwrite again"
        ) from None
