"""Check that a bundle and its prompts use the chat template that an instruction-tuned target was trained with."""

from collections.abc import Sequence
from pathlib import Path

from exporter.checkpoint.side_files import chat_template
from exporter.checkpoint.values import read_object
from exporter.doctor.verdicts import FINDING, PASS, SKIPPED, Experiment
from runtime_ref.chat import CHAT_TEMPLATE
from runtime_ref.errors import InputError
from runtime_ref.tokenizer import TOKENIZER

EXPERIMENT = "chat template"


def check_template(bundle: Path, target_dir: Path, prompts: Sequence[Sequence[int]]) -> Experiment:
    """Check that a bundle has a chat template if its target has one, and that prompts contain its turn tokens.

    Args:
        bundle: a directory that `export` wrote.
        target_dir: the target's checkpoint.
        prompts: token ids.

    Raises:
        InputError: a file with a template, or tokenizer.json, is malformed.
    """
    if chat_template(target_dir) is None:
        return Experiment(EXPERIMENT, SKIPPED, "the target has none, so it is not tuned for chats")
    if not (bundle / CHAT_TEMPLATE).is_file():
        detail = f"the target is tuned for chats and has a template, the bundle has no {CHAT_TEMPLATE};"
        return Experiment(EXPERIMENT, FINDING, f"{detail} fewer drafts are accepted after prompts without its turns")
    turn_tokens = _turn_tokens(bundle)
    plain = [i for i, prompt in enumerate(prompts) if turn_tokens and not turn_tokens.keys() & set(prompt)]
    if plain:
        listed = ", ".join(map(str, plain[:3])) + (", .." if len(plain) > 3 else "")
        names = " or ".join(turn_tokens.values())
        detail = f"prompt {listed} has no {names}, which the bundle's template writes; render it with the template"
        return Experiment(EXPERIMENT, FINDING, detail)
    return Experiment(EXPERIMENT, PASS, "in the bundle" + (", and the prompts have its turn tokens" if prompts else ""))


def _turn_tokens(bundle: Path) -> dict[int, str]:
    """Return the tokens that mark turns in the template, by id: `<|turn>`, `<start_of_turn>` and the like."""
    path = bundle / TOKENIZER
    if not path.is_file():
        return {}
    template = (bundle / CHAT_TEMPLATE).read_text(encoding="utf-8", errors="replace")
    try:
        names = {int(token["id"]): str(token["content"]) for token in read_object(path).get("added_tokens") or []}
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: added_tokens are malformed ({reason}); export the bundle again") from error
    return {number: name for number, name in names.items() if "turn" in name and name in template}
