"""Draw docs/hypermoe.svg, the picture of one HyperMoE block.

python docs/make_figure.py     writes docs/hypermoe.svg next to this file
"""

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1040, 430
INK, QUIET, PAPER = "#1f2933", "#9aa5b1", "#ffffff"
BLUE, ORANGE, GREY = "#d6e6f7", "#fde3c4", "#eef1f4"


def text(x: int, y: int, content: str, size: int = 14, colour: str = INK, anchor: str = "middle") -> str:
    """One line of text, its baseline at `y`."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{escape(content)}</text>'


def box(x: int, y: int, width: int, height: int, lines: list[str], fill: str, dashed: bool = False) -> str:
    """A box with a name and, below it, smaller lines."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" '
        f'stroke="{QUIET if dashed else INK}"{dash}/>'
    ]
    baseline = y + (height - 18 * (len(lines) - 1)) // 2 + 5
    for number, line in enumerate(lines):
        size, colour = (14, INK) if number == 0 else (12, INK)
        parts.append(text(x + width // 2, baseline + 18 * number, line, size, QUIET if dashed else colour))
    return "\n".join(parts)


def arrow(*points: tuple[int, int]) -> str:
    """A line through `points` with a head at the last one."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.4" marker-end="url(#head)"/>'


def experts() -> list[str]:
    """Four experts, the second of which the router selected."""
    parts = [
        f'<rect x="290" y="24" width="480" height="98" rx="8" fill="{PAPER}" stroke="{QUIET}"/>',
        text(530, 44, "N experts, K of them selected for the token (here N = 4, K = 1)", 12),
    ]
    for number in range(1, 5):
        x = 312 + 112 * (number - 1)
        parts.append(box(x, 58, 100, 48, [f"expert {number}"], BLUE if number == 2 else PAPER, dashed=number != 2))
    return parts


def selection_path() -> list[str]:
    """Draw the path from the unselected experts to the HyperExpert that is generated for them."""
    return [
        box(150, 248, 130, 72, ["unselected set", "{1, 3, 4}"], GREY),
        box(320, 248, 152, 72, ["selection encoder", "sum of embeddings,", "MLP; one a layer"], ORANGE),
        box(512, 248, 152, 72, ["hypernetwork", "shared by all layers", "and all experts"], ORANGE),
        box(704, 248, 172, 72, ["HyperExpert", "two generated matrices", "and biases"], ORANGE),
        box(512, 176, 152, 34, ["layer embedding"], ORANGE),
        text(300, 276, "(2)", 12),
        text(492, 276, "(3)", 12),
        text(684, 276, "(5)", 12),
        text(602, 234, "(4)", 12, anchor="start"),
        arrow((280, 284), (316, 284)),
        arrow((472, 284), (508, 284)),
        arrow((664, 284), (700, 284)),
        arrow((588, 210), (588, 244)),
    ]


def figure() -> str:
    """The whole picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
        "<title>One HyperMoE block</title>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
        *experts(),
        box(20, 150, 76, 48, ["token x"], GREY),
        box(150, 150, 130, 48, ["router", "top-K of softmax"], BLUE),
        *selection_path(),
        # x goes to the experts, the router and the HyperExpert.
        arrow((58, 150), (58, 82), (286, 82)),
        arrow((96, 174), (146, 174)),
        arrow((58, 198), (58, 366), (790, 366), (790, 324)),
        text(424, 384, "x", 12),
        # The router's choice.
        arrow((280, 174), (474, 174), (474, 110)),
        text(388, 166, "(1) selected, gate g", 12),
        arrow((215, 198), (215, 244)),
        text(223, 226, "not selected", 12, anchor="start"),
        # The sum.
        arrow((770, 73), (936, 73), (936, 152)),
        text(852, 64, "g · expert(x)", 12),
        arrow((876, 284), (936, 284), (936, 196)),
        text(944, 240, "HyperExpert(x)", 12, anchor="start"),
        f'<circle cx="936" cy="174" r="18" fill="{PAPER}" stroke="{INK}"/>',
        text(936, 180, "+", 20),
        text(962, 164, "(6)", 12, anchor="start"),
        arrow((954, 174), (1000, 174)),
        text(1014, 179, "y"),
        text(
            20,
            414,
            "Numbers: steps of docs/METHOD.md. Blue: the Mixture of Experts. Orange: what HyperMoE adds.",
            12,
            INK,
            "start",
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("hypermoe.svg").write_text(figure(), encoding="utf-8")
