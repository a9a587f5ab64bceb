"""What the page shows, as HTML: answers side by side, numbers, spike rates of all neurons, a raster of some."""

from difflib import SequenceMatcher
from html import escape
from typing import Any

from network import SHOWN_TOKENS, Site


Outcome = str | dict[str, float]

STYLE = """<style>
.fas-two { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 12px; }
.fas-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px 14px; }
.fas-card h4 { margin: 0 0 6px; font-size: 13px; font-weight: 600; opacity: .75; }
.fas-card p { margin: 0; line-height: 1.55; overflow-wrap: anywhere; white-space: pre-wrap; }
.fas-card mark, .fas-key { background: #f6c8bd; color: #4a1810; border-radius: 3px; padding: 0 2px; }
.fas-bar { height: 6px; border-radius: 3px; background: #8089a0; margin: 2px 0 8px; }
.fas-numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; }
.fas-numbers { margin-top: 12px; }
.fas-numbers b { display: block; font-size: 24px; line-height: 1.2; }
.fas-numbers span, .fas-note { font-size: 13px; opacity: .8; }
.fas-wide { overflow-x: auto; }
.fas-wide table { border-collapse: separate; border-spacing: 1px; font-size: 12px; }
.fas-wide td, .fas-wide th { min-width: 46px; height: 20px; padding: 0 4px; text-align: center; }
.fas-wide td, .fas-wide th { font-weight: 400; border: 0 !important; padding: 1px 4px !important; }
.fas-wide th:first-child { position: sticky; left: 0; text-align: right; white-space: nowrap;
  background: var(--background-fill-primary); }
.fas-plus { stroke: #d1495b; } .fas-minus { stroke: #3d7ea6; }
</style>"""  # fmt: skip


def percent(share: float) -> str:
    """Of a share, to two digits."""
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def short(token: str, most: int = 9) -> str:
    """A token as a label, escaped."""
    return escape(token if len(token) <= most else token[: most - 1] + "…")


def answers(prompt: str, stock: Outcome, spiking: Outcome, titles: tuple[str, str]) -> str:
    """Both answers side by side, marked where they differ."""
    cards = []
    for title, own, other in ((titles[0], stock, spiking), (titles[1], spiking, stock)):
        cards.append(f'<div class="fas-card"><h4>{escape(title)}</h4>{_answer(prompt, own, other)}</div>')
    return f'{STYLE}<div class="fas-two">{"".join(cards)}</div>'


def _answer(prompt: str, own: Any, other: Any) -> str:
    if isinstance(own, str):
        return f'<p><span style="opacity:.6">{escape(prompt)}</span>{_marked(own, other)}</p>'
    rows, ranks = [], list(other)
    for rank, (label, share) in enumerate(own.items()):
        name = escape(label) if ranks[rank : rank + 1] == [label] else f"<mark>{escape(label)}</mark>"
        rows.append(
            f'<div style="display:flex;justify-content:space-between"><span>{name}</span>'
            f'<span>{share:.1%}</span></div><div class="fas-bar" style="width:{max(100 * share, 0.5):.1f}%"></div>'
        )
    return "".join(rows)


def _marked(own: str, other: str) -> str:
    """A text with the words marked that another one does not have there."""
    words, others = (text.replace("\n", " \n").split(" ") for text in (own, other))
    pieces = []
    for kind, first, last, *_ in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        piece = escape(" ".join(words[first:last]))
        pieces += [piece if kind == "equal" else f"<mark>{piece}</mark>"] if last > first else []
    return " ".join(pieces)


def numbers(T: int, found: list[Site], cost: tuple[float, float], reference: str) -> str:
    """Spikes, energy and reads, each with what it is of."""
    neurons = sum(len(site.rates) * site.width for site in found)
    rate = sum(site.rates.sum().item() * site.width for site in found) / neurons
    energy, reads = cost
    tiles = [
        (f"{rate * T:.2f}", "spikes a neuron and token, all neurons"),
        (percent(rate), "of all neurons spike in a timestep, on average"),
        (
            f"{energy:.2f} ×",
            f"energy of all products, over the {reference}'s, at 0.9 pJ an accumulate and 4.6 a multiply-accumulate",
        ),
        (f"{reads:.2f} ×", f"weights read, over the {reference}'s: above 1, more memory traffic"),
    ]
    return "".join(
        ['<div class="fas-numbers">']
        + [f'<div class="fas-card"><b>{number}</b><span>{escape(text)}</span></div>' for number, text in tiles]
        + ["</div>"]
    )


