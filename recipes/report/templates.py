"""The templates of the pages beside this file: everything escaped, nothing missing unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2


def rendered(template: str, **values: Any) -> str:
    """The page of `template`, a file name here.

    Raises:
        jinja2.UndefinedError: for a value that the template names and `values` lacks.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
