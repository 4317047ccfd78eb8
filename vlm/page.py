"""What the HTML pages share: one file each, nothing loaded from elsewhere, light and dark."""

import re
from html import escape

# No script, and nothing that is not in the file itself.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1f2328;
  --quiet: #5c636b; --line: #dcdfe3; --good: #17693a; --bad: #a3262a; --warn: #fdf3d8;
  --s0: #0b62b0; --s1: #b84a00; --s2: #16794f; --s3: #8a3ea8; --s4: #7a6200; --s5: #a8245f; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --card: #1d2126; --ink: #e4e7eb;
  --quiet: #a2abb5; --line: #353b43; --good: #6fce93; --bad: #ff9a98; --warn: #3a3117;
  --s0: #6cb2f5; --s1: #f59a5b; --s2: #62c79a; --s3: #cf9be6; --s4: #d8bb58; --s5: #f48db5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; font-weight: 650; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; font-weight: 650; }
p { margin: .5rem 0; } a { color: var(--s0); }
.quiet, small { color: var(--quiet); font-size: .875rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .25rem 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .55rem .75rem; border-top: 1px solid var(--line);
  vertical-align: top; }
thead th { border-top: 0; font-size: .875rem; font-weight: 600; color: var(--quiet); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; } td small, th small { display: block; font-weight: 400; }
tfoot th, tfoot td { font-weight: 600; } sup { font-size: .7em; color: var(--quiet); }
ol.notes { padding-left: 1.5rem; color: var(--quiet); font-size: .875rem; }
.warning { background: var(--warn); border-radius: 8px; padding: .6rem 1rem; margin: .75rem 0; }
svg { display: block; width: 100%; min-width: 36rem; margin: .5rem 0; }
svg text { fill: var(--ink); font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; }
svg .quiet { fill: var(--quiet); font-size: 12px; } svg .head { font-weight: 600; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--quiet); }
"""


def text(value: object) -> str:
    """`value` for HTML, in an element or in a quoted attribute.

    Control characters, which no page may hold, become U+FFFD.
    """
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "\ufffd", escape(str(value)))


def page(title: str, body: str, style: str = "") -> str:
    """A whole page; `title` is text, `body` HTML, `style` further CSS."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
