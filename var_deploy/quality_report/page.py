"""Facts of a report → one HTML page that needs nothing else: no script, no request, pictures inside.

Everything from outside, such as class names, is escaped by the template; pictures are data: URIs, which is all that the
page's own policy lets a browser load.
"""

from __future__ import annotations

import base64
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from . import numbers, tables
from .facts import Facts

#: Images below this side, in pixels, are shown without smoothing, enlarged by a whole number.
SMALL_IMAGE = 128
#: Side that small images have at least on the page, and that others have, in pixels of the page.
LEAST_SHOWN, SHOWN = 64, 136


def data_uri(png: bytes) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"data_uri": data_uri, "percent": lambda part: f"{100 * part:.4g}%"}
    return environment.get_template("page.html.jinja")


#: Compiled when this is imported, so before the work whose result it shows.
TEMPLATE = _template()


def html(facts: Facts) -> str:
    """The whole page."""
    found, size = facts.inspection, facts.inspection["image_size"]
    return TEMPLATE.render(
        facts=facts,
        quoted_name=shlex.quote(facts.name),
        tables=tables,
        numbers=numbers,
        sides=found["var"]["patch_nums"],
        pixelated=size < SMALL_IMAGE,
        shown=-(-LEAST_SHOWN // size) * size if size < SMALL_IMAGE else SHOWN,
    )
