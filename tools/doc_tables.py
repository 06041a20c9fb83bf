"""Generate the tables of presets, settings and metrics in docs/ from the code."""

import argparse
import re
from pathlib import Path

from hypermoe_ds.errors import UserError
from hypermoe_ds.monitor.metrics import metrics_tables
from hypermoe_ds.process import one_line_errors
from hypermoe_ds.run_config import settings_table

_SEQUENCE_LENGTH = 2048


def presets_table() -> str:
    """Return a Markdown table of all presets with their parameters and FLOPs."""
    from hypermoe_ds.modeling import PRESETS, HyperMoEConfig

    rows = [
        "| `model.preset` | total | active | hypernetwork | MoE layers, N, K | forward, MFLOPs | generation, MFLOPs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, fields in PRESETS.items():
        model_config = HyperMoEConfig(**fields)
        counts = model_config.parameter_counts()
        millions = " | ".join(f"{n / 1e6:,.1f} M" for n in (counts.total, counts.active, counts.hypernetwork))
        shape = f"{len(model_config.moe_layers)}, {model_config.num_experts}, {model_config.num_experts_per_tok}"
        forward = f"{model_config.forward_flops_per_token(_SEQUENCE_LENGTH) / 1e6:,.1f}"
        rows.append(f"| `{name}` | {millions} | {shape} | {forward} | {model_config.generation_flops(1) / 1e6:,.1f} |")
    return "\n".join(rows) + "\n"


def tables() -> dict[str, str]:
    """Return all tables, keyed by the names of their markers."""
    return {"presets": presets_table(), "settings": settings_table(), "metrics": metrics_tables()}


def with_tables(page: str) -> str:
    """Replace the text between the markers of each table, `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, table in tables().items():
        before, *parts = re.split(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", page, maxsplit=1, flags=re.DOTALL)
        if parts:
            begin, end, after = parts
            page = before + begin + table + end + after
    return page


def main() -> None:
    """Print all tables, or update the tables in one page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="update the tables between the markers of this page")
    path = parser.parse_args().write
    if path is None:
        print(*tables().values(), sep="\n", end="")
    else:
        if not path.is_file():
            raise UserError(f"--write {path}", "no such file", "give a page that contains the markers")
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main()
