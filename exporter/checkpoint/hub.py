"""Checkpoints by their id on the Hugging Face Hub: fetched into its cache, which other programs share."""

import re
import sys
from pathlib import Path

from exporter.checkpoint.side_files import OTHER_TOKENIZERS
from exporter.terminal import err
from runtime_ref.errors import InputError

ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")

# What of a model's files an export reads.
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    *OTHER_TOKENIZERS,  # which are refused if there is no other
    "tokenizer_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",  # which names the licence
)


def local_checkpoint(checkpoint: Path) -> Path:
    """Return the directory of a checkpoint, which is fetched first if an id of the Hugging Face Hub is given.

    Files that are in the cache already are not fetched again. A connection that breaks off is taken up where it was; a
    file whose fetching was killed is begun again. The cache is where `HF_HOME` or `HF_HUB_CACHE` say;
    `HF_HUB_OFFLINE=1` takes what is in it.

    Args:
        checkpoint: a directory, or an id such as `google/gemma-4-E2B-it`, perhaps with a branch, tag or commit:
            `OWNER/NAME@REVISION`.

    Returns:
        The directory; what is neither there nor an id is returned as it is, and so is what is missing in a directory
        that is there.

    Raises:
        InputError: there is no such model or revision, it is gated, the hub cannot be reached, or huggingface_hub is
            not installed.
    """
    found = ID.fullmatch(str(checkpoint))
    if checkpoint.exists() or found is None or checkpoint.parent.is_dir():
        return checkpoint  # a directory, or one that is missing among others
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise InputError(
            f"{checkpoint}: no such directory; to fetch it as an id of the Hugging Face Hub,"
            f" pip install 'gemma-mtp-export[hub]' ({error})"
        ) from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    name, revision = found["id"], found["revision"]
    # Of the HTTP library, which the name belongs to in `errors`: broken connections are no OSError.
    broken: type[Exception] = getattr(errors, "HTTPError", errors.HfHubHTTPError)
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        directory = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(FILES))
    except errors.HFValidationError:
        return checkpoint  # no id
    except errors.GatedRepoError as error:
        raise InputError(
            f"{checkpoint}: is gated; accept its terms on {constants.ENDPOINT}/{name}, and {log_in}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{checkpoint}: no such directory, and no such model on {constants.ENDPOINT}; correct it, or, if it is"
            f" private, {log_in}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{checkpoint}: {name} has no revision {revision} on {constants.ENDPOINT}; give a branch, a tag or a commit"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError) as error:
        where = f"its files are not all in {constants.HF_HUB_CACHE}"
        raise InputError(
            f"{checkpoint}: no such directory, {constants.ENDPOINT} {_why(error)}, and {where}; connect, or pass a"
            " directory"
        ) from error
    except (broken, OSError) as error:
        raise InputError(
            f"{checkpoint}: could not be fetched from {constants.ENDPOINT} ({_line(error)}); run the command again,"
            " which fetches what is missing"
        ) from error
    if not any(Path(directory).glob("*.safetensors")):
        raise InputError(f"{checkpoint}: has no safetensors on {constants.ENDPOINT}; give a model that has them")
    err.print(f"{name}: revision {Path(directory).name} in {directory}")
    return Path(directory)


def _why(error: BaseException) -> str:
    from huggingface_hub.constants import is_offline_mode

    return "is not asked (HF_HUB_OFFLINE)" if is_offline_mode() else f"cannot be reached ({_line(error.__cause__)})"


def _line(error: BaseException | None) -> str:
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0].strip()}"
