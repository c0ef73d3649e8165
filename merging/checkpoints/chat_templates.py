"""Chat templates: those that have a name, and those of checkpoints' tokenizers.

A named one writes a conversation in the format that models of that name were trained on, in Jinja, as transformers
renders it. The names are mergekit's, whose own texts for alpaca, exaone and llama3 write line ends that these formats
do not have.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Iterable

from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object
from mergeline.merging.reading import open_regular

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
_MOST_BYTES = 1 << 20

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
_LLAMA3 = """\
{%- for message in messages -%}
{%- if loop.first %}{{ bos_token }}{% endif -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}
"""
_MISTRAL = """\
{%- set first = namespace(text='') -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' and loop.first -%}
{%- set first.text = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{ ' [INST] ' + first.text + message['content'] + ' [/INST]' }}{% set first.text = '' %}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + message['content'] + eos_token }}
{%- else -%}
{{ raise_exception('roles are user and assistant, after at most one system message') }}
{%- endif -%}
{%- endfor -%}
"""
_ALPACA = """\
{%- set titles = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'} -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' %}{{ message['content'] | trim + '\\n\\n' }}
{%- else %}{{ '### ' + titles[message['role']] + ':\\n' + message['content'] | trim + '\\n\\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '### Response:\\n' }}{% endif -%}
"""
_EXAONE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif -%}
{{ '[|' + message['role'] + '|]' + message['content'] + ('\\n' if message['role'] == 'user' else '[|endofturn|]\\n') }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '[|assistant|]' }}{% endif -%}
"""
NAMED = {
    "alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL,
}  # fmt: skip


def template_of(folder: Path) -> str | None:
    """The chat template of a checkpoint's tokenizer, the one called `default` of several; None if it has none.

    Raises:
        UserError: a file that is too large, or no text.
    """
    path = folder / TEMPLATE
    if path.is_file():
        with open_regular(path) as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UserError(f"{path}: holds more than {_MOST_BYTES} bytes; is it a chat template?")
        try:
            return content.decode().strip() or None
        except ValueError:
            raise UserError(f"{path}: is no text; download it again") from None
    found: Any = read_object(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found.strip() or None if isinstance(found, str) else None


def most_common(folders: Iterable[Path]) -> str | None:
    """The template that most of these checkpoints have, the first of equally many; None if none has any."""
    counts = Counter(filter(None, map(template_of, folders)))
    return counts.most_common(1)[0][0] if counts else None
