"""What is supported, in docs, from the table of backbones.

python -m benchmarks.backbone_tables [--check]
"""

import re
import sys
from collections.abc import Iterator

from benchmarks.pages import Part, command
from configuration_fas import BACKBONES, Backbone, Site
from training.publish.card import OUTER_SITES
from training.results import markdown_table


def parts() -> Iterator[Part]:
    """Models by Auto class, sites by backbone."""
    yield Part("docs/use.md", "auto classes", markdown_table(_auto_classes()))
    yield Part("docs/method.md", "sites", markdown_table(map(_sites, BACKBONES.values())))


def _auto_classes() -> Iterator[dict[str, str]]:
    for auto_class in dict.fromkeys(name for table in BACKBONES.values() for name in table.models):
        titles = [table.title for table in BACKBONES.values() if auto_class in table.models]
        yield {"Auto class": f"`{auto_class}`", "models": ", ".join(titles)}


def _sites(table: Backbone) -> dict[str, str]:
    blocks = ".".join(filter(None, (table.trunk, f"{table.blocks}[i]")))
    return {
        "model": table.title,
        "heads": ", ".join(map(_head, [name for name in table.models if name != "AutoModel"])),
        "sites of a block": "; ".join(f"`{blocks}.{site.path}`, {_place(site)}" for site in table.sites),
        "other sites": "; ".join(map(_outer, table.outer_sites)) or "–",
    }


def _place(site: Site) -> str:
    place = "at its input, as its child `site`" if site.at == "input" else "in place of the activation"
    return f"{place}, signed" if site.signed else place


def _outer(site: Site) -> str:
    return f"`{site.path}` ({', '.join(map(_head, OUTER_SITES[site.group][1]))})"


def _head(auto_class: str) -> str:
    """`AutoModelForMaskedLM` as "masked LM"."""
    words = re.findall(r"[A-Z][a-z]+|[A-Z]+(?![a-z])", auto_class.removeprefix("AutoModelFor"))
    return "no head" if auto_class == "AutoModel" else " ".join(w if w.isupper() else w.lower() for w in words)


if __name__ == "__main__":
    sys.exit(command(parts))
