"""Lets mkdocstrings read our docstrings as griffe knows them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Object


class OurDocstrings(Extension):
    """`Example:` is griffe's `Examples:`; record fields are listed below it without headings."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section in the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Move the docstrings of a class's fields into its own."""
        if cls.docstring is None:
            return
        listed = ""
        for entry in cls.attributes.values():
            if entry.docstring and "property" not in entry.labels:
                text = entry.docstring.value.replace("\n", "\n        ")
                listed += f"    {entry.name}: {text}\n"
                entry.docstring = None
        if listed:
            cls.docstring.value += f"\n\nAttributes:\n{listed}"
