"""What drawings share: fonts and inks, a line of text, and the escaping of it."""

import re
from xml.sax.saxutils import escape

SANS = "font-family=\"-apple-system,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif\""
MONO = "font-family=\"ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace\""
INK, MUTED = "#1f2933", "#5b6775"
# What XML 1.0 cannot hold, not even escaped.
_FORBIDDEN = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def label(x: float, y: float, attributes: str, content: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{content}</text>'


def text(text: str) -> str:
    return escape(_FORBIDDEN.sub("\ufffd", text), {'"': "&quot;"})
