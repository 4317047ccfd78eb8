"""The page of `vlm.data.view`: HTML and SVG, no script, nothing loaded from elsewhere."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from vlm.config import VisionConfig
from vlm.data.index import Index
from vlm.data.ledger import Entry
from vlm.data.processor import Example
from vlm.page import page, text

BARS = 40
MOST_BAD = 500
"""Rows of the table of bad samples; the rest is counted."""
SPEAKERS = ("system", "user", "assistant")
STYLE = """
.turn { border-left: 3px solid var(--line); padding: .1rem .75rem; margin: .5rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace; }
.turn::before { content: attr(data-role); display: block; color: var(--quiet); font-size: 12px; }
.turn.assistant { border-color: var(--s2); } .turn.user { border-color: var(--s0); }
.token { border-radius: 3px; box-shadow: inset -1px 0 var(--line); }
.learnt { background: color-mix(in srgb, var(--s2) 26%, transparent); }
.partly { background: color-mix(in srgb, var(--s4) 26%, transparent); }
.medium { background: color-mix(in srgb, var(--s0) 22%, transparent); }
.frames { display: flex; flex-wrap: wrap; gap: .75rem; margin: .75rem 0; }
figure { margin: 0; max-width: 100%; } figcaption { color: var(--quiet); font-size: 12px; }
.seen { position: relative; display: inline-block; max-width: 100%; line-height: 0; }
.seen img { max-width: 100%; height: auto; image-rendering: pixelated; }
.seen i { position: absolute; inset: 0; background-image:
  linear-gradient(to right, #fff9 1px, transparent 1px),
  linear-gradient(to bottom, #fff9 1px, transparent 1px); mix-blend-mode: difference; }
.packs svg { min-width: 0; } .packs rect { stroke: var(--card); }
.legend span { padding: 0 .4rem; border-radius: 3px; margin-right: .75rem; }
"""


@dataclass(frozen=True)
class Piece:
    """Tokens that are shown as one: a piece of text, or all placeholders of an image."""

    text: str
    first: int
    """Row of its first token."""
    ids: tuple[int, ...]
    weight: float
    """In the loss; 0 where it is not learnt."""
    positions: tuple[str, str, str]
    """Time, height and width: a number, or the range of a medium."""
    opens: bool
    """It begins a turn: the next piece is the speaker's name."""


@dataclass(frozen=True)
class View:
    """Everything that the page shows."""

    data: Sequence[str]
    model: str
    index: Index
    """The good samples."""
    bad: list[Entry]
    packs: list[list[list[int]]]
    """[rank][micro-batch][sample] of the first global batch."""
    token_budget: int
    samples: list[tuple[Example, list[Piece], list[list[Tensor]]]]
    """Example, its tokens and the frames of its media."""
    vision: VisionConfig


def render_page(view: View) -> str:
    title = f"{', '.join(view.data)} as {view.model} sees it"
    parts = [f"<h1>{text(title)}</h1>", _totals(view), _histogram(view.index.length)]
    if view.bad:
        parts.append(_bad_table(view.bad))
    parts.append(_packs(view))
    if view.samples:
        parts.append(f"<h2>The first {len(view.samples)} samples</h2>{_legend()}")
        parts += [_sample(*sample, view.vision) for sample in view.samples]
    return page(title, "\n".join(parts), STYLE)


def _totals(view: View) -> str:
    index = view.index
    tokens, targets, media = (
        int(column.sum(dtype=np.int64)) for column in (index.length, index.targets, index.media)
    )
    return (
        f'<p id="totals">{len(index):,} good samples with {tokens:,} tokens, of which '
        f"{targets:,} ({targets / tokens:.1%}) are learnt, and {media:,} images and videos; "
        f'<span class="{"bad" if view.bad else "good"}">{len(view.bad):,} bad</span>.</p>'
    )


def _histogram(lengths: np.ndarray) -> str:
    top = max(int(lengths.max()), BARS)
    counts, edges = np.histogram(lengths, BARS, (0, top))
    bars = []
    for number, count in enumerate(counts):
        height = 120 * count / counts.max()
        tip = f"{edges[number]:.0f} to {edges[number + 1]:.0f} tokens: {count} samples"
        bars.append(
            f'<g><title>{tip}</title><rect x="{number * 24}" y="{140 - height:.1f}" width="22" '
            f'height="{height:.1f}" fill="var(--s0)"/></g>'
        )
    quartiles = np.percentile(lengths, [0, 50, 90, 100]).astype(int)
    words = "shortest {}, half up to {}, nine in ten up to {}, longest {} tokens".format(*quartiles)
    return (
        f'<h2>Lengths</h2><svg id="lengths" viewBox="0 0 960 160" role="img" aria-label="{words}">'
        f'{"".join(bars)}<text class="quiet" x="0" y="156">0</text>'
        f'<text class="quiet" x="960" y="156" text-anchor="end">{top} tokens</text></svg>'
        f'<p class="quiet">{words}</p>'
    )


def _bad_table(bad: list[Entry]) -> str:
    rows = "".join(
        f"<tr><td>{text(entry.id)}</td><td style='text-align:left'>{text(entry.reason)}</td></tr>"
        for entry in bad[:MOST_BAD]
    )
    more = f"<p>and {len(bad) - MOST_BAD:,} more</p>" if len(bad) > MOST_BAD else ""
    return (
        '<h2>Bad samples</h2><div class="wide"><table id="bad"><thead><tr><th>sample</th>'
        f"<th style='text-align:left'>reason</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f"{more}"
    )


def _packs(view: View) -> str:
    """One bar a micro-batch; a segment is a sample, and attention never crosses its border."""
    lines, y = [], 0
    longest = max(
        [view.token_budget]
        + [int(view.index.length[pack].sum()) for rank in view.packs for pack in rank]
    )
    scale = 840 / longest
    for rank, micro_batches in enumerate(view.packs):
        for number, pack in enumerate(micro_batches):
            label = f"rank {rank}, {number}"
            lines.append(f'<text class="quiet" x="0" y="{y + 13}">{label}</text>')
            x = 100.0
            for place, sample in enumerate(pack):
                width = int(view.index.length[sample]) * scale
                tip = f"{view.index.sample_id(sample)}: {view.index.length[sample]} tokens"
                lines.append(
                    f'<g><title>{text(tip)}</title><rect x="{x:.2f}" y="{y}" width="{width:.2f}" '
                    f'height="16" fill="var(--s{place % 2})"/></g>'
                )
                x += width
            y += 20
    edge = 100 + view.token_budget * scale
    lines.append(f'<line class="axis" x1="{edge:.1f}" x2="{edge:.1f}" y1="0" y2="{y}"/>')
    count = sum(len(pack) for rank in view.packs for pack in rank)
    return (
        f'<h2>The first {count} samples, packed</h2><p class="quiet">One line a micro-batch, one '
        "segment a sample; samples of one line do not see each other. The line is the budget of "
        f'{view.token_budget:,} tokens.</p><div class="packs"><svg id="packs" viewBox="0 0 960 '
        f'{y + 4}" role="img" aria-label="samples packed into micro-batches">{"".join(lines)}'
        "</svg></div>"
    )


def _legend() -> str:
    return (
        '<p class="legend quiet"><span class="learnt">learnt</span><span class="partly">learnt, '
        'weighted</span><span class="medium">image or video</span><span>read only</span>'
        "Point at a token for its id and positions.</p>"
    )


def _sample(
    example: Example, tokens: list[Piece], media: list[list[Tensor]], vision: VisionConfig
) -> str:
    learnt = sum(len(piece.ids) for piece in tokens if piece.weight)
    figures = "".join(
        _figure(frame, number, time, len(frames), vision)
        for number, frames in enumerate(media)
        for time, frame in enumerate(frames)
    )
    return (
        f'<section class="sample"><h3>{text(example.id)}</h3><p class="quiet">{example.length} '
        f"tokens, {learnt} learnt, {len(media)} images and videos, {len(example.patches)} patches"
        f'</p><div class="frames">{figures}</div>{_turns(tokens)}</section>'
    )


def _figure(frame: Tensor, number: int, time: int, times: int, vision: VisionConfig) -> str:
    height, width, _ = frame.shape
    side = vision.patch_size * vision.spatial_merge_size
    # a percentage is of the picture as it is shown, so a cell is exactly one visual token
    cell = f"{100 * side / width:.6f}% {100 * side / height:.6f}%"
    when = f", time {time} of {times}" if times > 1 else ""
    return (
        f'<figure><span class="seen"><img width="{width}" height="{height}" alt="medium {number}" '
        f'src="{_data_uri(frame)}"><i style="background-size:{cell}">'
        f"</i></span><figcaption>medium {number}{when}: {width} × {height} pixels, "
        f"{width // side} × {height // side} visual tokens</figcaption></figure>"
    )


def _data_uri(frame: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(frame.numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _turns(tokens: list[Piece]) -> str:
    """Tokens, a block for each turn; the first token of a turn's name says whose it is."""
    blocks: list[str] = []
    for number, piece in enumerate(tokens):
        if piece.opens or not blocks:
            name = tokens[number + 1].text.strip() if number + 1 < len(tokens) else ""
            role = name if piece.opens and name in SPEAKERS else ""
            blocks.append(
                f'{"</div>" if blocks else ""}<div class="turn {role}" data-role="{role}">'
            )
        blocks.append(_token(piece))
    return "".join(blocks) + "</div>"


def _token(piece: Piece) -> str:
    kind = "medium" if len(set(piece.ids)) == 1 and len(piece.ids) > 1 else ""
    if piece.weight:
        kind = "learnt" if piece.weight == 1 else "partly"
    ids = f"{piece.ids[0]}" if kind == "medium" else " ".join(map(str, piece.ids))
    weight = f", weight {piece.weight:g}" if kind == "partly" else ""
    time, height, width = piece.positions
    tip = f"row {piece.first}, id {ids}, position {time} {height} {width}{weight}"
    return f'<span class="token {kind}" title="{tip}">{text(piece.text)}</span>'
