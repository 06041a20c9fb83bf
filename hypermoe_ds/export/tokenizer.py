"""Write the tokenizer of an export with the settings that Transformers users expect."""

import json
from pathlib import Path

from jinja2 import TemplateError

from hypermoe_ds.checkpoint.hf_folder import read_json
from hypermoe_ds.data.tokenizer import copy_tokenizer, load_tokenizer
from hypermoe_ds.errors import UserError

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_PROBE = [{"role": "user", "content": "Hello"}]


def write_tokenizer(tokenizer: Path, folder: Path, chat_template: Path | None = None) -> None:
    """Copy the tokenizer of a run to an export.

    The key `split_special_tokens` is removed, so that "</s>" in a text becomes the end-of-sequence token, as
    fine-tuning expects. `tools/preprocess_data.py` encodes "</s>" as text, regardless of this key.

    Args:
        tokenizer: the run's tokenizer folder.
        folder: folder of the export; it must not exist.
        chat_template: file with a Jinja chat template that replaces the tokenizer's template.

    Raises:
        UserError: `copy_tokenizer` refuses the tokenizer, or the template cannot be read or rendered.
    """
    template = None if chat_template is None else _read_template(chat_template)
    copy_tokenizer(tokenizer, folder)
    if (folder / _CONFIG).exists():
        content = read_json(folder, _CONFIG)
        replaced = ("split_special_tokens",) if template is None else ("split_special_tokens", "chat_template")
        kept = {key: value for key, value in content.items() if key not in replaced}
        (folder / _CONFIG).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if template is not None:
        (folder / _TEMPLATE).write_text(template, encoding="utf-8")
        _check_template(chat_template, folder)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template={path}", f"cannot be read ({error})", "give a Jinja file") from None


def _check_template(path: Path | None, folder: Path) -> None:
    """Check the chat template by rendering one message."""
    try:
        rendered = load_tokenizer(folder).apply_chat_template(_PROBE, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        problem = f"cannot be rendered for a user's message ({error})"
        raise UserError(f"--chat-template={path}", problem, "correct the template") from None
    if _PROBE[0]["content"] not in rendered:
        raise UserError(f"--chat-template={path}", "omits the user's message", "correct the template")
