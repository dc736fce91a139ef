"""What MkDocs does not do by itself: our docstrings' roles, and links to files beside docs/."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files that are not in the site, such as ../examples/cluster/slurm.sbatch, become their paths."""
    return re.sub(r"\[[^\]]*\]\(\.\./([^)]+)\)", r"`\1`", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """:func:`name` is shown as `name`."""
    return re.sub(r":(?:func|class|meth|mod|data|attr):(?=<code>)", "", html)
