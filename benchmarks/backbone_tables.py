"""What is supported, in docs, from the table of backbones.

python -m benchmarks.backbone_tables [--check]
"""

import re
import sys
from collections.abc import Iterator

from benchmarks.pages import Part, command
from configuration_fas import BACKBONES, Site
from training.publish.card import OUTER_SITES
from training.results import markdown_table


def parts() -> Iterator[Part]:
    """Models by Auto class, sites by backbone."""
    yield Part("docs/use.md", "auto classes", markdown_table(_auto_classes()))
    yield Part("docs/method.md", "sites", markdown_table(_sites()))


def _auto_classes() -> Iterator[dict[str, str]]:
    for auto_class in dict.fromkeys(name for table in BACKBONES.values() for name in table.models):
        titles = [table.title for table in BACKBONES.values() if auto_class in table.models]
        yield {"Auto class": f"`{auto_class}`", "models": ", ".join(titles)}


def _sites() -> Iterator[dict[str, str]]:
    """Models with the same sites in one row."""
    models: dict[tuple[str, str], list[str]] = {}
    for table in BACKBONES.values():
        sites = "; ".join(_place(site) for site in table.sites)
        models.setdefault((sites, "; ".join(map(_outer, table.outer_sites)) or "–"), []).append(table.title)
    for (sites, others), titles in models.items():
        yield {"model": ", ".join(titles), "sites of a block": sites, "other sites": others}


def _place(site: Site) -> str:
    if site.at != "input":
        return f"`{site.path}`"
    return f"the input of `{site.path}`{', signed' if site.signed else ''}"


def _outer(site: Site) -> str:
    return f"`{site.path}` ({', '.join(map(_head, OUTER_SITES[site.group][1]))})"


def _head(auto_class: str) -> str:
    """`AutoModelForMaskedLM` as "masked LM"."""
    words = re.findall(r"[A-Z][a-z]+|[A-Z]+(?![a-z])", auto_class.removeprefix("AutoModelFor"))
    return "no head" if auto_class == "AutoModel" else " ".join(w if w.isupper() else w.lower() for w in words)


if __name__ == "__main__":
    sys.exit(command(parts))
