"""Pages of a comparison: one over all benchmarks, and one each with the samples that changed."""

import math
from collections.abc import Sequence

from eval.chart import Group, Point, chart
from eval.pairs import Comparison, Pair
from eval.pictures import picture, video
from eval.result import SampleResult
from eval.stats import INDEPENDENT
from vlm.page import page, text

MOST = 200
"""Samples shown on a page that fell, and that rose."""

STYLE = """
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr));
  gap: .75rem; margin: 1.25rem 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem 1rem; } .figures b { display: block; font-size: 1.35rem; }
article { display: grid; grid-template-columns: minmax(9rem, 17rem) 1fr; gap: 1.25rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem 1.25rem; margin: .9rem 0; content-visibility: auto;
  contain-intrinsic-size: auto 18rem; }
article.bare { grid-template-columns: 1fr; }
.images img { display: block; min-width: 7rem; max-width: 100%; height: auto; border-radius: 4px;
  background: #fff; margin-bottom: .5rem; }
.gone { color: var(--quiet); font-size: .875rem; border: 1px dashed var(--line);
  border-radius: 4px; padding: .75rem; overflow-wrap: anywhere; }
.question { white-space: pre-wrap; overflow-wrap: anywhere; margin: .15rem 0 .5rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem;
  margin-top: .75rem; } .answers > div { border-top: 2px solid var(--line); padding-top: .4rem; }
.answers b { overflow-wrap: anywhere; }
pre { font: .8rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 15rem; overflow-y: auto; margin: .3rem 0 0; color: var(--quiet); }
@media (max-width: 40rem) { article { grid-template-columns: 1fr; } }
"""


def overview_page(comparisons: Sequence[Comparison], said: Sequence[str], files: dict) -> str:
    """All benchmarks: figures, intervals of the differences, links to each one's page.

    `said` is what must be told beside; `files` names each comparison's page by its key.
    """
    first = comparisons[0]
    title = f"{first.names[0]} → {first.names[1]}"
    rows = "".join(_row(c, files[c.key]) for c in comparisons)
    groups = []
    for c in comparisons:
        paired = c.statistics
        low, high = (100 * end for end in paired.interval)
        difference = 100 * paired.difference
        points = [Point(str(c.key), difference, (low, high), f"{difference:+.1f}", 0)]
        groups.append(Group("", points))
    furthest = max(abs(end) for c in comparisons for end in c.statistics.interval)
    reach, step = _axis(100 * furthest)
    body = (
        f"<h1>{text(title)}</h1>\n"
        '<p class="quiet">The same samples, answered by both. Differences are B − A in points of '
        f"100, with paired bootstrap 95 % intervals; A is {text(first.names[0])}, B "
        f"{text(first.names[1])}. {INDEPENDENT}</p>\n{_warnings(said)}"
        '<div class="wide"><table><thead><tr><th scope="col">Benchmark</th>'
        '<th scope="col">A</th><th scope="col">B</th><th scope="col">B − A</th>'
        '<th scope="col">Fell</th><th scope="col">Rose</th><th scope="col">McNemar p</th>'
        f'<th scope="col">Samples</th></tr></thead><tbody>{rows}</tbody></table></div>\n'
        '<h2>Differences</h2>\n<div class="wide">'
        + chart(groups, -reach, reach, step, "Differences B - A with 95 % intervals")
        + "</div>"
    )
    return page(title, body)


def _axis(furthest: float) -> tuple[float, float]:
    """(end, step) of an axis around 0 that holds `furthest`."""
    step = next(step for step in (1, 2, 5, 10, 20, 50) if furthest <= 5 * step)
    return step * max(1, math.ceil(furthest / step)), step


def _row(c: Comparison, file: str) -> str:
    paired = c.statistics
    low, high = (100 * end for end in paired.interval)
    mark = " ⚠" if c.warnings else ""
    more = f"<small>{_unmatched(c)}</small>" if _unmatched(c) else ""
    return (
        f'<tr><th scope="row"><a href="{text(file)}">{text(c.key.benchmark)}</a>{mark}'
        f"<small>{text(c.a.metric)}, {text(c.key.backend)}</small></th>"
        f"<td>{100 * paired.mean_a:.1f}</td><td>{100 * paired.mean_b:.1f}</td>"
        f"<td>{100 * paired.difference:+.1f}<small>{low:+.1f} to {high:+.1f}</small></td>"
        f"<td>{paired.only_a}</td><td>{paired.only_b}</td>"
        f"<td>{show_p(paired.p)}</td><td>{paired.n}{more}</td></tr>"
    )


