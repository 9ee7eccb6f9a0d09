"""A tokenizer's own files beside an encoder, so that titles are read without asking another host.

open_clip's own byte-pair vocabulary comes with open_clip; what transformers reads is kept here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer

from mmrec.data.batches import Tokenizer
from mmrec.errors import UserError
from mmrec.manifest import hash_file

FOLDER = "tokenizer"
# What a config may say of a tokenizer. All else would reach transformers, which has a word that lets a
# repository run its own code.
_KNOWN = {"clean", "strip_sep_token", "language", "additional_special_tokens", "reduction_mask"}


def save_tokenizer(tokenizer: Tokenizer, encoder: Path) -> dict[str, str]:
    """Write a tokenizer's files into an encoder's folder; names and SHA-256 of what was written.

    Nothing is written for a tokenizer that comes with open_clip.
    """
    if not isinstance(tokenizer, HFTokenizer):
        return {}
    folder = encoder / FOLDER
    tokenizer.save_pretrained(str(folder))
    return {file.name: hash_file(file) for file in sorted(folder.iterdir())}


def load_tokenizer(
    encoder: Path, model_config: Mapping[str, Any], files: Mapping[str, str]
) -> Tokenizer | None:
    """The tokenizer that lies in an encoder's folder; None where the manifest names no files of one.

    Raises `UserError` for files that are missing or not those that the manifest names.
    """
    if not files:
        return None
    folder = encoder / FOLDER
    for name, digest in files.items():
        path = folder / Path(name).name
        if not path.is_file() or hash_file(path) != digest:
            raise UserError(
                f"{path}: missing, or not what the manifest names; export the encoder again"
            )
    text = model_config["text_cfg"]
    try:
        return HFTokenizer(
            str(folder),
            context_length=text.get("context_length", 77),
            tokenizer_mode=text.get("tokenizer_mode"),
            trust_remote_code=False,
            **text.get("tokenizer_kwargs", {}),
        )
    except ImportError:
        raise UserError(
            f"{folder}: this tokenizer needs transformers: pip install transformers"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read as a tokenizer: {error}") from None


def check_tokenizer_settings(model_config: Mapping[str, Any]) -> None:
    """Raise `UserError` for a setting of the tokenizer that is not known to be harmless."""
    given = model_config.get("text_cfg", {}).get("tokenizer_kwargs", {})
    unknown = sorted(set(given) - _KNOWN)
    if unknown:
        raise UserError(
            f"text_cfg.tokenizer_kwargs has {', '.join(unknown)}; expected some of "
            f"{', '.join(sorted(_KNOWN))}"
        )
