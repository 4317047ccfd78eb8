"""The demo's report: a table, report.md with pictures, report.json."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm.checkpoint import write_json

STAGES = ("graft", "stage1", "stage2")
INK, GRAY, GREEN, RED = (30, 30, 30), (120, 120, 120), (20, 130, 60), (190, 40, 40)
BLUE = (40, 90, 180)


def write_report(
    out: Path, values: dict, rows: Sequence[dict], answers: dict[str, list[str]], data: Path
) -> None:
    """Print the table and write everything into `out`."""
    text = table(values)
    print("\n" + text)
    write_json(out / "report.json", values)
    boards_picture(rows, answers, data).save(out / "boards.png")
    curves = {stage: read_losses(out / stage / "log.jsonl") for stage in STAGES[1:]}
    curves_picture(curves).save(out / "losses.png")
    (out / "report.md").write_text(
        f"# The recipe in miniature\n\n{text}\n\n"
        "Held-out scans were part of no training, the donors' included. Chance is always giving a\n"
        "question kind's most frequent answer. A quarter of the boards are inverted, which the\n"
        "tower sees for the first time in stage 2's training.\n\n"
        "![boards with questions, the truth and each stage's answer](boards.png)\n\n"
        "![training loss of both stages](losses.png)\n\n"
        "The benchmark's [table](table/table.html), and [stage 1 against stage 2]"
        "(comparison/compare.html) with the questions that flipped.\n",
        encoding="utf-8",
    )


def table(values: dict) -> str:
    """The figures as a Markdown table."""
    match, loss, text = values["exact_match"], values["loss"], values["text_loss"]
    trained, inverted = values["trainable_parameters"], values["by_inverted"]
    lines = [
        "| | exact match | on inverted boards | loss | text loss | parameters trained |",
        "|---|---|---|---|---|---|",
        f"| chance | {match['chance']:.1f} % | | | | |",
        f"| language donor | | | | {text['llm']:.4f} | |",
    ]
    for stage in STAGES:
        of_text = f"{text[stage]:.4f}" if stage in text else ""
        count = f"{trained[stage]:,}" if stage in trained else "0"
        lines.append(
            f"| {stage} | {match[stage]:.1f} % | {inverted[stage]['True']:.1f} % | "
            f"{loss[stage]:.3f} | {of_text} | {count} |"
        )
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in values["seconds"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{values['questions']} held-out questions. On text the hybrid differs from its "
            f"language donor by {values['text_proof_max_abs_delta']:g} (our decoder, plain rope) "
            f"and {values['text_proof_vs_transformers']:.1e} of the largest logit (transformers).",
            "",
            *([variants_table(values["variants"]), ""] if values["variants"] else []),
            served_line(values["served"], values["parity"]),
            "",
            benchmark_line(values["benchmark"]),
            "",
            f"Seconds: {seconds}.",
        ]
    )


def variants_table(variants: dict[str, dict]) -> str:
    """What the literal variant costs, beside the exact one."""
    header = "| | exact match, graft | stage 1 | stage 2 | text loss, graft | stage 1 | stage 2 |"
    lines = [header + " top-1 agreement with the donor on text |", "|" + "---|" * 8]
    for variant, figures in variants.items():
        match = " | ".join(f"{figures[stage]['exact_match']:.1f} %" for stage in STAGES)
        text = " | ".join(f"{figures[stage]['text_loss']:.4f}" for stage in STAGES)
        lines.append(f"| {variant} | {match} | {text} | {figures['top1_agreement']:.1f} % |")
    return "\n".join(lines)


def benchmark_line(figures: dict[str, dict]) -> str:
    """The same questions through vLLM and EvalScope, and by the local scorer."""
    each = ", ".join(
        f"{name} {figure['evalscope']:.1f} % ({figure['local']:.1f} %)"
        for name, figure in figures.items()
    )
    (count,) = {figure["n"] for figure in figures.values()}
    differ = sum(figure["answers_that_differ"] for figure in figures.values())
    return (
        f"Through vLLM and EvalScope, {count} questions (and by the local scorer): {each}. "
        f"{differ} answers differ between the two"
        + (": in float32 two tokens of nearly equal weight may change places." if differ else ".")
    )


def served_line(served: dict, parity: list[dict]) -> str:
    """What vLLM and transformers made of the exported model."""
    agree = sum(row["passed"] for row in parity)
    furthest = max(row["logprobs"] for row in parity)
    return (
        f"Served by vLLM: {served['served_equals_local']} of {served['questions']} answers equal "
        f"our own generation's. Requests through our model, transformers and vLLM: {agree} of "
        f"{len(parity)} comparisons agree (ids, grids, pixels, positions, greedy tokens; "
        f"log-probabilities within {furthest:.1e})."
    )


def boards_picture(
    rows: Sequence[dict], answers: dict[str, list[str]], data: Path, count: int = 6
) -> Image.Image:
    """Boards with a question each, the truth, and what every stage answered."""
    chosen = choose(rows, count)
    columns, width, height = 3, 400, 276
    canvas = Image.new("RGB", (columns * width, -(-len(chosen) // columns) * height), "white")
    draw = ImageDraw.Draw(canvas)
    title, small = ImageFont.load_default(17), ImageFont.load_default(15)
    for place, number in enumerate(chosen):
        row = rows[number]
        left, top = place % columns * width + 14, place // columns * height + 14
        x = left
        for file in row["images"]:
            board = Image.open(data / file)
            scale = 2 if len(row["images"]) == 1 else 1
            canvas.paste(board.resize((board.width * scale, board.height * scale)), (x, top + 28))
            x += board.width * scale + 8
        question = row["messages"][0]["content"].replace("<image>", "").strip()
        truth = row["messages"][-1]["content"]
        draw.text((left, top), question, INK, title)
        column = left + 236
        draw.text((column, top + 30), f"truth: {truth}", GRAY, small)
        for line, stage in enumerate(STAGES):
            answer = answers[stage][number]
            color = GREEN if answer == truth else RED
            shown = answer if len(answer) < 14 else answer[:13] + "..."
            draw.text((column, top + 56 + 24 * line), f"{stage}: {shown}", color, small)
    return canvas


def choose(rows: Sequence[dict], count: int) -> list[int]:
    """Questions of different boards and kinds, half of them on inverted boards."""
    chosen: list[int] = []
    kinds: list[str] = []
    for inverted in (False, True):
        for number, row in enumerate(rows):
            seen = any(rows[other]["images"] == row["images"] for other in chosen)
            if row["inverted"] == inverted and not seen and row["kind"] not in kinds[-2:]:
                chosen.append(number)
                kinds.append(row["kind"])
            if len(chosen) == (count if inverted else count // 2):
                break
    return chosen


def read_losses(log: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run's log lines."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "train"]


def curves_picture(curves: dict[str, list[tuple[int, float]]]) -> Image.Image:
    """Training loss over steps, one panel a stage."""
    width, height, margin = 480, 260, 44
    canvas = Image.new("RGB", (width * len(curves), height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    for panel, (stage, points) in enumerate(curves.items()):
        left, right = panel * width + margin, (panel + 1) * width - 16
        top, bottom = 34, height - 30
        last, highest = points[-1][0], max(loss for _, loss in points)
        draw.text((left, 8), f"{stage}: training loss", INK, font)
        draw.rectangle((left, top, right, bottom), outline=GRAY)
        draw.text((left - 38, top - 6), f"{highest:.2f}", GRAY, font)
        draw.text((left - 14, bottom - 10), "0", GRAY, font)
        draw.text((right - 60, bottom + 6), f"step {last}", GRAY, font)
        places = [
            (left + (right - left) * step / last, bottom - (bottom - top) * loss / highest)
            for step, loss in points
        ]
        draw.line(places, fill=BLUE, width=2)
    return canvas