def show_p(p: float | None) -> str:
    """McNemar's p for reading."""
    if p is None:
        return "–"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def samples_page(c: Comparison) -> str:
    """One benchmark: its figures, and the samples that changed with images and answers."""
    a, b = c.names
    paired, binary = c.statistics, c.statistics.p is not None
    low, high = (100 * end for end in paired.interval)
    verdict = "the samples tell them apart" if paired.apart else "no clear difference"
    figures = [
        (f"{100 * paired.mean_a:.1f}", f"A: {a}"),
        (f"{100 * paired.mean_b:.1f}", f"B: {b}"),
        (f"{100 * paired.difference:+.1f}", f"95 % interval {low:+.1f} to {high:+.1f}: {verdict}"),
    ]
    if binary:
        figures.append((f"p = {show_p(paired.p)}", "exact McNemar test"))
    counted = ["samples that both have a score of", _unmatched(c)]
    figures.append((f"{paired.n}", "; ".join(filter(None, counted))))
    fell, rose = ("Right → wrong", "Wrong → right") if binary else ("Score fell", "Score rose")
    body = (
        f"<h1>{text(c.key.benchmark)}: {text(a)} → {text(b)}</h1>\n"
        f'<p class="quiet">{text(c.a.metric)}, backend {text(c.key.backend)} '
        f"{text(c.a.backend_version)}. {INDEPENDENT}</p>\n{_warnings(c.warnings)}"
        f'<div class="figures">'
        + "".join(f"<div><b>{text(v)}</b><small>{text(what)}</small></div>" for v, what in figures)
        + "</div>\n"
        + _section(fell, c.fell, c.names)
        + _section(rose, c.rose, c.names)
    )
    return page(f"{c.key.benchmark}: {a} → {b}", body, STYLE)


def _unmatched(c: Comparison) -> str:
    if not (c.only_in_a or c.only_in_b):
        return ""
    return f"{c.only_in_a} only in A, {c.only_in_b} only in B"


def _warnings(said: Sequence[str]) -> str:
    return "".join(f'<p class="warning" role="note">⚠ {text(one)}.</p>\n' for one in said)


def _section(title: str, pairs: list[Pair], names: tuple[str, str]) -> str:
    rest = len(pairs) - MOST
    more = f'<p class="quiet">{rest} more are not shown.</p>' if rest > 0 else ""
    cards = "\n".join(_card(pair, names) for pair in pairs[:MOST])
    return f"<h2>{title} ({len(pairs)})</h2>\n{cards or '<p>None.</p>'}\n{more}"


def _card(pair: Pair, names: tuple[str, str]) -> str:
    sample = pair.a
    media = [*map(picture, sample.images), *map(video, sample.videos)]
    place = " · ".join(filter(None, [sample.subset, sample.id]))
    shown = f'<div class="images">{"".join(media)}</div>'
    start = f"<article>{shown}" if media else '<article class="bare">'
    return (
        f'{start}<div><small>{text(place)}</small><p class="question">'
        f"{text(sample.question)}</p><p><small>Right answer</small> <b>{text(sample.gold)}</b></p>"
        f'<div class="answers">{_answer(pair.a, names[0])}{_answer(pair.b, names[1])}</div>'
        "</div></article>"
    )


def _answer(sample: SampleResult, name: str) -> str:
    read = "nothing could be read" if sample.extracted is None else sample.extracted or "(empty)"
    mark = {0: '<span class="bad">✗</span>', 1: '<span class="good">✓</span>'}.get(
        sample.score, f'<span class="quiet">{100 * sample.score:.0f}</span>'
    )
    cut = " · cut off at max_tokens" if sample.truncated else ""
    return (
        f"<div><small>{text(name + cut)}</small><div>{mark} <b>{text(read)}</b></div>"
        f'<pre tabindex="0">{text(sample.raw) or "(no answer)"}</pre></div>'
    )