def heat(found: list[Site], tokens: list[str]) -> str:
    """Share of all neurons that spike in a timestep, by layer and token."""
    tokens = tokens[-SHOWN_TOKENS:]
    layers: dict[str, list[Site]] = {}
    for site in found:
        layers.setdefault(_row(site), []).append(site)
    most = max((_rates(each).max().item() for each in layers.values()), default=0) or 1
    head = "".join(f"<th>{short(token)}</th>" for token in tokens)
    lines = [f"<tr><th></th>{head}<th><b>all tokens</b></th></tr>"]
    for name, each in layers.items():
        rates = _rates(each)
        cells = [_cell(rate, most) for rate in rates[-len(tokens) :].tolist()]
        gap = f'<td colspan="{len(tokens) - len(cells)}"></td>' if len(cells) < len(tokens) else ""
        lines.append(f"<tr><th>{name}</th>{gap}{''.join(cells)}{_cell(rates.mean().item(), most)}</tr>")
    widths = sorted({sum(site.width for site in each) for each in layers.values()})
    count = f"{widths[0]:,}" if len(widths) == 1 else f"{widths[0]:,} to {widths[-1]:,}"
    note = f"All {count} neurons of each row; in percent; darker is more, the darkest {percent(most)}."
    return f'<p class="fas-note">{note}</p><div class="fas-wide"><table>{"".join(lines)}</table></div>'


def _row(site: Site) -> str:
    return escape(site.kind) if site.layer is None else f"layer {site.layer + 1}"


def _rates(found: list[Site]) -> Any:
    """Rates by token over all neurons of some sites; those that run once a text have a column of their own."""
    widths = sum(site.width for site in found)
    return sum(site.rates * site.width for site in found) / widths


def _cell(rate: float, most: float) -> str:
    strength = rate / most
    ink = "#fff" if strength > 0.55 else "inherit"
    number = f"{100 * rate:.0f}" if rate >= 0.0995 or rate == 0 else f"{100 * rate:.1f}"
    return f'<td style="background:rgba(177,52,72,{strength:.2f});color:{ink}">{number}</td>'


def raster(site: Site, tokens: list[str]) -> str:
    """Spikes of some neurons of one site, over tokens and, within each, timesteps."""
    T, shown, neurons = site.sample.shape
    tokens = tokens[-shown:] if len(site.rates) > 1 else ["text"]
    step = max(6, 60 // T)
    width, cell, top = T * step, 4, 20
    lines = {1: [], -1: []}
    for t, token, neuron in site.sample.nonzero().tolist():
        sign = int(site.sample[t, token, neuron])
        lines[sign].append(f"M{token * width + t * step + 1} {top + neuron * cell + 2}h{step - 2}")
    paths = "".join(
        f'<path class="{name}" d="{"".join(lines[sign])}" stroke-width="{cell - 1}" fill="none"/>'
        for sign, name in ((1, "fas-plus"), (-1, "fas-minus"))
        if lines[sign]
    )
    height = top + neurons * cell
    grid = "".join(f"M{i * width} {top}V{height}" for i in range(shown + 1))
    labels = "".join(
        f'<text x="{(i + 0.5) * width}" y="13" font-size="12" text-anchor="middle" fill="currentColor">'
        f"{short(token, max(3, width // 8))}</text>"
        for i, token in enumerate(tokens)
    )
    part = site.sample.ne(0).float().mean().item()
    of_all = site.rates[-shown:].mean().item()
    which = f"{neurons} of {site.width:,} neurons, evenly spaced" if neurons < site.width else f"All {neurons} neurons"
    note = f"{which}, one line each; {percent(part)} of the places have a spike, {percent(of_all)} over all neurons. "
    signed = " Blue: negative ones." if lines[-1] else ""
    note += f"Between two bars lie the {T} timesteps of one token. Red: spikes.{signed}"
    svg = f'<svg width="{shown * width + 2}" height="{height}" role="img" aria-label="Raster of spikes">'
    grid = f'<path d="{grid}" stroke="currentColor" stroke-opacity=".35"/>'
    return f'<p class="fas-note">{note}</p><div class="fas-wide">{svg}{grid}{labels}{paths}</svg></div>'
