"""Messages to text by the Jinja template that comes with a model, given the surroundings that transformers gives it."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cupaged.errors import CheckpointError


class ChatTemplate:
    """source: the template, or several by name ("default", "tool_use"); where: the file, for messages.

    Compiled when first rendered.
    """

    def __init__(self, source: str | Mapping[str, str], where: str):
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self._where = where

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The conversation as text. Raises CheckpointError for a template that is broken, ValueError for messages that
        it refuses."""
        import jinja2

        name = "tool_use" if variables.get("tools") and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise CheckpointError(f"{self._where}: no chat template is named 'default'")
        try:
            template = _compile(self.sources[name])
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{self._where}: chat template, line {error.lineno}: {error.message}") from None
        try:
            return template.render(messages=messages, **variables)
        except Exception as error:  # a template is a program: it may fail in any way
            raise ValueError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from None


@functools.lru_cache(maxsize=8)
def _compile(source: str):
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %} marks the assistant's part, for training; here it is only let through."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
